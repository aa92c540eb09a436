"""Un-smoothing: what a model of smoothed targets says of the text itself.

A model that has learnt its targets says p = A P, where P is the text's distribution and column y of A is the target
q_y. All tokens of q_y but y are shorter than y, so A is triangular and P comes back exactly in one pass from the
longest tokens to the shortest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbutils.foundation import ParameterError
from nbutils.objectives.prefixes.targets import SmoothedTargets

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Unsmoothed:
    """P of some positions, and how far p was from any A P.

    probabilities: (rows, vocab), at least 0 and summing to 1.
    below_zero: (rows, vocab) bool, tokens whose P came out below 0 and was set to 0.
    negative_mass: (rows,), the sum of what was below 0, as a number of at least 0; before renormalisation.
    """

    probabilities: Tensor
    below_zero: Tensor
    negative_mass: Tensor


@dataclass(frozen=True)
class _Level:
    """The tokens of one length that have others in their row.

    tokens: (n,) ids; gold_mass: (n, 1) q_y(y). Of their entries but themselves: shorter: (m,) ids of the entries;
    sources: (m,) which of the n tokens each belongs to; weights: (m, 1).
    """

    tokens: Tensor
    gold_mass: Tensor
    shorter: Tensor
    sources: Tensor
    weights: Tensor


class Unsmoothing:
    """The inverse of a smoothing.

    `lengths`: (vocab,) bytes of each token, of the table the targets were made of. Raises ParameterError where a token
    has no mass in its own target, since nothing tells then how probable it is.
    """

    def __init__(self, targets: SmoothedTargets, lengths: np.ndarray) -> None:
        _check_gold_mass(targets)
        self.targets = targets
        self.lengths = lengths
        self._on_device: dict[tuple[torch.device, torch.dtype], list[_Level]] = {}

    def invert(self, p: Tensor) -> Unsmoothed:
        """P of p (rows, vocab), in its precision (float32 or float64) and on its device; p is left as it is.

        P(y) = (p(y) - sum over longer t of q_t(y) P(t)) / q_y(y), set to 0 where it is below, before shorter tokens
        are reckoned with it; then each row is divided by its sum. With a background, which is on every token, the
        equations are solved together and what is below 0 is cut afterwards.
        """
        inverse = self._without_background(p) if self.targets.background.any() else self._longest_first(p)
        below_zero = inverse < 0
        negative_mass = -inverse.clamp(max=0).sum(0)
        probabilities = inverse.clamp_(min=0)
        probabilities /= probabilities.sum(0)
        return Unsmoothed(probabilities.t(), below_zero.t(), negative_mass)

    def _longest_first(self, p: Tensor) -> Tensor:
        """P before clipping and renormalisation, (vocab, rows), so that a token's numbers lie together."""
        import torch

        inverse = p.t().clone(memory_format=torch.contiguous_format)
        for level in self._levels(p.device, p.dtype):
            raw = inverse[level.tokens] / level.gold_mass
            inverse[level.tokens] = raw
            kept = raw.clamp_(min=0)
            inverse.index_add_(0, level.shorter, kept[level.sources].mul_(level.weights), alpha=-1)
        return inverse

    def _without_background(self, p: Tensor) -> Tensor:
        """P before clipping and renormalisation, (vocab, rows), where rows hold the gold token and a background b.

        p(v) = w_v P(v) + s with s = sum_t b_t P(t), so s = sum_t (b_t / w_t) p(t) / (1 + sum_t b_t / w_t).
        """
        import torch

        weights = torch.from_numpy(self.targets.weights).to(p)
        ratio = torch.from_numpy(self.targets.background).to(p) / weights
        share = (p @ ratio) / (1 + ratio.sum())  # (rows,)
        return (p.t() - share) / weights[:, None]

    def _levels(self, device: torch.device, dtype: torch.dtype) -> list[_Level]:
        key = device, dtype
        if key not in self._on_device:
            self._on_device[key] = _levels(self.targets, self.lengths, device, dtype)
        return self._on_device[key]


def _levels(targets: SmoothedTargets, lengths: np.ndarray, device: torch.device, dtype: torch.dtype) -> list[_Level]:
    """The tokens that share their mass with others, by length, longest first."""
    rows = np.repeat(np.arange(len(lengths)), np.diff(targets.offsets))
    shared = np.flatnonzero((targets.tokens != rows) & (targets.weights > 0))
    if (lengths[targets.tokens[shared]] >= lengths[rows[shared]]).any():
        raise ValueError("these lengths are not those of the table the targets were made of: some prefix is no shorter")
    shared = shared[np.argsort(-lengths[rows[shared]], kind="stable")]
    ends = np.flatnonzero(np.diff(lengths[rows[shared]])) + 1
    return [
        _level(targets, rows[entries], entries, device, dtype) for entries in np.split(shared, ends) if len(entries)
    ]


def _level(
    targets: SmoothedTargets, gold: np.ndarray, entries: np.ndarray, device: torch.device, dtype: torch.dtype
) -> _Level:
    """Of the `entries` of the rows of `gold` tokens of one length."""
    import torch

    tokens, sources = np.unique(gold, return_inverse=True)
    ids = [torch.from_numpy(each.astype(np.int64)) for each in (tokens, targets.tokens[entries], sources)]
    numbers = [torch.from_numpy(each[:, None]) for each in (targets.gold_mass[tokens], targets.weights[entries])]
    tokens, shorter, sources = (each.to(device) for each in ids)
    gold_mass, weights = (each.to(device, dtype) for each in numbers)
    return _Level(tokens, gold_mass, shorter, sources, weights)


def _check_gold_mass(targets: SmoothedTargets) -> None:
    """Raise ParameterError where the equations have no single solution."""
    beyond_background = targets.weights[targets.offsets[1:] - 1]
    unknown = int(((targets.gold_mass == 0) | (beyond_background == 0)).sum())
    if unknown:
        raise ParameterError(
            f"The target of {unknown} tokens leaves the token itself no mass of its own, so its probability cannot be "
            "un-smoothed. Give eps below 1, or go without the un-smoothed numbers."
        )
