"""How far a judge can be trusted: whether it likes length, whether another one agrees with it.

Empty completions, which every judge gives the lowest grade unasked, have no part in either.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nbutils.interaction.judges.judged import Judged

FEWEST = 3  # texts: with two, every rank correlation is 1 or -1


class Agreement(NamedTuple):
    """The rank correlation of two judges, in [-1, 1], and the texts that both of them graded."""

    correlation: float
    texts: int


def length_correlation(judged: Judged, completions: Sequence[str]) -> float:
    """Spearman's correlation of score and words, of the completions that the judge graded; NaN where it has none."""
    words = np.array([len(text.split()) for text in completions], float)
    return _rank_correlation(judged.scores[judged.by_judge], words[judged.by_judge])


def agreement(first: Judged, second: Judged) -> Agreement:
    """Spearman's correlation of two judges' scores of the same texts; NaN where it has none."""
    both = first.by_judge & second.by_judge
    return Agreement(_rank_correlation(first.scores[both], second.scores[both]), int(both.sum()))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if len(first) < FEWEST:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all the same, which rank nothing: NaN says so
        return float(spearmanr(first, second).statistic)
