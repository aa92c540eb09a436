"""The comparisons a plan announces before any run, and whether they were changed after the first one.

A contrast is judged on pairs: the runs of the treatment and of the control whose other matrix values (the seeds) are
equal. Everything a report shows that no contrast asked for is exploratory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nbutils.errors import PlanError, did_you_mean
from nbutils.files import now, read_json, write_json

CHOICES = {"better": ("lower", "higher"), "claim": ("better", "no worse")}
PAIRED_BY = "seed"  # the one matrix name whose values make independent pairs
USED_FILE = "contrasts.json"  # in the plan's folder: what the contrasts were, and since when


class InMatrix(Protocol):
    """A variant of a plan, or a run of one."""

    stage: str
    matrix: dict[str, Any]


Item = TypeVar("Item", bound=InMatrix)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two settings of one stage, `treatment` and `control`, as matrix values. The noise floor is one: an A/A pair."""

    stage: str
    metric: str
    treatment: dict[str, Any]
    control: dict[str, Any]

    def pairs(self, items: Iterable[Item]) -> list[tuple[Item, Item]]:
        """(treatment, control) for all values of the matrix's other names that both sides have, in the plan's order."""
        sides: dict[str, dict[str, Item]] = {"treatment": {}, "control": {}}
        for item in items:
            for side, values in (("treatment", self.treatment), ("control", self.control)):
                if item.stage == self.stage and item.matrix.items() >= values.items():
                    rest = {name: value for name, value in item.matrix.items() if name not in values}
                    sides[side][json.dumps(rest, sort_keys=True)] = item
        return [(item, sides["control"][rest]) for rest, item in sides["treatment"].items() if rest in sides["control"]]


@dataclass(frozen=True, kw_only=True)
class Contrast(Comparison):
    """A question with its criterion. `smallest_effect` is in the metric's unit; for "no worse" it is the margin.

    Where `control_metric` is given, the control is judged on that result instead, which must be in the same unit: a
    treatment's proxy against the proxy of a control whose temperature was tuned.
    """

    name: str
    question: str
    better: str
    claim: str
    smallest_effect: float
    primary: bool = False
    control_metric: str = ""


def contrasts_sha256(contrasts: Iterable[Comparison]) -> str:
    """A hash of what the contrasts ask."""
    asked = [asdict(each) for each in contrasts]
    for each in asked:
        if not each.get("control_metric"):
            each.pop("control_metric", None)  # what a plan leaves out asks nothing
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def record_contrasts(contrasts: Iterable[Comparison], folder: Path) -> None:
    """Note in plan folder `folder` that these contrasts are in use from now on, if they were not the last in use."""
    used = _used(folder)
    digest = contrasts_sha256(contrasts)
    if not used or used[-1]["sha256"] != digest:
        write_json(folder / USED_FILE, [*used, {"sha256": digest, "first_used": now()}])


def _used(folder: Path) -> list[dict[str, str]]:
    path = folder / USED_FILE
    return read_json(path) if path.is_file() else []


def check_criterion(where: str, given: Mapping[str, Any]) -> None:
    """Raise PlanError where `better`, `claim` or `smallest_effect` of a contrast is not what it can be."""
    for name, words in CHOICES.items():
        if given[name] not in words:
            raise PlanError(f"{where}: {name} is {given[name]!r}. {did_you_mean(str(given[name]), words)}")
    effect = given["smallest_effect"]
    if isinstance(effect, bool) or not isinstance(effect, int | float) or not 0 < effect < float("inf"):
        raise PlanError(
            f"{where}: smallest_effect is {effect!r}. Give the smallest difference in the metric that would matter to "
            "you, a number above 0."
        )
    if given.get("control_metric") == given["metric"]:
        raise PlanError(f"{where}: control_metric is the metric itself. Leave it out.")
    if not isinstance(given.get("primary", False), bool):
        raise PlanError(f"{where}: primary is {given['primary']!r}. Write true or false.")


def check_pairs(where: str, comparison: Comparison, matrix: Mapping[str, list[Any]], items: Iterable[InMatrix]) -> None:
    """Raise PlanError where a comparison names no values of `matrix`, has two equal sides, or has no pair."""
    for side in ("treatment", "control"):
        for name, value in getattr(comparison, side).items():
            if name not in matrix:
                near = did_you_mean(name, matrix)
                raise PlanError(f"{where}: {side} names {name!r}, not in the matrix of its stage. {near}")
            if value not in matrix[name]:
                values = ", ".join(map(str, matrix[name]))
                raise PlanError(f"{where}: {side} has {name} {value!r}; the matrix has {values}.")
    if comparison.treatment.keys() != comparison.control.keys():
        raise PlanError(
            f"{where}: treatment and control must name the same matrix values, so that pairs can be formed."
        )
    if comparison.treatment == comparison.control:
        raise PlanError(f"{where}: treatment and control are the same.")
    pairs = comparison.pairs(items)
    if not pairs:
        raise PlanError(
            f"{where}: no variant of the treatment has a partner of the control with equal other matrix values. "
            "Look at what the stage excludes."
        )
    unnamed = [name for name in matrix.keys() - comparison.treatment.keys() - {PAIRED_BY} if _varies(name, pairs)]
    if unnamed:
        raise PlanError(
            f"{where}: pairs with equal seed differ in {', '.join(sorted(unnamed))}, but runs of one seed are not "
            "independent of each other. Name one value of each in treatment and control."
        )


def _varies(name: str, pairs: Iterable[tuple[InMatrix, InMatrix]]) -> bool:
    return len({str(treatment.matrix.get(name)) for treatment, _ in pairs}) > 1
