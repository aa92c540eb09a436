"""Cross entropy against a soft target that is the same for every occurrence of a token, and is nearly all zeros.

Prefix smoothing gives each gold token y a distribution q_y over a handful of tokens. The vocabulary's targets are one
ragged table; a chunk gathers the few logits it needs, and no (positions, vocab) target is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nbutils.models import TeacherTarget
from nbutils.objectives.chunk import Chunk, Gradients
from nbutils.objectives.term import Measure, Term, register

if TYPE_CHECKING:
    from nbutils.objectives.prefixes import SmoothedTargets


@dataclass(eq=False)
class SparseTargets:
    """The rows q_y of `SmoothedTargets` as tensors, on whatever device a chunk is."""

    targets: SmoothedTargets
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict:
        return {"targets": self.targets, "_on_device": {}}

    @property
    def vocab(self) -> int:
        """Tokens that have a row, and columns of a row."""
        return len(self.targets.offsets) - 1

    @property
    def has_background(self) -> bool:
        """Whether a row gives something to every token of the vocabulary."""
        return bool(self.targets.background.any())

    def background(self, labels: Tensor) -> Tensor:
        """What q_y gives each token beside its entries, (rows,)."""
        return self._tensors(labels.device)[3][labels]

    def entropy(self, labels: Tensor) -> Tensor:
        """H(q_y) in nats, (rows,)."""
        return self._tensors(labels.device)[4][labels]

    def entries(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of q_y for gold tokens `labels` (rows,), in turn: row, token, weight, (entries,)."""
        offsets, tokens, weights, *_ = self._tensors(labels.device)
        begins = offsets[labels]
        counts = offsets[labels + 1] - begins  # (rows,)
        row = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts)[row]
        place = begins[row] + torch.arange(len(row), device=labels.device) - first
        return row, tokens[place], weights[place]

    def dense(self, labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """q_y as full rows, (rows, vocab): for comparison, not for training."""
        row, token, weight = self.entries(labels)
        full = self.background(labels).to(dtype).unsqueeze(-1).repeat(1, self.vocab)
        return full.index_put_((row, token), weight.to(dtype), accumulate=True)

    def _tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Offsets, tokens, weights, background and entropy; in float64, in which a row sums to 1 exactly."""
        if device not in self._on_device:
            table = self.targets
            weights, background = table.weights.astype(np.float64), table.background.astype(np.float64)
            total = np.add.reduceat(weights, table.offsets[:-1]) + self.vocab * background
            weights /= total.repeat(np.diff(table.offsets))
            arrays = table.offsets.astype(np.int64), table.tokens.astype(np.int64), weights, background / total
            self._on_device[device] = tuple(torch.tensor(array, device=device) for array in (*arrays, table.entropy))
        return self._on_device[device]


@register("prefix_smoothing")
@dataclass(frozen=True, eq=False)
class SmoothedCrossEntropy(Term):
    """L = -sum_k q_k log p_k = lse(z) - sum_k q_k z_k, in nats;  dz = p - q,  p = softmax(z), q = q_y of the gold y.

    Its least value is H(q), not 0: compare objectives by `TargetDivergence`, L - H(q). Szegedy et al. 2016 (arXiv
    1512.00567, section 7) for a uniform q; here q is any sparse row, with or without an even background.
    """

    targets: SparseTargets
    name: str = "prefix"
    label = "cross entropy against smoothed targets"
    formula = "L = −Σₖ qₖ log pₖ,  q = q_y of the gold token y"
    source = "prefix-aware label smoothing; Szegedy et al. 2016, arXiv 1512.00567"

    @property
    def vocab(self) -> int:
        """Tokens that have a target."""
        return self.targets.vocab

    def further_measures(self) -> dict[str, Term]:
        return {"kl_to_target": TargetDivergence(self.targets)}

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        row, token, weight = self.targets.entries(chunk.labels)
        values = _soft_cross_entropy(chunk, self.targets, row, token, weight)
        if gradients is not None:
            gradients.add_product(chunk.probabilities(), coefficients.unsqueeze(-1))
            flat = gradients.logits.view(-1)
            flat.index_add_(0, row * chunk.logits.shape[-1] + token, -(weight * coefficients[row]).to(flat.dtype))
            if self.targets.has_background:
                gradients.logits.sub_((self.targets.background(chunk.labels) * coefficients).unsqueeze(-1))
        return values

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        return soft_cross_entropy(logits, self.targets.dense(labels, logits.dtype))


@dataclass(frozen=True, eq=False)
class TargetDivergence(Measure):
    """KL(q || p) = L - H(q) against the objective's own target, in nats: 0 where it is learnt perfectly."""

    targets: SparseTargets
    name: str = "kl_to_target"

    def value(self, chunk: Chunk) -> Tensor:
        entries = self.targets.entries(chunk.labels)
        return _soft_cross_entropy(chunk, self.targets, *entries) - self.targets.entropy(chunk.labels)


@dataclass(frozen=True, eq=False)
class PrefixMass(Measure):
    """sum_k p_k over the strict prefixes k of the gold token; `scored` (vocab,) marks the gold tokens asked about.

    `prefixes` has the gold token last in each row. Prefixes such as " st" before " strawberry" spell words in ways that
    no tokenizer writes; this is how much of the distribution lies there.
    """

    prefixes: SparseTargets
    scored: Tensor
    name: str = "prefix_mass"
    own_rows = True

    def rows(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & self.scored.to(labels.device)[labels.clamp_min(0)]

    def value(self, chunk: Chunk) -> Tensor:
        row, token, _ = self.prefixes.entries(chunk.labels)
        proper = token != chunk.labels[row]
        row, token = row[proper], token[proper]
        p = chunk.probabilities()
        return p.new_zeros(len(p)).index_add_(0, row, p[row, token])


def _soft_cross_entropy(chunk: Chunk, targets: SparseTargets, row: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """-sum_k q_k log p_k of each row (rows,); differences from the largest logit first: exact where p is near 1."""
    z = chunk.logits
    largest = chunk.largest_logit().squeeze(-1)  # (rows,)
    log_top = chunk.probabilities().amax(-1).log()  # of the most probable token
    below = largest[row] - z[row, token]  # (entries,), at least 0
    values = z.new_zeros(len(z)).index_add_(0, row, below * weight.to(z.dtype))
    if targets.has_background:
        background = targets.background(chunk.labels).to(z.dtype)
        values += background * (largest * z.shape[-1] - z.sum(-1))
    return values - log_top


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_k q_k log softmax(z)_k against full rows `targets` (positions, vocab)."""
    return -(targets * logits.log_softmax(-1)).sum(-1)
