"""Run folders grouped for comparison: plans, studies (one stage of a plan), arms, and contrasts judged on seed pairs.

An arm is a stage's runs that differ in nothing but seeds. Runs that the plan does not name, or made with
other parameters than it has now, are never averaged in: they are left out and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils import statistics
from nbutils.errors import WorkbookError

if TYPE_CHECKING:
    from nbutils.contrasts import Comparison, Contrast
    from nbutils.plans import Plan
    from nbutils.runs import Run

SEEDS = ("seed", "noise_seed")  # they repeat an arm, they do not make another one
FINAL = ("test_", "eval_")  # prefixes of what a trained model was judged on, the better split first


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
    """The usable runs of one matrix combination, one a seed, in the order of the seeds; `planned` are to be made."""

    label: str
    values: dict[str, Any]
    runs: tuple[Run, ...]
    planned: int

    def results(self, metric: str) -> list[float]:
        """`metric` of every run that reports it; nan where the run diverged."""
        return list(self.by_seed(metric).values())

    def by_seed(self, metric: str) -> dict[Any, float]:
        """`metric` of every run that reports it, by the run's seed."""
        return {run.matrix.get("seed"): number(run.result[metric]) for run in self.runs if metric in run.result}


@dataclass(frozen=True)
class Judged:
    """A planned contrast, its verdict, the pairs it lacks and why, and the A/A noise floor in its metric."""

    contrast: Contrast
    verdict: statistics.Verdict
    missing: tuple[str, ...] = ()
    floor: statistics.NoiseFloor | None = None


@dataclass(frozen=True)
class Study:
    """One stage of one plan: its arms, the control first where a contrast names one, and its verdicts."""

    plan: str
    stage: str
    slots: tuple[Slot, ...]
    arms: tuple[Arm, ...]
    control: Arm | None = None
    judged: tuple[Judged, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.plan}-{self.stage}"

    @property
    def runs(self) -> list[Run]:
        """The runs of all arms; without the A/A repeats."""
        return [run for arm in self.arms for run in arm.runs]

    def reports(self, metric: str) -> bool:
        """Whether any arm has a result called `metric`."""
        return any(arm.results(metric) for arm in self.arms)

    def foremost(self, most: int) -> Study:
        """The study with at most so many arms: the control, those that contrasts ask about, then the others."""
        sides = [side for each in self.judged for side in (each.contrast.treatment, each.contrast.control)]
        order = [self.control, *map(self.arm_of, sides), *self.arms]
        chosen: list[Arm] = []
        for arm in order:
            if arm is not None and arm not in chosen:
                chosen.append(arm)
        return replace(self, arms=tuple(arm for arm in self.arms if arm in chosen[:most]))

    def final(self, name: str) -> str | None:
        """The result that holds measure `name`: on the test split if any run has it, else on validation."""
        return next((prefix + name for prefix in FINAL if self.reports(prefix + name)), None)

    def arm_of(self, values: dict[str, Any]) -> Arm | None:
        """The arm with these matrix values, seeds aside; None where they fit several or none."""
        return next((arm for arm in self.arms if arm.values == _without_seeds(values)), None)

    def asked(self, arm: Arm, metric: str) -> Judged | None:
        """The planned contrast of `arm` with the control in `metric`; None: such a comparison is exploratory."""
        for judged in self.judged:
            sides = [self.arm_of(judged.contrast.treatment), self.arm_of(judged.contrast.control)]
            contrast = judged.contrast
            if contrast.metric == metric and not contrast.control_metric and sides == [arm, self.control]:
                return judged
        return None

    def differences(self, arm: Arm, metric: str) -> list[float]:
        """`arm` minus the control in `metric`, for every seed that both have."""
        control = self.control.by_seed(metric) if self.control else {}
        return [value - control[seed] for seed, value in arm.by_seed(metric).items() if seed in control]


