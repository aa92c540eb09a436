"""Verdicts and intervals against scipy, published power tables and simulation.

python -m pytest tests/test_statistics.py -v
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats

from nbutils.report import statistics as st

DIFFERENCES = [-0.021, -0.013, -0.034, -0.008, -0.017]  # treatment minus control, five seeds, all better


@dataclass(frozen=True)
class Claim:
    claim: str = "better"
    better: str = "lower"
    smallest_effect: float = 0.01
    primary: bool = True


def verdict(differences, **fields) -> st.Verdict:
    return st.judge([(Claim(**fields), differences)])[0]


# --- intervals and p values -----------------------------------------------------------------------


def test_interval_and_p_are_scipys_paired_t_test():
    control = np.array([4.1, 4.3, 4.0, 4.2, 4.15])
    reference = scipy.stats.ttest_rel(control + DIFFERENCES, control)
    assert st.p_value(DIFFERENCES) == pytest.approx(reference.pvalue, rel=1e-9)
    assert st.mean_interval(DIFFERENCES) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
    assert st.mean_interval(DIFFERENCES, 0.01) == pytest.approx(tuple(reference.confidence_interval(0.99)), rel=1e-9)


def test_p_at_a_margin_is_scipys_one_sample_test():
    reference = scipy.stats.ttest_1samp(DIFFERENCES, 0.01).pvalue
    assert st.p_value(DIFFERENCES, 0.01) == pytest.approx(reference, rel=1e-9)


def test_one_value_has_no_interval():
    assert np.isnan(st.mean_interval([1.0])).all()
    assert np.isnan(st.p_value([1.0]))


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("effect", "pairs", "expected"), [(0.2, 199, 0.8017), (0.5, 34, 0.8078), (0.8, 15, 0.8213)])
def test_pairs_and_power_are_those_of_the_published_tables(effect, pairs, expected):
    """Cohen's small, medium and large paired effect at alpha .05, power .8, as G*Power lists them."""
    assert st.pairs_needed(1.0, effect) == pairs
    assert st.power(effect, pairs) == pytest.approx(expected, abs=5e-5)
    assert st.power(effect, pairs - 1) < 0.8


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
def test_the_minimum_detectable_effect_is_detected_in_80_of_100_simulated_studies(pairs):
    generator = np.random.default_rng(1)
    spread = 0.3
    differences = spread * np.array([-1, 1, *([0] * (pairs - 2))]) / np.sqrt(2 / (pairs - 1))
    assert np.std(differences, ddof=1) == pytest.approx(spread)
    effect = st.minimum_detectable_effect(differences)
    studies = generator.normal(effect, spread, (20_000, pairs))
    p_values = scipy.stats.ttest_1samp(studies, 0.0, axis=1).pvalue
    assert (p_values < 0.05).mean() == pytest.approx(0.8, abs=0.012)


def test_pairs_needed_gives_up_where_no_one_would_run_them():
    assert st.pairs_needed(1.0, 0.001) is None
    assert st.pairs_needed(1.0, 0.0) is None
    assert st.pairs_needed(0.0, 0.1) == 2


# --- Holm -----------------------------------------------------------------------------------------


def test_holm_levels_step_down_and_stop_at_the_first_failure():
    assert st.holm_levels([0.01, 0.04, 0.02]) == pytest.approx([0.05 / 3, 0.05, 0.05 / 2])
    # .03 fails at .025: .04, though below .05, must not pass after it
    assert st.holm_levels([0.04, 0.03]) == pytest.approx([0.025, 0.025])
    assert st.holm_levels([np.nan, 0.02]) == pytest.approx([0.05, 0.025])
    assert st.holm_levels([]) == []


def test_holm_rejects_what_adjusted_p_values_reject():
    """Against the other form of the rule: the running maximum of (m - rank) p."""
    generator = np.random.default_rng(2)
    for _ in range(200):
        p_values = generator.uniform(0, 0.1, 4)
        order = np.argsort(p_values)
        adjusted = np.empty(4)
        adjusted[order] = np.maximum.accumulate(p_values[order] * (4 - np.arange(4)))
        rejected = [p <= level for p, level in zip(p_values, st.holm_levels(p_values), strict=True)]
        assert rejected == (adjusted <= 0.05).tolist()


def test_only_contrasts_that_are_not_primary_share_the_level():
    weak = np.array([-0.03, -0.01, -0.05, -0.02, -0.006])  # p about .04: enough alone, not in a family
    assert 0.025 < st.p_value(weak) < 0.05
    claims = [(Claim(primary=True), weak)] + [(Claim(primary=False), weak)] * 2 + [(Claim(primary=False), [])]
    primary, second, third, empty = st.judge(claims)
    assert primary.outcome == st.SUPPORTED and primary.alpha == 0.05
    assert second.outcome == third.outcome == st.NOT_SEEN
    assert second.alpha == third.alpha == pytest.approx(0.05 / 3)  # the one without runs still counts
    assert second.low < primary.low < 0 < second.high  # its interval is shown at its own level
    assert empty.outcome == st.NOT_JUDGED


# --- verdicts -------------------------------------------------------------------------------------


def around(mean: float, half_width: float) -> np.ndarray:
    """Five differences whose 95 % interval is mean -+ half_width."""
    unit = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    low, high = st.mean_interval(unit)
    return mean + unit * half_width / ((high - low) / 2)


