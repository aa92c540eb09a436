"""Answers to questions in the report: their measures, a paired bootstrap against the control, answers side by side."""

from __future__ import annotations

import html
from dataclasses import replace

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.errors import RunError
from nbutils.measures import UNKNOWN, measure, p_text
from nbutils.report.page import details, shortened, side_by_side, stacked, table
from nbutils.report.tables import measure_table
from nbutils.report.teachers import without_teacher
from nbutils.studies import Arm, Study

MEASURES = ("bleu", "corpus_bleu", "chrf", "exact_match", "token_f1", "perplexity")
COMPARED = ("corpus_bleu", "chrf")  # scores of a whole split, which a bootstrap over questions can compare
SPLITS = ("test", "validation")  # as answers.parquet calls them, the better one first
MOST_ARMS = 4  # columns that a page can hold
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the questions shown, by the arms' mean BLEU
TEACHER = "teacher_answer"  # a column that runs may have


def answers(study: Study) -> HTML:
    """All on the answers of a study's arms; empty where its runs gave none."""
    if study.final("bleu") is None:
        return HTML("")
    return stacked(answer_table(study), bootstrap_table(study), answer_samples(study))


def answer_table(study: Study) -> HTML:
    """Every arm's BLEU, chrF, exact match, F1 and perplexity of the answers; the measures' signatures behind a line."""
    limits = [value for arm in study.own_arms for value in arm.results(study.final("bleu_limit") or "")]
    caption = (
        "Mean and 95 % interval over seeds. Sentence BLEU is the mean over questions; perplexity is that of the "
        "reference answers. "
    )
    if limits:
        caption += f"The references themselves get a sentence BLEU of {np.mean(limits):.4f}: an answer cannot get more."
    found = measure_table(study, MEASURES, caption.strip(), "No run has measured its answers.")
    told: dict[str, set[str]] = {}
    for run in study.runs:
        for name, signature in run.answer_signatures().items():
            told.setdefault(signature, set()).add(measure(name).label)
    if not told:
        return found
    rows = [{"Measure": ", ".join(sorted(names)), "Signature": signature} for signature, names in told.items()]
    note = "What decides each number: scores with other signatures are other measures."
    return stacked(found, HTML(details("Signatures", table(pd.DataFrame(rows), note, text=rows[0]).data)))


def bootstrap_table(study: Study) -> HTML:
    """Corpus scores of each arm's first run against the control's run with that seed, questions drawn again."""
    from nbutils.answer_measures import compare_answers

    control, split = _control(study), _split(study)
    rows = []
    for arm in study.arms:
        pair = _first_pair(arm, control)
        if arm is control or pair is None:
            continue
        tables = [_of_split(run.answers(), split) for run in pair]
        row = {"Arm": arm.label, "Seed": str(pair[1].matrix.get("seed", UNKNOWN)), "Questions": f"{len(tables[1]):,}"}
        for name in COMPARED:
            try:
                score = compare_answers(*tables, names=(control.label, arm.label), metric=name)
            except RunError as error:
                return HTML(f'<p class="note">{html.escape(str(error))}</p>')
            quantity = measure(name)
            row[f"{quantity.axis}\ncontrol → arm"] = (
                f"{quantity.number(score.score_a)} → {quantity.number(score.score_b)}"
            )
            interval = quantity.difference_interval(score.low, score.high)
            row[f"Δ {quantity.label}"] = f"{quantity.difference(score.difference)}\n{interval}\n(p {_p(score.p_value)})"
        rows.append(row)
    if not rows:
        return HTML("")
    note = (
        f"One run against one run on the {split} questions, sacrebleu's paired bootstrap over questions: 95 % interval "
        "and p. It says how far other questions would move the difference, and nothing about other seeds; the "
        "verdicts are read from seeds."
    )
    return table(pd.DataFrame(rows), note)


def answer_samples(study: Study) -> HTML:
    """Answers of every arm to the same questions beside the reference; of each arm the run with the first seed.

    The questions are the worst, the best and those between by the arms' mean sentence BLEU: a rule, no hand.
    """
    split = _split(study)
    answered = tuple(arm for arm in study.arms if arm.runs and len(_of_split(arm.runs[0].answers(), split)))
    control = study.control if study.control in answered else None
    arms = replace(study, arms=answered, control=control).foremost(MOST_ARMS).arms
    tables = {arm.label: _of_split(arm.runs[0].answers(), split).drop_duplicates("question") for arm in arms}
    tables = {label: frame.set_index("question") for label, frame in tables.items()}
    shared = [each for each in next(iter(tables.values()), pd.DataFrame()).index]
    shared = [question for question in shared if all(question in frame.index for frame in tables.values())]
    if not shared:
        return HTML('<p class="note">No question was answered by every arm.</p>')
    scores = sum(frame.loc[shared, "bleu"] for frame in tables.values())
    order = scores.sort_values(kind="stable").index
    chosen = dict.fromkeys(order[round(quantile * (len(order) - 1))] for quantile in QUANTILES)
    rows = [(question, _cells(question, tables)) for question in chosen]
    teacher = ["Teacher"] * _has_teacher_answers(tables)
    left = len(answered) - len(arms)
    caption = (
        f"Shaded: the question, from the {split} split. By the arms' mean sentence BLEU they are the lowest, those at "
        "a quarter, half and three quarters of all, and the highest. One run an arm, the one with its first seed."
        + f" {left} more arms are not shown."
        * bool(left)
    )
    return side_by_side(["Reference", *teacher, *tables], rows, caption)


def _cells(question: str, tables: dict[str, pd.DataFrame]) -> list[str]:
    """The reference, the teacher's answer where there is one, and every arm's with its BLEU."""
    own = [frame.loc[question] for frame in tables.values()]
    cells = [_escaped(own[0]["reference"])]
    if _has_teacher_answers(tables):
        cells.append(_escaped(next((row[TEACHER] for row in own if TEACHER in row), UNKNOWN)))
    return cells + [f"{_escaped(row['answer'])}<br><small>BLEU {row['bleu']:.2f}</small>" for row in own]


def _has_teacher_answers(tables: dict[str, pd.DataFrame]) -> bool:
    return any(TEACHER in frame.columns for frame in tables.values())


def _escaped(value: object) -> str:
    return html.escape(shortened(str(value).strip())) or UNKNOWN


def _control(study: Study) -> Arm | None:
    return study.control or without_teacher(study)


def _first_pair(arm: Arm, control: Arm | None):
    """(control's run, arm's run) of the first seed of which both have answers; None where there is none."""
    for run in arm.runs:
        for other in control.runs if control else ():
            if run.matrix.get("seed") == other.matrix.get("seed") and len(run.answers()) and len(other.answers()):
                return other, run
    return None


def _split(study: Study) -> str:
    """The better split that any run has answered."""
    splits = {split for run in study.runs for split in run.answers().get("split", [])}
    return next((split for split in SPLITS if split in splits), SPLITS[-1])


def _of_split(frame: pd.DataFrame, split: str) -> pd.DataFrame:
    return frame[frame["split"] == split].reset_index(drop=True) if len(frame) else frame


def _p(value: float) -> str:
    text = p_text(value)
    return text if text.startswith("<") else f"= {text}"
