"""Run folders grouped for comparison: plans, studies (one stage of a plan), arms, and contrasts judged on seed pairs.

Runs that the plan does not name, or made with other parameters than it has now, are never averaged into an arm
(nbutils.report.arms): they are left out and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.foundation import WorkbookError
from nbutils.report.arms import Arm, Slot, group_arms, named, without_seeds
from nbutils.report.registered import Judged, Registered, judge_contrasts, registered

if TYPE_CHECKING:
    from nbutils.runs import Contrast, Plan, Registration, Run

LONGEST_FOLDER_NAME = 120  # characters; file systems allow 255 bytes
BEFORE = "before_eval_ce_loss"  # a result of runs that fine-tune a teacher
FINAL = ("test_", "eval_")  # prefixes of what a trained model was judged on, the better split first


@dataclass(frozen=True)
class Study:
    """One stage of one plan: its arms, the control first where a contrast names one, and its verdicts.

    Arms that contrasts take as controls from another stage are among its arms, but not in its slots. `repeats` are the
    pairs of the plan's noise floor, where that stands in this stage or in that of a control.
    """

    plan: str
    stage: str
    slots: tuple[Slot, ...]
    arms: tuple[Arm, ...]
    control: Arm | None = None
    judged: tuple[Judged, ...] = ()
    repeats: tuple[tuple[Slot, Slot], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.plan}-{self.stage}"

    @property
    def runs(self) -> list[Run]:
        """The runs of all arms; without the A/A repeats."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def own_arms(self) -> list[Arm]:
        """The arms that are of this stage, and not a control of another one."""
        return [arm for arm in self.arms if not arm.borrowed_from]

    def reports(self, metric: str) -> bool:
        """Whether any arm has a result called `metric`."""
        return any(arm.results(metric) for arm in self.arms)

    def foremost(self, most: int) -> Study:
        """The study with at most so many arms: the control, those that contrasts ask about, then the others."""
        order = [self.control, *(side for each in self.judged for side in self.sides(each.contrast)), *self.arms]
        chosen: list[Arm] = []
        for arm in order:
            if arm is not None and arm not in chosen:
                chosen.append(arm)
        return replace(self, arms=tuple(arm for arm in self.arms if arm in chosen[:most]))

    def final(self, name: str) -> str | None:
        """The result that holds measure `name`: on the test split if any run has it, else on validation."""
        return next((prefix + name for prefix in FINAL if self.reports(prefix + name)), None)

    def reported(self, name: str) -> str | None:
        """The result that holds measure `name`: of a split, or of none, as the harness's are."""
        return self.final(name) or (name if self.reports(name) else None)

    def arm_of(self, values: dict[str, Any], borrowed_from: str = "") -> Arm | None:
        """The arm with these matrix values, seeds aside; None where they fit several or none."""
        arms = [arm for arm in self.arms if arm.borrowed_from == borrowed_from]
        return next((arm for arm in arms if arm.values == without_seeds(values)), None)

    def sides(self, contrast: Contrast) -> tuple[Arm | None, Arm | None]:
        """The treatment's arm and the control's."""
        return self.arm_of(contrast.treatment), self.arm_of(contrast.control, contrast.control_stage or "")

    def asked(self, arm: Arm, metric: str) -> Judged | None:
        """The planned contrast of `arm` with the control in `metric`; None: such a comparison is exploratory."""
        for judged in self.judged:
            contrast = judged.contrast
            sides = self.sides(contrast)
            if contrast.metric == metric and not contrast.control_metric and sides == (arm, self.control):
                return judged
        return None

    def differences(self, arm: Arm, metric: str) -> list[float]:
        """`arm` minus the control in `metric`, for every seed that both have."""
        return arm.minus(self.control, metric)


