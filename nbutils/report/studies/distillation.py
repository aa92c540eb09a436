"""Teachers and distillation in the report: what a teacher learned, what its students took from it, what that cost.

Nothing is shown of studies without a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from nbutils.foundation import LONGEST_PARAGRAPH, escaped
from nbutils.report import figures
from nbutils.report.arms import number
from nbutils.report.evidence import Arm, Evidence, Study
from nbutils.report.figures.distillation import divisor, not_in_nats
from nbutils.report.page import figures_of, frame_of, of_studies, section, table
from nbutils.report.studies.answers import answers
from nbutils.report.studies.description import Description, Formula, has, reports
from nbutils.report.studies.teachers import (
    PREFIX,
    against_control,
    has_teacher,
    is_taught,
    no_better,
    of_few_teachers,
    without_teacher,
)
from nbutils.report.tables import (
    ACROSS_TOKENIZERS,
    Column,
    arms_table,
    measure_table,
    measured,
    share_and_interval,
    with_control,
)
from nbutils.runs import UNKNOWN, measure

TITLE = "Teachers and distillation"
TOLD = "What a teacher learned, whether it knew more than a student without one, and what its students took from it."
MIB = 1 << 20
PUBLISHED = ("expected_before", "expected_after")
CACHE = ("kl_error", "gradient_error", "context_kl", "bytes_per_token", "seconds")
SIZES = {
    "parameters": ("Parameters", 1.0, 0),
    "bytes_on_disk": ("Weights on disk\n(MiB)", 1 / MIB, 1),
    "generation_tokens_per_second": ("Generation\n(tokens/s)", 1.0, 1),
}
KL_CAPTION = (
    "Left: on validation over optimiser steps; a divergence term is each arm's own, T² included. Right: at the end the "
    "plain KL, alike for all arms, every seed as a faint mark, below it the mean with its 95 % interval."
)
BLEU_CAPTION = "Mean sentence BLEU of generated answers. Left: on validation over optimiser steps. Right: at the end."
TERMS_CAPTION = (
    "What each term adds to the objective: its weight times its raw value, T² included, mean over seeds with the 95 % "
    "interval as a band."
)
OVERFITTING_CAPTION = (
    "Cross entropy of a teacher while it was fine-tuned. Dashed: the best validation, whose weights teach. Where "
    "validation rises behind it, the teacher over-fits."
)


def distillation(evidence: Evidence, folder: Path) -> HTML:
    """The whole section, its heading included, figures saved in `folder`; empty where no run had a teacher."""
    made, taught = evidence.teachers, [study for study in evidence.studies if has_teacher(study)]
    learned = [study for study in taught if any(map(is_taught, study.own_arms))]
    asked = [study for study in taught if study.final("bleu")]

    def drawn(studies: Sequence[Study], draw: Callable[[Study], Figure], name: str, caption: str, **more) -> HTML:
        return figures_of(evidence, studies, draw, name, caption, folder, **more)

    return section(
        TITLE,
        TOLD,
        of_studies(evidence, made, teacher_table),
        drawn(made, figures.overfitting, "overfitting", OVERFITTING_CAPTION),
        *(of_studies(evidence, taught, show) for show in (callout, student_table)),
        drawn(taught, figures.distance_to_teacher, "kl", KL_CAPTION, more=_not_drawn),
        drawn(learned, figures.loss_terms, "terms", TERMS_CAPTION, more=_heavier),
        drawn(asked, lambda study: figures.proxy(study, "bleu"), "bleu", BLEU_CAPTION),
        *(of_studies(evidence, taught, show) for show in (compression_table, cache_table, answers)),
    )


def teacher_table(study: Study) -> HTML:
    """Every teacher of a stage before and after fine-tuning, beside what was published, and where it was best."""
    columns: dict[str, Column] = {}
    for split in ("eval_", "test_"):
        if study.reports(f"before_{split}ce_loss"):
            title = measure(f"{split}perplexity").axis + "\nbefore → after\n(cross entropy)"
            title += "\n(bits per byte)" * study.reports(f"{split}bits_per_byte")
            columns[title] = partial(_before_after, split)
    if any(value for name in PUBLISHED for arm in study.own_arms for value in arm.results(name)):
        perplexity = measure("perplexity").number
        columns["published perplexity\nbefore → after"] = lambda arm: " → ".join(
            perplexity(arm.mean(name) or math.nan) for name in PUBLISHED
        )
    columns |= {"Best step": _best_step, "Rise after the best\n(nats per token)": _rise}
    note = (
        "Mean over runs. Rise after the best: last less best validation cross entropy, which over-fitting makes "
        f"large; the weights of the best step are kept. {ACROSS_TOKENIZERS}"
    )
    return arms_table(study, columns, note, study.own_arms, counted="Runs", heading="Teacher")


def _before_after(split: str, arm: Arm) -> str:
    lines = []
    for name in ("perplexity", "ce_loss", "bits_per_byte"):
        values = [arm.mean(f"{stage}{split}{name}") for stage in ("before_", "")]
        if np.isfinite(values).any() or name != "bits_per_byte":
            lines.append(" → ".join(map(measure(name).number, values)))
    return "\n(".join([lines[0], *(f"{line})" for line in lines[1:])])


def _validation(arm: Arm) -> list[pd.DataFrame]:
    """step and eval_ce_loss of every run that logged them."""
    frames = [run.metrics() for run in arm.runs]
    frames = [frame[["step", "eval_ce_loss"]].dropna() for frame in frames if "eval_ce_loss" in frame.columns]
    return [frame.set_index("step")["eval_ce_loss"] for frame in frames if len(frame)]


def _best_step(arm: Arm) -> str:
    curves = _validation(arm)
    means = (f"{np.mean(steps):,.0f}" for steps in zip(*((own.idxmin(), own.index[-1]) for own in curves), strict=True))
    return " of ".join(means) if curves else UNKNOWN


def _rise(arm: Arm) -> str:
    rises = [own.iloc[-1] - own.min() for own in _validation(arm)]
    return measure("ce_loss").number(float(np.mean(rises))) if rises else UNKNOWN


def callout(study: Study) -> HTML:
    """Whether each teacher is better than the student without one: a warning where it is not."""
    found = against_control(study)
    if not found:
        return HTML(
            '<p class="note">No student of this stage was trained on cross entropy alone, and no contrast borrows one: '
            "whether the teacher knew more cannot be told.</p>"
        )
    parts = []
    for each in found:
        whom = f" It taught {'; '.join(each.arms)}." if len(found) > 1 else ""
        sentence = escaped(each.sentence + whom, LONGEST_PARAGRAPH)
        parts.append(f"<p>{sentence}</p>" if each.is_better else f'<div class="warning"><p>{sentence}</p></div>')
    return HTML("".join(parts))


def student_table(study: Study) -> HTML:
    """Teacher and students beside each other, and how much of the gap between them each student closed."""
    metric, control = study.final("ce_loss"), without_teacher(study)
    if metric is None or not any(arm.results(PREFIX + metric) for arm in study.own_arms):
        return HTML("")
    prefix = metric.removesuffix("ce_loss")
    beside = ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement")
    names = [metric, *(prefix + name for name in beside if study.reports(prefix + name))]
    rows = [
        {"Model": label, "Seeds": ""}
        | {measure(name).axis: measure(name).number(teacher.mean(PREFIX + name)) for name in names}
        | {"Gap closed": ""}
        for label, teacher in _teachers(study, metric).items()
    ]
    columns = measured(names) | {"Gap closed": partial(_gap_closed, control, metric)}
    note = (
        "Mean and 95 % interval over seeds. Gap closed: of the distance in cross entropy from the student without a "
        "teacher to the teacher, the share that this student gained over it, seed by seed; below 0 it lost. "
        + ACROSS_TOKENIZERS
    )
    return arms_table(study, columns, note, name=with_control(study), heading="Model", above=rows)


def _teachers(study: Study, metric: str) -> dict[str, Arm]:
    """A label for each teacher, and an arm whose runs report it."""
    found: dict[str, Arm] = {}
    for arm in study.own_arms:
        if arm.results(PREFIX + metric):
            found.setdefault(measure(metric).number(arm.mean(PREFIX + metric)), arm)
    several = len(found) > 1
    return {f"Teacher\n(of {arm.label})" if several else "Teacher": arm for arm in found.values()}


def _gap_closed(control: Arm | None, metric: str, arm: Arm) -> str:
    """The share of the gap, with its interval over seed pairs; a dash where there is no gap to close."""
    if control is None or arm is control or not is_taught(arm):
        return UNKNOWN
    gap, gains = control.mean(metric) - arm.mean(PREFIX + metric), control.minus(arm, metric)
    return share_and_interval(gains, gap) if gap > 0 and gains and np.isfinite(gains).all() else UNKNOWN


def _heavier(study: Study) -> list[str]:
    """A sentence on the arms whose divergence is divided by sequences, not by tokens."""
    arms = [arm for arm in study.own_arms if arm.params.get("kd_reduction") == "batchmean"]
    if not arms:
        return []
    block = arms[0].runs[0].data_card().get("block_size")
    times = f"{block} times, the tokens of a block," if block else "as many times as a block has tokens"
    names = "; ".join(arm.label for arm in arms)
    return [f"Under kd_reduction batchmean ({names}) the divergence is {times} heavier than per token at equal weight."]


def _not_drawn(study: Study) -> list[str]:
    """Sentences on arms whose divergence the figure's left panel divides or leaves out."""
    logs = {name: [arm for arm in study.arms if _logs(arm, name)] for name in ("eval_kl_to_teacher", "eval_kl_loss")}
    if logs["eval_kl_to_teacher"]:
        return []  # the panel shows that, which is alike for all arms
    left_out = not_in_nats(study)
    binned = [arm for arm in left_out if arm.params.get("teacher_cache") == "topk"]
    summed = [arm for arm in left_out if arm not in binned]
    divided = [arm for arm in logs["eval_kl_loss"] if arm not in left_out and divisor(arm) != 1]
    sentences = (
        (binned, "Not on the left: {}, whose teacher's top k were stored: all other tokens are in one bin, which makes "
         "the divergence smaller by construction."),
        (summed, "Not on the left: {}, whose divergence is a sum over sequences of unlike lengths."),
        (divided, "On the left the sums of {} over a block are divided by its tokens."),
    )  # fmt: skip
    return [sentence.format("; ".join(arm.label for arm in arms)) for arms, sentence in sentences if arms]


