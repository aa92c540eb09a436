"""Prefix smoothing in the report: numbers against hand calculation, what is said of what cannot be told.

python -m pytest tests/test_report_prefix.py
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from page_structure import row_of, text_of
from synthetic_prefix import SEEDS, arm_of, harness_rows, increases, prefix_numbers, write_prefix
from synthetic_runs import STEPS

from nbutils import report
from nbutils.report import judging
from nbutils.report.evidence import gather
from nbutils.report.log import results_log
from nbutils.report.studies.mixing import mixes
from nbutils.report.studies.prefix import arm_table, ceiling_table, prefix_smoothing, sampler_table
from nbutils.report.studies.prefix_figures import by_smoothing, target_examples
from nbutils.report.studies.smoothing import ceiling
from nbutils.report.studies.tasks import task_table
from nbutils.report.weekly import summary


@pytest.fixture(scope="module")
def study(smooth_evidence):
    return smooth_evidence.studies[0]


# --- tables -------------------------------------------------------------------------------------------


def test_the_table_of_arms_has_every_number_by_hand(study):
    html = arm_table(study)
    row = row_of(html, "(over prefixes)")
    values = [prefix_numbers("prefixes", seed)["test_unsmoothed_bits_per_byte"] for seed in SEEDS]
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [row[0].split()[0], *row[1:3]] == ["normalised", "5", "23.30"]
    assert f"{np.mean(values):.4f}" in text_of(html) and f"[{low:.4f}, {high:.4f}]" in text_of(html)
    assert row[-4:] == ["0.050", "2.33", "14.32", "6.66"]  # d, clipped, prefix mass, calibration error in per cent
    assert "On the test split" in html.data and "stage cosine" not in html.data
    null = row_of(html, "unnormalised")
    assert "equals cross entropy: serves as A/A" in null[0] and null[2] == "&lt; 0.01"
    marked = re.findall(r'<tr class="control">.*?</tr>', html.data)
    assert len(marked) == 1 and "cross entropy" in marked[0]


def test_an_arm_without_gold_mass_has_dashes_and_the_reason(study):
    html = arm_table(study)
    assert row_of(html, "eps 1)")[5:8] == ["–", "–", "–"]  # un-smoothed, d, clipped
    assert "With eps 1 the target leaves the gold token no mass, so nothing can be un-smoothed." in html.data
    others = replace(study, arms=tuple(arm for arm in study.arms if arm.values["eps"] != 1.0))
    assert "With eps 1" not in arm_table(others).data


def test_the_ceiling_stands_beside_what_was_observed(study):
    html = ceiling_table(study)
    row = row_of(html, "normalised, tau 0.2<")
    low, high = scipy.stats.ttest_1samp(increases("prefixes"), 0).confidence_interval(0.95)
    assert row[2] == "0.3000" and row[3].startswith(f"{np.mean(increases('prefixes')):+.4f}")
    assert f"[{low:+.4f}, {high:+.4f}]" in row[3]
    assert row[4].startswith(f"{100 * np.mean(increases('prefixes')) / 0.3:.0f} %")
    assert f"[{100 * low / 0.3:.0f}, {100 * high / 0.3:.0f}]" in row[4]
    bits = np.mean(increases("prefixes", "test_unsmoothed_bits_per_byte"))
    assert row[5].startswith(f"{bits:+.4f}".replace("-", "−"))
    assert row_of(html, "eps 1<")[2] == "–" and row_of(html, "eps 1<")[4:] == ["–", "–"]
    assert "One-hot perplexity alone cannot tell" in html.data
    assert "unnormalised" not in html.data  # it equals cross entropy: there is nothing to explain


def test_without_a_control_or_a_ceiling_no_share_is_given(study):
    alone = replace(study, arms=study.arms[1:], control=None)
    assert ceiling_table(alone).data == "" and "23.30" in text_of(arm_table(alone))
    runs = [replace(run) for run in study.arms[1].runs]
    for run in runs:
        run.__dict__["result"] = {name: value for name, value in run.result.items() if "predicted" not in name}
    arms = (study.arms[0], replace(study.arms[1], runs=tuple(runs)))
    assert math.isnan(ceiling(replace(study, arms=arms), arms[1]))


# --- tasks --------------------------------------------------------------------------------------------


def test_tasks_have_chance_and_differences_item_by_item(study):
    html = task_table(study)
    text = text_of(html)
    assert "PIQA(40 items)(chance 50.0 %)" in text and "spelling, count(30 items)(chance 33.3 %)" in text
    row = row_of(html, "normalised, tau 0.2<")  # of the first task
    sides = []
    for name in ("prefixes", "none"):
        own = pd.concat(harness_rows(name, seed) for seed in SEEDS)
        own = own[(own["step"] == STEPS) & (own["task"] == "piqa")]
        sides.append(own.groupby("item")[["correct", "gold_bits", "gold_bytes"]].mean())
    difference = sides[0]["correct"] - sides[1]["correct"]
    mean = difference.sum() / 42  # Agresti and Min's, two items more
    half = 1.959964 * np.sqrt(((difference**2).sum() + 1) / 42 - mean**2) / np.sqrt(42)
    low, high = 100 * (mean - half), 100 * (mean + half)
    assert f"Δ {100 * difference.mean():+.2f}".replace("-", "−") in row[2]
    assert f"[{low:+.2f}, {high:+.2f}]".replace("-", "−") in row[2]
    accuracy = np.mean([prefix_numbers("prefixes", seed)["piqa_acc"] for seed in SEEDS])
    assert row[2].startswith(f"{100 * accuracy:.2f}")
    bits = sides[0]["gold_bits"].sum() / sides[0]["gold_bytes"].sum()
    assert f"Δ {bits - sides[1]['gold_bits'].sum() / sides[1]['gold_bytes'].sum():+.4f}" in row[4]
    assert "1 more arm is in result.json alone" in text and html.data.count('<tr class="control">') == 2


def test_unlike_items_and_missing_controls_give_no_difference(tmp_path):
    runs, file = write_prefix(tmp_path, seeds=(1, 2))
    for path in runs.glob("smooth/prefix-smoothingnone-*/harness.parquet"):
        rows = pd.read_parquet(path)
        rows.assign(item=rows["item"] + " of another tokenizer").to_parquet(path)
    row = row_of(task_table(gather(runs, str(file)).studies[0]), "normalised, tau 0.2<")
    assert not any("Δ" in cell for cell in row) and row[2] != "–"
    for path in runs.glob("smooth/prefix-smoothingnone-*/harness.parquet"):
        path.unlink()
    row = row_of(task_table(gather(runs, str(file)).studies[0]), "normalised, tau 0.2<")
    assert not any("Δ" in cell for cell in row) and row[2] != "–"


# --- samples ------------------------------------------------------------------------------------------


def test_samples_stand_side_by_side_and_the_other_section_shows_those_as_trained(study):
    html = sampler_table(study)
    head = re.findall(r'<th scope="col">(.*?)</th>', html.data)
    assert head[:2] == ["normalised, tau 0.2: as trained", "normalised, tau 0.2: un-smoothed"] and len(head) == 4
    assert (
        "<script>" not in html.data
        and "<b>" not in html.data
        and "of prefixes, un-smoothed 0 <script>" in text_of(html)
    )
    assert "un-smoothed" not in report.samples(study).data


# --- verdicts -----------------------------------------------------------------------------------------


def test_an_absent_number_cannot_be_judged_and_the_reason_is_said(smooth_evidence):
    judged = next(each for each in smooth_evidence.studies[0].judged if each.contrast.name == "no-gold")
    assert judged.verdict.outcome == judging.NOT_JUDGED
    text = text_of(report.verdicts(smooth_evidence))
    assert "Cannot be judged. And without gold mass?" in text
    told = "No run of mixed uniform, eps 1 reports test un-smoothed bits per byte: its target leaves the gold token no"
    assert told in text


def test_a_one_hot_contrast_says_what_the_target_alone_costs(smooth_evidence):
    text = text_of(report.verdicts(smooth_evidence))
    assert text.count("its target alone costs up to 0.3000 nats per token") == 1
    assert "Supported. Does it improve spelling?" in text and "percentage points" in text


# --- figures ------------------------------------------------------------------------------------------


def test_marks_are_means_at_the_effective_smoothing(study):
    axes = by_smoothing(study).axes
    titles = ["cross entropy", "bits per byte", "un-smoothed bits per", "KL to its own target", "spelling: accuracy"]
    assert all(title in each.get_ylabel() for title, each in zip(titles, axes, strict=False)) and len(axes) == 6
    spelling = axes[4]
    plain = np.mean([prefix_numbers("none", seed)["spelling_acc"] for seed in SEEDS])
    level = next(line for line in spelling.lines if len(set(line.get_xdata())) == 2 and len(set(line.get_ydata())) == 1)
    assert level.get_ydata()[0] == pytest.approx(100 * plain)
    ours = 100 * np.mean([prefix_numbers("prefixes", seed)["spelling_acc"] for seed in SEEDS])
    means = [line for line in spelling.lines if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
    (found,) = [line for line in means if line.get_ydata()[0] == pytest.approx(ours)]
    assert abs(found.get_xdata()[0] - 23.3) < 3 and found.get_marker() == "o"
    markers = {text.get_text() for text in axes[5].get_legend().get_texts()}
    assert {
        "prefixes",
        "all tokens evenly",
        "random tokens",
        "equals cross entropy (A/A)",
        "A/A noise floor",
    } <= markers


def test_intervals_are_those_of_seed_paired_differences(study):
    axes = by_smoothing(study).axes[0]
    plain = np.mean([prefix_numbers("none", seed)["test_ce_loss"] for seed in SEEDS])
    low, high = scipy.stats.ttest_1samp(increases("uniform"), 0).confidence_interval(0.95)
    drawn = [tuple(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(pair == pytest.approx((plain + low, plain + high)) for pair in drawn)


def test_the_arm_off_the_scale_is_written_instead(study):
    axes = by_smoothing(study).axes[0]
    mean = np.mean([prefix_numbers("no-gold", seed)["test_ce_loss"] for seed in SEEDS])
    assert [text.get_text() for text in axes.texts] == [f"↑ {mean:.4f}"] and axes.get_ylim()[1] < mean


def test_targets_are_bars_of_each_token(study):
    figure = target_examples(study)
    first = figure.axes[0]
    assert [bar.get_width() for bar in first.patches] == [0.01, 0.02, 0.03, 0.09, 0.13, 0.72]
    assert [label.get_text() for label in first.get_yticklabels()][-1] == "␣personality"
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles[:2] == ["normalised, tau 0.2", "mixed uniform, eps 1"]  # the forms, then what else is smoothed over
    assert [title.split(", ")[-1] for title in titles[2:]] == [
        "prefixes but whitespace",
        "all tokens evenly",
        "random tokens",
    ]


def test_a_long_or_hostile_target_is_cut_and_spelled_out():
    from nbutils.report.studies.prefix_figures import BARS, _bars, spelled

    assert spelled(" \n$x\u202e") == "␣\\n$x\\u202e" and len(spelled("a" * 99)) == 24
    runs = {"gold": " " * 86, "tokens": [" " * n for n in range(1, 87)], "weights": [1 / 86] * 86}
    bars = _bars(runs)
    assert len(bars) == BARS + 1 and bars[0] == ("all others", pytest.approx(1 - BARS / 86)) and bars[-1][0][0] == "␣"
    uniform = {"gold": " x", "tokens": [" x"], "weights": [0.7]}
    assert _bars(uniform) == [("all others", pytest.approx(0.3)), ("␣x", 0.7)]


def test_damaged_examples_are_passed_over(tmp_path):
    runs, file = write_prefix(tmp_path, seeds=(1,))
    for path in runs.glob("smooth/*/targets.json"):
        path.write_text(
            json.dumps([{"gold": "x", "tokens": ["x"], "weights": []}, "x", {"tokens": ["x"], "weights": [1]}])
        )
    assert target_examples(gather(runs, str(file)).studies[0]).axes[0].texts


# --- the whole section --------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_few_seeds_and_diverged_runs_stop_nothing(tmp_path, seeds, undrawn):
    runs, file = write_prefix(tmp_path, seeds=seeds)
    path = next(runs.glob("smooth/prefix-smoothingnormalised-*uniform-seed1/result.json"))
    numbers = {name: None for name in json.loads(path.read_text()) if name.startswith(("eval_", "test_"))}
    path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    evidence = gather(runs, str(file))
    text = text_of(prefix_smoothing(evidence, tmp_path / "figures"))
    assert not {"nan", "None", "[nan,"} & {*text.split()}
    report.verdicts(evidence)


def test_the_other_sections_take_such_runs(smooth_evidence, tmp_path):
    study = smooth_evidence.studies[0]
    assert not mixes(study) and "un-smoothed bits per byte" in report.headline_table(study).data
    method = text_of(report.method(smooth_evidence))
    assert "Effective smoothing" in method and "Ceiling" in method
    log = results_log(smooth_evidence)
    assert "Smoothing: normalised | Tau: 0.2 | Eps: 0.1 | Over: prefixes" in log
    assert "un-smoothed bits per byte" in log
    means = summary(smooth_evidence, "2026-W47")["arms"]["smooth-prefix"]
    assert "test_unsmoothed_bits_per_byte" in means[arm_of(study, "prefixes").label]
