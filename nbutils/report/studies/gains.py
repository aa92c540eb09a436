"""Whether students' gains with a judge are gains: what a held-out judge says, people's text, samples over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped, shortened
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import more_arms, side_by_side
from nbutils.report.statistics import mean_interval
from nbutils.report.studies.rounds import (
    SCORES,
    STORY_SCORES,
    holds_out,
    is_interaction,
    learns_from_scores,
    one_of_each_method,
    sampled_rounds,
    text_beside,
    writes_stories,
)
from nbutils.runs import UNKNOWN, measure

COLUMNS = ("First round", "Halfway", "Last round")
LONGEST_PROMPT = 160  # characters; of a long one the end, which the student writes on from
LONGEST_REASON = 120
CAPTION = (
    "Of each arm the run with its first seed, a sample of its first, middle and last round: for one prompt where it is "
    "in all of them, else the first of each below the end of its prompt. In small print what was said of it."
)


def gains(study: Study) -> HTML:
    """A sentence on every arm that learned from scores, a warning where its gain is none or was dearly bought."""
    parts = []
    for arm in study.arms:
        if learns_from_scores(arm) and (metric := study.final(_scores_of(study, arm)[0])) and arm.results(metric):
            warns, told = _checked(study, arm)
            paragraph = f"<p>{escaped(told, LONGEST_PARAGRAPH)}</p>"
            parts.append(f'<div class="warning">{paragraph}</div>' if warns else paragraph)
    return HTML("".join(parts))


def _scores_of(study: Study, arm: Arm) -> tuple[str, str]:
    """Both judges' scores of what an arm learned to write, where stories were judged at all."""
    return STORY_SCORES if writes_stories(arm) and study.final(STORY_SCORES[0]) else SCORES


def _checked(study: Study, arm: Arm) -> tuple[bool, str]:
    """(whether a reader must be warned, what there is to say) of one arm that learned from scores."""
    if not holds_out(arm):
        return (
            True,
            f"{arm.label}: no other judge than the one it learned from has scored it: nothing checks its score.",
        )
    text, metrics = text_beside(study, arm), [study.final(name) for name in _scores_of(study, arm)]
    if text is None or None in metrics:
        return False, f"{arm.label}: no arm of text alone was asked the same: whether its score is a gain is unknown."
    found = [arm.minus(text, metric) for metric in metrics]
    if min(map(len, found)) < 2:
        return False, f"{arm.label}: with fewer than two seed pairs no gain of its score can be told from noise."
    first, second = (_difference(SCORES[0], each) for each in found)
    (low, _), (least, most) = map(mean_interval, found)
    on = " on stories" if _scores_of(study, arm) == STORY_SCORES else ""
    said = f"against {text.label} the judge it learned from says {first}{on}, the held-out judge {second}"
    if not low > 0:
        return False, f"{arm.label}: {said}. The first is no gain beyond the noise of seeds."
    is_worse, price = _price(study, arm, text)
    beside = f"{price}{_agreement(arm, bool(on))}"
    if float(np.mean(found[1])) < 0:
        why = "it has learned what its judge likes, not to write better"
        if most < 0:
            return True, f"Reward hacking in {arm.label}: {said}. {why.capitalize()}.{beside}"
        return True, f"{arm.label}: {said}. The second sees no gain; perhaps {why}.{beside}"
    if is_worse:
        scores = "Both scores rose" if least > 0 else "Only the first score rose beyond noise"
        return True, f"{arm.label}: {said}. {scores}, but it predicts what people wrote worse.{beside}"
    return False, f"{arm.label}: {said}. {'Both see the gain' if least > 0 else 'Only the first sees a gain'}.{beside}"


def _difference(name: str, values: list[float]) -> str:
    """A mean difference with its interval."""
    quantity = measure(name)
    return f"{quantity.difference(float(np.mean(values)))} {quantity.difference_interval(*mean_interval(values))}"


