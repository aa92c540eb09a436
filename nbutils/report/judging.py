"""What a plan's contrasts come to: each planned pair is waited for, and a verdict is read from one interval.

    claim "better":    supported beyond 0, with the smallest effect still possible
                       real but too small where all of it lies between 0 and the smallest effect
                       not supported where it reaches 0 or less, and all of it is below the smallest effect
    claim "no worse":  supported beyond -margin; not supported when all of it is worse than the margin
    otherwise:         undecided; the minimum detectable effect says what could have been seen
    interim:           pairs that were registered are not in yet: numbers, and no verdict

Pairs are registered before they run, and looked at when all of a registration are in. The first look is judged at
.04, two-sided; each extension of the plan spends half of what is left of .01, so that all looks together stay below
.05. (Looking at .05 after every pair, from 3 to 30, would call 13 of 100 null effects real.) The first look that
decides stands. Contrasts that are not primary share the level of each look by Holm's rule.

There is no interval of one pair, of a run that diverged, of arms that gave identical numbers, or of pairs that all
differ by the same amount: a coarse metric can do that by chance, and it does not mean that other seeds would agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nbutils.report.statistics import (
    far_from_normal,
    holm_levels,
    mean_interval,
    minimum_detectable_effect,
    p_value,
    spread_of,
)

FIRST_LOOK, LATER_LOOKS = 0.04, 0.01  # what the first look spends of .05, and what is left for all extensions
ENOUGH = 10  # pairs from which a mean of differences far from normal is near normal enough

SUPPORTED = "supported"
TOO_SMALL = "real but too small"
NOT_SUPPORTED = "not supported"
UNDECIDED = "undecided"
INTERIM = "interim"
NOT_JUDGED = "cannot be judged"
OUTCOMES = (SUPPORTED, TOO_SMALL, NOT_SUPPORTED, UNDECIDED, INTERIM, NOT_JUDGED)
DECIDED = (SUPPORTED, TOO_SMALL, NOT_SUPPORTED)

IDENTICAL = "Both arms gave identical numbers: the treatment changed nothing, or was not applied."
DIVERGED = "A run's value is not a finite number: it diverged, and a mean over the others would hide it."
NO_SPREAD = (
    "Every seed gave the same difference, and an interval needs a spread: check that the seed reaches the run, "
    "or take a metric with finer steps."
)
FAR_FROM_NORMAL = (
    "The differences are far from normal (Shapiro-Wilk, p below 0.05): Student's interval over fewer than "
    f"{ENOUGH} pairs then supports nothing."
)


class Claim(Protocol):
    """What a plan's contrast states before any run; `plans.Contrast` has these and more."""

    better: str  # "lower" or "higher" values are better
    claim: str  # "better" or "no worse"
    smallest_effect: float  # >= 0, in the metric's unit; the margin for "no worse"
    primary: bool


@dataclass(frozen=True)
class Look:
    """The pairs of one registration and of those before: how many are planned, and the differences of those in.

    `absent` of them ran, and report no such number.
    """

    planned: int
    differences: tuple[float, ...]
    absent: int = 0

    @property
    def is_complete(self) -> bool:
        return len(self.differences) >= self.planned


@dataclass(frozen=True)
class WithoutOne:
    """What a verdict would be without one pair, the `place`-th of its differences."""

    place: int
    outcome: str
    difference: float


@dataclass(frozen=True)
class Verdict:
    """One contrast, judged. Differences are treatment minus control in the metric's own unit.

    `alpha` is the level of the look it was judged at (Holm's share of it for a contrast that is not primary), and
    `low`..`high` the interval at 1 - alpha. `p_value` tests the claim's boundary: 0 for "better", the margin for "no
    worse". `spread` is the standard deviation of the differences; `minimum_detectable` is for alpha and power .8. What
    cannot be computed is nan. `look` counts from 1; `earlier` are the outcomes of looks before it. `without_one` says
    how far the outcome hangs on one pair, None where on none.
    """

    outcome: str
    differences: tuple[float, ...]
    low: float
    high: float
    alpha: float
    p_value: float
    planned: int
    minimum_detectable: float
    note: str = ""
    look: int = 1
    earlier: tuple[str, ...] = ()
    without_one: WithoutOne | None = None

    @property
    def difference(self) -> float:
        return float(np.mean(self.differences)) if self.differences else np.nan

    @property
    def pairs(self) -> int:
        return len(self.differences)

    @property
    def spread(self) -> float:
        return spread_of(np.asarray(self.differences)) if self.pairs > 1 else np.nan


def level_of_look(look: int) -> float:
    """What look number `look`, from 1, may spend: .04, then .005, .0025 and so on, which never add up to .05."""
    return FIRST_LOOK if look == 1 else LATER_LOOKS / 2 ** (look - 1)


def judge(claims: Sequence[tuple[Claim, Sequence[Look]]]) -> list[Verdict]:
    """Verdicts on a plan's contrasts, each with its looks, the first registration's first.

    All of a plan's contrasts belong in one call, those without runs included: the family is what was planned.
    """
    most = max((len(looks) for _, looks in claims), default=0)
    levels = [_levels(claims, number) for number in range(1, most + 1)]
    return [
        _judged(claim, looks, [of_look[index] for of_look in levels]) for index, (claim, looks) in enumerate(claims)
    ]


