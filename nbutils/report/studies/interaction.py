"""Interaction in the report: what each arm reached and at how many words, whether its judge can be believed, samples.

Nothing is shown of studies without runs of an interaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped
from nbutils.interaction import DISTILL
from nbutils.report.arms import named
from nbutils.report.evidence import Arm, Evidence, Study
from nbutils.report.page import MOST_ARMS, behind, figure_of, frame_of, heading, more_arms, section, stacked, table
from nbutils.report.studies.description import Description, Formula, has, reports, settings_of
from nbutils.report.studies.gains import gains, round_table
from nbutils.report.studies.interaction_figures import beside, rewarded, rounds_and_judges
from nbutils.report.studies.judges import judge_table
from nbutils.report.studies.rounds import (
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
    words_beside,
    words_of,
)
from nbutils.report.tables import Column, arms_table, mean_and_interval, measured, with_control
from nbutils.runs import UNKNOWN, measure

TITLE = "Interaction"
TOLD = (
    "A student that writes, and learns from what a judge or a teacher makes of it, beside one that reads on. Arms are "
    "compared by the words they used: those of people, of the student and of the teacher."
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
    return section(TITLE, TOLD, *parts)


def _group(group: Group, folder: Path) -> HTML:
    study, shown = group.study, one_of_each_method(group.study, MOST_ARMS)
    absent = [arm.label for arm in study.arms if is_interaction(arm) and not any(len(rounds_of(r)) for r in arm.runs)]
    caption = FIGURE_CAPTION + PANELS_CAPTION * (len(rewarded(shown)) > 1) + JUDGES_CAPTION * bool(beside(shown))
    caption += more_arms(len(study.arms) - len(shown.arms), "in the tables alone")
    caption += f" Without rounds: {'; '.join(absent)}." * bool(absent)
    return stacked(
        arm_table(study),
        aspect_table(study),
        response_table(study),
        figure_of(shown, rounds_and_judges, "rounds", caption, folder, whole=True),
        gains(study),
        word_table(study),
        equal_words(group),
        judge_table(study),
        round_table(study, MOST_ARMS),
    )


# ---- what was reached ------------------------------------------------------------------------------------------------


def arm_table(study: Study) -> HTML:
    """Every arm and how good its runs are: both judges, perplexity, minimal pairs; text alone marked."""
    titles = _reported(study, TITLES)
    columns = {
        title: partial(_score, study, metric) if metric.endswith(SCORES) else own
        for (metric, title), own in zip(titles.items(), measured(titles).values(), strict=True)
    }
    caption = ARMS_CAPTION + PAIRS_CAPTION * any(metric.endswith("_acc") for metric in titles) + _otherwise(study)
    return arms_table(study, columns, caption, name=with_control(study))


def response_table(study: Study) -> HTML:
    """What the responses of each arm look like; empty where none were measured."""
    titles = _reported(study, OF_RESPONSES)
    arms = [arm for arm in study.arms if any(map(arm.results, titles))]
    told = f" Arms marked {OTHERWISE} above were asked otherwise here, too." * bool(_otherwise(study))
    columns = measured(titles)
    shown = arms_table(study, columns, RESPONSES_CAPTION + told, arms, with_control(study), counted="")
    return shown if arms else HTML("")


def _reported(study: Study, titles: Mapping[str, str]) -> dict[str, str]:
    """The results that hold the measures of `titles`, of those that any run reports."""
    return {metric: title for name, title in titles.items() if (metric := study.reported(name))}


def _score(study: Study, metric: str, arm: Arm) -> str:
    """A judge's score, with a dagger where it cannot be set beside that of the first arm."""
    first, judge = study.arms[0], JUDGES["second_judge" in metric]
    cell = mean_and_interval(arm.results(metric), measure(metric))
    if cell == UNKNOWN or not (is_interaction(first) and scored_otherwise(arm, first, judge)):
        return cell
    number, *interval = cell.split("\n")
    return "\n".join([f"{number} {OTHERWISE}", *interval])


def aspect_table(study: Study) -> HTML:
    """What each judge says of single aspects, a line for each and a column an arm; empty where none is reported."""
    arms = [arm for arm in study.arms if is_interaction(arm)]
    rows = []
    for metric, title in _reported(study, TITLES).items():
        beginning = metric.removesuffix("score")
        for name in _aspects(arms, beginning) if metric.endswith(SCORES) else ():
            aspect = named(name.removeprefix(beginning)).replace("_", " ")
            row = {"Judge": title.replace("\n", " ").removesuffix("'s score (0 to 1)").removesuffix(" (0 to 1)")}
            told = {arm.label: f"{arm.mean(name):.2f}" if arm.results(name) else UNKNOWN for arm in arms}
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
            values = [f"{name} {named(arm.params.get(name))}, not {named(first.params.get(name))}" for name in names]
            told.append(f"{arm.label} ({'; '.join(values)})")
    if not told:
        return ""
    return f" {OTHERWISE} Asked otherwise than {first.label}, so not to be set beside it: {'; '.join(told)}."


