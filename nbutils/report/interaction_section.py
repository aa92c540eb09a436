"""Interaction in the report: what each arm reached and at how many words, whether its judge can be believed, samples.

Nothing is shown of studies without runs of an interaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped
from nbutils.interaction import DISTILL
from nbutils.report import figures
from nbutils.report.arms import named
from nbutils.report.figures.interaction import beside, rewarded
from nbutils.report.gains import gains, round_table
from nbutils.report.interaction_results import (
    ABOUT,
    JUDGES,
    SCORES,
    WORDS,
    Group,
    groups,
    is_interaction,
    method_of,
    one_of_each_method,
    rounds_of,
    scored_otherwise,
    times,
    unequal_words,
    words_of,
)
from nbutils.report.judges import judge_table
from nbutils.report.page import MOST_ARMS, behind, figure_of, frame_of, heading, more_arms, stacked, table
from nbutils.report.smoothing_results import reported
from nbutils.report.studies import Arm, Evidence, Study
from nbutils.report.tables import mean_and_interval, seeds
from nbutils.runs import UNKNOWN, measure

TITLE = (
    "<h2>Interaction</h2><p>A student that writes, and learns from what a judge or a teacher makes of it, beside one "
    "that reads on. Arms are compared by the words they used: those of people, of the student and of the teacher.</p>"
)
# Titles in the tables of arms; what a judge says of single aspects stands below its score.
TITLES = {
    "judge_score": "first judge's score\n(0 to 1)",
    "second_judge_score": "held-out judge's score\n(0 to 1)",
    "story_judge_score": "first judge, stories\n(0 to 1)",
    "story_second_judge_score": "held-out judge, stories\n(0 to 1)",
    "perplexity": "perplexity",
    "pairs_acc": "minimal pairs of our own\n(%)",
    "blimp_acc": "BLiMP\n(%)",
}
OF_RESPONSES = {
    "distinct_2": "distinct\nword pairs (%)",
    "repetition": "repetition\n(%)",
    "response_words": "words of a\nresponse",
    "kl_to_start": "KL from the start\n(nats per token)",
}
NO_ASPECTS = ("score", "failures", "not_asked", "number_mass")
MOST_ASPECTS = 6
ARMS_CAPTION = (
    "Mean and 95 % interval over seeds. Every arm writes on from the "
    "same test blocks, which none learned from, and, as stories, from one opening; judges grade either by one rubric "
    "for all. Perplexity is of what people wrote."
)
ASPECTS = "Single aspects of the scores"
ASPECTS_CAPTION = "Means over seeds, from 0 to 1."
PAIRS_CAPTION = " Minimal pairs: the grammatical sentence is the more probable one, mean over kinds of pairs."
RESPONSES_CAPTION = (
    "The responses that the judges read, mean and 95 % interval over seeds. Repetition: runs of four words that came "
    "before in their text. KL: how far the student has gone from what all arms began with."
)
OTHERWISE = "†"
FIGURE_CAPTION = (
    "Mean over seeds with the 95 % interval as a band. Reward: the first judge's mean score of each round's samples, "
    "over all words used so far. KL: over optimiser steps, for rounds differ in length."
)
PANELS_CAPTION = (
    " Rewards of other judges, rubrics or prompts cannot be set beside each other and have panels of their own."
)
JUDGES_CAPTION = (
    " Last: both judges at the end, of arms that were asked as the first was; faint marks are seeds. In grey a student "
    "has gained with the judge it could learn from and lost with the other."
)
WORDS_CAPTION = (
    "Mean over seeds. People: the prompts and whatever else people wrote that was learned from; teacher: corrections, "
    "and a word for each grade that a judge was asked to teach by. Words of a judge that only looks on are not counted."
)
DISTILLED_CAPTION = " The distributions of a teacher that is distilled from cost no words: it writes none."


def interaction(evidence: Evidence, folder: Path) -> HTML:
    """The whole section, its heading included, figures saved in `folder`; empty where no run was an interaction."""
    parts = [HTML(heading(group.study, evidence) + _group(group, folder).data) for group in groups(evidence)]
    return stacked(HTML(TITLE), *parts) if parts else HTML("")


def _group(group: Group, folder: Path) -> HTML:
    study, shown = group.study, one_of_each_method(group.study, MOST_ARMS)
    absent = [arm.label for arm in study.arms if is_interaction(arm) and not any(len(rounds_of(r)) for r in arm.runs)]
    caption = FIGURE_CAPTION + PANELS_CAPTION * (len(rewarded(shown)) > 1) + JUDGES_CAPTION * bool(beside(shown))
    caption += more_arms(len(study.arms) - len(shown.arms), "in the tables alone")
    caption += f" Without rounds: {'; '.join(absent)}." * bool(absent)
    parts = [
        arm_table(study),
        aspect_table(study),
        response_table(study),
        figure_of(shown, figures.rounds_and_judges, "rounds", caption, folder, whole=True),
        gains(study),
        word_table(study),
        equal_words(group),
        judge_table(study),
        round_table(study, MOST_ARMS),
    ]
    return stacked(*(part for part in parts if part.data))


# ---- what was reached ------------------------------------------------------------------------------------------------


def arm_table(study: Study) -> HTML:
    """Every arm and how good its runs are: both judges, perplexity, minimal pairs; text alone marked."""
    titles = _reported(study, TITLES)
    rows = []
    for arm in study.arms:
        row = {"Arm": _name(arm, study), "Seeds": seeds(arm)}
        for metric, title in titles.items():
            row[title] = mean_and_interval(arm.results(metric), measure(metric))
            if metric.endswith(SCORES):
                row[title] = _marked(row[title], study, arm, metric)
        rows.append(row)
    caption = ARMS_CAPTION + PAIRS_CAPTION * any(metric.endswith("_acc") for metric in titles) + _otherwise(study)
    return table(frame_of(rows), caption, [arm is study.control for arm in study.arms])


def response_table(study: Study) -> HTML:
    """What the responses of each arm look like; empty where none were measured."""
    titles = _reported(study, OF_RESPONSES)
    arms = [arm for arm in study.arms if any(map(arm.results, titles))]
    rows = [
        {"Arm": _name(arm, study)}
        | {title: mean_and_interval(arm.results(metric), measure(metric)) for metric, title in titles.items()}
        for arm in arms
    ]
    caption = RESPONSES_CAPTION + f" Arms marked {OTHERWISE} above were asked otherwise here, too." * bool(
        _otherwise(study)
    )
    return table(frame_of(rows), caption, [arm is study.control for arm in arms]) if rows else HTML("")


def _reported(study: Study, titles: Mapping[str, str]) -> dict[str, str]:
    """The results that hold the measures of `titles`, of those that any run reports."""
    return {metric: title for name, title in titles.items() if (metric := reported(study, name))}


def _name(arm: Arm, study: Study) -> str:
    return arm.label + "\n(control)" * (arm is study.control)


def _marked(cell: str, study: Study, arm: Arm, metric: str) -> str:
    """A score with a dagger where it cannot be set beside that of the first arm."""
    if cell == UNKNOWN or not (is_interaction(study.arms[0]) and scored_otherwise(arm, study.arms[0], _judge(metric))):
        return cell
    number, *interval = cell.split("\n")
    return "\n".join([f"{number} {OTHERWISE}", *interval])


def _judge(metric: str) -> str:
    """Which judge a score is of."""
    return JUDGES["second_judge" in metric]


def aspect_table(study: Study) -> HTML:
    """What each judge says of single aspects, a line for each and a column an arm; empty where none is reported."""
    arms = [arm for arm in study.arms if is_interaction(arm)]
    rows = []
    for metric, title in _reported(study, TITLES).items():
        beginning = metric.removesuffix("score")
        for name in _aspects(arms, beginning) if metric.endswith(SCORES) else ():
            aspect = named(name.removeprefix(beginning)).replace("_", " ")
            row = {"Judge": title.replace("\n", " ").removesuffix("'s score (0 to 1)").removesuffix(" (0 to 1)")}
            values = {arm.label: arm.results(name) for arm in arms}
            told = {label: f"{float(np.mean(own)):.2f}" if own else UNKNOWN for label, own in values.items()}
            rows.append(row | {"Aspect": aspect} | told)
    return behind(ASPECTS, table(frame_of(rows), ASPECTS_CAPTION, text=("Judge", "Aspect")) if rows else HTML(""))


def _aspects(arms: Sequence[Arm], beginning: str) -> list[str]:
    """The results that hold a judge's aspects."""
    names = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.result if name.startswith(beginning))
    return [name for name in names if name.removeprefix(beginning) not in NO_ASPECTS][:MOST_ASPECTS]


