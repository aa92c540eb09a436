"""Answers to questions in the report: their measures, a paired bootstrap against the control, answers side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.foundation import MANIFEST, RunError, escaped, resolve
from nbutils.report.arms import number
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import details, frame_of, more_arms, side_by_side, stacked, table
from nbutils.report.studies.teachers import without_teacher
from nbutils.report.tables import mean_and_interval, seeds
from nbutils.runs import UNKNOWN, Run, load_runs, measure, p_text

MEASURES = ("bleu", "corpus_bleu", "chrf", "exact_match", "token_f1", "perplexity")
COMPARED = ("corpus_bleu", "chrf")  # scores of a whole split, which a bootstrap over questions can compare
SPLITS = ("test", "validation")  # as answers.parquet calls them, the better one first
MOST_ARMS = 3  # beside reference and teacher: columns that a page can hold
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the questions shown, by the arms' mean BLEU
MOST_TEACHERS = 1  # more would leave no room for students


def answers(study: Study) -> HTML:
    """All on the answers of a study's arms; empty where its runs gave none."""
    if study.final("bleu") is None:
        return HTML("")
    return stacked(answer_table(study), bootstrap_table(study), answer_samples(study))


def answer_table(study: Study) -> HTML:
    """BLEU, chrF, exact match, F1 and perplexity of the answers; the measures' signatures behind a line."""
    names = [name for name in map(study.final, MEASURES) if name]
    rows = []
    for label, run in _teachers(study).items():
        row = {name: measure(name).number(number(run.result.get(name))) for name in names}
        rows.append({"Model": label, "Seeds": ""} | {measure(name).axis: row[name] for name in names})
    teachers = len(rows)
    for arm in study.arms:
        row = {measure(name).axis: mean_and_interval(arm.results(name), measure(name)) for name in names}
        rows.append({"Model": arm.label + "\n(control)" * (arm is study.control), "Seeds": seeds(arm)} | row)
    caption = (
        "Mean and 95 % interval over seeds. Sentence BLEU is the mean over questions; perplexity is that of the "
        "reference answers."
    )
    limits = [value for arm in study.own_arms for value in arm.results(study.final("bleu_limit") or "")]
    if limits:
        caption += f" The references themselves get {np.mean(limits):.4f} in it: short texts get less than 1."
    marked = [False] * teachers + [arm is study.control for arm in study.arms]
    return stacked(table(frame_of(rows), caption, marked), _signatures(study))


def _signatures(study: Study) -> HTML:
    """What decides each score, to be opened; empty where no run has kept it."""
    told: dict[str, set[str]] = {}
    for run in study.runs:
        for name, signature in run.answer_signatures().items():
            told.setdefault(signature, set()).add(measure(name).label)
    rows = [{"Measure": ", ".join(sorted(names)), "Signature": signature} for signature, names in told.items()]
    note = "Scores with another signature are other measures."
    return HTML(details("Signatures", table(frame_of(rows), note, text=rows[0]).data) if rows else "")


def bootstrap_table(study: Study) -> HTML:
    """Corpus scores of each arm's first run against the control's run with that seed, questions drawn again."""
    from nbutils.evaluation import compare_answers

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
                return HTML(f'<p class="note">{escaped(error)}</p>')
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
    return table(frame_of(rows), note)


def answer_samples(study: Study) -> HTML:
    """Answers of every arm to the same questions beside the reference; of each arm the run with the first seed.

    The questions are the worst, the best and those between by the arms' mean sentence BLEU: a rule, no hand.
    """
    split = _split(study)
    answered = tuple(arm for arm in study.arms if arm.runs and len(_of_split(arm.runs[0].answers(), split)))
    control = study.control if study.control in answered else None
    arms = replace(study, arms=answered, control=control).foremost(MOST_ARMS).arms
    tables = {arm.label: _by_question(arm.runs[0], split) for arm in arms}
    shared = next(iter(tables.values()), pd.DataFrame()).index
    shared = [question for question in shared if all(question in frame.index for frame in tables.values())]
    if not shared:
        return HTML('<p class="note">No question was answered by every arm.</p>')
    scores = sum(frame.loc[shared, "bleu"] for frame in tables.values())
    order = scores.sort_values(kind="stable").index
    chosen = dict.fromkeys(order[round(quantile * (len(order) - 1))] for quantile in QUANTILES)
    taught = [_by_question(run, split) for run in _teachers(study).values()]
    rows = []
    for question in chosen:
        own = [frame.loc[question] for frame in tables.values()]
        cells = [_answer(frame.loc[question]) if question in frame.index else UNKNOWN for frame in taught]
        rows.append((question, [_escaped(own[0]["reference"]), *cells, *map(_answer, own)]))
    left = len(answered) - len(arms)
    caption = (
        f"Shaded: the question, from the {split} split. By the arms' mean sentence BLEU they are the lowest, those at "
        "a quarter, half and three quarters of all, and the highest. One run an arm, the one with its first seed."
        + more_arms(left, "not shown")
    )
    return side_by_side(["Reference", *_teachers(study), *tables], rows, caption)


def _by_question(run: Run, split: str) -> pd.DataFrame:
    """A run's answers on a split, one a question."""
    answered = _of_split(run.answers(), split)
    return answered.drop_duplicates("question").set_index("question") if len(answered) else answered


def _answer(row: pd.Series) -> str:
    return f"{_escaped(row['answer'])}<br><small>BLEU {row['bleu']:.2f}</small>"


def _teachers(study: Study) -> dict[str, Run]:
    """The runs that made the students' teachers, where they answered the questions too, under a label each."""
    found: dict[str, Run] = {}
    for arm in study.own_arms:
        for run in arm.runs[:1]:
            folder = run.manifest.get("inputs", {}).get("teacher", {}).get("folder")
            made = load_runs(resolve(folder)) if folder and (resolve(folder) / MANIFEST).is_file() else []
            found |= {each.variant: each for each in made if len(each.answers())}
    found = dict(list(found.items())[:MOST_TEACHERS])
    return {"Teacher" if len(found) == 1 else f"Teacher {name}": run for name, run in found.items()}


def _escaped(value: object) -> str:
    return escaped(str(value).strip()) or UNKNOWN


def _control(study: Study) -> Arm | None:
    return study.control or without_teacher(study)


def _first_pair(arm: Arm, control: Arm | None) -> tuple[Run, Run] | None:
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
