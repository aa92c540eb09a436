"""What an arm gains when both sides had the same: tokens, or time by the clock.

The control saw as many tokens. The time is matched by a longer control: an arm of the plan with the control's
settings and more steps or epochs, which used what the dearer objective costs for more plain training.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.composite import is_longer
from nbutils.measures import UNKNOWN, measure
from nbutils.report.page import table
from nbutils.statistics import mean_interval
from nbutils.studies import Arm, Study

SAME_TIME = 0.15  # times closer than this share count as equal: clocks on shared machines are no better


def budget_table(study: Study) -> HTML:
    """Every arm's cross entropy against the control with as many tokens, and against the one with as much time."""
    metric, control = study.final("ce_loss"), study.control
    if metric is None or control is None:
        return HTML('<p class="note">Without a control there is nothing to compare at equal cost.</p>')
    longer = [arm for arm in study.arms if is_longer(arm, control)]
    rows = []
    for arm in study.arms:
        if arm is not control and arm not in longer and arm.runs:
            rows.append({"Arm": arm.label, "Time of a step\n(× control's)": _ratio(arm, control, "seconds_per_step")})
            rows[-1]["Equal tokens: Δ\n(× control's time)"] = _cell(study, arm, control, metric)
            same = [each for each in longer if abs(_share(arm, each, "train_seconds") - 1) <= SAME_TIME]
            against = _cell(study, arm, same[0], metric) if same else UNKNOWN
            rows[-1]["Equal time: Δ\n(× longer control's time)"] = against
    if not rows:
        return HTML('<p class="note">No arm but the control has finished.</p>')
    quantity = measure(metric)
    names = ", ".join(arm.label for arm in longer)
    note = f"Δ: seed-paired difference in {quantity.axis}, 95 % interval. "
    if longer:
        note += f"Equal time is judged against {names}, where the times differ by at most {100 * SAME_TIME:.0f} %."
    else:
        note += "The plan has no longer control, so nothing is said about equal time."
    return table(pd.DataFrame(rows), note)


def _cell(study: Study, arm: Arm, other: Arm, metric: str) -> str:
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