# ---- words -----------------------------------------------------------------------------------------------------------


def word_table(study: Study) -> HTML:
    """The words of each arm by who wrote them, and what they were used in; empty without a ledger."""
    if not any(map(words_of, study.arms)):
        return HTML("")
    titles = dict(zip((*WORDS, "all_words"), ("people", "student", "teacher", "together"), strict=True))
    columns: dict[str, Column] = {title: partial(_words, name) for name, title in titles.items()}
    if of_control := words_of(study.control).get("all_words") if study.control else None:
        columns["against\ntext alone"] = lambda arm: (
            f"× {words_of(arm)['all_words'] / of_control:.2f}" if words_of(arm) else UNKNOWN
        )
    columns["Rounds"] = lambda arm: _average(frame.index.max() for frame in _rounds(arm))
    columns["Examples\nlearned from"] = lambda arm: _average(
        frame["examples"].sum() for frame in _rounds(arm) if "examples" in frame
    )
    caption = f"Words used. {WORDS_CAPTION}" + DISTILLED_CAPTION * (DISTILL in map(method_of, study.arms))
    return arms_table(study, columns, caption, name=with_control(study), counted="")


def _words(name: str, arm: Arm) -> str:
    return measure(name).number(words_of(arm).get(name, np.nan))


def _rounds(arm: Arm) -> list[pd.DataFrame]:
    return [frame for run in arm.runs if len(frame := rounds_of(run))]


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


SETTINGS = {"Method": "method", "Judge": "judge", "Held-out judge": "second_judge", "Rubric": "rubric"}
SETTINGS |= {"Corrections by": "correcting_teacher", "Rounds": "rounds"}
FORMULAS = (
    Formula(
        "Objective",
        "of each method, in rounds",
    ),
    Formula(
        "Text",
        "CE on what people wrote",
        has("method", "text"),
    ),
    Formula(
        "Distillation in rounds",
        "(1 − w) CE + w T² KL(t ‖ p) on what people wrote, with t the teacher's and p the student's softmax at T",
        has("method", "distill"),
    ),
    Formula(
        "SFT",
        "CE on the teacher's corrections of samples",
        has("method", "sft"),
    ),
    Formula(
        "SimPO",
        "−log σ(β (m<sub>w</sub> − m<sub>l</sub>) − γ) + w CE<sub>w</sub>, with m the mean log-probability of a "
        "response's tokens, its end included, w the preferred and l the other",
        has("method", "simpo", "simpo_judge", "three_way"),
    ),
    Formula(
        "Three-way",
        "SimPO on the pairs of people &gt; teacher &gt; student, each pass another",
        has("method", "three_way"),
    ),
    Formula(
        "PPO",
        "−min(r A, clip(r, 1 ± ε) A) with r = p / p<sub>sampled</sub> and generalised advantages A of score and KL",
        has("method", "ppo"),
    ),
    Formula(
        "RLOO",
        "−(R − mean R of the prompt's other samples) log p",
        has("method", "rloo"),
    ),
    Formula(
        "Judge's score",
        "the mean of its aspects, each in [0, 1]; of a model the expected value over the numbers it may answer. "
        "What gives no number is left out and counted",
        reports("judge_score"),
    ),
    Formula(
        "KL from the start",
        "mean over the places of sampled responses of Σ p (log p − log p<sub>start</sub>) over the vocabulary, "
        "exact at each; the price that rewards pay is of the sampled tokens alone",
        reports("kl_to_start"),
    ),
    Formula(
        "Minimal pairs",
        "share of pairs with Σ log p(good) &gt; Σ log p(bad), the first token unscored where nothing precedes it;"
        " mean over paradigms, as BabyLM's pipeline has it, not comparable with lm-eval",
        reports("pairs_acc", "blimp_acc"),
    ),
    Formula(
        "Distinct-n, repetition",
        "different n-grams of words over all n-grams, of all responses together; share of 4-grams that came "
        "before in their response",
        reports("distinct_2"),
    ),
)
INTERACTION = Description(
    name="interaction",
    parameter="prompts_per_round",
    formulas=FORMULAS,
    settings=lambda params: settings_of(
        SETTINGS | ({"Distilled from": "distilling_teacher"} if params.get("method") == DISTILL else {})
    )(params),
    sections=interaction,
    cautions=(words_beside,),
)
