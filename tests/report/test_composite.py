"""The study's rule: win, trade-off, neither, or undecided, read from intervals.

python -m pytest tests/test_composite.py
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from page_structure import text_of
from synthetic_runs import write_full

from nbutils.report.evidence import gather
from nbutils.report.statistics import holm_levels
from nbutils.report.studies.mixing import (
    AT_FLOOR,
    MODEST,
    NEITHER,
    TRADE_OFF,
    UNDECIDED,
    WIN,
    Gain,
    Rule,
    composite,
    composite_table,
    decide,
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
        ((-0.04, -0.02), (-0.001, 0.003), CLOSER, WIN),  # perplexity or accuracy
        ((-0.2, -0.1), (-0.001, 0.003), CLOSER, NEITHER),  # more than modestly worse: no accuracy makes up for it
        ((-0.03, -0.02), (-0.01, -0.005), CLOSER, TRADE_OFF),
        ((-0.011, 0.1), None, CLOSER, TRADE_OFF),  # may be worse, but never by more than modestly
        ((-MODEST - 0.01, 0.0), (-0.001, 0.003), CLOSER, UNDECIDED),
        ((0.0, 0.01), None, NOT_CLOSER, NEITHER),
        ((0.0, 0.01), None, (0.001, 0.005), NEITHER),  # a real gain, too small to count
        ((0.0, 0.01), None, OPEN, UNDECIDED),
        ((NAN, NAN), None, CLOSER, UNDECIDED),
        ((0.0, 0.01), None, (NAN, NAN), UNDECIDED),
    ],
)
def test_the_rule(ce, accuracy, proxy, expected):
    assert outcome(ce, accuracy, proxy) == expected


def test_arms_are_judged_against_the_control(tmp_path):
    runs, file = write_full(tmp_path, seeds=5)
    (study,) = gather(runs, str(file)).studies
    results = {each.arm.label: each.result for each in composite(study)}
    assert "alpha 0.0, num_train_epochs 1.45" not in results  # a longer control has no soft target to weigh
    assert results["alpha 0.5"] == WIN and results["alpha 1.0"] == NEITHER
    text = text_of(composite_table(study))
    assert "at most 0.01 nats" in text and "at most 0.05 nats" in text and "tuned control" in text


def test_one_seed_decides_nothing(tmp_path):
    runs, file = write_full(tmp_path, seeds=1)
    (study,) = gather(runs, str(file)).studies
    assert {each.result for each in composite(study)} == {UNDECIDED}
    assert {each.beats_tuned for each in composite(study)} == {None}


def test_without_a_control_there_is_no_rule(tmp_path, toy_evidence):
    bare = replace(toy_evidence.studies[0], control=None)
    assert composite(bare) == [] and "needs a planned contrast" in text_of(composite_table(bare))


def rules(studies: np.random.Generator, arms: int, seeds: int = 5) -> list[str]:
    """The outcomes of so many arms that change nothing: differences of one size in every measure."""
    spread = {"ce": 0.004, "accuracy": 0.001, "proxy": 0.004}
    study = SimpleNamespace(differences=lambda arm, metric: arm[metric], asked=lambda arm, metric: None)
    made = [{name: list(studies.normal(0, width, seeds)) for name, width in spread.items()} for _ in range(arms)]
    own = [Rule(study, arm, "ce", "accuracy", "proxy") for arm in made]
    return [each.outcome(level) for each, level in zip(own, holm_levels([r.p_of_win for r in own]), strict=True)]


@pytest.mark.parametrize("arms", [1, 9, 20])
def test_of_arms_that_change_nothing_one_is_a_win_in_at_most_one_of_forty_studies(arms):
    generator = np.random.default_rng(arms)
    wins = [WIN in rules(generator, arms) for _ in range(400)]
    assert np.mean(wins) <= 0.025 + 0.015


def test_a_margin_is_that_of_a_contrast_that_claims_no_worse_and_of_no_other(tmp_path):
    runs, file = write_full(tmp_path)
    (study,) = gather(runs, str(file)).studies
    arm = study.sides(study.judged[0].contrast)[0]
    rule = Rule(study, arm, "test_ce_loss", None, "test_cosine")
    for claim, margin in (("no worse", 0.3), ("better", 0.01)):
        contrast = replace(study.judged[0].contrast, claim=claim, smallest_effect=0.3, metric="test_ce_loss")
        asked = replace(study, judged=(replace(study.judged[0], contrast=contrast),))
        assert replace(rule, study=asked)._margin("test_ce_loss") == margin


def test_at_the_floor_there_is_no_outcome(tmp_path):
    runs, file = write_full(tmp_path)
    for path in runs.glob("full/cosine-alpha0.5*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bigram_eval_ce_loss": 0.1}))
    (study,) = gather(runs, str(file)).studies
    found = {each.arm.label: each.result for each in composite(study)}
    assert found["alpha 0.5"] == AT_FLOOR and found["alpha 1.0"] != AT_FLOOR
