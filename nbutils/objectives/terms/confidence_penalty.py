"""Confidence penalty: a reward for entropy, against distributions that are too sure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbutils.models import TeacherTarget
from nbutils.objectives.chunk import Chunk, Gradients
from nbutils.objectives.term import Term, register


@register("confidence_penalty")
@dataclass(frozen=True)
class ConfidencePenalty(Term):
    """L = -H(p) = sum_k p_k log p_k, p = softmax(z), in nats: least where p is even;  dz = p * (log p + H)."""

    name: str = "confidence_penalty"
    label = "confidence penalty"
    formula = "L = −H(p) = Σₖ pₖ log pₖ"
    source = "Pereyra et al. 2017, arXiv 1701.06548"

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        p = chunk.probabilities()  # (rows, vocab)
        entropy = torch.special.entr(p).sum(-1)  # (rows,)
        if gradients is not None:
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # 0 log 0 = 0
            gradients.logits.add_(coefficients.unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1)))
        return -entropy

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)
