"""How far the judges of an interaction can be believed: failures, length, agreement, in numbers and in words."""

from __future__ import annotations

import math

import numpy as np
from IPython.display import HTML

from nbutils.interaction import CORRECTED, LITTLE_MASS, SERVER, STORY
from nbutils.report.arms import named
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import frame_of, table
from nbutils.report.statistics import mean_interval
from nbutils.report.studies.rounds import JUDGES, holds_out, is_interaction, method_of, rounds_of, writes_stories
from nbutils.runs import UNKNOWN, measure

CAPTION = (
    "Mean and 95 % interval over seeds. Failures: samples that the judge gave no score while the student learned; they "
    "count in no mean. Not asked: samples that a spent budget left without a score or a correction. Left out at "
    "the end: responses to test prompts that got no score, and count in none above. Numbers: how "
    "probable it is that a model that is to grade writes a number at all; the less, the less its grades say. "
    "Correlations are Spearman's, of the finished student's responses to test prompts (to the story prompt, where it "
    "learned from that); n: responses of all seeds. Rule of thumb: from 0.5 on scores follow length, and can be earned "
    "by writing more; from 0.7 on judges agree, from 0.4 on in part. Within ±2/√n of 0 a correlation may be chance."
)
# Columns that are shown only where an arm has any.
SOMETIMES = ("Without a\ncorrection", "Not\nasked", "Left out\nat the end", "Numbers\n(%)")
FAILS = 0.05  # share of failures from which what is left may be another kind of text
OF_JUDGES = {"judge": "{}", "second_judge": "(held out: {})"}
CORRELATIONS = ("judge_length_correlation", "judges_agreement")
FOLLOWS, LEANS = 0.5, 0.3  # correlations with length
AGREES, IN_PART = 0.7, 0.4  # correlations of judges


def judge_table(study: Study) -> HTML:
    """Each arm's judges and what speaks for or against them; empty where no judge was asked."""
    rows = [row for arm in study.arms if is_interaction(arm) and (row := _row(arm))]
    empty = [title for title in SOMETIMES if all(row[title] == UNKNOWN for row in rows)]
    rows = [{title: cell for title, cell in row.items() if title not in empty} for row in rows]
    if not rows:
        return HTML("")
    return table(frame_of(rows), f"Can the judges be believed? {CAPTION}", text=("Arm", "Judges", "In words"))


def _row(arm: Arm) -> dict[str, str]:
    of_stories = writes_stories(arm) and bool(arm.results("story_judges_agreement"))
    names = [f"{'story_' * of_stories}{name}" for name in CORRELATIONS]
    length, agreement = (arm.mean(name) for name in names)
    failed = _failures(arm)
    if not any(map(math.isfinite, (length, agreement, failed))):
        return {}
    scored, both = _scored(arm, of_stories), int(np.nansum(arm.results(f"{names[1]}_samples") or [0]))
    first, second = (_judge(arm, name) for name in JUDGES)
    judges = [first, f"(held out: {second})"]
    return {
        "Arm": arm.label,
        "Judges": "\n".join(judges),
        "Failures\n(%)": measure("judge_failure_rate").number(failed) + _counts(*_asked(arm)),
        "Without a\ncorrection": _uncorrected(arm),
        "Not\nasked": _not_asked(arm),
        "Left out\nat the end": _unscored(arm),
        "Numbers\n(%)": _number_mass(arm),
        "Score and\nlength": _correlation(arm, names[0], scored),
        "Agreement\nof judges": _correlation(arm, names[1], both),
        "In words": "\n".join(_in_words(arm, failed, (length, scored), (agreement, both))),
    }


def _judge(arm: Arm, parameter: str) -> str:
    """Its name; of a server the model it was asked for, as far as the first run's manifest tells."""
    name, told = named(arm.params.get(parameter, UNKNOWN)), arm.runs[0].manifest.get("prompts")
    model = told.get("server_model") if name == SERVER and isinstance(told, dict) else None
    return f"{name} {named(model)}" if model else name


def _asked(arm: Arm) -> tuple[int, int]:
    """(failures, how often a judge or teacher was asked) over an arm's rounds."""
    frames = [frame for run in arm.runs if {"scored", "failures"} <= {*(frame := rounds_of(run)).columns}]
    scored, failed = (sum(int(frame[name].sum()) for frame in frames) for name in ("scored", "failures"))
    return failed, scored + failed


def _failures(arm: Arm) -> float:
    """The share that failed; NaN where nobody was asked."""
    kept = any(len(rounds_of(run)) for run in arm.runs)
    return math.nan if kept and not _asked(arm)[1] else arm.mean("judge_failure_rate")


def _counts(failed: int, asked: int) -> str:
    return f"\n({failed:,} of {asked:,})" if asked else ""


def _uncorrected(arm: Arm) -> str:
    """How many samples the teacher did not correct; a dash of arms without one."""
    frames = [frame["uncorrected"] for run in arm.runs if "uncorrected" in (frame := rounds_of(run)).columns]
    if method_of(arm) not in CORRECTED or not frames:
        return UNKNOWN
    samples = arm.params["prompts_per_round"] * sum(map(len, frames))
    return f"{sum(int(frame.sum()) for frame in frames):,}" + f"\n(of {samples:,})"


