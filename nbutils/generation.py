"""Samples: continuations of the same validation prompts for every variant, beside the true continuation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from datasets import Dataset


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

    The prompts depend on the data alone, so all variants get the same; sampling repeats with `seed`.
    """
    time = len(blocks[0]["input_ids"])
    prompt_tokens = min(prompt_tokens, time // 2)
    new_tokens = min(new_tokens, time - prompt_tokens)
    chosen = blocks.with_format("numpy")[np.linspace(0, len(blocks) - 1, min(number, len(blocks))).astype(int)]
    tokens = torch.from_numpy(chosen["input_ids"].astype(np.int64)).to(model.device)  # (number, time)
    prompts = tokens[:, :prompt_tokens]
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        completed = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0,
        )
    references = tokens[:, prompt_tokens : prompt_tokens + new_tokens]
    return [
        {
            "document": int(document),
            "prompt": tokenizer.decode(prompt),
            "reference": tokenizer.decode(reference),
            "completion": tokenizer.decode(completion, skip_special_tokens=True),
        }
        for document, prompt, reference, completion in zip(
            chosen["document_ids"][:, 0], prompts, references, completed[:, prompt_tokens:], strict=True
        )
    ]
