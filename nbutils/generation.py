"""Samples: continuations of the same validation prompts for every variant, beside the true continuation."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
) -> list[dict]:
    """`number` evenly spaced blocks' first tokens, continued by the model: [{document, prompt, reference, completion}].

    The prompts depend on the data alone, so all variants get the same; sampling repeats with `seed`. A model that
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
    with torch.no_grad():
        if not model(prompts).logits.isfinite().all():
            logger.warning("The model's logits are not finite: it diverged, and no samples are drawn from it.")
            return []
    settings = {"temperature": temperature, "top_k": top_k, "max_new_tokens": new_tokens}
    completions = _continued(model, prompts, seed, pad_token_id=tokenizer.eos_token_id or 0, **settings)
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


def _continued(model: PreTrainedModel, prompts: Tensor, seed: int, **settings) -> Tensor:
    """What the model adds to prompts (number, time), sampled without touching the global random state."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        mask = torch.ones_like(prompts)
        return model.generate(prompts, attention_mask=mask, do_sample=True, **settings)[:, prompts.shape[1] :]
