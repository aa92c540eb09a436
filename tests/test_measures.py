"""How numbers are written.

python -m pytest tests/test_measures.py -v
"""

from __future__ import annotations

import math

import pytest

from nbutils.measures import UNKNOWN, Measure, measure, p_text, percent


def test_splits_are_named_and_units_kept():
    assert measure("test_ce_loss").axis == "test cross entropy (nats per token)"
    assert measure("eval_perplexity").label == "validation perplexity"
    assert measure("test_ce_loss").better == "lower" and measure("eval_cosine").better == "higher"


def test_an_unknown_name_is_shown_as_it_is_without_a_direction():
    unknown = measure("test_some_new_score")
    assert (unknown.label, unknown.unit, unknown.better) == ("test some new score", "", "")


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234.50"), (-0.5, "−0.50"), (-0.001, "0.00"), (math.nan, UNKNOWN)]
)
def test_numbers_have_fixed_digits_and_a_true_minus(value, text):
    assert Measure("", digits=2).number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "+0.50"), (-0.5, "−0.50"), (0.001, "0.00"), (0.0, "0.00")])
def test_differences_are_signed_unless_they_round_to_zero(value, text):
    assert Measure("", digits=2).difference(value) == text


def test_percentages_are_scaled_and_differ_by_points():
    accuracy = measure("test_token_acc")
    assert accuracy.number(0.3456) == "34.56" and accuracy.short(0.002) == "0.2"
    assert accuracy.difference_unit == "percentage points"
    assert percent(0.0123) == "+1.23 %"


def test_an_interval_that_does_not_exist_is_a_dash():
    assert Measure("").interval(math.nan, math.nan) == UNKNOWN
    assert Measure("", digits=1).difference_interval(-1, 2) == "[−1.0, +2.0]"


def test_axis_ticks_are_short():
    assert [measure("test_token_acc").signed(value) for value in (-0.001, 0.0, 0.02)] == ["−0.1", "0", "+2"]


@pytest.mark.parametrize(("p", "text"), [(0.0421, "0.042"), (0.0004, "< 0.001"), (math.nan, UNKNOWN)])
def test_p_values(p, text):
    assert p_text(p) == text
