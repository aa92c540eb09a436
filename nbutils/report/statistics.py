"""Was the difference there? Seed-paired contrasts, Holm's correction, detectable effects, document intervals.

The unit is the run. Two arms are compared by the differences of runs that share a seed (same initial weights,
same data order), and the interval is Student's t over those differences. Documents cannot take the place of
seeds: resampling documents alone calls 70 % of null effects real, because it never sees what another seed
would do. Such an interval says how well the test text stands for other text, and nothing about arms.

A verdict is read from one interval against two thresholds, in the direction the contrast calls better:

    claim "better":    supported beyond 0        not supported when all of it is below the smallest effect
    claim "no worse":  supported beyond -margin  not supported when all of it is worse than the margin
    otherwise:         could not have been seen; the minimum detectable effect says by how much

No interval is made of one pair, of a run that diverged, or of pairs that all differ by the same amount other than 0: a
few values of a coarse metric fall together, and that their spread is 0 is then no knowledge of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import nct

ALPHA = 0.05  # two-sided
POWER = 0.8
RESAMPLES = 10_000
MOST_PAIRS = 10_000  # beyond this no one will run the seeds

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
NOT_SEEN = "could not have been seen at this size"
NOT_JUDGED = "cannot be judged"

# Subtracting rounded numbers leaves dust: a spread this far below the values is none.
ROUNDING = 1e-9


class Claim(Protocol):
    """What a plan's contrast states before any run; `plans.Contrast` has these and more."""

    better: str  # "lower" or "higher" values are better
    claim: str  # "better" or "no worse"
    smallest_effect: float  # >= 0, in the metric's unit; the margin for "no worse"
    primary: bool


@dataclass(frozen=True)
class Verdict:
    """One contrast, judged. Differences are treatment minus control in the metric's own unit.

    `alpha` is the level the contrast was judged at (Holm's for a contrast that is not primary), and
    `low`..`high` the interval at 1 - alpha. `p_value` tests the claim's boundary: 0 for "better", the
    margin for "no worse". `spread` is the standard deviation of the differences; `minimum_detectable` is
    for alpha .05, power .8. What cannot be computed is nan.
    """

    outcome: str
    difference: float
    low: float
    high: float
    alpha: float
    p_value: float
    pairs: int
    spread: float
    minimum_detectable: float
    note: str = ""


