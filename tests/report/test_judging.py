"""Verdicts: what an interval means, registered pairs and looks, what hangs on one seed, and the rates of error.

python -m pytest tests/report/test_judging.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from nbutils.report import judging
from nbutils.report import statistics as st
from nbutils.report.judging import Look, judge


@dataclass(frozen=True)
class Claim:
    claim: str = "better"
    better: str = "lower"
    smallest_effect: float = 0.01
    primary: bool = True


def verdict(differences, planned: int = 0, **fields) -> judging.Verdict:
    return judge([(Claim(**fields), [Look(planned or len(differences), tuple(differences))])])[0]


def around(mean: float, half_width: float) -> np.ndarray:
    """Five differences whose interval at the first look's level is mean -+ half_width."""
    unit = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    low, high = st.mean_interval(unit, judging.FIRST_LOOK)
    return mean + unit * half_width / ((high - low) / 2)


# --- outcomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "gain", "half_width", "outcome"),
    [
        ("better", 0.03, 0.02, judging.SUPPORTED),
        ("better", 0.008, 0.006, judging.SUPPORTED),  # the smallest effect is possible: the note says that less is too
        ("better", 0.003, 0.002, judging.TOO_SMALL),
        ("better", 0.0, 0.009, judging.NOT_SUPPORTED),  # all of it falls short of the smallest effect
        ("better", -0.05, 0.01, judging.NOT_SUPPORTED),  # worse
        ("better", 0.0, 0.011, judging.UNDECIDED),  # 0 and the smallest effect both inside
        ("no worse", 0.0, 0.009, judging.SUPPORTED),
        ("no worse", -0.005, 0.004, judging.SUPPORTED),  # worse, yet inside the margin
        ("no worse", -0.03, 0.019, judging.NOT_SUPPORTED),  # all of it worse than the margin
        ("no worse", -0.03, 0.021, judging.UNDECIDED),
        ("no worse", 0.0, 0.011, judging.UNDECIDED),
    ],
)
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_outcomes(claim, gain, half_width, outcome, better):
    differences = around(-gain if better == "lower" else gain, half_width)
    result = verdict(differences, claim=claim, better=better, smallest_effect=0.01)
    assert result.outcome == outcome and result.alpha == 0.04
    assert result.low <= result.difference <= result.high
    assert ("may be smaller than the smallest effect" in result.note) == (
        outcome == judging.SUPPORTED and gain == 0.008
    )


@pytest.mark.parametrize("claim", ["better", "no worse"])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_claim_holds_exactly_when_p_passes_its_level_in_the_claimed_direction(claim, better):
    generator = np.random.default_rng(3)
    for _ in range(200):
        result = verdict(generator.normal(0.0, 0.02, 10), claim=claim, better=better)
        gain = -result.difference if better == "lower" else result.difference
        right_side = gain > (0.0 if claim == "better" else -0.01)
        holds = result.outcome in (judging.SUPPORTED, judging.TOO_SMALL)
        assert holds == (result.p_value < result.alpha and right_side)


def test_only_contrasts_that_are_not_primary_share_the_level():
    weak = (-0.03, -0.01, -0.045, -0.02, -0.009)  # p about .03: enough alone, not in a family
    assert 0.02 < st.p_value(weak) < 0.04
    look = [Look(5, weak)]
    claims = (
        [(Claim(primary=True), look)] + [(Claim(primary=False), look)] * 2 + [(Claim(primary=False), [Look(5, ())])]
    )
    primary, second, third, empty = judge(claims)
    assert primary.outcome == judging.SUPPORTED and primary.alpha == 0.04
    assert second.outcome == third.outcome == judging.UNDECIDED
    assert second.alpha == third.alpha == pytest.approx(0.04 / 3)  # the one without runs still counts
    assert second.low < primary.low < 0 < second.high  # its interval is shown at its own level
    assert empty.outcome == judging.INTERIM


# --- registered pairs and looks -------------------------------------------------------------------


STRONG = (-0.021, -0.013, -0.034, -0.008, -0.017)
NOTHING = (0.03, -0.02, 0.01, -0.03, 0.012)


def test_before_all_registered_pairs_are_in_there_is_no_verdict():
    result = verdict(STRONG[:4], planned=5)
    assert result.outcome == judging.INTERIM and (result.pairs, result.planned) == (4, 5)
    assert result.difference == pytest.approx(np.mean(STRONG[:4])) and np.isfinite(result.low)
    assert verdict((), planned=5).outcome == verdict((0.1,), planned=5).outcome == judging.INTERIM


def test_a_look_that_decides_stands_and_an_extension_is_judged_more_strictly():
    extended = [Look(5, STRONG), Look(10, STRONG + NOTHING)]
    assert judge([(Claim(), extended)])[0].outcome == judging.SUPPORTED and judge([(Claim(), extended)])[0].look == 1
    (result,) = judge([(Claim(), [Look(5, NOTHING), Look(10, NOTHING + STRONG)])])
    assert (result.look, result.alpha, result.pairs) == (2, 0.005, 10) and result.earlier == (judging.UNDECIDED,)
    (waiting,) = judge([(Claim(), [Look(5, NOTHING), Look(10, NOTHING + STRONG[:2])])])
    assert waiting.outcome == judging.INTERIM and waiting.pairs == 7 and waiting.earlier == (judging.UNDECIDED,)


