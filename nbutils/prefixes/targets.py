"""The target distribution of every gold token, as sparse rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SmoothedTargets:
    """For each gold token y a distribution q_y over the vocabulary: q_y(v) = weight of v in row y + background[y].

    offsets: (vocab + 1,) int32; row y is tokens[offsets[y] : offsets[y + 1]] with the weights there.
    tokens: (entries,) int32, distinct in a row, y itself last; all others are strictly shorter than y.
    weights: (entries,) float32; a token without an entry has weight 0.
    background: (vocab,) float32, the probability every token of the vocabulary has beside its weight; 0 but for the
        uniform control, whose rows hold y alone with the weight q_y(y) - background[y].
    entropy: (vocab,) float32, H(q_y) in nats.
    gold_mass: (vocab,) float32, q_y(y).
    """

    offsets: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    background: np.ndarray
    entropy: np.ndarray
    gold_mass: np.ndarray
