"""What smoothing costs by arithmetic alone, when a model of smoothed targets is scored on the gold token."""

from __future__ import annotations

import numpy as np

from nbutils.objectives.prefixes.targets import SmoothedTargets


def effective_smoothing(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """1 - the mean gold mass of a corpus: the share of the target that is not on the gold token.

    counts: (vocab,) how often each token is the gold token in the corpus.
    """
    return 1 - _mean(targets.gold_mass, counts)


def predicted_cost(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """The most, in nats per token, by which gold cross entropy can rise for no other reason than the target.

    A model that has learnt its targets to perfection says p(y) = sum_t q_t(y) P(t) >= q_y(y) P(y) where the text has
    P, so the cross entropy of the gold tokens is at most E[-log q_y(y)] above that of P. It is a ceiling: prefixes of
    likely longer tokens get mass back. Infinite where a gold token of the corpus has no mass.

    counts: (vocab,) how often each token is the gold token in the corpus.
    """
    seen = counts > 0
    with np.errstate(divide="ignore"):
        return _mean(-np.log(targets.gold_mass[seen].astype(np.float64)), counts[seen])


def mean_target_entropy(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """The mean entropy of a corpus's targets, nats per token: what cross entropy with them cannot fall below."""
    return _mean(targets.entropy, counts)


def _mean(values: np.ndarray, counts: np.ndarray) -> float:
    return float(np.average(values.astype(np.float64), weights=counts))
