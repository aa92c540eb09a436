"""How numbers are written.

python -m pytest tests/test_measures.py -v
"""

from __future__ import annotations

import math

import pytest

from nbutils.runs.metric_labels import UNKNOWN, Measure, is_of_the_machine, measure, p_text, percent


def test_splits_are_named_and_units_kept():
    assert measure("test_ce_loss").axis == "test cross entropy (nats per token)"
    assert measure("eval_perplexity").label == "validation perplexity"
    assert measure("test_ce_loss").better == "lower" and measure("eval_cosine").better == "higher"


def test_an_unknown_name_is_shown_as_it_is_without_a_direction():
    unknown = measure("test_some_new_score")
    assert (unknown.label, unknown.unit, unknown.better) == ("test some new score", "", "")


def test_the_teachers_numbers_and_those_before_fine_tuning_say_so():
    assert measure("teacher_eval_perplexity").label == "validation perplexity of the teacher"
    assert measure("teacher_test_ce_loss").axis == "test cross entropy of the teacher (nats per token)"
    assert measure("teacher_parameters").digits == 0 and measure("teacher_token_acc").unit == "%"
    assert measure("before_eval_ce_loss").label == "validation cross entropy before fine-tuning"
    assert measure("expected_after").label == "published perplexity after fine-tuning"
    assert measure("teacher_cache_bytes_per_token").unit == "bytes per token"  # of the store, not of the teacher


@pytest.mark.parametrize(
    ("name", "value", "text", "unit", "better"),
    [
        ("test_kl_loss", 0.12345, "0.1235", "nats per token", "lower"),
        ("eval_agreement", 0.4321, "43.21", "%", "higher"),
        ("test_bleu", 0.1234, "0.1234", "0 to 1", "higher"),
        ("test_bleu_limit", 0.5, "0.5000", "0 to 1", ""),
        ("eval_corpus_bleu", 12.345, "12.35", "0 to 100", "higher"),
        ("eval_chrf", 23.4, "23.40", "0 to 100", "higher"),
        ("test_exact_match", 0.25, "25.00", "%", "higher"),
        ("test_token_f1", 0.5, "50.00", "%", "higher"),
        ("bytes_on_disk", 327_657_928, "327.7", "MB", "lower"),
        ("teacher_bytes_on_disk", 3_096_165_928, "3,096.2", "MB", "lower"),
        ("generation_tokens_per_second", 41.26, "41.3", "tokens/s", "higher"),
        ("scoring_tokens_per_second", 1234.5, "1,234", "tokens/s", "higher"),
        ("times_smaller", 774_030_080 / 81_912_576, "9.4", "", "higher"),
        ("teacher_cache_kl_error", 1.5e-5, "0.000015", "", "lower"),
    ],
)
def test_distillation_is_measured_in(name, value, text, unit, better):
    found = measure(name)
    assert (found.number(value), found.unit, found.better) == (text, unit, better)


@pytest.mark.parametrize(
    ("name", "label", "value", "text", "unit", "better"),
    [
        ("test_unsmoothed_bits_per_byte", "test un-smoothed bits per byte", 1.23456, "1.2346", "", "lower"),
        ("eval_unsmoothed_ce", "validation un-smoothed cross entropy", 3.5, "3.5000", "nats per token", "lower"),
        ("test_kl_to_target", "test KL to its own target", 0.5, "0.5000", "nats per token", "lower"),
        ("test_clipped_gold", "test gold tokens clipped", 0.0123, "1.23", "%", "lower"),
        ("eval_prefix_mass", "validation mass on strict prefixes at word starts", 0.1, "10.00", "%", "lower"),
        ("effective_smoothing", "effective smoothing", 0.2334, "23.34", "%", ""),
        ("spelling_acc", "spelling: accuracy", 0.251, "25.10", "%", "higher"),
        ("eval_spelling_acc", "spelling: accuracy", 0.251, "25.10", "%", "higher"),
        ("hellaswag_acc_norm", "HellaSwag: normalised accuracy", 0.251, "25.10", "%", "higher"),
        (
            "winogrande_debiased_gold_bits_per_byte",
            "Winogrande (debiased): bits per byte of the gold answer",
            *(1.5, "1.5000", "", "lower"),
        ),
        ("spelling_first_index_acc", "spelling, first index: accuracy", 0.5, "50.00", "%", "higher"),
    ],
)
def test_prefix_smoothing_is_measured_in(name, label, value, text, unit, better):
    found = measure(name)
    assert (found.label, found.number(value), found.unit, found.better) == (label, text, unit, better)


