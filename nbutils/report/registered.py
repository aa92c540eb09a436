"""The pairs that a plan registered, held against its runs: what each contrast comes to, and since when it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbutils.report.arms import Slot, named, number
from nbutils.report.judging import Look, Verdict, judge
from nbutils.report.statistics import NoiseFloor

if TYPE_CHECKING:
    from nbutils.runs import Comparison, Contrast, Plan, Registration, Run


@dataclass(frozen=True)
class Judged:
    """A planned contrast, its verdict, the pairs it lacks and why, and the A/A noise floor in its metric.

    `seeds` names the pairs behind the verdict's differences, one a difference.
    """

    contrast: Contrast
    verdict: Verdict
    missing: tuple[str, ...] = ()
    floor: NoiseFloor | None = None
    seeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registered:
    """When the contrasts that a plan has now were written down, beside the first start of a run they ask about.

    at, began: ISO 8601, UTC; empty where nothing recorded it. changed: whether they asked something else before.
    """

    at: str = ""
    began: str = ""
    changed: bool = False

    @property
    def is_before(self) -> bool:
        """Whether they stood, as they are, when the first run began."""
        return bool(self.at) and not self.changed and (not self.began or self.at <= self.began)


def registered(records: Sequence[Registration], plan: Plan | None, slots: Sequence[Slot]) -> Registered:
    """Since when `plan` asks what it asks, and when the first run of a stage that it asks about began."""
    from nbutils.runs import contrasts_sha256

    if plan is None or not records:
        return Registered()
    stages = {stage for each in plan.contrasts for stage in (each.stage, each.stage_of_control)}
    runs = [slot.run for slot in slots if slot.run and slot.stage in stages]
    starts = [attempt["start"] for run in runs for attempt in run.manifest.get("attempts", []) if attempt.get("start")]
    now = contrasts_sha256(plan.comparisons)
    at = next((each.at for each in records if each.sha256 == now), "")
    return Registered(at, min(starts, default=""), changed=records[0].sha256 != now)


def judge_contrasts(
    plan: Plan, slots: Sequence[Slot], records: Sequence[Registration] = (), unplanned: Sequence[Run] = ()
) -> list[Judged]:
    """The verdict on every contrast of `plan`, from all pairs that were ever registered for it."""
    by_variant = {run.variant: Slot(run.stage, run.variant, run.matrix, run) for run in unplanned}
    by_variant |= {slot.variant: slot for slot in slots}
    paired = [[_pair(one, other, each, by_variant) for one, other in _all_pairs(each, slots, records)]
              for each in plan.contrasts]  # fmt: skip
    looks = [_looks(each, slots, records, pairs) for each, pairs in zip(plan.contrasts, paired, strict=True)]
    verdicts = judge(list(zip(plan.contrasts, looks, strict=True)))
    found = []
    for contrast, verdict, pairs in zip(plan.contrasts, verdicts, paired, strict=True):
        of_look = pairs[: verdict.planned]
        missing = tuple(pair.missing for pair in of_look if pair.missing)
        seeds = tuple(pair.seed for pair in of_look if not pair.missing)
        found.append(Judged(contrast, verdict, missing, floor_of(plan.noise_floor, contrast, slots), seeds))
    return found


@dataclass(frozen=True)
class _Pair:
    """A planned pair: its difference, or what is `missing`. `is_absent`: both ran, and one reports no such number."""

    seed: str
    difference: float = float("nan")
    missing: str = ""
    is_absent: bool = False


def _all_pairs(contrast: Contrast, slots: Sequence[Slot], records: Sequence[Registration]) -> list[tuple[str, str]]:
    """Every pair of variants that was ever planned, in the order of registration; then those the plan has now."""
    now = [(one.variant, other.variant) for one, other in contrast.pairs(slots)]
    registered = [pair for record in records for pair in record.pairs.get(contrast.name, ())]
    return list(dict.fromkeys([*registered, *now]))


def _looks(
    contrast: Contrast, slots: Sequence[Slot], records: Sequence[Registration], pairs: Sequence[_Pair]
) -> list[Look]:
    """One look for each registration that added pairs, and one for what the plan has now and no record has."""
    sizes = [len(_all_pairs(contrast, (), records[:number])) for number in range(1, len(records) + 1)]
    found = []
    for size in dict.fromkeys(size for size in [*sizes, len(pairs)] if size):
        own = pairs[:size]
        differences = tuple(pair.difference for pair in own if not pair.missing)
        found.append(Look(size, differences, sum(pair.is_absent for pair in own)))
    return found or [Look(0, ())]


def _pair(treatment: str, control: str, comparison: Comparison, slots: Mapping[str, Slot]) -> _Pair:
    """What two variants come to: treatment's metric minus control's `control_metric`, or metric."""
    metrics = comparison.metric, getattr(comparison, "control_metric", "") or comparison.metric
    found, troubles, waits = [], [], False
    for variant, metric in zip((treatment, control), metrics, strict=True):
        slot = slots.get(variant)
        trouble = slot.trouble if slot else "no longer in the plan, and its run is gone"
        waits |= bool(trouble)
        if not trouble and metric not in slot.run.result:
            trouble = f"has no {metric}"
        if trouble:
            troubles.append(f"{variant}: {trouble}")
        else:
            found.append(number(slot.run.result[metric]))
    seed = named(slots[treatment].matrix.get("seed", treatment)) if treatment in slots else treatment
    if troubles:
        return _Pair(seed, missing="; ".join(troubles), is_absent=not waits)
    return _Pair(seed, found[0] - found[1])


def floor_of(repeat: Comparison | None, contrast: Contrast, slots: Sequence[Slot]) -> NoiseFloor | None:
    """The A/A differences in the metric that the contrast judges its control on; None where no pair has it."""
    if repeat is None or repeat.stage not in (contrast.stage, contrast.stage_of_control):
        return None
    by_variant = {slot.variant: slot for slot in slots}
    for metric in dict.fromkeys([contrast.metric, contrast.control_metric or contrast.metric]):
        asked = replace(repeat, metric=metric)
        pairs = [_pair(one.variant, other.variant, asked, by_variant) for one, other in repeat.pairs(slots)]
        if values := tuple(pair.difference for pair in pairs if not pair.missing):
            return NoiseFloor(values)
    return None
