"""What a study's runs say of their teacher: is it better than the student that learned without one?"""

from __future__ import annotations

from dataclasses import dataclass

from nbutils.report.evidence import Arm, Judged, Study
from nbutils.runs import measure

WORDS = "teacher_words"  # of an interaction, whose teacher is no teacher of a distillation
PREFIX = "teacher_"  # of results that are the teacher's


@dataclass(frozen=True)
class AgainstControl:
    """A teacher's cross entropy beside the mean of the student that learned from cross entropy alone.

    `arms` are the labels of those it taught.
    """

    metric: str
    teacher: float
    control: float
    control_label: str
    arms: tuple[str, ...]

    @property
    def is_better(self) -> bool:
        """Whether the teacher predicts better than that student; not where either diverged."""
        return self.teacher < self.control

    @property
    def sentence(self) -> str:
        """What the two numbers say, in plain words."""
        quantity = measure(self.metric)
        told = (
            f"The teacher is {'better' if self.is_better else 'no better'} than the student trained on cross entropy "
            f"alone, {self.control_label}: {quantity.label} {quantity.number(self.teacher)} against "
            f"{quantity.number(self.control)} {quantity.unit}."
        )
        if self.is_better:
            return told
        return f"{told} What distillation changes here is not the knowledge of a better model."


def has_teacher(study: Study) -> bool:
    """Whether any run of a study reports what its teacher reached."""
    names = {name for arm in study.own_arms for run in arm.runs for name in run.result} - {WORDS}
    return any(name.startswith(PREFIX) for name in names)


def is_taught(arm: Arm) -> bool:
    """Whether a teacher has any weight in an arm's objective."""
    return arm.params.get("divergence", "none") != "none" and arm.params.get("kl_weight", 1) != 0


def without_teacher(study: Study) -> Arm | None:
    """The arm that learned from cross entropy alone: the control where it did, else the first that did."""
    arms = sorted(study.arms, key=lambda arm: arm is not study.control)
    return next((arm for arm in arms if arm.runs and _is_plain(arm)), None)


def _is_plain(arm: Arm) -> bool:
    return not is_taught(arm) if "divergence" in arm.params else arm.params.get("alpha") == 0


def against_control(study: Study) -> list[AgainstControl]:
    """Every teacher of a study against the student without one; empty where there is none, or no common result."""
    control, metric = without_teacher(study), study.final("ce_loss")
    if control is None or metric is None or not control.results(metric):
        return []
    teachers: dict[str, list[Arm]] = {}
    for arm in study.own_arms:
        if is_taught(arm) and arm.results(PREFIX + metric):
            teachers.setdefault(measure(metric).number(arm.mean(PREFIX + metric)), []).append(arm)
    reached = control.mean(metric), control.label
    return [
        AgainstControl(metric, arms[0].mean(PREFIX + metric), *reached, tuple(arm.label for arm in arms))
        for arms in teachers.values()
    ]


def no_better(judged: Judged, study: Study) -> list[str]:
    """The sentence on the treatment's teacher, where that is no better than the student without one."""
    arm = study.sides(judged.contrast)[0]
    found = [each for each in against_control(study) if not each.is_better]
    return [each.sentence for each in found if arm is not None and arm.label in each.arms]


def of_few_teachers(judged: Judged, study: Study) -> list[str]:
    """What the pairs of a taught arm generalise over: seeds of the student, under so many teachers."""
    arm = study.sides(judged.contrast)[0]
    if arm is None or not is_taught(arm):
        return []
    inputs = [run.manifest.get("inputs", {}).get("teacher", {}) for run in arm.runs]
    teachers = {each.get("fingerprint") or each.get("folder") for each in inputs} - {None}
    if not teachers or len(teachers) == len(arm.runs):
        return []
    told = "one teacher" if len(teachers) == 1 else f"{len(teachers)} teachers"
    return [f"The pairs are of {len(arm.runs)} seeds of the student and {told}: they say nothing of other teachers."]
