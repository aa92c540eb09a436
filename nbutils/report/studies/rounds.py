"""What the runs of interactions say: arms of several stages beside each other, the words each spent, who judged them.

Stages of one plan belong together where a contrast takes its control from another one, or where they begin with the
same model on the same data. Arms are compared by words; their scores only where they were asked the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbutils.interaction import DISTILL, JUDGED, NO_JUDGE, STORY, taught_by
from nbutils.report.arms import named
from nbutils.report.evidence import Arm, Evidence, Judged, Study
from nbutils.report.statistics import mean_interval
from nbutils.runs import measure

if TYPE_CHECKING:
    from nbutils.runs import Run

TEXT = "text"
METHOD_WORDS = {
    TEXT: "text alone",
    DISTILL: "distillation",
    "sft": "imitation (SFT)",
    "simpo": "SimPO on corrections",
    "simpo_judge": "SimPO by the judge",
    "three_way": "three-way SimPO",
    "ppo": "PPO",
    "rloo": "RLOO",
}
WORDS = ("human_words", "student_words", "teacher_words")
PLACES = ("all_words", "step")  # of a round: what was used until then, and how often the student was changed
ABOUT = 1.05  # word counts no further apart than by this factor count as equal
MOST_ROUNDS = 1e9  # a larger number is none of a round
ASKED = ("judged_samples", "judged_stories")  # contexts and stories that every arm is asked to write on from
SCORES = ("judge_score", "second_judge_score")
STORY_SCORES = ("story_judge_score", "story_second_judge_score")
JUDGES = ("judge", "second_judge")
BEGINNING = ("start_model", "model_name", "data_folder")


@dataclass(frozen=True)
class Compared:
    """A contrast with its sides, None where that side has no arm."""

    judged: Judged
    treatment: Arm | None
    control: Arm | None


@dataclass(frozen=True)
class Group:
    """Stages that belong together as one study: its arms by short names, text alone first, and their contrasts."""

    study: Study
    contrasts: tuple[Compared, ...] = ()


def interacts(study: Study) -> bool:
    """Whether a study's own runs are of an interaction."""
    return any(map(is_interaction, study.own_arms))


def is_interaction(arm: Arm) -> bool:
    """Whether an arm's runs learned in rounds of samples."""
    return "prompts_per_round" in arm.params


def method_of(arm: Arm) -> str:
    """The method of an arm of an interaction; of one without runs what the plan says, empty of others."""
    params = arm.params or arm.values
    return str(params.get("method", "")) if is_interaction(arm) or not arm.runs else ""


def learns_from_scores(arm: Arm) -> bool:
    """Whether the first judge's scores are what an arm learned from."""
    return method_of(arm) in JUDGED


# ---- stages that belong together -------------------------------------------------------------------------------------


def groups(evidence: Evidence) -> list[Group]:
    """The interactions of every plan, stages that belong together as one."""
    return [_joined(studies) for plan in evidence.plans for studies in _together(plan.studies)]


def _together(studies: Iterable[Study]) -> list[list[Study]]:
    """Studies of a plan in which an interaction takes part, as connected sets."""
    found: list[list[Study]] = []
    for study in studies:
        if not any(map(is_interaction, study.arms)):
            continue
        ties = _ties(study)
        near = [each for each in found if any(ties & _ties(other) for other in each)]
        found = [each for each in found if each not in near] + [[*(other for each in near for other in each), study]]
    return [each for each in found if any(map(interacts, each))]


def _ties(study: Study) -> set[str]:
    """What ties a study to others: its stage, the stages of its controls, and what its runs begin with."""
    stages = {study.stage, *(arm.borrowed_from for arm in study.arms if arm.borrowed_from)}
    params = [run.params for arm in study.own_arms if is_interaction(arm) for run in arm.runs]
    return {f"stage {each}" for each in stages} | {str([each.get(name) for name in BEGINNING]) for each in params}


