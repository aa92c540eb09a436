"""Arms: a stage's runs that differ in nothing but seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.foundation import shortened, visible
from nbutils.runs import Measure, measure

if TYPE_CHECKING:
    from nbutils.runs import Run

SEEDS = ("seed", "noise_seed")  # they repeat an arm, they do not make another one
FLOORS = ("unigram", "bigram", "trigram")  # models of counts, the weakest first
LONGEST_VALUE, LONGEST_LABEL = 60, 160  # characters, or a legend and a table would be nothing else


@dataclass(frozen=True)
class Slot:
    """A variant and its run: None while there is none. `other_parameters` are those in which the run differs."""

    stage: str
    variant: str
    matrix: dict[str, Any]
    run: Run | None
    other_parameters: str = ""

    @property
    def trouble(self) -> str:
        """Why its numbers cannot be used; empty where they can."""
        if self.run is None:
            return "not run yet"
        if self.run.status != "finished":
            return self.run.status.replace("_", " ")
        return f"run with other parameters than the plan has ({self.other_parameters})" * bool(self.other_parameters)


@dataclass(frozen=True)
class Arm:
    """The usable runs of one matrix combination, one a seed, in the order of the seeds; `planned` are to be made.

    `borrowed_from` is the stage it is of where it serves as control of another one; empty in its own.
    """

    label: str
    values: dict[str, Any]
    runs: tuple[Run, ...]
    planned: int
    borrowed_from: str = ""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of its first run; none where it has no run."""
        return self.runs[0].params if self.runs else {}

    def results(self, metric: str) -> list[float]:
        """`metric` of every run that reports it; nan where the run diverged."""
        return list(self.by_seed(metric).values())

    def by_seed(self, metric: str) -> dict[Any, float]:
        """`metric` of every run that reports it, by the run's seed."""
        return {run.matrix.get("seed"): number(run.result[metric]) for run in self.runs if metric in run.result}

    def mean(self, metric: str) -> float:
        """The mean of `metric` over runs, of a perplexity the geometric one; nan where none reports it."""
        return mean_of(self.results(metric), measure(metric))

    @property
    def floor_not_beaten(self) -> str:
        """The weakest model of counts that a run of it ended no better than on validation: "unigram", "" for none."""
        reached = self.by_seed("eval_ce_loss")
        for floor in FLOORS:
            counted = self.by_seed(f"{floor}_eval_ce_loss")
            if any(not value < counted[seed] for seed, value in reached.items() if seed in counted):
                return floor
        return ""

    def minus(self, other: Arm | None, metric: str) -> list[float]:
        """This arm minus `other` in `metric`, for every seed that both have."""
        theirs = other.by_seed(metric) if other else {}
        return paired(self.by_seed(metric), theirs)


def group_arms(slots: Sequence[Slot]) -> list[Arm]:
    """The arms of one stage, in the order of its matrix; repeats with another noise seed (A/A) are left out.

    An arm without a usable run is an arm all the same. Labels name what the matrix varies first, and what else differs
    from the first arm: "alpha 0.5, cos_topk 256". No two are alike.
    """
    noise_seeds = [slot.matrix["noise_seed"] for slot in slots if "noise_seed" in slot.matrix]
    first_noise = min(noise_seeds, default=None)
    groups: list[tuple[dict[str, Any], list[Slot]]] = []
    for slot in slots:
        if slot.matrix.get("noise_seed", first_noise) != first_noise:
            continue
        values = without_seeds(slot.matrix)
        group = next((members for known, members in groups if known == values), None)
        if group is None:
            group = []
            groups.append((values, group))
        group.append(slot)
    names = dict.fromkeys(name for values, _ in groups for name in values)
    first = groups[0][0] if groups else {}
    differing = [name for name in names if any(values.get(name) != first.get(name) for values, _ in groups)]
    told = [
        ", ".join(
            f"{name} {named(values[name])}"
            for name in differing
            if name in values and (name == differing[0] or values[name] != first.get(name))
        )
        or members[0].stage
        for values, members in groups
    ]
    return [
        Arm(
            label,
            values,
            tuple(slot.run for slot in sorted(members, key=_seed) if slot.run is not None and not slot.trouble),
            len(members),
        )
        for label, (values, members) in zip(_labels(told), groups, strict=True)
    ]


def mean_of(values: Sequence[float], quantity: Measure) -> float:
    """The mean, of a perplexity the geometric one; nan of none."""
    if not values:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.mean(np.log(values))) if quantity.geometric else np.mean(values))


def paired(ours: dict[Any, float], theirs: dict[Any, float]) -> list[float]:
    """Ours minus theirs, for every seed that both have."""
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def named(value: Any) -> str:
    """A parameter's value as a few words of a name: every character to be seen, and not too many of them."""
    return shortened(visible(value), LONGEST_VALUE)


def _labels(told: Sequence[str]) -> list[str]:
    """`told`, each no longer than LONGEST_LABEL, numbered where that leaves two alike."""
    labels: list[str] = []
    for text in told:
        label, number = shortened(visible(text), LONGEST_LABEL), 1
        while label in labels:
            number += 1
            label = f"{shortened(visible(text), LONGEST_LABEL)} (no. {number})"
        labels.append(label)
    return labels


def number(value: object) -> float:
    """A stored result as a float; what is none (null: the run diverged) is nan."""
    return float(value) if isinstance(value, int | float) else float("nan")


def without_seeds(values: dict[str, Any]) -> dict[str, Any]:
    """Matrix values that make an arm."""
    return {name: value for name, value in values.items() if name not in SEEDS}


def _seed(slot: Slot) -> Any:
    return slot.matrix.get("seed", 0)