def mean_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Student's t interval for a mean: mean -+ t(n-1, 1 - alpha/2) s / sqrt(n). Equal values give a point.

    With one value there is no spread to judge by: both ends are nan.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    half = stdtrit(len(values) - 1, 1 - alpha / 2) * _spread(values) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def p_value(differences: Sequence[float], boundary: float = 0.0) -> float:
    """Two-sided p of a one-sample t test that the mean difference is `boundary`.

    Without spread there is nothing to test: 1 on the boundary, 0 off it. nan with fewer than two differences.
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        return np.nan
    distance = abs(differences.mean() - boundary)
    spread = _spread(differences)
    if spread == 0:
        return float(distance <= ROUNDING * max(abs(boundary), np.abs(differences).max()))
    return float(2 * stdtr(len(differences) - 1, -distance * np.sqrt(len(differences)) / spread))


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level each of a family of tests is judged at by Holm's step-down rule, in the order given.

    The smallest of m p values is held to alpha / m, the next to alpha / (m - 1), and so on. The first that
    fails ends it: it and all after it keep its level, so an interval at 1 - level never contradicts the rule.
    A nan (a test that could not be made) counts as 1, because the family was fixed before any run.
    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    p_values = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    levels, failed = np.empty(len(p_values)), False
    level = alpha
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        level = level if failed else alpha / (len(p_values) - rank)
        levels[index] = level
        failed = failed or p_values[index] > level
    return levels.tolist()


def power(effect: float, pairs: int, alpha: float = ALPHA) -> float:
    """Power of the two-sided paired t test for a mean difference of `effect` standard deviations.

    P(|T| > t(n-1, 1 - alpha/2)), T noncentral t with n - 1 degrees of freedom and noncentrality effect
    sqrt(n).
    Source: J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 2nd ed. (1988), 2.3 and 2.4.
    """
    critical = stdtrit(pairs - 1, 1 - alpha / 2)
    shift = effect * np.sqrt(pairs)
    return float(nct.sf(critical, pairs - 1, shift) + nct.sf(critical, pairs - 1, -shift))


@lru_cache
def _detectable_in_spreads(pairs: int) -> float:
    """The effect, in standard deviations of the differences, seen with probability POWER."""
    upper = 1.0
    while power(upper, pairs) < POWER:
        upper *= 2
    return float(brentq(lambda effect: power(effect, pairs) - POWER, 0.0, upper, xtol=1e-10))


def minimum_detectable_effect(differences: Sequence[float]) -> float:
    """The mean difference that this many pairs with this spread would have seen in 80 of 100 such studies.

    It solves power(effect / s, n) = .8 at alpha .05, two-sided, with s the differences' own standard
    deviation. For "no worse" it is the margin that could have been confirmed for two equal arms. nan with
    fewer than two.
    """
    if len(differences) < 2:
        return np.nan
    spread = _spread(np.asarray(differences, dtype=float))
    return spread * _detectable_in_spreads(len(differences))


def pairs_needed(spread: float, effect: float) -> int | None:
    """The fewest pairs that see a mean difference of `effect` (power .8, alpha .05); None past MOST_PAIRS.

    `spread` is the standard deviation of the differences, in the unit of `effect`.
    """
    if effect <= 0 or spread < 0 or power(effect / max(spread, ROUNDING * effect), MOST_PAIRS) < POWER:
        return None
    low, high = 1, MOST_PAIRS  # `low` does not see it, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        seen = spread == 0 or power(effect / spread, middle) >= POWER
        low, high = (low, middle) if seen else (middle, high)
    return high


def judge(claims: Sequence[tuple[Claim, Sequence[float]]]) -> list[Verdict]:
    """Verdicts on a plan's contrasts, each with its seed-paired differences (treatment minus control).

    A primary contrast is judged at .05; the others share .05 by Holm's rule. All of a plan's contrasts belong
    in one call, those without runs included: the family is what was planned.
    """
    p_values = [_claim_p_value(claim, differences) for claim, differences in claims]
    family = [index for index, (claim, _) in enumerate(claims) if not claim.primary]
    levels = [ALPHA] * len(claims)
    for index, level in zip(family, holm_levels([p_values[i] for i in family]), strict=True):
        levels[index] = level
    return [
        _judge_one(claim, np.asarray(differences, dtype=float), p, level)
        for (claim, differences), p, level in zip(claims, p_values, levels, strict=True)
    ]


def _judge_one(claim: Claim, differences: np.ndarray, p: float, alpha: float) -> Verdict:
    """The verdict of the module's docstring for one contrast at one level."""
    problem = _cannot_be_judged(differences)
    if problem:
        return _not_judged(differences, alpha, problem)
    low, high = mean_interval(differences, alpha)
    worst, best = (-high, -low) if claim.better == "lower" else (low, high)  # as gains: positive is better
    margin = claim.smallest_effect
    claimed, refuted = (0.0, margin) if claim.claim == "better" else (-margin, -margin)
    outcome = SUPPORTED if worst > claimed else NOT_SUPPORTED if best < refuted else NOT_SEEN
    return Verdict(
        outcome=outcome,
        difference=float(differences.mean()),
        low=low,
        high=high,
        alpha=alpha,
        p_value=p,
        pairs=len(differences),
        spread=_spread(differences),
        minimum_detectable=minimum_detectable_effect(differences),
        note=_note(outcome, claim, best, differences),
    )


