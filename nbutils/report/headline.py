"""The table that a study opens with: what each arm reached, and its difference to the control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from IPython.display import HTML

from nbutils.report.arms import FLOORS, mean_of
from nbutils.report.evidence import BEFORE, Arm, Study
from nbutils.report.studies.smoothing import smooths
from nbutils.report.studies.teachers import has_teacher
from nbutils.report.tables import ACROSS_TOKENIZERS, arms_table, difference_lines, interval_of, with_control
from nbutils.runs import UNKNOWN, measure

HEADLINE = ("perplexity", "ce_loss", "bits_per_byte", "unsmoothed_bits_per_byte", "token_acc", "cosine")
HEADLINE += ("kl_to_teacher", "bleu")
EXPLORATORY = "†"


def headline_table(study: Study) -> HTML:
    """Arm by measure: mean, 95 % interval over seeds, and the seed-paired difference to the control."""
    names = [metric for name in HEADLINE if name not in _aside(study) and (metric := study.final(name))]
    names += [j.contrast.metric for j in study.judged if j.contrast.metric not in names]
    columns = {}
    for metric in filter(study.reports, dict.fromkeys(names)):
        quantity = measure(metric)
        title = quantity.axis + (f"\n({quantity.better} is better)" if quantity.better else "")
        columns[title] = partial(_headline_cell, study, metric)
    note = "Mean (of perplexity the geometric one), 95 % interval over seeds"
    if study.control:
        note += ", both of the seeds that the control has, and Δ: seed-paired difference to it with its interval"
    if any(EXPLORATORY in cell(arm) for cell in columns.values() for arm in study.arms):
        note += f". {EXPLORATORY} exploratory: no planned contrast asks this; 95 % interval, not corrected"
    above = _floors(study, [metric for metric in dict.fromkeys(names) if study.reports(metric)], list(columns))
    note += ". Models of counts: interpolated Kneser-Ney, of as many tokens as were seen" * bool(above)
    note += f". {ACROSS_TOKENIZERS}" * any(name.endswith("bits_per_byte") for name in filter(study.reports, names))
    return arms_table(study, columns, f"{note.removesuffix('.')}.", name=with_control(study), above=above)


def _floors(study: Study, metrics: Sequence[str], titles: Sequence[str]) -> list[dict[str, str]]:
    """A row for each model of counts that the runs report, the weakest first: its cross entropy and perplexity."""
    rows = []
    for floor in FLOORS:
        row = {"Arm": f"{floor} model", "Seeds": ""}
        for metric, title in zip(metrics, titles, strict=True):
            split, _, name = metric.partition("_")
            levels = [value for arm in study.own_arms for value in arm.results(f"{floor}_{split}_ce_loss")]
            is_told = name in ("ce_loss", "perplexity") and levels
            level = float(np.mean(levels)) if is_told else math.nan
            row[title] = measure(metric).number(math.exp(level) if name == "perplexity" else level) if is_told else ""
        if any(row[title] for title in titles):
            rows.append(row)
    return rows


def _aside(study: Study) -> set[str]:
    """Measures that are no goal of a study, so that its table fits a page; a contrast that asks brings them back."""
    if smooths(study):
        return {"cosine", "token_acc"}  # bits per byte stand beside those with the smoothing taken out
    if not has_teacher(study) and not study.reports(BEFORE):
        return {"bits_per_byte"}  # teachers, students and their baselines alone have several tokenizers in one plan
    return {"cosine", "token_acc"} if study.final("bleu") else {"cosine"}


def shared_results(study: Study, arm: Arm, metric: str) -> list[float]:
    """`metric` of the seeds that the control has, too: what stands beside a paired difference; else of all."""
    theirs = study.control.by_seed(metric) if study.control else {}
    return [value for seed, value in arm.by_seed(metric).items() if seed in theirs] or arm.results(metric)


def _headline_cell(study: Study, metric: str, arm: Arm) -> str:
    """Mean, interval and difference, a line each."""
    values, quantity = shared_results(study, arm, metric), measure(metric)
    if not values:
        return UNKNOWN
    lines = [quantity.number(mean_of(values, quantity)), quantity.interval(*interval_of(values, quantity))]
    if study.control is None or arm is study.control or not study.control.results(metric):
        return "\n".join(lines)
    mark = "" if study.asked(arm, metric) else f" {EXPLORATORY}"
    difference, interval = difference_lines(study, arm, metric)
    return "\n".join([*lines, f"Δ {difference}{mark}", interval])
