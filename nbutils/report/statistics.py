"""Was the difference there? Seed-paired intervals, Holm's correction, detectable effects, document intervals.

The unit is the run. Two arms are compared by the differences of runs that share a seed (same initial weights,
same data order), and the interval is Student's t over those differences. Documents cannot take the place of
seeds: resampling documents alone calls 70 % of null effects real, because it never sees what another seed
would do. Such an interval says how well the test text stands for other text, and nothing about arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, stdtr, stdtrit
from scipy.stats import nct, shapiro

ALPHA = 0.05  # two-sided
POWER = 0.8
SURE = 0.8  # share of samples in which the true spread is below `spread_limit`
ODD = 0.05  # p of the Shapiro-Wilk test below which differences are far from normal
RESAMPLES = 10_000
MOST_PAIRS = 10_000  # beyond this no one will run the seeds

# Subtracting rounded numbers leaves dust: a spread this far below the values is none.
ROUNDING = 1e-9


def mean_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Student's t interval for a mean: mean -+ t(n-1, 1 - alpha/2) s / sqrt(n). Equal values give a point.

    With one value there is no spread to judge by: both ends are nan.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    half = stdtrit(len(values) - 1, 1 - alpha / 2) * spread_of(values) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def p_value(differences: Sequence[float], boundary: float = 0.0) -> float:
    """Two-sided p of a one-sample t test that the mean difference is `boundary`.

    Without spread there is nothing to test: 1 on the boundary, 0 off it. nan with fewer than two differences.
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        return np.nan
    distance = abs(differences.mean() - boundary)
    spread = spread_of(differences)
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
def detectable_in_spreads(pairs: int, alpha: float = ALPHA) -> float:
    """The effect, in standard deviations of the differences, seen with probability POWER; it solves power = .8."""
    upper = 1.0
    while power(upper, pairs, alpha) < POWER:
        upper *= 2
    return float(brentq(lambda effect: power(effect, pairs, alpha) - POWER, 0.0, upper, xtol=1e-10))


def spread_limit(spread: float, pairs: int) -> float:
    """The upper limit of a standard deviation: in four of five samples of this size the true one is no larger.

    s sqrt((n - 1) / chi2(.2, n - 1)). Power at the sample's own spread is .63 of a nominal .8 for three pairs.
    """
    return float(spread * np.sqrt((pairs - 1) / chdtri(pairs - 1, SURE)))


def minimum_detectable_effect(differences: Sequence[float], alpha: float = ALPHA) -> float:
    """The mean difference that as many pairs would show at level `alpha` in 80 of 100 studies, or in more.

    The spread is the upper limit of that of the differences. For "no worse" it is the margin that could be confirmed
    for two equal arms. nan with fewer than two.
    """
    if len(differences) < 2:
        return np.nan
    spread = spread_of(np.asarray(differences, dtype=float))
    return spread_limit(spread, len(differences)) * detectable_in_spreads(len(differences), alpha)


def pairs_needed(spread: float, effect: float, alpha: float = ALPHA) -> int | None:
    """The fewest pairs that see a mean difference of `effect` (power .8, level `alpha`); None past MOST_PAIRS.

    `spread` is the standard deviation of the differences, in the unit of `effect`.
    """
    if effect <= 0 or spread < 0 or power(effect / max(spread, ROUNDING * effect), MOST_PAIRS, alpha) < POWER:
        return None
    low, high = 1, MOST_PAIRS  # `low` does not see it, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        seen = spread == 0 or power(effect / spread, middle, alpha) >= POWER
        low, high = (low, middle) if seen else (middle, high)
    return high


def spread_of(values: np.ndarray) -> float:
    """Standard deviation with n - 1, rounding dust taken as 0."""
    spread = float(values.std(ddof=1))
    return spread if spread > ROUNDING * np.abs(values).max() else 0.0


def far_from_normal(differences: Sequence[float]) -> bool:
    """Whether the Shapiro-Wilk test rejects that the differences are normal (p < .05); no with fewer than three.

    Student's interval is then not to be relied on: of five lognormal differences without a mean effect it calls 16 of
    100 real. Source: S. Shapiro and M. Wilk, Biometrika 52 (1965).
    """
    differences = np.asarray(differences, dtype=float)
    return len(differences) > 2 and spread_of(differences) > 0 and bool(shapiro(differences).pvalue < ODD)


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
