"""Cross entropy against the gold token, and whether the gold token is the most probable one."""

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
            gradients.logits.addcmul_(chunk.probabilities(), scale)
            gradients.logits.scatter_add_(-1, gold, -scale)
        return values


@dataclass(frozen=True)
class Accuracy(Term):
    """1 where the gold token has the largest logit, else 0: a measure, with no gradient."""

    name: str = "correct"

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        if gradients is not None:
            raise TypeError("Accuracy has no gradient; it is a measure for evaluation, not a training term.")
        gold_logit = chunk.logits.gather(-1, chunk.labels.unsqueeze(-1))
        return (gold_logit == chunk.largest_logit()).squeeze(-1).to(chunk.logits.dtype)