def _price(study: Study, arm: Arm, text: Arm) -> tuple[bool, str]:
    """(whether cross entropy is worse than that of text alone beyond noise, a sentence on it and perplexity)."""
    loss, perplexity = study.final("ce_loss"), study.final("perplexity")
    if not loss or not perplexity or len(lost := arm.minus(text, loss)) < 2:
        return False, ""
    ours, theirs = (measure("perplexity").number(each.mean(perplexity)) for each in (arm, text))
    told = f" Perplexity of what people wrote: {ours}, {text.label} {theirs}"
    return mean_interval(lost)[0] > 0, f"{told} (cross entropy {_difference('ce_loss', lost)} nats per token)."


def _agreement(arm: Arm, of_stories: bool) -> str:
    """A sentence on how alike both judges rank an arm's responses."""
    name = "story_judges_agreement" if of_stories else "judges_agreement"
    values = arm.results(name)
    return f" The judges' rank correlation on its responses: {measure(name).number(np.mean(values))}." if values else ""


def round_table(study: Study, most: int) -> HTML:
    """Samples of at most so many arms over their rounds, one of each method first; empty where no run kept any."""
    samples = {arm.label: chosen for arm in study.arms if (chosen := _chosen(arm))}
    if not samples:
        return HTML("")
    sampled = replace(study, arms=tuple(arm for arm in study.arms if arm.label in samples))
    shown = one_of_each_method(sampled, most).arms
    rows = [_row(arm.label, samples[arm.label]) for arm in shown]
    return side_by_side(COLUMNS, rows, CAPTION + more_arms(len(samples) - len(shown), "left out"))


def _row(label: str, chosen: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """An arm, with the prompt if all its samples have one, and a cell for each round."""
    prompts = {_prompt(each) for each in chosen}
    title = label + (f": {prompts.pop()}" if len(prompts) == 1 else "")
    cells = [_cell(each, with_prompt=len(prompts) > 1) for each in chosen]
    return title, [cells[0], *[UNKNOWN] * (len(COLUMNS) - len(cells)), *cells[1:]]


def _chosen(arm: Arm) -> list[Mapping[str, Any]]:
    """A sample of each chosen round, for one prompt if they share one."""
    rounds = sampled_rounds(arm.runs[0].round_samples()) if is_interaction(arm) else []
    kept = [{str(each.get("prompt")): each for each in reversed(samples)} for samples in rounds]
    shared = (
        next((prompt for prompt in reversed(kept[0]) if all(prompt in own for own in kept)), None) if kept else None
    )
    return [own[shared] if shared is not None else samples[0] for own, samples in zip(kept, rounds, strict=True)]


def _prompt(sample: Mapping[str, Any]) -> str:
    text = str(sample.get("prompt", "")).strip()
    return text if len(text) <= LONGEST_PROMPT else f"… {text[-LONGEST_PROMPT:]}"


def _cell(sample: Mapping[str, Any], with_prompt: bool) -> str:
    """What was written in a round, behind the round's number, and what judge and teacher made of it."""
    where = f"Round {sample['round']:,.0f}" + f": {_prompt(sample)}" * with_prompt
    parts = [f"<small>{escaped(where)}</small>", escaped(str(sample.get("completion", "")).strip() or "(nothing)")]
    told = _told(sample)
    return "<br>".join([*parts, *(f"<small>{escaped(each)}</small>" for each in told)])


def _told(sample: Mapping[str, Any]) -> Sequence[str]:
    """The score, or why there is none, and the correction."""
    score, raw = sample.get("score"), str(sample.get("raw") or "").strip()
    told = []
    if isinstance(score, int | float):
        told.append(f"Score {measure('reward').number(score)}")
    elif raw:
        told.append(f"No score; the judge said: {shortened(raw, LONGEST_REASON)}")
    if sample.get("correction") is not None:
        told.append(f"Corrected: {str(sample['correction']).strip()}")
    return told
