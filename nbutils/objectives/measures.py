"""Measures: what a trained model is judged on, in the same chunks as the training terms and without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbutils.models import matrix_product
from nbutils.objectives.chunk import Chunk, unit
from nbutils.objectives.term import Measure


@dataclass(frozen=True)
class Accuracy(Measure):
    """1 where the gold token has the largest logit, else 0."""

    name: str = "correct"

    def value(self, chunk: Chunk) -> Tensor:
        gold_logit = chunk.logits.gather(-1, chunk.labels.unsqueeze(-1))
        return (gold_logit == chunk.largest_logit()).squeeze(-1).to(chunk.logits.dtype)


@dataclass(frozen=True)
class Entropy(Measure):
    """H(p) = -sum_j p_j log p_j, p = softmax(z), in nats."""

    name: str = "entropy"

    def value(self, chunk: Chunk) -> Tensor:
        return torch.special.entr(chunk.probabilities()).sum(-1)


@dataclass(frozen=True)
class Confidence(Measure):
    """max_j p_j: what calibration compares accuracy with (Guo et al. 2017, arXiv 1706.04599)."""

    name: str = "confidence"

    def value(self, chunk: Chunk) -> Tensor:
        return chunk.probabilities().amax(-1)


@dataclass(frozen=True)
class TeacherAgreement(Measure):
    """1 where student and teacher find the same token most probable, else 0."""

    name: str = "agreement"
    uses_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        same = chunk.logits.argmax(-1) == chunk.teacher_logits().argmax(-1)
        return same.to(chunk.logits.dtype)


@dataclass(frozen=True)
class TeacherAccuracy(Measure):
    """1 where the teacher finds the gold token most probable, else 0."""

    name: str = "teacher_correct"
    uses_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        return (chunk.teacher_logits().argmax(-1) == chunk.labels).to(chunk.logits.dtype)


@dataclass(frozen=True)
class TeacherCrossEntropy(Measure):
    """-log softmax(u)_y of the teacher's logits u, in nats: what the student learns from, on the same tokens."""

    name: str = "teacher_ce"
    uses_teacher = True

    def value(self, chunk: Chunk) -> Tensor:
        gold = chunk.teacher_logits().gather(-1, chunk.labels.unsqueeze(-1)).squeeze(-1)
        return chunk.teacher_logits().logsumexp(-1) - gold


@dataclass(frozen=True, eq=False)
class CosineProxy(Measure):
    """cos(mu, e_y), mu = softmax(z / T) E over the whole vocabulary: the proxy for semantic closeness, in [-1, 1].

    A model can raise it by making frequent embeddings point one way. With token `frequencies` (vocab,), mu and e_y
    are centred on the mean embedding of the text, so that such a collapse gains nothing.
    """

    frequencies: Tensor | None = None
    temperature: float = 1.0
    name: str = "cosine_similarity"
    uses_embeddings = True

    def value(self, chunk: Chunk) -> Tensor:
        mu = chunk.expected_embedding(self.temperature)  # (rows, width)
        gold = chunk.embeddings[chunk.labels].to(mu.dtype)
        centre = 0 if self.frequencies is None else _mean_embedding(self.frequencies, chunk)  # probabilities sum to 1
        return (unit(mu - centre)[0] * unit(gold - centre)[0]).sum(-1)


@dataclass(frozen=True, eq=False)
class UnigramCosine(Measure):
    """What `CosineProxy` gives a predictor that knows token `frequencies` (vocab,) and no context."""

    frequencies: Tensor
    name: str = "unigram_cosine"
    uses_embeddings = True

    def value(self, chunk: Chunk) -> Tensor:
        centre = _mean_embedding(self.frequencies, chunk)
        gold = chunk.embeddings[chunk.labels].to(centre.dtype)
        return (unit(gold)[0] * unit(centre)[0]).sum(-1)


def _mean_embedding(frequencies: Tensor, chunk: Chunk) -> Tensor:
    """sum_j f_j E_j, (width,)."""
    return matrix_product(frequencies.to(chunk.logits).unsqueeze(0), chunk.embeddings).squeeze(0)
