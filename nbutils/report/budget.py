"""What an arm gains when both sides had the same: tokens, or time by the clock.

The control saw as many tokens, where no run stopped early and no earlier model than the last was judged: otherwise
the table says what both sides had seen. The time is matched by a longer control: an arm of the plan with the control's
settings and more steps or epochs, which used what the dearer objective costs for more plain training. Where a study of
teachers has none, the validation curves say where the slower side stood when the faster one was done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from IPython.display import HTML

from nbutils.report.arms import number
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import frame_of, table
from nbutils.report.statistics import mean_interval
from nbutils.report.studies.mixing import is_longer
from nbutils.report.studies.smoothing import smooths
from nbutils.report.studies.teachers import has_teacher
from nbutils.runs import UNKNOWN, measure

if TYPE_CHECKING:
    from nbutils.runs import Run

EQUAL_TOKENS = "Equal tokens: Δ\n(× control's time)"
TOKENS_NOTE = (
    " Where tokens are not equal, the models judged had seen more or fewer than the control's, because a run stopped "
    "early or the model of its best step was judged; Δ is of those models."
)
SAME_TOKENS = 0.02  # token counts closer than this share count as equal
SAME_TIME = 0.15  # times closer than this share count as equal: clocks on shared machines are no better


def budget_table(study: Study) -> HTML:
    """Every arm's cross entropy against the control with as many tokens, and against the one with as much time.

    Where an arm's models had seen other numbers of tokens than the control's, both are given, and nothing is called
    equal.
    """
    metric, control = study.final("ce_loss"), study.control
    if metric is None or control is None:
        return HTML('<p class="note">Without a control there is nothing to compare at equal cost.</p>')
    longer = [arm for arm in study.arms if is_longer(arm, control)]
    from_curves = has_teacher(study) and not longer
    compared = [arm for arm in study.arms if arm is not control and arm not in longer and arm.runs]
    unequal = [arm for arm in compared if not _equal_tokens(arm, control)]
    title = "Models judged: Δ\n(× control's time)\n(tokens against control's)" if unequal else EQUAL_TOKENS
    rows = []
    for arm in compared:
        rows.append({"Arm": arm.label, "Time of a step\n(× control's)": _ratio(arm, control, "seconds_per_step")})
        tokens = f"\n({'not equal: ' * (arm in unequal)}{_tokens(arm, control)})" if unequal else ""
        rows[-1][title] = _cell(arm, control, metric) + tokens
        if from_curves:
            rows[-1]["Equal time: Δ on validation\n(what was read)"] = _on_curves(arm, control)
            continue
        same = [each for each in longer if abs(_share(arm, each, "train_seconds") - 1) <= SAME_TIME]
        against = _cell(arm, same[0], metric) if same else UNKNOWN
        rows[-1]["Equal time: Δ\n(× longer control's time)"] = against
    if not rows:
        return HTML('<p class="note">No arm but the control has finished.</p>')
    frame = frame_of(rows)
    measured = frame.columns[(frame != UNKNOWN).any()]
    return table(frame[measured], _note(study, metric, longer, from_curves) + TOKENS_NOTE * bool(unequal))


def _note(study: Study, metric: str, longer: Sequence[Arm], from_curves: bool) -> str:
    """How to read the table, and what is not in its times."""
    note = f"Δ: seed-paired difference in {measure(metric).axis}, 95 % interval. "
    if longer:
        names = ", ".join(arm.label for arm in longer)
        note += f"Equal time is judged against {names}, where the times differ by at most {100 * SAME_TIME:.0f} %."
    elif from_curves:
        note += (
            "The plan has no longer control, so equal time was not measured. Read from the validation curves, straight "
            "lines between evaluations, is where the slower side stood when the faster had finished; its learning "
            "rate had not decayed by then, which counts against it."
        )
    else:
        note += "The plan has no longer control, so nothing is said about equal time."
    if smooths(study):
        note += " Scored one-hot, a smoothed model pays for its target as well: see the section on prefix smoothing."
    once = [value for arm in study.own_arms for value in arm.results("teacher_cache_seconds")]
    if has_teacher(study):
        note += " Not in these times: the teacher's own training, paid once for all students"
        note += f", and storing what it said, {np.mean(once):,.0f} s on average." if once else "."
    return note


def _equal_tokens(arm: Arm, control: Arm) -> bool:
    """Whether the models judged had seen as many tokens, seed by seed; an unknown count differs from none."""
    ours, theirs = _tokens_by_seed(arm), _tokens_by_seed(control)
    pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    return all(abs(a - b) <= SAME_TOKENS * max(a, b) for a, b in pairs)


def _tokens_by_seed(arm: Arm) -> dict[Any, float]:
    """Tokens that the model judged had been trained on, by seed: up to the best step where that is judged."""
    found = {}
    for run in arm.runs:
        tokens, best, steps = (number(run.result.get(name)) for name in ("tokens_seen", "best_step", "steps"))
        if run.params.get("evaluated_model") == "best" and 0 < best < steps:
            tokens *= best / steps
        if math.isfinite(tokens):
            found[run.matrix.get("seed")] = tokens
    return found


def _tokens(arm: Arm, control: Arm) -> str:
    """Mean tokens of the models judged, the arm's and the control's."""
    counts = [_tokens_by_seed(each).values() for each in (arm, control)]
    return " against ".join(measure("tokens_seen").number(float(np.mean([*c]))) if c else UNKNOWN for c in counts)


def _on_curves(arm: Arm, control: Arm) -> str:
    """Arm minus control on validation at the time at which the faster of both had finished, as their curves say."""
    differences, shares = [], []
    theirs = {run.matrix.get("seed"): run for run in control.runs}
    for run in arm.runs:
        other = theirs.get(run.matrix.get("seed"))
        times = [number(each.result.get("train_seconds")) if each else math.nan for each in (run, other)]
        if other is None or not min(times) > 0:
            continue
        reached = [_reached(each, min(times) / time) for each, time in zip((run, other), times, strict=True)]
        if np.isfinite(reached).all():
            differences.append(reached[0] - reached[1])
            shares.append(times[1] / times[0])
    if not differences:
        return f"{UNKNOWN}\n(not measured)"
    quantity, share = measure("eval_ce_loss"), float(np.mean(shares))
    interval = quantity.difference_interval(*mean_interval(differences))
    whose = (
        f"this arm at {100 * share:.0f} % of its steps" if share < 1 else f"control at {100 / share:.0f} % of its steps"
    )
    return f"{quantity.difference(float(np.mean(differences)))}\n{interval}\n({whose})"


def _reached(run: Run, share: float) -> float:
    """Validation cross entropy after this share of a run's steps; nan before the first evaluation."""
    metrics = run.metrics()
    if "eval_ce_loss" not in metrics.columns:
        return math.nan
    curve = metrics[["step", "eval_ce_loss"]].dropna()
    if curve.empty:
        return math.nan
    step = share * max(metrics["step"].max(), number(run.result.get("steps", 0)))
    return float(np.interp(step, curve["step"], curve["eval_ce_loss"], left=math.nan))


def _cell(arm: Arm, other: Arm, metric: str) -> str:
    """The paired difference, its interval, and the ratio of the training times, a line each."""
    quantity, theirs = measure(metric), other.by_seed(metric)
    differences = [value - theirs[seed] for seed, value in arm.by_seed(metric).items() if seed in theirs]
    if not differences:
        return UNKNOWN
    interval = quantity.difference_interval(*mean_interval(differences))
    return f"{quantity.difference(float(np.mean(differences)))}\n{interval}\n({_ratio(arm, other, 'train_seconds')})"


def _share(arm: Arm, other: Arm, name: str) -> float:
    """Mean of `name` as a multiple of the other arm's; nan where one has none."""
    ours, theirs = arm.results(name), other.results(name)
    return float(np.mean(ours) / np.mean(theirs)) if ours and theirs and np.mean(theirs) else math.nan


def _ratio(arm: Arm, other: Arm, name: str) -> str:
    share = _share(arm, other, name)
    return f"× {share:.2f}" if math.isfinite(share) else UNKNOWN
