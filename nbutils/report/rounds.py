"""Samples over the rounds of an interaction: what a student wrote first, midway and last, and what it was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from IPython.display import HTML

from nbutils.foundation import escaped, shortened
from nbutils.report.interaction_results import is_interaction, one_of_each_method, sampled_rounds
from nbutils.report.page import more_arms, side_by_side
from nbutils.report.studies import Arm, Study
from nbutils.runs import UNKNOWN, measure

COLUMNS = ("First round", "Halfway", "Last round")
LONGEST_PROMPT = 160  # characters; of a long one the end, which the student writes on from
LONGEST_REASON = 120
CAPTION = (
    "Of each arm the run with its first seed, a sample of its first, middle and last round: for one prompt where it is "
    "in all of them, else the first of each below the end of its prompt. In small print what was said of it."
)


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
