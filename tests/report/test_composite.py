"""The study's rule: win, trade-off, neither, or undecided, read from intervals.

python -m pytest tests/test_composite.py
"""

from __future__ import annotations

import math

import pytest
from page_structure import text_of
from synthetic_runs import write_full

from nbutils.report.evidence import gather
from nbutils.report.studies.mixing import (
    MODEST,
    NEITHER,
    TRADE_OFF,
    UNDECIDED,
    WIN,
    Gain,
    composite,
    composite_table,
    decide,
    gain,
)

NAN = math.nan
CLOSER, NOT_CLOSER, OPEN = (0.02, 0.04), (-0.02, 0.005), (-0.01, 0.03)


def outcome(ce, accuracy, proxy):
    """Gains: positive is better; a cross entropy gain of -0.02 is 0.02 nats worse."""
    return decide(Gain(*ce, 0.01), accuracy and Gain(*accuracy, 0.002), Gain(*proxy, 0.01))


@pytest.mark.parametrize(
    ("ce", "accuracy", "proxy", "expected"),
    [
        ((-0.009, 0.02), None, CLOSER, WIN),  # equal: all of it within the margin
        ((-0.2, -0.1), (-0.001, 0.003), CLOSER, WIN),  # perplexity or accuracy
        ((-0.03, -0.02), (-0.01, -0.005), CLOSER, TRADE_OFF),
        ((-0.011, 0.1), None, CLOSER, TRADE_OFF),  # may be worse, but never by more than modestly
        ((-MODEST - 0.01, 0.0), None, CLOSER, UNDECIDED),
        ((-0.2, -0.1), (-0.01, -0.005), CLOSER, NEITHER),  # bought too dearly
        ((-0.2, -0.1), (-0.01, 0.005), CLOSER, UNDECIDED),  # accuracy may yet be equal
        ((0.0, 0.01), None, NOT_CLOSER, NEITHER),
        ((0.0, 0.01), None, (0.001, 0.005), NEITHER),  # a real gain, too small to count
        ((0.0, 0.01), None, OPEN, UNDECIDED),
        ((NAN, NAN), None, CLOSER, UNDECIDED),
        ((0.0, 0.01), None, (NAN, NAN), UNDECIDED),
    ],
)
def test_the_rule(ce, accuracy, proxy, expected):
    assert outcome(ce, accuracy, proxy) == expected


def test_arms_are_judged_against_the_control_with_the_plans_own_margin(tmp_path):
    runs, file = write_full(tmp_path)
    (study,) = gather(runs, str(file)).studies
    results = {each.arm.label: each.result for each in composite(study)}
    assert "alpha 0.0, num_train_epochs 1.45" not in results  # a longer control has no soft target to weigh
    assert results["alpha 0.5"] == WIN and results["alpha 1.0"] == NEITHER
    arm = study.arm_of(study.judged[0].contrast.treatment)
    verdict = study.judged[0].verdict
    assert gain(study, arm, "test_ce_loss", 9.0, lower_is_better=True) == Gain(-verdict.high, -verdict.low, 0.01)
    text = text_of(composite_table(study))
    assert "at most 0.01 nats" in text and "at most 0.05 nats" in text and "tuned control" in text


def test_one_seed_decides_nothing(tmp_path):
    runs, file = write_full(tmp_path, seeds=1)
    (study,) = gather(runs, str(file)).studies
    assert {each.result for each in composite(study)} == {UNDECIDED}
    assert {each.beats_tuned for each in composite(study)} == {None}


def test_without_a_control_there_is_no_rule(tmp_path, toy_evidence):
    from dataclasses import replace

    bare = replace(toy_evidence.studies[0], control=None)
    assert composite(bare) == [] and "needs a planned contrast" in text_of(composite_table(bare))