@dataclass(frozen=True)
class PlanEvidence:
    """One plan with its runs. `problems` are sentences, on a plan that does not load or was edited since.

    `unplanned` are runs in the plan's folder that it does not name. `contrasts_changed`: whether it asks
    now what it did not ask before its first run, None where that was not recorded.
    """

    name: str
    studies: tuple[Study, ...]
    slots: tuple[Slot, ...]
    unplanned: tuple[Run, ...]
    contrasts_changed: bool | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that a report speaks of."""

    folder: Path
    plans: tuple[PlanEvidence, ...] = ()

    @property
    def studies(self) -> list[Study]:
        return [study for plan in self.plans for study in plan.studies]

    @property
    def slots(self) -> list[Slot]:
        return [slot for plan in self.plans for slot in plan.slots]

    @property
    def unplanned(self) -> list[Run]:
        return [run for plan in self.plans for run in plan.unplanned]


def gather(folder: Path, plan: str = "") -> Evidence:
    """The evidence in runs folder `folder`: of one plan, by name or file, or of every plan that has runs.

    A plan is read from the copy its last batch left with the runs, or from `plan` where that is a file. Runs
    made by hand in a notebook count only where `plan` is "interactive". Raises PlanError where `plan` names
    neither a plan nor runs.
    """
    from nbutils.plans import INTERACTIVE, find_plan, load_plan
    from nbutils.runs import load_runs

    runs = load_runs(folder)
    names = sorted({run.plan for run in runs})
    if not plan:
        names = [name for name in names if name != INTERACTIVE]
        return Evidence(folder, tuple(_plan_evidence(folder, name, runs) for name in names))
    if plan not in names or plan.endswith((".yaml", ".yml")):
        file = find_plan(plan)
        return Evidence(folder, (_plan_evidence(folder, load_plan(file).name, runs, file),))
    return Evidence(folder, (_plan_evidence(folder, plan, runs),))


def _plan_evidence(folder: Path, name: str, all_runs: Sequence[Run], file: Path | None = None) -> PlanEvidence:
    """What the runs of the plan called `name` show; from `file`, or from the copy kept with the runs."""
    from nbutils.batch import PLAN_FILE
    from nbutils.plans import INTERACTIVE, find_plan, load_plan

    kept, current, problems, plan = folder / name / PLAN_FILE, find_plan(name), [], None
    if file is None and kept.is_file() and current.is_file() and kept.read_bytes() != current.read_bytes():
        problems.append(
            f"Plan {name}: the file was edited after the last batch, whose copy is judged here. Run the batch "
            "again to take the edit in; what has finished is not repeated."
        )
    try:
        if name != INTERACTIVE:
            plan = load_plan(file or (kept if kept.is_file() else current))
    except WorkbookError as error:
        problems.append(f"Plan {name}: {error} Its contrasts are unknown, so all of it is exploratory.")
    slots, unplanned = fill_slots([run for run in all_runs if run.plan == name], plan)
    studies = plan_studies(name, slots, plan)
    changed = _contrasts_changed(folder / name, plan)
    return PlanEvidence(name, tuple(studies), tuple(slots), tuple(unplanned), changed, tuple(problems))


def _contrasts_changed(plan_folder: Path, plan: Plan | None) -> bool | None:
    """Whether `plan` asks now what it did not ask before its first run; None where that was not recorded."""
    from nbutils.contrasts import USED_FILE, contrasts_sha256
    from nbutils.files import read_json

    record = plan_folder / USED_FILE
    if plan is None or not record.is_file():
        return None
    return read_json(record)[0]["sha256"] != contrasts_sha256(plan.comparisons)


def fill_slots(runs: Sequence[Run], plan: Plan | None) -> tuple[list[Slot], list[Run]]:
    """Every variant of `plan` with its run, and the runs it does not name. Without a plan every run is its own."""
    if plan is None:
        # a run made by hand has no stage: its notebook stands alone
        return [Slot(run.stage or run.variant, run.variant, run.matrix, run) for run in runs], []
    found = {run.variant: run for run in runs}
    slots = []
    for variant in plan.variants:
        run = found.pop(variant.name, None)
        made_with = run.params if run else {}
        expected = variant.params.items()
        other = [f"{name} {made_with[name]}, not {v}" for name, v in expected if made_with.get(name, v) != v]
        slots.append(Slot(variant.stage, variant.name, variant.matrix, run, ", ".join(other)))
    return slots, list(found.values())


def plan_studies(name: str, slots: Sequence[Slot], plan: Plan | None) -> list[Study]:
    """The stages of one plan that train or judge a model, with the plan's contrasts judged as one family."""
    contrasts = plan.contrasts if plan else ()
    verdicts = judge_contrasts(contrasts, slots, plan.noise_floor if plan else None)
    studies = []
    for stage in dict.fromkeys(slot.stage for slot in slots):
        own = [slot for slot in slots if slot.stage == stage]
        judged = [verdict for verdict in verdicts if verdict.contrast.stage == stage]
        judged.sort(key=lambda verdict: not verdict.contrast.primary)
        arms = group_arms(own)
        control = None
        if judged:
            values = _without_seeds(judged[0].contrast.control)
            control = next((arm for arm in arms if arm.values == values), None)
            arms.sort(key=lambda arm: arm is not control)
        study = Study(name, stage, tuple(own), tuple(arms), control, tuple(judged))
        if judged or study.final("ce_loss"):
            studies.append(study)
    return studies