def _levels(claims: Sequence[tuple[Claim, Sequence[Look]]], number: int) -> list[float]:
    """The level of each contrast at look `number`: primary ones have it whole, the others share it by Holm's rule."""
    level = level_of_look(number)
    family = [index for index, (claim, _) in enumerate(claims) if not claim.primary]
    p_values = [_p_of_look(*claims[index], number) for index in family]
    shared = dict(zip(family, holm_levels(p_values, level), strict=True))
    return [shared.get(index, level) for index in range(len(claims))]


def _p_of_look(claim: Claim, looks: Sequence[Look], number: int) -> float:
    """The p value at the claim's boundary; nan where the look is not complete or cannot be judged."""
    if number > len(looks) or not looks[number - 1].is_complete:
        return np.nan
    look = looks[number - 1]
    return np.nan if _problem(look) else _p_value(claim, np.asarray(look.differences, dtype=float))


def _p_value(claim: Claim, differences: np.ndarray) -> float:
    worse = 1.0 if claim.better == "lower" else -1.0
    return p_value(differences, worse * claim.smallest_effect if claim.claim == "no worse" else 0.0)


def _judged(claim: Claim, looks: Sequence[Look], levels: Sequence[float]) -> Verdict:
    """The verdict of the first look that decides, else of the last that can be taken."""
    earlier: list[str] = []
    for number, look in enumerate(looks, 1):
        verdict = replace(_at(claim, look, levels[number - 1]), look=number, earlier=tuple(earlier))
        if verdict.outcome in (*DECIDED, INTERIM):
            break
        earlier.append(verdict.outcome)
    return verdict


def _at(claim: Claim, look: Look, alpha: float) -> Verdict:
    """The verdict at one look."""
    differences = np.asarray(look.differences, dtype=float)
    if problem := _problem(look):
        nan = float("nan")
        outcome = INTERIM if problem == INTERIM else NOT_JUDGED
        return Verdict(
            outcome, look.differences, nan, nan, alpha, nan, look.planned, nan, problem * (outcome != INTERIM)
        )
    low, high = mean_interval(differences, alpha)
    numbers = (
        low,
        high,
        alpha,
        _p_value(claim, differences),
        look.planned,
        minimum_detectable_effect(differences, alpha),
    )
    if not look.is_complete:
        return Verdict(INTERIM, look.differences, *numbers)
    outcome = outcome_of(claim, low, high)
    note = FAR_FROM_NORMAL if far_from_normal(differences) else ""
    if note and outcome in (SUPPORTED, TOO_SMALL) and len(differences) < ENOUGH:
        outcome = UNDECIDED
    elif outcome == SUPPORTED and claim.claim == "better" and abs(differences.mean()) < claim.smallest_effect:
        note = "The gain is real, and may be smaller than the smallest effect of interest."
    found = Verdict(outcome, look.differences, *numbers, note=note)
    return replace(found, without_one=_without_one(claim, differences, alpha, outcome))


def outcome_of(claim: Claim, low: float, high: float) -> str:
    """The outcome that an interval of differences means for a claim, as in this module's docstring."""
    worst, best = (-high, -low) if claim.better == "lower" else (low, high)  # as gains: positive is better
    margin = claim.smallest_effect
    if claim.claim == "no worse":
        return SUPPORTED if worst > -margin else NOT_SUPPORTED if best < -margin else UNDECIDED
    if best < margin:
        return TOO_SMALL if worst > 0 else NOT_SUPPORTED
    return SUPPORTED if worst > 0 else UNDECIDED


def _without_one(claim: Claim, differences: np.ndarray, alpha: float, outcome: str) -> WithoutOne | None:
    """The pair furthest from the mean of the others of those without which the outcome would be another."""
    found = []
    for place in range(len(differences)) if len(differences) > 2 else ():
        others = np.delete(differences, place)
        if (
            not _problem(Look(0, tuple(others)))
            and (told := outcome_of(claim, *mean_interval(others, alpha))) != outcome
        ):
            distance = abs(differences[place] - others.mean())
            found.append((distance, WithoutOne(place, told, float(others.mean()))))
    return max(found, key=lambda each: each[0])[1] if found else None


def _problem(look: Look) -> str:
    """Why a look allows no interval; empty where it does. INTERIM: too few pairs are in, and more will come."""
    differences = np.asarray(look.differences, dtype=float)
    if look.absent:
        return f"{look.absent} of {look.planned} pairs ran and report no such number."
    if not np.isfinite(differences).all():
        return DIVERGED
    if len(differences) < 2:
        count = "1 seed pair" if len(differences) == 1 else f"{len(differences)} seed pairs"
        return INTERIM if look.planned > max(1, len(differences)) else f"{count}: an interval needs at least 2."
    if spread_of(differences) == 0:
        return NO_SPREAD if np.abs(differences).max() > 0 else IDENTICAL
    return ""