@pytest.mark.parametrize(
    ("name", "label", "value", "text", "unit", "better"),
    [
        ("test_judge_score", "test judge's score", 0.5, "0.500", "0 to 1", "higher"),
        ("test_second_judge_score", "test held-out judge's score", 0.5, "0.500", "0 to 1", "higher"),
        ("test_story_judge_score", "test judge's score in stories", 0.5, "0.500", "0 to 1", "higher"),
        (
            "test_story_judge_wit",
            "test judge's score of wit in stories",
            0.5,
            "0.500",
            "0 to 1",
            "higher",
        ),
        (
            "test_story_judge_not_asked",
            "test responses the judge was not asked about in stories",
            2,
            "2.0",
            "",
            "lower",
        ),
        ("judge_number_mass", "probability that the judge grades by a number", 0.5, "50.0", "%", "higher"),
        ("test_judge_known_words", "test judge's score of known words", 0.25, "0.250", "0 to 1", "higher"),
        ("test_second_judge_repetition", "test held-out judge's score of repetition", 1, "1.000", "0 to 1", "higher"),
        ("test_repetition", "test repetition", 0.125, "12.5", "%", "lower"),
        ("judge_failure_rate", "failures of the judge", 0.125, "12.50", "%", "lower"),
        ("judges_agreement", "rank correlation of the judges", -0.5, "−0.50", "", ""),
        ("human_words", "words of people", 12_000, "12,000", "", ""),
        ("kl_to_start", "KL from the start", 0.25, "0.250", "nats per token", ""),
        ("blimp_acc", "BLiMP: mean accuracy", 0.671, "67.10", "%", "higher"),
        ("eval_pairs_acc", "minimal pairs of our own: mean accuracy", 0.5, "50.00", "%", "higher"),
        ("blimp_anaphor_number_agreement_acc", "BLiMP, anaphor number agreement: accuracy", 1, "100.00", "%", "higher"),
        ("pairs_number_acc", "minimal pairs, number: accuracy", 0.5, "50.00", "%", "higher"),
    ],
)
def test_interaction_is_measured_in(name, label, value, text, unit, better):
    found = measure(name)
    assert (found.label, found.number(value), found.unit, found.better) == (label, text, unit, better)


def test_token_accuracy_is_no_task():
    assert measure("eval_token_acc").label == "validation token accuracy"


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
    assert measure("test_bleu").difference_unit == ""  # "+0.02 0 to 1" says nothing
    assert percent(0.0123) == "+1.23 %"


def test_an_interval_that_does_not_exist_is_a_dash():
    assert Measure("").interval(math.nan, math.nan) == UNKNOWN
    assert Measure("", digits=1).difference_interval(-1, 2) == "[−1.0, +2.0]"


def test_axis_ticks_are_short():
    assert [measure("test_token_acc").signed(value) for value in (-0.001, 0.0, 0.02)] == ["−0.1", "0", "+2"]


@pytest.mark.parametrize(("p", "text"), [(0.0421, "0.042"), (0.0004, "< 0.001"), (math.nan, UNKNOWN)])
def test_p_values(p, text):
    assert p_text(p) == text


def test_what_a_clock_or_a_meter_of_memory_read_is_known_by_its_name():
    read = (
        "judging_seconds",
        "sampling_seconds",
        "train_seconds",
        "tokens_per_second",
        "peak_memory_mib",
        "times_faster",
        "cosine_mix_time_ratio",
    )
    assert all(map(is_of_the_machine, read))
    assert not any(map(is_of_the_machine, ("eval_ce_loss", "times_smaller", "steps", "second_teacher_loss", "seed")))