def _joined(studies: Sequence[Study]) -> Group:
    arms: dict[tuple[str, str], Arm] = {}
    compared = []
    for study in studies:
        asked = [(judged, *study.sides(judged.contrast)) for judged in study.judged]
        asked = [each for each in asked if interacts(study) or any(side and is_interaction(side) for side in each[1:])]
        sides = [side for each in asked for side in each[1:] if side is not None]
        own = study.own_arms if interacts(study) else []
        for arm in (*own, *sides):
            key = _key(study, arm)
            if key not in arms or arm in own:  # a borrowed one is the same under another label
                arms[key] = replace(arm, borrowed_from="" if interacts(study) and arm in own else key[0])
        compared += [(judged, *(side and _key(study, side) for side in both)) for judged, *both in asked]
    named_arms = dict(zip(arms, _named(list(arms.items()), len(studies) > 1), strict=True))
    ordered = sorted(named_arms.values(), key=lambda arm: (method_of(arm) != TEXT, not is_interaction(arm)))
    control = ordered[0] if method_of(ordered[0]) == TEXT else None
    study = Study(studies[0].plan, ", ".join(each.stage for each in studies), (), tuple(ordered), control)
    told = [Compared(judged, named_arms.get(first), named_arms.get(second)) for judged, first, second in compared]
    return Group(study, tuple(told))


def _key(study: Study, arm: Arm) -> tuple[str, str]:
    return arm.borrowed_from or study.stage, str(sorted(arm.values.items(), key=str))


def _named(arms: Sequence[tuple[tuple[str, str], Arm]], several: bool) -> list[Arm]:
    """The arms by their methods; where two have the same, what their labels say beside, with the stage if need be."""
    methods = [METHOD_WORDS.get(method_of(arm), "") for _, arm in arms]
    labels = [_beside(method, methods, arm) for method, (_, arm) in zip(methods, arms, strict=True)]
    told = []
    for label, ((stage, _), arm) in zip(labels, arms, strict=True):
        is_placed = arm.label == stage or arm.label.endswith(f"(stage {stage})")
        is_clear = is_placed or (labels.count(label) == 1 and label != arm.label)
        told.append(replace(arm, label=label if is_clear or not several else f"{label} (stage {named(stage)})"))
    return told


def _beside(method: str, methods: Sequence[str], arm: Arm) -> str:
    """What an arm is called by its method and, where that is not its alone, by its label without it."""
    if not method or methods.count(method) == 1:
        return method or arm.label
    rest = [part for part in arm.label.split(", ") if part != f"method {method_of(arm)}"]
    return ", ".join([method, *rest])


# ---- scores ----------------------------------------------------------------------------------------------------------


def scored_otherwise(arm: Arm, other: Arm, judge: str = "judge") -> list[str]:
    """The parameters in which two arms' scores by a judge, "judge" or "second_judge", differ; none: comparable."""
    return [name for name in (judge, *ASKED) if arm.params.get(name) != other.params.get(name)]


def one_of_each_method(study: Study, most: int) -> Study:
    """The study with at most so many arms: one of each method first, comparable scores before others."""
    first = study.control or study.arms[0]
    arms = sorted(study.arms, key=lambda arm: (not arm.runs, bool(_asked_otherwise(arm, first))))
    firsts = {method_of(arm) or arm.label: arm for arm in reversed(arms)}
    chosen = [arm.label for arm in arms if arm in firsts.values()] + [arm.label for arm in arms]
    chosen = [*dict.fromkeys(chosen)][:most]
    return replace(study, arms=tuple(arm for arm in study.arms if arm.label in chosen))


def _asked_otherwise(arm: Arm, other: Arm) -> list[str]:
    return [name for judge in JUDGES for name in scored_otherwise(arm, other, judge)]


def writes_stories(arm: Arm) -> bool:
    """Whether an arm learned from responses to the story prompt."""
    return arm.params.get("prompts") == STORY