@pytest.mark.parametrize(
    ("claim", "gain", "half_width", "outcome"),
    [
        ("better", 0.03, 0.02, st.SUPPORTED),
        ("better", 0.003, 0.002, st.SUPPORTED),  # real, though below the smallest effect: the note says so
        ("better", 0.0, 0.009, st.NOT_SUPPORTED),  # all of it falls short of the smallest effect
        ("better", -0.05, 0.01, st.NOT_SUPPORTED),  # worse
        ("better", 0.0, 0.011, st.NOT_SEEN),  # 0 and the smallest effect both inside
        ("no worse", 0.0, 0.009, st.SUPPORTED),
        ("no worse", -0.005, 0.004, st.SUPPORTED),  # worse, yet inside the margin
        ("no worse", -0.03, 0.019, st.NOT_SUPPORTED),  # all of it worse than the margin
        ("no worse", -0.03, 0.021, st.NOT_SEEN),
        ("no worse", 0.0, 0.011, st.NOT_SEEN),
    ],
)
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_verdicts(claim, gain, half_width, outcome, better):
    differences = around(-gain if better == "lower" else gain, half_width)
    result = verdict(differences, claim=claim, better=better, smallest_effect=0.01)
    assert result.outcome == outcome
    assert result.low <= result.difference <= result.high
    below = claim == "better" and outcome == st.SUPPORTED and gain < 0.01
    assert ("smaller than the smallest effect" in result.note) == below


@pytest.mark.parametrize("claim", ["better", "no worse"])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_supported_exactly_when_p_passes_its_level_in_the_claimed_direction(claim, better):
    generator = np.random.default_rng(3)
    for _ in range(200):
        differences = generator.normal(0.0, 0.02, 4)
        result = verdict(differences, claim=claim, better=better)
        gain = -result.difference if better == "lower" else result.difference
        right_side = gain > (0.0 if claim == "better" else -0.01)
        assert (result.outcome == st.SUPPORTED) == (result.p_value < result.alpha and right_side)


@pytest.mark.parametrize(("claim", "true_gain"), [("better", 0.0), ("no worse", -0.01)])
def test_a_false_claim_is_supported_in_at_most_one_of_forty_studies(claim, true_gain):
    """On the boundary of the claim, five pairs: the upper half of a two-sided .05, by simulation."""
    studies = np.random.default_rng(4).normal(-true_gain, 0.02, (4000, 5))
    supported = [verdict(study, claim=claim).outcome == st.SUPPORTED for study in studies]
    assert np.mean(supported) == pytest.approx(0.025, abs=0.0075)


def test_holm_keeps_the_family_error_where_single_tests_do_not():
    studies = np.random.default_rng(5).normal(0.0, 0.02, (1500, 4, 5))
    corrected = [
        any(v.outcome == st.SUPPORTED for v in st.judge([(Claim(primary=False), s) for s in study]))
        for study in studies
    ]
    alone = [any(verdict(s).outcome == st.SUPPORTED for s in study) for study in studies]
    assert np.mean(corrected) < 0.04 < 0.07 < np.mean(alone)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("differences", [[], [0.1]])
def test_fewer_than_two_pairs_cannot_be_judged(differences):
    result = verdict(differences)
    assert result.outcome == st.NOT_JUDGED
    assert f"{len(differences)} seed pair" in result.note and "at least 2" in result.note


def test_a_diverged_run_is_not_averaged_away():
    result = verdict([-0.1, -0.11, float("nan"), -0.12])
    assert result.outcome == st.NOT_JUDGED and "diverged" in result.note


def test_identical_arms_have_a_verdict_without_nan():
    for claim, outcome in [("better", st.NOT_SUPPORTED), ("no worse", st.SUPPORTED)]:
        result = verdict([0.0] * 5, claim=claim)
        assert result.outcome == outcome
        assert (result.low, result.high, result.minimum_detectable) == (0.0, 0.0, 0.0)
        assert result.p_value == (1.0 if claim == "better" else 0.0)
        assert "identical" in result.note


def test_equal_differences_up_to_rounding_have_no_interval_and_point_at_the_seed():
    control = np.array([4.1, 4.3, 4.0])
    result = verdict((control - 0.1) - control)
    assert result.outcome == st.NOT_JUDGED and result.difference == pytest.approx(-0.1) and np.isnan(result.low)
    assert "check that the seed reaches the run, or take a metric with finer steps" in result.note


# --- noise floor and documents --------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3, 5])
def test_the_noise_band_holds_95_of_100_means_of_equal_arms(pairs):
    generator = np.random.default_rng(6)
    inside = []
    for _ in range(2000):
        floor = st.NoiseFloor(tuple(generator.normal(0.0, 0.4, 3)))
        inside.append(abs(generator.normal(0.0, 0.4, pairs).mean()) <= floor.band(pairs))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_noise_floor_without_dropout_is_zero_and_without_runs_is_unknown():
    assert st.NoiseFloor((0.0, 0.0)).band(5) == 0.0
    assert np.isnan(st.NoiseFloor(()).band(5))


def test_document_interval_is_that_of_the_ratio_and_repeats():
    generator = np.random.default_rng(7)
    tokens = generator.integers(10, 2000, 150)
    rates = generator.normal(4.0, 0.5, 150) + 50.0 / tokens  # short documents are harder
    interval = st.document_interval(rates * tokens, tokens)
    assert interval == st.document_interval(rates * tokens, tokens)
    reference = scipy.stats.bootstrap(
        (rates * tokens, tokens),
        lambda ce, n, axis=-1: ce.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=8,
    ).confidence_interval
    assert interval == pytest.approx((reference.low, reference.high), abs=0.01)
    assert interval[1] < rates.mean()  # the mean of the documents' own rates lies far outside


def test_document_interval_leaves_out_empty_documents_and_needs_two():
    assert st.document_interval([8.0, 9.0, 0.0], [2, 3, 0]) == st.document_interval([8.0, 9.0], [2, 3])
    assert np.isnan(st.document_interval([8.0], [2])).all()
