"""What a teacher says at each position: its hidden states, or its most probable tokens. The head turns it into logits.

The teacher's logits exist for one chunk at a time, like the student's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nbutils.models.products import add_matrix_product, matrix_product

MISSING_LOGIT = -1e30  # of a token the teacher lacks: probability 0 and, unlike -inf, a number when multiplied by it


@dataclass(frozen=True)
class TeacherStates:
    """Last hidden states of teachers, each (positions, width), and their output matrices, each (vocab, width).

    The logits of several are averaged, before any softmax (BabyLlama, arXiv 2308.02019).
    """

    hidden: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    def rows(self, indices: Tensor) -> TeacherStates:
        """The same of some positions."""
        return replace(self, hidden=tuple(hidden[indices] for hidden in self.hidden))

    def in_precision(self, dtype: torch.dtype) -> TeacherStates:
        """The same with matrices in the precision of the student's products."""
        return replace(self, weights=tuple(weight.to(dtype) for weight in self.weights))

    @property
    def vocab(self) -> int:
        """Tokens that every teacher has."""
        return min(len(weight) for weight in self.weights)

    def logits(self, out: Tensor) -> Tensor:
        """Averaged logits in the memory of `out` (rows, vocab of the student), in float32 or wider.

        A padded vocabulary has entries the other lacks: those of the teacher are cut off; those of the student get
        `MISSING_LOGIT`.
        """
        shared = min(self.vocab, out.shape[-1])
        out[:, shared:] = MISSING_LOGIT
        seen = out[:, :shared]
        for i, (hidden, weight) in enumerate(zip(self.hidden, self.weights, strict=True)):
            share = hidden.to(weight.dtype) / len(self.hidden) if len(self.hidden) > 1 else hidden
            if i == 0:
                product = matrix_product(share, weight[:shared].t(), seen)
                if product.data_ptr() != seen.data_ptr():
                    seen.copy_(product)
            else:
                add_matrix_product(seen, share.to(weight.dtype), weight[:shared].t())
        return out


@dataclass(frozen=True)
class TopTokens:
    """The k most probable tokens at a temperature, and the mass of all others as one bin.

    columns (positions, k); log_probabilities (positions, k + 1), the last one that of the bin.
    """

    columns: Tensor
    log_probabilities: Tensor
    temperature: float

    def rows(self, indices: Tensor) -> TopTokens:
        """The same of some positions; the k + 1 probabilities sum to 1, whatever precision they were stored in."""
        stored = self.log_probabilities[indices]
        log_probabilities = stored.to(torch.promote_types(stored.dtype, torch.float32)).log_softmax(-1)
        return replace(self, columns=self.columns[indices].long(), log_probabilities=log_probabilities)

    def in_precision(self, dtype: torch.dtype) -> TopTokens:
        """Itself: there is no matrix."""
        return self


TeacherTarget = TeacherStates | TopTokens