def _logs(arm: Arm, column: str) -> bool:
    return any(column in run.metrics().columns for run in arm.runs)


def compression_table(study: Study) -> HTML:
    """Parameters, bytes on disk and speed of teacher and students, and how many times smaller and faster they are."""
    names = [name for name in SIZES if study.reports(name) and study.reports(PREFIX + name)]
    if not names:
        return HTML("")
    sizes: dict[tuple[float, ...], list[Arm]] = {}
    for arm in study.own_arms:
        if arm.results(PREFIX + names[0]):
            sizes.setdefault((arm.mean(names[0]), arm.mean(PREFIX + names[0])), []).append(arm)
    rows = []
    for arms in sizes.values():
        which = f"\n({'; '.join(arm.label for arm in arms)})" if len(sizes) > 1 else ""
        teacher, student = ({name: _pooled(arms, prefix + name) for name in names} for prefix in (PREFIX, ""))
        rows += [{"Model": f"Teacher{which}"} | _sizes(teacher), {"Model": f"Student{which}"} | _sizes(student)]
        rows.append({"Model": "Student against teacher"} | {SIZES[n][0]: _times(n, teacher, student) for n in names})
    note = "Speeds of both models were measured in the student's run, in turns, so on one machine. Mean over runs."
    return table(frame_of(rows), note)


