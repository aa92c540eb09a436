"""Verdicts and intervals against scipy, published power tables and simulation.

python -m pytest tests/test_statistics.py -v
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from nbutils.report import statistics as st

DIFFERENCES = [-0.021, -0.013, -0.034, -0.008, -0.017]  # treatment minus control, five seeds, all better


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


@pytest.mark.parametrize("alpha", [0.05, 0.01])
@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_the_minimum_detectable_effect_is_detected_in_at_least_80_of_100_simulated_studies(pairs, alpha):
    """At the spread's upper limit, which four of five samples stay below: the true spread is that limit here."""
    generator = np.random.default_rng(1)
    sample = np.array([-1, 1, *([0] * (pairs - 2))]) / np.sqrt(2 / (pairs - 1))  # of standard deviation 1
    effect, limit = st.minimum_detectable_effect(sample, alpha), st.spread_limit(1.0, pairs)
    studies = generator.normal(effect, limit, (20_000, pairs))
    p_values = scipy.stats.ttest_1samp(studies, 0.0, axis=1).pvalue
    assert (p_values < alpha).mean() == pytest.approx(0.8, abs=0.012)
    spreads = np.std(generator.normal(0, 1, (20_000, pairs)), axis=1, ddof=1)
    assert np.mean(st.spread_limit(1.0, pairs) * spreads > 1) == pytest.approx(0.8, abs=0.012)


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
