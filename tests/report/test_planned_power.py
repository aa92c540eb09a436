"""What planned pairs can show, told before they run.

python -m pytest tests/report/test_planned_power.py
"""

from __future__ import annotations

import numpy as np
import scipy.stats
from synthetic_runs import final_numbers, write_plan, write_runs

from nbutils.report import power_lines
from nbutils.runs.plans import load_plan


def test_without_runs_it_is_told_in_standard_deviations(tmp_path):
    heading, primary, *others = power_lines(load_plan(write_plan(tmp_path)), tmp_path / "runs" / "toy")
    assert heading == "What the planned pairs can show, with power 0.8:" and len(others) == 3
    detected = float(primary.split(": ")[2].split()[0])
    critical = scipy.stats.t.ppf(0.98, 4)
    power = scipy.stats.nct.sf(critical, 4, detected * np.sqrt(5))
    assert abs(power - 0.8) < 0.005 and "mixing-perplexity: 5 pairs at level 0.04" in primary
    assert all("at level 0.013" in line for line in others)  # a third of .04


def test_the_spread_of_a_a_pairs_says_whether_the_smallest_effect_can_be_seen(tmp_path):
    runs = write_runs(tmp_path / "runs", keep=lambda matrix: matrix["alpha"] == 0.0)
    _, primary, *_ = power_lines(load_plan(write_plan(tmp_path)), runs / "toy")
    again = [final_numbers(0.0, s, 1)["test_ce_loss"] - final_numbers(0.0, s, 0)["test_ce_loss"] for s in range(1, 6)]
    detected = 1.79 * np.sqrt(np.mean(np.square(again)))
    shown = float(primary.split(": ")[2].split()[0])
    assert abs(shown - detected) < 0.0002 and ("NOT enough" in primary) == (shown > 0.01)
