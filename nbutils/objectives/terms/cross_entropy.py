"""Cross entropy against the gold token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbutils.models import TeacherTarget
from nbutils.objectives.chunk import Chunk, Gradients
from nbutils.objectives.term import Term, register


@register("cross_entropy")
@dataclass(frozen=True)
class CrossEntropy(Term):
    """L = lse(z) - z_y, in nats;  dz = p - onehot(y),  p = softmax(z)."""

    name: str = "ce"
    label = "cross entropy"
    formula = "L = −log p_y,  p = softmax(z)"
    source = "maximum likelihood"

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        gold = chunk.labels.unsqueeze(-1)  # (rows, 1)
        values = -chunk.log_probabilities(gold).squeeze(-1)  # (rows,)
        if gradients is not None:
            scale = coefficients.unsqueeze(-1)  # (rows, 1)
            gradients.add_product(chunk.probabilities(), scale)
            gradients.logits.scatter_add_(-1, gold, -scale)
        return values

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        return cross_entropy(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