def text_beside(study: Study, arm: Arm) -> Arm | None:
    """The arm of text alone whose scores by both judges can be set beside those of `arm`."""
    texts = [each for each in study.arms if method_of(each) == TEXT]
    return next((each for each in texts if not _asked_otherwise(arm, each)), None)


def holds_out(arm: Arm) -> bool:
    """Whether its second judge is another than the first, and none that taught it."""
    params = arm.params
    return params.get("second_judge", NO_JUDGE) not in (NO_JUDGE, params.get("judge"), *taught_by(params).values())


# ---- rounds and words ------------------------------------------------------------------------------------------------


def rounds_of(run: Run) -> pd.DataFrame:
    """rounds.csv as numbers, by round, with `all_words`; what is none is NaN. Empty where there is none."""
    frame = run.rounds()
    if "round" not in frame.columns:
        return pd.DataFrame()
    frame = frame.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    frame = frame.dropna(subset="round").drop_duplicates("round")
    parts = [frame[name] if name in frame.columns else np.nan for name in WORDS]
    return frame.assign(all_words=sum(parts)).set_index("round").sort_index()


def by_round(arm: Arm, column: str) -> pd.DataFrame:
    """`column` by round: columns words, step and mean over an arm's seeds, low and high of the 95 % interval."""
    frames = [frame for run in arm.runs if column in (frame := rounds_of(run)).columns]
    if not frames:
        return pd.DataFrame(columns=["words", "step", "mean", "low", "high"])
    kept = [frame.reindex(columns=[*PLACES, column]).dropna(subset=column) for frame in frames]
    rows = {
        number: (*own[[*PLACES]].mean(), own[column].mean(), *mean_interval(own[column]))
        for number, own in pd.concat(kept).groupby(level=0)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["words", "step", "mean", "low", "high"])


def words_of(arm: Arm) -> dict[str, float]:
    """human_words, student_words, teacher_words and their sum, all_words, mean over seeds; empty without a ledger."""
    if not all(map(arm.results, WORDS)):
        return {}
    means = {name: arm.mean(name) for name in WORDS}
    return means | {"all_words": sum(means.values())}


def times(more: float, less: float) -> float:
    """How many times as many words, at least 1; infinity where one side has none and the other has."""
    low, high = sorted((more, less))
    return 1.0 if high == low else high / low if low > 0 else float("inf")


def unequal_words(treatment: Arm | None, control: Arm | None) -> str:
    """That two arms were compared at unequal words, or that it cannot be told; empty where they were equal."""
    sides = [arm for arm in (treatment, control) if arm is not None and arm.runs]
    if len(sides) < 2 or not any(map(is_interaction, sides)):
        return ""
    if uncounted := [named(arm.label) for arm in sides if not words_of(arm)]:
        return f"No words were counted of {' and '.join(uncounted)}: whether they were equal cannot be told."
    less, more = sorted(((words_of(arm)["all_words"], named(arm.label)) for arm in sides), key=lambda side: side[0])
    if (factor := times(more[0], less[0])) <= ABOUT:
        return ""
    number = measure("all_words").number
    told = f" ({factor:.2f} times as many)" if np.isfinite(factor) else ""
    return f"The words were unequal: {more[1]} used {number(more[0])}{told}, {less[1]} {number(less[0])}."


def words_beside(judged: Judged, study: Study) -> list[str]:
    """A sentence on the words of both sides of a contrast, where they are not equal."""
    told = unequal_words(*study.sides(judged.contrast))
    return [told] if told else []


def sampled_rounds(samples: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Samples of the first, the middle and the last round that has any, each round once."""
    by_number: dict[float, list[Mapping[str, Any]]] = {}
    for each in samples:
        number = each.get("round") if isinstance(each, Mapping) else None
        if isinstance(number, int | float) and 0 <= number < MOST_ROUNDS:
            by_number.setdefault(number, []).append(each)
    numbers = sorted(by_number)
    chosen = dict.fromkeys((numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1])) if numbers else {}
    return [by_number[number] for number in chosen]
