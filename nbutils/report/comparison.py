"""Two reports, or two sets of runs, side by side: verdicts, means, runs that one alone has, what else is different.

    print(compare(Path("runs/quick"), Path("runs/quick-again")))

Of two folders of runs, means are compared over the seeds that both have, with Student's 95 % interval. No contrast
asked for that: it is exploratory and not corrected. Without an interval nothing is called better or worse, and runs
on other data, prepared in another way or cut by another tokenizer, have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbutils.batch import Change, changes
from nbutils.report import statistics
from nbutils.report.arms import Arm, number
from nbutils.report.sides import Side
from nbutils.runs import UNKNOWN, Manifest, Measure, measure

SAME, UNDECIDED, OTHER_DATA = "same", "undecided", "other data"


@dataclass(frozen=True)
class Told:
    """One side's verdict on a contrast, as text in its own measure: all dashes where that side does not have it."""

    metric: str = UNKNOWN
    outcome: str = UNKNOWN
    difference: str = UNKNOWN
    interval: str = UNKNOWN
    pairs: str = UNKNOWN


@dataclass(frozen=True)
class VerdictRow:
    """A planned contrast, and what the runs of each side say to it."""

    contrast: str
    first: Told
    second: Told

    @property
    def measure(self) -> Measure | None:
        """What it is judged in; None where the sides judge it in different ones, so that they do not compare."""
        metrics = {told.metric for told in (self.first, self.second) if told != Told()}
        return measure(metrics.pop()) if len(metrics) == 1 else None


@dataclass(frozen=True)
class MeanRow:
    """An arm's mean in a measure on both sides. `reading` is what the interval of the difference supports.

    Where runs of one seed read other data there are no pairs: no difference, no interval, and the reading says so.
    """

    study: str
    arm: str
    measure: Measure
    first: str
    second: str
    difference: str
    interval: str
    pairs: str
    reading: str


@dataclass(frozen=True)
class Comparison:
    """All that is told of two sides. `changes` are None where a side is a report, which does not know them."""

    first: Side
    second: Side
    verdicts: tuple[VerdictRow, ...]
    means: tuple[MeanRow, ...]
    changes: tuple[Change, ...] | None

    @property
    def paired(self) -> bool:
        """Whether both sides are runs, so that means can be compared by seeds."""
        return self.first.evidence is not None and self.second.evidence is not None

    def alone(self) -> tuple[list[str], list[str]]:
        """The finished runs that only the first side has, and those that only the second has."""
        first, second = self.first.finished, self.second.finished
        return [name for name in first if name not in second], [name for name in second if name not in first]

    def on_other_data(self) -> list[str]:
        """The runs that finished on both sides under one name, but on other data. Of a report that is not known."""
        return [
            name
            for name, manifest in self.first.manifests.items()
            if name in self.second.manifests and _data(manifest) != _data(self.second.manifests[name])
        ]

    def shared(self) -> list[str]:
        """The runs that finished on both sides, on the same data as far as that is known."""
        other = self.on_other_data()
        return [name for name in self.first.finished if name in self.second.finished and name not in other]


def compare_sides(first: Side, second: Side) -> Comparison:
    """All that is told of two sides."""
    known = first.evidence is not None and second.evidence is not None
    return Comparison(
        first,
        second,
        tuple(_verdict_rows(first.verdicts, second.verdicts)),
        tuple(_mean_rows(first, second)),
        tuple(_changes(first, second)) if known else None,
    )


def _verdict_rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[VerdictRow]:
    for name in dict.fromkeys([*first, *second]):
        sides = [side.get(name) for side in (first, second)]
        yield VerdictRow(name, *map(_told, sides))


def _told(verdict: Mapping[str, Any] | None) -> Told:
    if verdict is None:
        return Told()
    metric = str(verdict.get("metric"))
    quantity = measure(metric)
    difference, low, high = (number(verdict.get(name)) for name in ("difference", "low", "high"))
    return Told(
        metric,
        str(verdict.get("outcome", UNKNOWN)),
        quantity.difference(difference),
        quantity.difference_interval(low, high),
        str(verdict.get("pairs", UNKNOWN)),
    )