def _not_judged(differences: np.ndarray, alpha: float, problem: str) -> Verdict:
    """A verdict that says why there is none."""
    mean = float(differences.mean()) if len(differences) else np.nan
    nan = float("nan")
    return Verdict(NOT_JUDGED, mean, nan, nan, alpha, nan, len(differences), nan, nan, problem)


def _claim_p_value(claim: Claim, differences: Sequence[float]) -> float:
    """The p value at the claim's boundary; nan where the contrast cannot be judged."""
    if _cannot_be_judged(np.asarray(differences, dtype=float)):
        return np.nan
    worse = 1.0 if claim.better == "lower" else -1.0
    return p_value(differences, worse * claim.smallest_effect if claim.claim == "no worse" else 0.0)


def _cannot_be_judged(differences: np.ndarray) -> str:
    """Why these differences allow no interval; empty where they do."""
    if not np.isfinite(differences).all():
        return "A run's value is not a finite number: it diverged, and a mean over the others would hide it."
    if len(differences) < 2:
        count = "1 seed pair" if len(differences) == 1 else f"{len(differences)} seed pairs"
        return f"{count}: an interval needs at least 2."
    if _spread(differences) == 0 and np.abs(differences).max() > 0:
        return (
            "Every seed gave the same difference, and an interval needs a spread: check that the seed reaches the run, "
            "or take a metric with finer steps."
        )
    return ""


def _note(outcome: str, claim: Claim, best_gain: float, differences: np.ndarray) -> str:
    """What a reader of the bare verdict would miss."""
    if _spread(differences) == 0:
        return "Both arms gave identical numbers: the treatment changed nothing, or was not applied."
    if outcome == SUPPORTED and claim.claim == "better" and best_gain < claim.smallest_effect:
        return "The gain is real but smaller than the smallest effect of interest."
    return ""


def _spread(values: np.ndarray) -> float:
    """Standard deviation with n - 1, rounding dust taken as 0."""
    spread = float(values.std(ddof=1))
    return spread if spread > ROUNDING * np.abs(values).max() else 0.0


@dataclass(frozen=True)
class NoiseFloor:
    """What changes when nothing but noise does: an A/A pair, one arm run twice with another dropout seed.

    Or under another name, with a target that equals cross entropy. Without dropout only rounding differs, and the floor
    is a lower bound.
    """

    differences: tuple[float, ...]  # one a seed

    def band(self, pairs: int) -> float:
        """Half the width of the band that holds 95 % of A/A means over `pairs` seeds, in the metric's unit.

        The true mean is 0 by construction, so the spread is the root mean square with all n degrees of
        freedom: t(n, .975) rms / sqrt(pairs). 0 where the runs are identical; nan without a
        finite pair.
        """
        differences = np.asarray(self.differences, dtype=float)
        if not len(differences) or not np.isfinite(differences).all() or pairs < 1:
            return np.nan
        scale = np.sqrt(np.mean(differences**2) / pairs)
        return float(stdtrit(len(differences), 1 - ALPHA / 2) * scale)


def document_interval(
    ce_sums: Sequence[float], tokens: Sequence[int], alpha: float = ALPHA, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over documents of sum(ce) / sum(tokens), nats a token; exp of it for perplexity.

    Documents are drawn with replacement and the ratio is taken of the drawn sums: a mean of the documents'
    own perplexities would weigh a title page like a chapter. Measurement error only: it never compares
    arms. `ce_sums` and `tokens` are one value a document; nan with fewer than two documents that hold
    tokens.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), 13.3.
    """
    ce_sums, tokens = np.asarray(ce_sums, dtype=float), np.asarray(tokens, dtype=float)
    ce_sums, tokens = ce_sums[tokens > 0], tokens[tokens > 0]
    documents = len(tokens)
    if documents < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    ratios = []
    for start in range(0, RESAMPLES, 500):  # 500 draws at a time bound the memory: 500 x documents indices
        drawn = generator.integers(0, documents, (min(500, RESAMPLES - start), documents))
        ratios.append(ce_sums[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)
