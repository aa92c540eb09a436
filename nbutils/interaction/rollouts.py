"""What a student says to prompts: sampled with left padding, one mask from here to the loss.

A response is what was sampled, up to the first end token, which is part of it; nothing after that is anybody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nbutils.evaluation import continued, seeded
from nbutils.foundation import ModelError
from nbutils.interaction.continuations import as_text, text_after
from nbutils.interaction.prompts import read_story

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """One prompt and one response to it: token ids, int64 (time,), and their texts, the second as it follows."""

    prompt: np.ndarray
    response: np.ndarray
    prompt_text: str
    text: str

    @property
    def words(self) -> int:
        """Words of the response."""
        return len(self.text.split())


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: softmax(logits / temperature), the smallest set of tokens that holds top_p of it.

    min_response_tokens: before so many there is no end token.
    """

    response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    min_response_tokens: int = 0


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    seed: int,
) -> list[Rollout]:
    """A response of `model` to each of `prompts` (token ids, of any lengths). The same seed gives the same.

    The model is left in evaluation mode and the global random state as it was. Raises ModelError where it gives no
    distribution to sample from.
    """
    end = tokenizer.eos_token_id
    settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings |= {"max_new_tokens": sampling.response_tokens, "pad_token_id": 0 if end is None else end}
    settings |= {"eos_token_id": end, "min_new_tokens": sampling.min_response_tokens or None}
    model.eval()
    rollouts = []
    with seeded(seed, model.device):
        for batch in _batches(prompts, sampling.batch_size):
            tokens, mask = left_padded(batch)
            drawn = continued(model, tokens.to(model.device), mask.to(model.device), **settings)  # (batch, time)
            if drawn is None:
                raise ModelError("The student's logits are not finite: it diverged. Lower the learning rate.")
            rollouts += [_rollout(tokenizer, *each) for each in zip(batch, drawn.cpu().numpy(), strict=True)]
    return rollouts


def story_prompt(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The opening of every story behind an end token, int64 (time,)."""
    tokens = np.array(tokenizer.encode(read_story().prompt, add_special_tokens=False), np.int64)
    return tokens if tokenizer.eos_token_id is None else np.insert(tokens, 0, tokenizer.eos_token_id)


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both int64 (batch, time): the prompts flush right, the mask 1 on what is theirs."""
    time = max(map(len, prompts))
    tokens, mask = (np.zeros((len(prompts), time), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, time - len(prompt) :] = prompt
        mask[row, time - len(prompt) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def cut_at_end(response: np.ndarray, end: int | None) -> np.ndarray:
    """`response` (time,) up to its first end token, which stays."""
    ends = np.flatnonzero(response == end) if end is not None else []
    return response[: ends[0] + 1] if len(ends) else response


def without_end(response: np.ndarray, end: int | None) -> np.ndarray:
    """`response` (time,) without the end token it may end with."""
    return response[:-1] if end is not None and len(response) and response[-1] == end else response


def _rollout(tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, drawn: np.ndarray) -> Rollout:
    response = cut_at_end(drawn.astype(np.int64), tokenizer.eos_token_id)
    texts = as_text(tokenizer, prompt), text_after(tokenizer, prompt, response)
    return Rollout(np.asarray(prompt, np.int64), response, *texts)


def _batches(prompts: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
