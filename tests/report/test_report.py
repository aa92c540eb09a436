"""The report says what the runs say: verdicts, tables, samples, failures.

python -m pytest tests/test_report.py -v
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from page_structure import text_of
from synthetic_runs import final_numbers, write_plan, write_run, write_runs

from nbutils import report
from nbutils.report import judging, statistics
from nbutils.report.evidence import gather
from nbutils.report.verdict_sentences import _verdict


@pytest.fixture(scope="module")
def study(toy_evidence):
    return toy_evidence.studies[0]


def test_verdicts_come_first_in_words_the_primary_on_top(toy_evidence):
    text = text_of(report.verdicts(toy_evidence))
    assert text.startswith("Supported. Is alpha 0.5 no worse than cross entropy in perplexity?")
    differences = [
        final_numbers(0.5, s, 0)["test_ce_loss"] - final_numbers(0, s, 0)["test_ce_loss"] for s in range(1, 6)
    ]
    low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.96)
    written = f"{np.mean(differences):+.4f} nats per token, 96 % interval [{low:+.4f}, {high:+.4f}], 5 seed pairs, "
    written += f"{sum(each > 0 for each in differences)} of them up"
    assert written.replace("-", "−") in text
    assert (
        "Not supported. Is the cosine term alone no worse" in text and "worse by more than the margin of 0.01" in text
    )
    assert "Real but too small. Does alpha 0.5 raise token accuracy?" in text
    assert "all of its interval lies below the smallest effect of interest, 0.2 percentage points" in text
    assert f"perplexity {100 * np.expm1(np.mean(differences)):+.2f} %".replace("-", "−") in text


def test_before_all_pairs_are_in_a_contrast_is_interim_and_names_what_is_missing(tmp_path):
    runs = write_runs(tmp_path / "runs", keep=lambda matrix: matrix["seed"] <= 2)
    evidence = gather(runs, str(write_plan(tmp_path)))
    assert {judged.verdict.outcome for judged in evidence.studies[0].judged} == {judging.INTERIM}
    text = text_of(report.verdicts(evidence))
    assert "Interim. Is alpha 0.5 no worse" in text and "2 of 5 registered pairs are in" in text
    assert "3 of 5 planned pairs are missing (cosine-alpha0.5-seed3-noise_seed0: not run yet" in text
    assert "and 2 more)" in text
    assert "12 of 20 planned runs are missing from these numbers" in text


def test_an_undecided_contrast_says_what_could_have_been_seen_and_what_an_extension_takes(study):
    asked = study.judged[0]
    verdict = replace(asked.verdict, outcome=judging.UNDECIDED, differences=(-0.02, 0.03, 0.01, -0.01), alpha=0.02)
    verdict = replace(verdict, minimum_detectable=0.1234, planned=4, low=-0.1, high=0.1)
    text = _verdict(replace(asked, verdict=verdict), study)
    needed = statistics.pairs_needed(verdict.spread, 0.01, 0.005 * 0.5)
    assert "4 pairs could have shown a margin of 0.1234 nats per token or more (power 0.8 at level 0.02" in text
    assert f"An extension, judged at level 0.0025, takes about {needed} pairs." in text


def test_a_verdict_that_hangs_on_one_seed_says_so(study):
    asked = study.judged[0]
    alone = judging.WithoutOne(4, judging.NOT_SUPPORTED, 0.02)
    text = _verdict(replace(asked, verdict=replace(asked.verdict, without_one=alone)), study)
    assert "Without seed 5 this would read: not supported, +0.0200." in text


def test_a_difference_inside_the_noise_floor_is_not_told_from_it_and_no_worse_needs_no_such_word(study):
    asked = next(each for each in study.judged if each.contrast.claim == "better")
    floor = statistics.NoiseFloor((9.0, -9.0))
    assert "not distinguishable from A/A" in _verdict(replace(asked, floor=floor), study)
    contrast = replace(asked.contrast, claim="no worse")
    assert "A/A" not in _verdict(replace(asked, floor=floor, contrast=contrast), study)


def test_the_verdict_table_holds_every_number_behind_a_verdict(study):
    text = text_of(report.verdict_table(study))
    for judged in study.judged:
        assert judged.contrast.name in text and judged.verdict.outcome in text
    for needed in ("primary", "secondary", "(margin 0.01)", "(smallest effect 0.2)", "(98.7 %)", "percentage points"):
        assert needed in text
    assert f"{study.judged[0].verdict.minimum_detectable:.4f}" in text
    assert f"±{study.judged[0].floor.band(5):.4f}" in text


def test_the_headline_table_marks_the_control_and_what_is_exploratory(study):
    html = report.headline_table(study).data
    assert html.count('<tr class="control">') == 1 and "alpha 0.0<br><small>(control)" in html
    values = study.arms[1].results("test_perplexity")
    logs = np.log(values)
    low, high = np.exp(scipy.stats.t.interval(0.95, 4, np.mean(logs), scipy.stats.sem(logs)))
    assert f"{scipy.stats.gmean(values):.2f}<br><small>[{low:.2f}, {high:.2f}]</small>" in html
    text = text_of(report.headline_table(study))
    assert re.search(r"Δ [+−]0\.\d\d % †", text)  # perplexity: no contrast asks it
    judged = study.judged[0].verdict
    assert f"Δ −{abs(judged.difference):.4f}[" in html.replace("<br><small>", "") and "† exploratory" in text


def test_runs_of_different_data_or_code_are_called_out(tmp_path):
    runs = write_runs(tmp_path / "runs", keep=lambda matrix: matrix["seed"] <= 2)
    path = next(runs.glob("toy/*/manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_fingerprint": "e" * 64}))
    text = text_of(report.verdicts(gather(runs, str(write_plan(tmp_path)))))
    assert "used 2 different data" in text and "versions of the code" not in text


def test_an_arm_that_learned_nothing_is_called_out(tmp_path):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    assert "unigram" not in text_of(report.verdicts(gather(runs, str(file))))
    result = runs / "toy" / "cosine-alpha1.0-seed2-noise_seed0" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"eval_ce_loss": 6.3}))
    assert "some runs of alpha 1.0 ended no better than a unigram model" in text_of(
        report.verdicts(gather(runs, str(file)))
    )


def test_failed_runs_name_cause_and_cell(tmp_path):
    matrix = {"alpha": 0.5, "seed": 1, "noise_seed": 0}
    runs = write_runs(tmp_path / "runs", keep=lambda each: each != matrix)
    error = {"type": "ValueError", "message": "alpha is <b>odd</b>", "cell": 7, "log": []}
    write_run(runs / "toy", "cosine", matrix, {}, status="failed", exit_code=1, error=error)
    evidence = gather(runs, str(write_plan(tmp_path)))
    html = report.failed_runs(evidence)
    for needed in ("cosine-alpha0.5-seed1-noise_seed0", "failed", "ValueError: alpha is <b>odd</b>", "7"):
        assert needed in text_of(html)
    assert "<b>" not in html.data
    assert "4 of 5" in text_of(report.headline_table(evidence.studies[0]))
    assert "1 of 5 planned pairs are missing (cosine-alpha0.5-seed1-noise_seed0: failed)" in text_of(
        report.verdicts(evidence)
    )


def test_a_failed_repeat_of_a_finished_run_is_named_and_the_result_stands(toy_evidence):
    (plan,) = toy_evidence.plans
    newer = plan.slots[0].run.manifest | {"status": "killed", "error": {"type": "Killed", "message": "out of memory"}}
    slots = (replace(plan.slots[0], run=replace(plan.slots[0].run, newer=newer)), *plan.slots[1:])
    text = text_of(report.failed_runs(replace(toy_evidence, plans=(replace(plan, slots=slots),))))
    assert "toy/cosine-alpha0.0-seed1-noise_seed0" in text and "Killed: out of memory" in text
    assert "the earlier finished result stands" in text


def test_all_finished_says_so(toy_evidence):
    assert text_of(report.failed_runs(toy_evidence)) == "None: every planned run finished."


def test_samples_stand_side_by_side_for_prompts_all_arms_share(study):
    html = report.samples(study).data
    assert html.count('<tr class="prompt">') == 5
    first_row = re.search(r"number 0 returns.*?</tr><tr>(.*?)</tr>", html)[1]
    assert first_row.count("<td>") == 4  # the true continuation and three arms
    assert [m in first_row for m in ("&#x27;alpha&#x27;: 0.0", "&#x27;alpha&#x27;: 0.5", "&#x27;alpha&#x27;: 1.0")]
    other = replace(study.arms[2], runs=study.arms[2].runs[:0])
    assert "alpha 1.0" not in report.samples(replace(study, arms=(*study.arms[:2], other))).data


def test_cost_is_compared_with_the_control(study):
    times = [np.mean(arm.results("train_seconds")) for arm in study.arms]
    assert f"× {times[1] / times[0]:.2f}" in text_of(report.cost_table(study))


def test_document_intervals_use_the_sums_of_the_test_documents(study):
    text = text_of(report.document_table(study))
    frame = study.arms[0].runs[0].per_document()
    assert f"test{len(frame)}" in text.replace(" ", "") and "No comparison of arms" in text


def test_the_manifest_says_once_what_all_share(toy_evidence):
    html = report.manifest(toy_evidence).data
    assert html.count("dddddddddddd") == 1 and html.count("torch 2.13.0") == 1 and "unrelated" not in html
    assert "0.0, 0.5, 1.0" in text_of(report.manifest(toy_evidence))  # alpha, among the parameters
    assert "20 runs, one by one" in html


def test_the_period_is_the_newest_runs_week_unless_given(toy_evidence):
    assert text_of(report.period(toy_evidence)).startswith(
        "Week 2026-W47, 16 to 22 November 2026. 20 of 20 planned runs (toy), finished from 2026-11-18"
    )
    assert text_of(report.period(toy_evidence, "2027-W01")).startswith("Week 2027-W01, 4 to 10 January 2027.")


def test_no_runs_explains_how_to_get_some(tmp_path):
    evidence = gather(tmp_path / "runs")
    text = text_of(report.verdicts(evidence))
    assert "no runs" in text and "make report" in text and "python -m nbutils batch params/quick.yaml" in text
    for show in (report.failed_runs, report.manifest, report.contrasts_registered, report.period):
        show(evidence)
    assert "Nothing to show" in text_of(report.by_study(evidence, report.headline_table))


@pytest.mark.parametrize(
    ("metric", "claim", "scores", "told"),
    [
        ("pairs_acc", "no worse", (0.49, 0.50, 0.52), True),
        ("pairs_acc", "no worse", (0.60, 0.61, 0.62), False),
        ("pairs_acc", "better", (0.49, 0.50, 0.52), False),
        ("test_token_acc", "no worse", (0.49, 0.50, 0.52), False),
    ],
)
def test_a_control_at_chance_has_nothing_to_lose(study, metric, claim, scores, told):
    asked = study.judged[0]
    contrast = replace(asked.contrast, metric=metric, claim=claim)
    runs = [SimpleNamespace(matrix={"seed": i}, result={metric: score}, params={}) for i, score in enumerate(scores)]
    control = replace(study.control, runs=tuple(runs))
    shown = replace(study, arms=(control, *study.arms[1:]), control=control)
    text = _verdict(replace(asked, contrast=contrast), shown)
    assert ("The control itself is at chance (50.00 %): it has nothing to lose" in text) == told


def test_a_run_that_ended_at_four_thousand_nats_ends_no_report(tmp_path):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    path = runs / "toy" / "cosine-alpha0.5-seed2-noise_seed0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_ce_loss": 4000.0, "test_perplexity": None}))
    evidence = gather(runs, str(file))
    assert "Without seed 2 this would read: supported" in text_of(report.verdicts(evidence))
    assert text_of(report.headline_table(evidence.studies[0]))
