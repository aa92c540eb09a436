"""Samples: continuations of the same validation prompts for every variant, beside the true continuation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Dataset,
    number: int = 5,
    prompt_tokens: int = 32,
    new_tokens: int = 48,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    processor: LogitsProcessor | None = None,
) -> list[dict]:
    """`number` evenly spaced blocks' first tokens, continued by the model: [{document, prompt, reference, completion}].

    The prompts depend on the data alone, so all variants get the same; sampling repeats with `seed`. A `processor`
    changes the model's logits before temperature and top_k do. A model that
    diverged has no distribution to sample from: it gives no samples, and the log says so.
    """
    if not number:
        return []
    time = len(blocks[0]["input_ids"])
    prompt_tokens = min(prompt_tokens, time // 2)
    new_tokens = min(new_tokens, time - prompt_tokens)
    chosen = blocks.with_format("numpy")[np.linspace(0, len(blocks) - 1, min(number, len(blocks))).astype(int)]
    tokens = torch.from_numpy(chosen["input_ids"].astype(np.int64)).to(model.device)  # (number, time)
    prompts, references = tokens[:, :prompt_tokens], tokens[:, prompt_tokens : prompt_tokens + new_tokens]
    model.eval()
    settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": new_tokens}
    with seeded(seed, model.device):
        completions = continued(
            model, prompts, torch.ones_like(prompts), processor, pad_token_id=tokenizer.eos_token_id or 0, **settings
        )
    if completions is None:
        logger.warning("The model's logits are not finite: it diverged, and no samples are drawn from it.")
        return []
    documents = chosen["document_ids"][:, 0]
    return [
        {
            "document": int(document),
            "prompt": tokenizer.decode(prompt),
            "reference": tokenizer.decode(reference),
            "completion": tokenizer.decode(completion),
        }
        for document, prompt, reference, completion in zip(documents, prompts, references, completions, strict=True)
    ]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of `seed` inside; outside, the global random state is as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def continued(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, processor: LogitsProcessor | None = None, **settings
) -> Tensor | None:
    """What the model adds to prompts (number, time), of which `mask` (number, time) is 1 on real tokens, 0 on padding.

    The `processor` sees the model's logits first; `settings` go to transformers' generate, which derives each token's
    position from the mask. Of what a published model asks for itself (repetition_penalty, min_p, ...) its special
    tokens alone are heeded: else samples would not have the model's own probabilities. None where the model gives no
    distribution at some step: its logits are not finite.
    """
    own = model.generation_config
    tokens_alone = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens_alone)
    processors = LogitsProcessorList([_FiniteLogits(), *([processor] if processor else [])])
    try:
        tokens = model.generate(prompts, attention_mask=mask, logits_processor=processors, **settings)
        return tokens[:, prompts.shape[1] :]
    except _NotFiniteError:
        return None
    finally:
        model.generation_config = own


class _NotFiniteError(ArithmeticError):
    """A row of logits has no softmax."""


class _FiniteLogits(LogitsProcessor):
    """Stops before a NaN is sampled from: on a GPU that would end the whole process's use of the device."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():  # the largest of a row is NaN or infinite where any is
            raise _NotFiniteError
        return scores