def test_what_all_looks_spend_stays_below_the_level():
    spent = [judging.level_of_look(number) for number in range(1, 40)]
    assert spent[:4] == [0.04, 0.005, 0.0025, 0.00125] and sum(spent) <= 0.05


def test_pairs_that_ran_and_lack_the_number_cannot_be_judged():
    (result,) = judge([(Claim(), [Look(5, STRONG[:3], absent=2)])])
    assert result.outcome == judging.NOT_JUDGED and "2 of 5 pairs ran and report no such number" in result.note


# --- one seed, and odd shapes ---------------------------------------------------------------------


def test_what_hangs_on_one_seed_is_told():
    collapsed = (0.0093, 0.0129, 0.0067, 0.0127, -0.1827)  # quick's centred proxy, as it came out
    result = verdict(collapsed, better="higher", smallest_effect=0.005)
    assert result.outcome == judging.UNDECIDED
    assert result.without_one.place == 4 and result.without_one.outcome == judging.SUPPORTED
    assert result.without_one.difference == pytest.approx(0.0104)
    assert verdict((-0.1, -0.11, -0.105, -0.102, -0.108)).without_one is None


def test_differences_far_from_normal_support_nothing_with_few_pairs():
    few = (-0.30, -0.31, -0.305, -0.308, -0.9)
    result = verdict(few, smallest_effect=0.5)
    assert st.far_from_normal(few) and result.outcome == judging.UNDECIDED and "far from normal" in result.note
    many = verdict((*few, -0.3, -0.32, -0.31, -0.3, -0.29), smallest_effect=0.5)
    assert many.outcome in (judging.SUPPORTED, judging.TOO_SMALL)


# --- what cannot be judged ------------------------------------------------------------------------


def test_one_planned_pair_cannot_be_judged():
    result = verdict([0.1])
    assert result.outcome == judging.NOT_JUDGED and "1 seed pair: an interval needs at least 2" in result.note


def test_a_diverged_run_is_not_averaged_away():
    result = verdict([-0.1, -0.11, float("nan"), -0.12])
    assert result.outcome == judging.NOT_JUDGED and "diverged" in result.note


@pytest.mark.parametrize("claim", ["better", "no worse"])
def test_identical_arms_cannot_be_judged(claim):
    result = verdict([0.0] * 5, claim=claim)
    assert result.outcome == judging.NOT_JUDGED and "identical" in result.note


def test_equal_differences_up_to_rounding_have_no_interval_and_point_at_the_seed():
    control = np.array([4.1, 4.3, 4.0])
    result = verdict((control - 0.1) - control)
    assert result.outcome == judging.NOT_JUDGED and result.difference == pytest.approx(-0.1) and np.isnan(result.low)
    assert "check that the seed reaches the run, or take a metric with finer steps" in result.note


# --- rates ----------------------------------------------------------------------------------------


def false_claims(studies: np.ndarray, sizes: tuple[int, ...], **fields) -> float:
    """The share of studies without an effect whose claim holds at some look, at `sizes` pairs one after the other."""
    held = (judging.SUPPORTED, judging.TOO_SMALL)
    looks = [[Look(size, tuple(study[:size])) for size in sizes] for study in studies]
    return float(np.mean([judge([(Claim(**fields), own)])[0].outcome in held for own in looks]))


@pytest.mark.parametrize("sizes", [(5,), (5, 10, 20)])
@pytest.mark.parametrize(("claim", "true_gain"), [("better", 0.0), ("no worse", -0.01)])
def test_a_false_claim_holds_in_at_most_one_of_forty_studies_however_often_the_plan_grows(claim, true_gain, sizes):
    studies = np.random.default_rng(4).normal(-true_gain, 0.02, (1500, 20))
    assert false_claims(studies, sizes, claim=claim) <= 0.025 + 0.006


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [(2,), (3,), (5,), (10,), (2, 5), (5, 20), (5, 10, 20), (3, 6, 12, 24)])
def test_rates_of_false_claims(sizes):
    studies = np.random.default_rng(5).normal(0.0, 0.02, (8000, 24))
    assert false_claims(studies, sizes) <= 0.025 + 0.004


def test_holm_keeps_the_family_error_where_single_tests_do_not():
    studies = np.random.default_rng(5).normal(0.0, 0.02, (600, 4, 5))
    held = (judging.SUPPORTED, judging.TOO_SMALL)
    family = [judge([(Claim(primary=False), [Look(5, tuple(s))]) for s in study]) for study in studies]
    corrected = [any(each.outcome in held for each in own) for own in family]
    alone = [any(verdict(s).outcome in held for s in study) for study in studies]
    assert np.mean(corrected) < 0.04 < 0.055 < np.mean(alone)