def _mean_rows(first: Side, second: Side) -> Iterator[MeanRow]:
    arms = first.arms, second.arms
    means = first.means, second.means
    for study in dict.fromkeys([*means[0], *means[1]]):
        of_study = [side.get(study, {}) for side in means]
        for arm in dict.fromkeys([*of_study[0], *of_study[1]]):
            of_arm = [side.get(arm, {}) for side in of_study]
            for metric in dict.fromkeys([*of_arm[0], *of_arm[1]]):
                values = [number(side.get(metric)) for side in of_arm]
                runs = [side.get((study, arm)) for side in arms]
                yield MeanRow(study, arm, measure(metric), *_mean_cells(metric, values, runs))


def _mean_cells(metric: str, means: Sequence[float], arms: Sequence[Arm | None]) -> tuple[str, ...]:
    """Both means, their difference, its interval, pairs of seeds, and what the interval supports."""
    quantity = measure(metric)
    if None not in arms and _read_other_data(metric, *arms):
        return (*map(quantity.number, means), UNKNOWN, UNKNOWN, "0", OTHER_DATA)
    difference, interval, pairs = means[1] - means[0], (math.nan, math.nan), UNKNOWN
    differences = _differences(metric, *arms) if None not in arms else []
    if differences:
        difference, interval = float(np.mean(differences)), statistics.mean_interval(differences)
    if None not in arms:
        pairs = str(len(differences))
    return (
        *map(quantity.number, means),
        quantity.difference(difference),
        quantity.difference_interval(*interval),
        pairs,
        _reading(quantity, *interval),
    )


def _data(manifest: Manifest) -> str | None:
    """What tells the data that a run read or made: documents, tokenizer and all that was done to them."""
    return manifest.get("data_fingerprint")


def _read_other_data(metric: str, first: Arm, second: Arm) -> bool:
    """Whether runs of both arms with one seed, which would be a pair, read other data."""
    data = [
        {run.matrix.get("seed"): _data(run.manifest) for run in arm.runs if metric in run.result}
        for arm in (first, second)
    ]
    return any(data[1][seed] != read for seed, read in data[0].items() if seed in data[1])


def _differences(metric: str, first: Arm, second: Arm) -> list[float]:
    """Second minus first for every seed that both have."""
    theirs = second.by_seed(metric)
    return [theirs[seed] - value for seed, value in first.by_seed(metric).items() if seed in theirs]


def _reading(quantity: Measure, low: float, high: float) -> str:
    """What an interval of second minus first supports; a dash where there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    if low == high == 0:
        return SAME
    if low <= 0 <= high:
        return UNDECIDED
    higher = low > 0
    if not quantity.better:
        return "B higher" if higher else "B lower"
    return "B better" if higher == (quantity.better == "higher") else "B worse"


def _changes(first: Side, second: Side) -> list[Change]:
    """What differs between two sets of runs: their plans, then the facts of the runs that both have, else of all."""
    found = _plan_changes(first, second)
    sides = first.manifests, second.manifests
    both = [name for name in sides[0] if name in sides[1]]
    of_both = [[side[name] for name in both or side] for side in sides]
    return found + changes(*of_both)


def _plan_changes(first: Side, second: Side) -> list[Change]:
    found = []
    if set(first.runs) != set(second.runs):
        counts = (
            f"{len(side.runs)}, {len(set(side.runs) - set(other.runs))} of them alone"
            for side, other in ((first, second), (second, first))
        )
        found.append(Change("planned runs", *counts))
    contrasts = [{name: asdict(each.contrast) for name, each in side.judged.items()} for side in (first, second)]
    for name in (name for name in contrasts[0] if name in contrasts[1]):
        ours, theirs = contrasts[0][name], contrasts[1][name]
        fields = [field for field in ours if ours[field] != theirs[field]]
        found += [Change(f"{field} of {name}", str(ours[field]), str(theirs[field])) for field in fields]
    return found
