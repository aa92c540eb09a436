"""Cross entropy against the gold token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nbutils.objectives.head import Chunk, Gradients, Term


@dataclass(frozen=True)
class CrossEntropy(Term):
    """L = lse(z) - z_y, in nats;  dz = p - onehot(y),  p = softmax(z)."""

    name: str = "ce"

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        gold = chunk.labels.unsqueeze(-1)  # (rows, 1)
        values = -chunk.log_probabilities(gold).squeeze(-1)  # (rows,)
        if gradients is not None:
            scale = coefficients.unsqueeze(-1)  # (rows, 1)
            gradients.add_product(chunk.probabilities(), scale)
            gradients.logits.scatter_add_(-1, gold, -scale)
        return values