@dataclass(frozen=True)
class PlanEvidence:
    """One plan with its runs. `problems` are sentences, on a plan that does not load or was edited since.

    `unplanned` are runs in the plan's folder that it does not name. `registered` says since when it asks what it
    asks. `teachers` are stages whose
    fine-tuned models other stages need, and that no contrast asks about. Other stages that none asks about, of one
    variant that others begin with, are no studies: their runs are among the slots alone.
    """

    name: str
    studies: tuple[Study, ...]
    slots: tuple[Slot, ...]
    unplanned: tuple[Run, ...]
    registered: Registered
    problems: tuple[str, ...]
    teachers: tuple[Study, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All that a report speaks of."""

    folder: Path
    plans: tuple[PlanEvidence, ...] = ()

    @property
    def studies(self) -> list[Study]:
        return [study for plan in self.plans for study in plan.studies]

    @property
    def teachers(self) -> list[Study]:
        return [study for plan in self.plans for study in plan.teachers]

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
    from nbutils.runs import INTERACTIVE, find_plan, load_plan, load_runs

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
    from nbutils.runs import INTERACTIVE, PLAN_FILE, find_plan, load_plan, registrations

    if file is None and not is_folder_name(name):  # manifests say so, and it may be anything: no path is made of it
        return _without_plan(name, all_runs)
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
    records = registrations(folder / name)
    studies = plan_studies(name, slots, plan, records, unplanned)
    teachers = [study for study in studies if _is_teacher(study, plan)]
    shown = [study for study in studies if study not in teachers and not _is_beginning(study, studies, plan)]
    found = tuple(slots), tuple(unplanned), registered(records, plan, slots), tuple(problems)
    return PlanEvidence(name, tuple(shown), *found, teachers=tuple(teachers))


def is_folder_name(name: str) -> bool:
    """Whether a plan's name can be that of the folder in which its runs lie, and leads nowhere else."""
    return name == Path(name).name and name not in ("", "..") and "\0" not in name and len(name) <= LONGEST_FOLDER_NAME


def _without_plan(name: str, all_runs: Sequence[Run]) -> PlanEvidence:
    """Runs of a plan that cannot have a file."""
    slots, unplanned = fill_slots([run for run in all_runs if run.plan == name], None)
    problem = f"Plan {named(name)}: this is no name of a folder, so it has no file, and all of it is exploratory."
    return PlanEvidence(
        name, tuple(plan_studies(name, slots, None)), tuple(slots), tuple(unplanned), Registered(), (problem,)
    )


def _is_teacher(study: Study, plan: Plan | None) -> bool:
    """Whether a stage made teachers. Without a plan every model that was fine-tuned counts as one."""
    return (plan is None or _is_needed(study, plan)) and study.reports(BEFORE) and not study.judged


def _is_beginning(study: Study, studies: Sequence[Study], plan: Plan | None) -> bool:
    """Whether a stage made one model that others begin with, which is compared with none."""
    compared = study.judged or any(arm.borrowed_from == study.stage for each in studies for arm in each.arms)
    return plan is not None and _is_needed(study, plan) and len(study.slots) == 1 and not compared


def _is_needed(study: Study, plan: Plan) -> bool:
    return any(study.stage in stage.needs.values() for stage in plan.stages)


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
        differing = {name: v for name, v in variant.params.items() if made_with.get(name, v) != v}
        other = [f"{name} {named(made_with[name])}, not {named(v)}" for name, v in differing.items()]
        slots.append(Slot(variant.stage, variant.name, variant.matrix, run, ", ".join(other)))
    return slots, list(found.values())


def plan_studies(
    name: str,
    slots: Sequence[Slot],
    plan: Plan | None,
    records: Sequence[Registration] = (),
    unplanned: Sequence[Run] = (),
) -> list[Study]:
    """The stages of one plan that train or judge a model, with the plan's contrasts judged as one family.

    `records`: what was registered of the plan; pairs that it names no more are looked for among the `unplanned` runs.
    """
    verdicts = judge_contrasts(plan, slots, records, unplanned) if plan else []
    arms = {
        stage: group_arms([slot for slot in slots if slot.stage == stage])
        for stage in dict.fromkeys(slot.stage for slot in slots)
    }
    studies = []
    for stage in arms:
        judged = [verdict for verdict in verdicts if verdict.contrast.stage == stage]
        judged.sort(key=lambda verdict: not verdict.contrast.primary)
        own = tuple(slot for slot in slots if slot.stage == stage)
        all_arms = (*_borrowed([each.contrast for each in judged], arms), *arms[stage])
        study = Study(name, stage, own, all_arms, judged=tuple(judged))
        if judged:
            control = study.sides(judged[0].contrast)[1]
            study = replace(study, arms=tuple(sorted(all_arms, key=lambda arm: arm is not control)), control=control)
        if plan and plan.noise_floor and plan.noise_floor.stage in {stage, *(arm.borrowed_from for arm in all_arms)}:
            study = replace(study, repeats=tuple(plan.noise_floor.pairs(slots)))
        if judged or study.final("ce_loss"):
            studies.append(study)
    return studies


def _borrowed(contrasts: Iterable[Contrast], arms: dict[str, list[Arm]]) -> list[Arm]:
    """The arms of other stages that serve as controls, each once, their stage in the label."""
    found: dict[tuple[str, str], Arm] = {}
    for contrast in contrasts:
        stage = contrast.control_stage
        for arm in arms[stage] if stage else []:
            if arm.values == without_seeds(contrast.control):
                label = arm.label if arm.label == stage else f"{arm.label} (stage {stage})"
                found[stage, label] = replace(arm, label=label, borrowed_from=stage)
    return list(found.values())


def one_run(folder: Path) -> Study:
    """The run in `folder`, finished or not, as a study of its own: for figures in the notebook that makes it."""
    from nbutils.runs import load_runs

    (run,) = load_runs(folder)
    return Study(run.plan, run.stage or run.variant, (), (Arm(run.variant, run.matrix, (run,), 1),))
