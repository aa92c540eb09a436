"""The harness's view of a model in memory. Imports the harness and torch: only an evaluation needs it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_SCORED = (math.nan, False)
NO_LIMIT = 10**9


class ModelInMemory(HFLM):
    """HFLM that leaves tokenizer and model as they were, and scores nothing it would have to cut.

    A continuation longer than the model's positions gets NaN in place of a failed assertion. `cut_prompts` counts
    prompts that lost their beginning for want of positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        prompt_start: Sequence[int] | None,
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a pad token
        tokenizer.model_max_length = NO_LIMIT  # or it warns of every long prompt; the model's own limit is kept below
        self.prompt_start = prompt_start
        self.cut_prompts = 0
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            prefix_token_id=prompt_start[-1] if prompt_start else None,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of `string` after `prompt_start`, or after what the tokenizer itself begins a text with."""
        if self.prompt_start is None:
            return super().tok_encode(string, add_special_tokens, **kwargs)
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        return ids if add_special_tokens is False else [*self.prompt_start, *ids]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list:
        fits = [0 < len(continuation) <= self.max_length for _, _, continuation in requests]
        kept = [request for request, fit in zip(requests, fits, strict=True) if fit]
        self.cut_prompts += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in kept)
        found = iter(super()._loglikelihood_tokens(kept, disable_tqdm, **kwargs) if kept else ())
        return [next(found) if fit else NOT_SCORED for fit in fits]
