"""The tables of a study: headline numbers, cost, and how well the documents stand for others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.foundation import escaped
from nbutils.report import statistics
from nbutils.report.page import frame_of, table
from nbutils.report.smoothing_results import smooths
from nbutils.report.studies import BEFORE, Arm, Study
from nbutils.report.teachers import has_teacher
from nbutils.runs import UNKNOWN, Measure, measure

HEADLINE = ("perplexity", "ce_loss", "bits_per_byte", "unsmoothed_bits_per_byte", "token_acc", "cosine")
HEADLINE += ("kl_to_teacher", "bleu")
COSTS = ("train_seconds", "tokens_per_second", "peak_memory_mib", "tokens_seen", "parameters")
EXPLORATORY = "†"
ACROSS_TOKENIZERS = "Between models of different tokenizers only bits per byte are comparable."


def headline_table(study: Study) -> HTML:
    """Arm by measure: mean, 95 % interval over seeds, and the seed-paired difference to the control."""
    names = [metric for name in HEADLINE if name not in _aside(study) and (metric := study.final(name))]
    names += [j.contrast.metric for j in study.judged if j.contrast.metric not in names]
    metrics = [metric for metric in dict.fromkeys(names) if study.reports(metric)]
    rows = {
        "Arm": [arm.label + ("\n(control)" if arm is study.control else "") for arm in study.arms],
        "Seeds": [seeds(arm) for arm in study.arms],
    }
    for metric in metrics:
        quantity = measure(metric)
        title = quantity.axis + (f"\n({quantity.better} is better)" if quantity.better else "")
        rows[title] = [_headline_cell(study, arm, metric) for arm in study.arms]
    note = "Mean, 95 % interval over seeds"
    if study.control:
        note += ", and Δ: seed-paired difference to the control with its interval"
    if any(EXPLORATORY in cell for column in rows.values() for cell in column):
        note += f". {EXPLORATORY} exploratory: no planned contrast asks this; 95 % interval, not corrected"
    note += f". {ACROSS_TOKENIZERS}" * any(name.endswith("bits_per_byte") for name in metrics)
    control = [arm is study.control for arm in study.arms]
    return table(frame_of(rows), f"{note.removesuffix('.')}.", marked=control)


def _aside(study: Study) -> set[str]:
    """Measures that are no goal of a study, so that its table fits a page; a contrast that asks brings them back."""
    if smooths(study):
        return {"cosine", "token_acc"}  # bits per byte stand beside those with the smoothing taken out
    if not has_teacher(study) and not study.reports(BEFORE):
        return {"bits_per_byte"}  # teachers, students and their baselines alone have several tokenizers in one plan
    return {"cosine", "token_acc"} if study.final("bleu") else {"cosine"}


def _headline_cell(study: Study, arm: Arm, metric: str) -> str:
    """Mean, interval and difference, a line each."""
    values, quantity = arm.results(metric), measure(metric)
    if not values:
        return UNKNOWN
    lines = [quantity.number(float(np.mean(values))), quantity.interval(*statistics.mean_interval(values))]
    if study.control is None or arm is study.control or not study.control.results(metric):
        return "\n".join(lines)
    mark = "" if study.asked(arm, metric) else f" {EXPLORATORY}"
    difference, interval = difference_lines(study, arm, metric)
    return "\n".join([*lines, f"Δ {difference}{mark}", interval])


def difference_lines(study: Study, arm: Arm, metric: str) -> tuple[str, str]:
    """An arm's seed-paired difference to the control and its interval: the planned contrast's, or the 95 % one."""
    judged, quantity = study.asked(arm, metric), measure(metric)
    if judged and judged.verdict.outcome != statistics.NOT_JUDGED:
        difference, low, high = judged.verdict.difference, judged.verdict.low, judged.verdict.high
    else:
        differences = study.differences(arm, metric)
        difference = float(np.mean(differences)) if differences else math.nan
        low, high = statistics.mean_interval(differences)
    return quantity.difference(difference), quantity.difference_interval(low, high)


def cost_table(study: Study) -> HTML:
    """What each arm cost: mean and 95 % interval over seeds, time also as a multiple of the control's."""
    rows: dict[str, list[str]] = {"Arm": [arm.label for arm in study.arms], "Seeds": [seeds(a) for a in study.arms]}
    for name in filter(study.reports, COSTS):
        rows[measure(name).axis] = [mean_and_interval(arm.results(name), measure(name)) for arm in study.arms]
    control = study.control.results("train_seconds") if study.control else []
    if control:
        times = [arm.results("train_seconds") for arm in study.arms]
        rows["time against\nthe control"] = [f"× {np.mean(t) / np.mean(control):.2f}" if t else UNKNOWN for t in times]
    marked = [arm is study.control for arm in study.arms]
    return table(frame_of(rows), "Mean and 95 % interval over seeds. Training only; evaluation not counted.", marked)


def measure_table(study: Study, names: Sequence[str], caption: str, absent: str) -> HTML:
    """Arm by measure, mean with 95 % interval over seeds, of those of `names` that any run reports.

    A name without a split stands for the result on test, or on validation where there is no test. `absent` is shown
    where nothing was reported.
    """
    found = [metric for name in names if (metric := study.final(name) or (name if study.reports(name) else None))]
    if not found:
        return HTML(f'<p class="note">{escaped(absent)}</p>')
    rows = {"Arm": [arm.label for arm in study.arms], "Seeds": [seeds(arm) for arm in study.arms]}
    for metric in found:
        rows[measure(metric).axis] = [mean_and_interval(arm.results(metric), measure(metric)) for arm in study.arms]
    return table(frame_of(rows), caption, [arm is study.control for arm in study.arms])


def document_table(study: Study) -> HTML:
    """How far other documents would move each arm's perplexity: bootstrap over the documents it was judged on."""
    rows = []
    for arm in study.arms:
        frames = [run.per_document() for run in arm.runs]
        documents = pd.concat([frame for frame in frames if len(frame)]) if any(map(len, frames)) else pd.DataFrame()
        for split in ("test", "validation"):
            own = documents[documents["split"] == split] if len(documents) else documents
            if len(own):
                sums = own.groupby("document")[["ce_sum", "tokens"]].mean()
                interval = np.exp(statistics.document_interval(sums["ce_sum"], sums["tokens"]))
                perplexity = measure("perplexity")
                value = math.exp(sums["ce_sum"].sum() / sums["tokens"].sum())
                rows.append(
                    {
                        "Arm": arm.label,
                        "Split": split,
                        "Documents": f"{len(sums):,}",
                        "Perplexity": perplexity.number(value),
                        "95 % interval over documents": perplexity.interval(*interval),
                    }
                )
                break
    if not rows:
        return HTML("<p>No run has kept its sums per document.</p>")
    return table(frame_of(rows), "No comparison of arms can be read from it: they share the documents.")


def mean_and_interval(values: Sequence[float], quantity: Measure) -> str:
    """Mean over its interval, or the mean alone where all seeds agree."""
    if not values:
        return UNKNOWN
    mean = quantity.number(float(np.mean(values)))
    return mean if np.ptp(values) == 0 else f"{mean}\n{quantity.interval(*statistics.mean_interval(values))}"


def seeds(arm: Arm) -> str:
    """How many seeds an arm's numbers rest on: "5", or "4 of 5" where runs are missing."""
    return str(len(arm.runs)) if len(arm.runs) == arm.planned else f"{len(arm.runs)} of {arm.planned}"