def _otherwise(study: Study) -> str:
    """A sentence on the arms whose scores are marked."""
    first, told = study.arms[0], []
    for arm in study.arms if is_interaction(first) else ():
        names = dict.fromkeys(name for judge in JUDGES for name in scored_otherwise(arm, first, judge))
        if is_interaction(arm) and names:
            ours, theirs = arm.runs[0].params, first.runs[0].params
            values = [f"{name} {named(ours.get(name))}, not {named(theirs.get(name))}" for name in names]
            told.append(f"{arm.label} ({'; '.join(values)})")
    if not told:
        return ""
    return f" {OTHERWISE} Asked otherwise than {first.label}, so not to be set beside it: {'; '.join(told)}."


# ---- words -----------------------------------------------------------------------------------------------------------


def word_table(study: Study) -> HTML:
    """The words of each arm by who wrote them, and what they were used in; empty without a ledger."""
    if not any(map(words_of, study.arms)):
        return HTML("")
    of_control = words_of(study.control).get("all_words") if study.control else None
    titles = dict(zip((*WORDS, "all_words"), ("people", "student", "teacher", "together"), strict=True))
    rows = []
    for arm in study.arms:
        spent, frames = words_of(arm), [frame for run in arm.runs if len(frame := rounds_of(run))]
        row = {"Arm": _name(arm, study)}
        row |= {title: measure(name).number(spent.get(name, np.nan)) for name, title in titles.items()}
        if of_control:
            row["against\ntext alone"] = f"× {spent['all_words'] / of_control:.2f}" if spent else UNKNOWN
        row["Rounds"] = _average(frame.index.max() for frame in frames)
        row["Examples\nlearned from"] = _average(frame["examples"].sum() for frame in frames if "examples" in frame)
        rows.append(row)
    caption = f"Words used. {WORDS_CAPTION}" + DISTILLED_CAPTION * (DISTILL in map(method_of, study.arms))
    return table(frame_of(rows), caption, [arm is study.control for arm in study.arms])