def _not_asked(arm: Arm) -> str:
    """What a spent budget left out while the student learned; a dash where nothing."""
    frames = [frame for run in arm.runs if "not_asked" in (frame := rounds_of(run)).columns]
    return f"{left_out:,}" if (left_out := sum(int(frame["not_asked"].sum()) for frame in frames)) else UNKNOWN


def _left_out(arm: Arm) -> dict[str, tuple[int, int]]:
    """(responses without a score, responses) at the end of each judge that gave some none."""
    told = [each for run in arm.runs for each in run.judged() if isinstance(each, dict)]
    found = {}
    for judge in JUDGES:
        failed = sum(int(np.nansum(arm.results(f"test_{kind}{judge}_failures") or [0])) for kind in ("", "story_"))
        found |= {judge: (failed, len(told))} if failed else {}
    return found


def _unscored(arm: Arm) -> str:
    counts = {judge: f"{failed:,} of {asked:,}" for judge, (failed, asked) in _left_out(arm).items()}
    return "\n".join(OF_JUDGES[judge].format(count) for judge, count in counts.items()) or UNKNOWN


def _number_mass(arm: Arm) -> str:
    masses = {judge: measure("judge_number_mass").number(mass) for judge, mass in _masses(arm).items()}
    return "\n".join(OF_JUDGES[judge].format(mass) for judge, mass in masses.items()) or UNKNOWN


def _masses(arm: Arm) -> dict[str, float]:
    """How probable a number is, of each judge that is a model; of contexts and stories the lower one."""
    found = {judge: [arm.mean(f"test_{kind}{judge}_number_mass") for kind in ("", "story_")] for judge in JUDGES}
    known = {judge: [each for each in masses if math.isfinite(each)] for judge, masses in found.items()}
    return {judge: min(masses) for judge, masses in known.items() if masses}


def _little_mass(arm: Arm) -> list[str]:
    """What to think of judges that hardly write a number, however they were told to count it."""
    sentences = {"judge": "writes", "second_judge": "the held-out judge writes"}
    return [
        f"{sentences[judge]} a number {measure('judge_number_mass').number(mass)} % of the time: its grades say little"
        for judge, mass in _masses(arm).items()
        if mass < LITTLE_MASS
    ]


def _scored(arm: Arm, of_stories: bool) -> int:
    """Responses of the finished students that the first judge graded, to contexts or to the story prompt."""
    told = [each for run in arm.runs for each in run.judged() if isinstance(each, dict)]
    told = [each for each in told if (each.get("prompts") == STORY) == of_stories]
    told = [each for each in told if str(each.get("completion")).split()]
    return sum(isinstance(each.get("judge"), int | float) for each in told)


def _correlation(arm: Arm, name: str, number: int) -> str:
    """Mean and interval over seeds, no wider than a correlation can be."""
    values, quantity = arm.results(name), measure(name)
    if not values:
        return UNKNOWN
    lines = [quantity.number(float(np.mean(values)))]
    low, high = mean_interval(values)
    lines += [quantity.interval(max(low, -1), min(high, 1))] if high > low else []
    return "\n".join([*lines, *[f"(n {number:,})"] * (number > 0)])


def _in_words(arm: Arm, failed: float, length: tuple[float, int], agreement: tuple[float, int]) -> list[str]:
    """What the numbers say, a line each."""
    told = [f"fails often: {100 * failed:.0f} %"] * (failed >= FAILS) + _often_left_out(arm) + _little_mass(arm)
    told += [_length_in_words(*length)] if math.isfinite(length[0]) else []
    if not holds_out(arm):
        return [*told, "no other judge looks on"]
    return [*told, _agreement_in_words(*agreement)] if math.isfinite(agreement[0]) else told


def _often_left_out(arm: Arm) -> list[str]:
    who = {"judge": "the judge", "second_judge": "the held-out judge"}
    shares = {judge: failed / max(failed, asked) for judge, (failed, asked) in _left_out(arm).items()}
    often = {judge: share for judge, share in shares.items() if share >= FAILS}
    return [f"at the end {who[judge]} gave {100 * share:.0f} % no score" for judge, share in often.items()]


def _length_in_words(value: float, number: int) -> str:
    if _may_be_chance(value, number):
        return f"length: {_signed(value)}, which may be chance"
    if abs(value) >= FOLLOWS:
        return f"scores follow {'length' if value > 0 else 'shortness'}: {_signed(value)}"
    if abs(value) >= LEANS:
        return f"scores lean towards {'length' if value > 0 else 'shortness'}: {_signed(value)}"
    return f"scores hardly depend on length: {_signed(value)}"


def _agreement_in_words(value: float, number: int) -> str:
    if _may_be_chance(value, number):
        return f"agreement with the held-out judge may be chance: {_signed(value)}"
    if value >= AGREES:
        return f"the held-out judge agrees: {_signed(value)}"
    if value >= IN_PART:
        return f"the held-out judge agrees in part: {_signed(value)}"
    if value <= -LEANS:
        return f"the held-out judge says the opposite: {_signed(value)}"
    return f"the held-out judge hardly agrees: {_signed(value)}"


def _may_be_chance(value: float, number: int) -> bool:
    return number > 0 and abs(value) < 2 / math.sqrt(number)


def _signed(value: float) -> str:
    return measure("judges_agreement").number(value)