def _times(name: str, teacher: dict[str, float], student: dict[str, float]) -> str:
    """How many times faster or smaller the student is."""
    told, (above, below) = ("faster", (student, teacher)) if "per_second" in name else ("smaller", (teacher, student))
    return f"{above[name] / below[name]:.1f} times {told}" if below[name] else UNKNOWN


def _sizes(values: dict[str, float]) -> dict[str, str]:
    return {SIZES[n][0]: f"{value * SIZES[n][1]:,.{SIZES[n][2]}f}" for n, value in values.items()}


def cache_table(study: Study) -> HTML:
    """What a stored teacher takes and how far it is from the live one; empty where none was stored."""
    names = [f"{PREFIX}cache_{name}" for name in CACHE]
    if not any(map(study.reports, names)):
        return HTML("")
    caption = (
        "The teacher was run once and what it said was stored. Both errors are relative: of the divergence and of its "
        "gradient, as shares of what the live teacher gives on the same positions."
    )
    if study.reports(f"{PREFIX}cache_context_kl"):
        caption += (
            " Random chunks are served from positions that the store holds, with the contexts these were computed "
            "with; the KL between stored and own context is what that changes, at the temperature of the term."
        )
    return measure_table(study, names, caption, "")


def _pooled(arms: Sequence[Arm], name: str) -> float:
    return float(np.mean([number(value) for arm in arms for value in arm.results(name)]))


FORMULAS = (
    Formula(
        "Objective",
        "L = w<sub>CE</sub> CE + w<sub>KL</sub> T² D(t<sub>T</sub>, p<sub>T</sub>), with t<sub>T</sub> the "
        "teacher's and p<sub>T</sub> the student's softmax at temperature T; of several teachers the logits are "
        "averaged. D is 0 where the student equals the teacher",
    ),
    Formula(
        "Forward divergence",
        "KL(t ‖ p) = Σ<sub>j</sub> t<sub>j</sub> log(t<sub>j</sub> / p<sub>j</sub>)",
        has("divergence", "forward"),
    ),
    Formula(
        "Reverse divergence",
        "KL(p ‖ t)",
        has("divergence", "reverse"),
    ),
    Formula(
        "Jensen-Shannon",
        "β KL(t ‖ m) + (1 − β) KL(p ‖ m), with m = β t + (1 − β) p",
        has("divergence", "jsd"),
    ),
    Formula(
        "Reduction",
        "batchmean: the sum over the positions scored divided by the sequences, as many times heavier than the "
        "mean over positions as a sequence has positions",
        has("kd_reduction", "batchmean"),
    ),
    Formula(
        "KL to the teacher",
        "mean over the scored tokens of KL(t ‖ p) at T = 1, whatever was trained on; agreement: the share of "
        "tokens where teacher and student find the same one most probable",
        reports("_kl_to_teacher"),
    ),
)
DISTILLATION = Description(
    name="distillation",
    parameter="divergence",
    formulas=FORMULAS,
    settings=lambda params: {
        "Teacher": params.get("teacher", UNKNOWN),
        "Divergence": params.get("divergence", UNKNOWN),
        "Weights CE/KL": "/".join(str(params.get(name, UNKNOWN)) for name in ("ce_weight", "kl_weight")),
        "Temp": params.get("kl_temperature", UNKNOWN),
    },
    sections=distillation,
    cautions=(no_better, of_few_teachers),
)