def one_run(folder: Path) -> Study:
    """The run in `folder`, finished or not, as a study of its own: for figures in the notebook that makes it."""
    from nbutils.runs import load_runs

    (run,) = load_runs(folder)
    return Study(run.plan, run.stage or run.variant, (), (Arm(run.variant, run.matrix, (run,), 1),))


def group_arms(slots: Sequence[Slot]) -> list[Arm]:
    """The arms of one stage, in the order of its matrix; repeats with another noise seed (A/A) are left out.

    An arm without a usable run is an arm all the same. Labels name what the matrix varies first, and what else differs
    from the first arm: "alpha 0.5, cos_topk 256".
    """
    noise_seeds = [slot.matrix["noise_seed"] for slot in slots if "noise_seed" in slot.matrix]
    first_noise = min(noise_seeds, default=None)
    groups: list[tuple[dict[str, Any], list[Slot]]] = []
    for slot in slots:
        if slot.matrix.get("noise_seed", first_noise) != first_noise:
            continue
        values = _without_seeds(slot.matrix)
        group = next((members for known, members in groups if known == values), None)
        if group is None:
            group = []
            groups.append((values, group))
        group.append(slot)
    names = dict.fromkeys(name for values, _ in groups for name in values)
    first = groups[0][0] if groups else {}
    differing = [name for name in names if any(values.get(name) != first.get(name) for values, _ in groups)]
    return [
        Arm(
            ", ".join(
                f"{name} {values[name]}"
                for name in differing
                if name in values and (name == differing[0] or values[name] != first.get(name))
            )
            or members[0].stage,
            values,
            tuple(slot.run for slot in sorted(members, key=_seed) if slot.run is not None and not slot.trouble),
            len(members),
        )
        for values, members in groups
    ]


def judge_contrasts(
    contrasts: Iterable[Contrast], slots: Sequence[Slot], noise_floor: Comparison | None
) -> list[Judged]:
    """Every contrast's verdict, from the pairs of which both runs are usable; the others are named with the cause."""
    contrasts = list(contrasts)
    paired = [_differences(each, slots, each.metric, each.control_metric or each.metric) for each in contrasts]
    verdicts = statistics.judge([(c, values) for c, (values, _) in zip(contrasts, paired, strict=True)])
    result = []
    for contrast, verdict, (_, missing) in zip(contrasts, verdicts, paired, strict=True):
        floor = None
        if noise_floor is not None and noise_floor.stage == contrast.stage:
            values, _ = _differences(noise_floor, slots, contrast.metric, contrast.metric)
            floor = statistics.NoiseFloor(tuple(values)) if values else None
        result.append(Judged(contrast, verdict, tuple(missing), floor))
    return result


def _differences(
    comparison: Comparison, slots: Sequence[Slot], metric: str, control_metric: str
) -> tuple[list[float], list[str]]:
    """Treatment's `metric` minus control's `control_metric` for each usable pair; what is wrong with each other."""
    values, missing = [], []
    for treatment, control in comparison.pairs(slots):
        troubles = [
            f"{slot.variant}: {slot.trouble or f'has no {name}'}"
            for slot, name in ((treatment, metric), (control, control_metric))
            if slot.trouble or name not in slot.run.result
        ]
        if troubles:
            missing.append("; ".join(troubles))
        else:
            values.append(number(treatment.run.result[metric]) - number(control.run.result[control_metric]))
    return values, missing


def number(value: object) -> float:
    """A stored result as a float; what is none (null: the run diverged) is nan."""
    return float(value) if isinstance(value, int | float) else float("nan")


def _without_seeds(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in SEEDS}


def _seed(slot: Slot) -> Any:
    return slot.matrix.get("seed", 0)