def _average(values: Iterable[float]) -> str:
    found = [float(value) for value in values]
    return f"{np.mean(found):,.0f}" if found else UNKNOWN


def equal_words(group: Group) -> HTML:
    """Which arms used about as many words, and which contrasts compare arms that did not."""
    sentences = _alike(group.study.arms)
    counted = [each for each in group.contrasts if all(side and side.runs for side in (each.treatment, each.control))]
    told = [(each.judged.contrast.name, unequal_words(each.treatment, each.control)) for each in counted]
    unequal = [f"Contrast {named(name)}: {text[0].lower()}{text[1:]}" for name, text in told if text]
    if told and not unequal:
        which = "Every planned contrast" if len(counted) == len(group.contrasts) else "Every contrast that has runs"
        sentences.append(f"{which} compares arms at about equal words.")
    items = "".join(f"<li>{escaped(text, LONGEST_PARAGRAPH)}</li>" for text in (*sentences, *unequal))
    return HTML(f"<ul>{items}</ul>" if items else "")


def _alike(arms: Sequence[Arm]) -> list[str]:
    """A sentence on each set of arms with about equal words, all within the factor ABOUT of the fewest."""
    counted = sorted((words_of(arm)["all_words"], arm.label) for arm in arms if words_of(arm))
    sets: list[list[tuple[float, str]]] = []
    for count, label in counted:
        if sets and times(count, sets[-1][0][0]) <= ABOUT:
            sets[-1].append((count, label))
        else:
            sets.append([(count, label)])
    number = measure("all_words").number
    return [
        f"About equal words (within {100 * (ABOUT - 1):.0f} %), {number(own[0][0])} to {number(own[-1][0])}: "
        f"{'; '.join(label for _, label in own)}."
        for own in sets
        if len(own) > 1
    ]
