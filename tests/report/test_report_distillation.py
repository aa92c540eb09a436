"""Teachers and students in the report: what is shown, what is called out, and what is left out.

python -m pytest tests/test_report_distillation.py
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
import yaml
from page_structure import text_of
from synthetic_distillation import GAINS, SEEDS, TEACHER_CE, answer_rows, student_numbers, write_distillation
from synthetic_runs import final_numbers, write_run

from nbutils import report
from nbutils.report import figures
from nbutils.report.evidence import gather
from nbutils.report.log import plan_metrics, results_log
from nbutils.report.method_section import objective_text
from nbutils.report.studies.answers import answer_samples, answer_table, bootstrap_table
from nbutils.report.studies.distillation import (
    cache_table,
    callout,
    compression_table,
    distillation,
    student_table,
    teacher_table,
)
from nbutils.report.studies.mixing import composite_table, mixes
from nbutils.report.studies.teachers import against_control


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    runs, file = write_distillation(tmp_path_factory.mktemp("kd"))
    return gather(runs, str(file))


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """The same with a teacher that knows less than the control, and the divergence divided by sequences."""
    folder = tmp_path_factory.mktemp("weak")
    runs, file = write_distillation(folder, teacher_ce=4.5, kd_reduction="batchmean")
    return gather(runs, str(file))


def named(evidence, stage):
    return next(study for study in [*evidence.studies, *evidence.teachers] if study.stage == stage)


def control_ce() -> float:
    return float(np.mean([final_numbers(0.0, seed, 0)["test_ce_loss"] for seed in SEEDS]))


def edit_results(evidence, stage, **numbers):
    for path in evidence.folder.glob(f"kd/{stage}-*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | numbers))


def test_a_teacher_stage_is_no_study_but_has_its_table(evidence):
    assert [study.stage for study in evidence.studies] == ["cosine", "distillation", "qa"]
    text = text_of(teacher_table(named(evidence, "teacher")))
    assert f"{np.exp(4.4):.2f} → {np.exp(TEACHER_CE):.2f}(4.4000 → 3.9000)" in text
    assert "23.29 → 22.41" in text and "140 of 200" in text and "0.0900" in text  # (60 / 200)^2 above the best


def test_a_baseline_that_nobody_needs_is_a_study_and_no_teacher(tmp_path):
    """The same notebook as the teacher's, on other tokens: it has its headline, in the unit that compares."""
    runs, file = write_distillation(tmp_path)
    plan = yaml.safe_load(file.read_text())
    plan["stages"].append(plan["stages"][0] | {"name": "blm", "matrix": {"seed": [1, 2]}})
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    result = {"before_eval_ce_loss": 9.7, "test_bits_per_byte": 1.2345, "eval_cosine": 0.1}
    result |= {f"{split}_{name}": 4.2 for split in ("eval", "test") for name in ("ce_loss", "perplexity")}
    for seed in (1, 2):
        write_run(runs / "kd", "blm", {"seed": seed}, result)
    evidence = gather(runs, str(file))
    assert [study.stage for study in evidence.teachers] == ["teacher"]
    study = named(evidence, "blm")
    assert study in evidence.studies and "1.2345" in text_of(report.headline_table(study))
    assert [arm.label for arm in one_by_hand(tmp_path / "hand", result).teachers[0].arms] == ["02_teacher_finetune"]


def one_by_hand(folder, result):
    """The evidence of a teacher made in its notebook: no plan says who needs it."""
    manifest = write_run(folder / "interactive", "02_teacher_finetune", {}, result) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"stage": ""}))
    return gather(folder, "interactive")


def test_bits_per_byte_stand_beside_perplexity_where_tokenizers_may_differ(tmp_path):
    runs, file = write_distillation(tmp_path)
    evidence = gather(runs, str(file))
    edit_results(evidence, "distillation", test_bits_per_byte=1.1111, teacher_test_bits_per_byte=1.0101)
    edit_results(evidence, "cosine", test_bits_per_byte=1.2222)
    teacher = runs / "kd" / "teacher" / "result.json"
    before = {"before_test_bits_per_byte": 3.0303, "test_bits_per_byte": 2.0202}
    teacher.write_text(json.dumps(json.loads(teacher.read_text()) | before))
    evidence = gather(runs, str(file))
    study = named(evidence, "distillation")
    assert (
        "1.1111" in text_of(report.headline_table(study)) and "only bits per byte" in report.headline_table(study).data
    )
    students = text_of(student_table(study))
    assert "1.0101" in students and "1.1111" in students
    assert "(3.0303 → 2.0202)" in text_of(teacher_table(named(evidence, "teacher")))
    assert "1.2222" not in text_of(report.headline_table(named(evidence, "cosine")))  # one tokenizer, a full table


def test_a_study_without_pairs_has_no_empty_figure_of_contrasts(evidence, tmp_path):
    """The plan asks about three stages; without its second seed one of them has no interval."""
    assert all(map(report.has_contrasts, evidence.studies))
    asked = named(evidence, "qa")
    unasked = replace(asked, judged=())
    single = [replace(each, verdict=replace(each.verdict, low=math.nan, high=math.nan)) for each in asked.judged]
    single = replace(asked, judged=tuple(single))
    assert not report.has_contrasts(unasked) and not report.has_contrasts(single)
    alone = replace(evidence, plans=(replace(evidence.plans[0], studies=(unasked, single)),))
    shown = report.figure_by_study(
        alone, figures.contrast_forest, "c", "", tmp_path, where=report.has_contrasts, absent="No <pairs>."
    )
    assert shown.data == '<p class="note">No &lt;pairs&gt;.</p>' and not [*tmp_path.iterdir()]


def test_a_better_teacher_is_said_and_not_warned_of(evidence):
    (found,) = against_control(named(evidence, "distillation"))
    assert found.is_better and found.control == pytest.approx(control_ce()) and found.teacher == TEACHER_CE
    assert "warning" not in callout(named(evidence, "distillation")).data
    verdicts = text_of(report.verdicts(evidence))
    assert "no better" not in verdicts and "one teacher: they say nothing of other teachers" in verdicts


def test_a_teacher_no_better_than_the_student_is_called_out_everywhere(weak):
    told = f"test cross entropy 4.5000 against {control_ce():.4f} nats per token"
    html = callout(named(weak, "distillation"))
    assert '<div class="warning">' in html.data and told in text_of(html)
    verdicts = text_of(report.verdicts(weak))
    assert verdicts.count("The teacher is no better than the student trained on cross entropy alone") == 2  # and qa
    assert told in verdicts and f"alone, alpha 0.0 (stage cosine): {told}" in results_log(weak)


def test_only_arms_with_a_weighted_teacher_are_held_against_it(evidence):
    study = named(evidence, "qa")
    assert [each.arms for each in against_control(study)] == [("divergence forward",)]
    runs = [
        replace(run, manifest=run.manifest | {"params": run.params | {"kl_weight": 0}}) for run in study.arms[1].runs
    ]
    untaught = replace(study, arms=(study.arms[0], replace(study.arms[1], runs=tuple(runs))))
    assert against_control(untaught) == []


def test_without_a_plain_student_nothing_is_said_of_the_teacher(evidence):
    study = named(evidence, "distillation")
    alone = replace(study, arms=study.arms[1:], control=None)
    assert "knew more cannot be told" in text_of(callout(alone)) and against_control(alone) == []


def test_the_gap_closed_is_the_seed_paired_share(evidence):
    html = student_table(named(evidence, "distillation"))
    gains = [final_numbers(0.0, s, 0)["test_ce_loss"] - student_numbers("forward", s)["test_ce_loss"] for s in SEEDS]
    share = 100 * np.mean(gains) / (control_ce() - TEACHER_CE)
    interval = scipy.stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    low, high = (100 * end / (control_ce() - TEACHER_CE) for end in interval)
    assert f"<td>{share:.0f} %<br><small>[{low:.0f}, {high:.0f}]</small></td>" in html.data
    rows = re.findall(r"<tr.*?</tr>", html.data)
    assert "Teacher" in rows[1] and 'class="control"' in rows[2] and "stage cosine" in rows[2]


def test_a_diverged_student_is_no_number_and_stops_nothing(tmp_path, undrawn):
    runs, file = write_distillation(tmp_path)
    folder = runs / "kd" / "qa-divergenceforward-seed1"
    result = json.loads((folder / "result.json").read_text())
    nothing = {name: None for name in result if name.startswith(("eval_", "test_"))}
    (folder / "result.json").write_text(json.dumps(result | nothing))
    pd.DataFrame().to_parquet(folder / "answers.parquet")
    teacher = runs / "kd" / "teacher" / "metrics.csv"
    pd.read_csv(teacher).assign(eval_ce_loss=None).to_csv(teacher, index=False)
    html = distillation(gather(runs, str(file)), tmp_path / "figures")
    assert not {"nan", "None"} & {*text_of(html).split()}


def test_compression_is_a_ratio_of_what_was_measured(evidence):
    text = text_of(compression_table(named(evidence, "distillation")))
    assert f"{9_876_543 / 1_234_567:.1f} times smaller" in text and "40.0" in text and "8.0 times smaller" in text
    assert "903.0" in text and f"{903 / 300:.1f} times faster" in text  # the mean over seeds 1 to 5


def test_a_stored_teacher_shows_its_errors(tmp_path):
    runs, file = write_distillation(tmp_path)
    evidence = gather(runs, str(file))
    assert cache_table(named(evidence, "distillation")).data == ""
    numbers = {"kl_error": 0.000123, "gradient_error": 0.00045, "bytes_per_token": 768.0, "seconds": 40.0}
    edit_results(evidence, "distillation", **{f"teacher_cache_{name}": value for name, value in numbers.items()})
    text = text_of(cache_table(named(gather(runs, str(file)), "distillation")))
    assert "Both errors are relative" in text and "Random chunks" not in text
    numbers["context_kl"] = 0.0321
    edit_results(evidence, "distillation", **{f"teacher_cache_{name}": value for name, value in numbers.items()})
    study = named(gather(runs, str(file)), "distillation")
    text = text_of(cache_table(study))
    assert all(value in text for value in ("0.000123", "0.000450", "768.0", "40.0", "0.0321"))
    assert "Random chunks are served from positions that the store holds" in text
    assert "storing what it said, 40 s" in text_of(report.budget_table(study))


# --- answers ----------------------------------------------------------------------------------------


def test_answers_have_scores_signatures_and_a_bootstrap_of_the_first_seed(evidence):
    from nbutils.evaluation.answer_measures import paired_bleu

    study = named(evidence, "qa")
    table = text_of(answer_table(study))
    mean = np.mean([answer_rows("forward", seed)["bleu"].mean() for seed in SEEDS])
    assert f"{mean:.4f}" in table and "smooth:method4" in table and "0.8765" in table  # the teacher's own
    plain, taught = (answer_rows(divergence, 1) for divergence in ("none", "forward"))
    score = paired_bleu(list(plain["reference"]), list(plain["answer"]), list(taught["answer"]))
    told = text_of(bootstrap_table(study))
    assert f"{score.score_a:.2f} → {score.score_b:.2f}" in told and f"+{score.difference:.2f}" in told


def test_answers_stand_side_by_side_and_are_escaped(evidence):
    html = answer_samples(named(evidence, "qa"))
    assert html.data.count('<tr class="prompt">') == 5 and "<b>" not in html.data and "<b>prints</b>" in text_of(html)
    head = re.findall(r'<th scope="col">(.*?)</th>', html.data)
    assert head == ["Reference", "Teacher", "divergence none", "divergence forward"]
    scores = sum(answer_rows(divergence, 1)["bleu"] for divergence in ("none", "forward"))
    shown = [int(number) for number in re.findall(r"What does function (\d) do", html.data)]
    assert scores[shown[0]] == scores.min() and scores[shown[-1]] == scores.max()


def test_answers_to_other_questions_are_not_compared(tmp_path):
    runs, file = write_distillation(tmp_path)
    path = runs / "kd" / "qa-divergenceforward-seed1" / "answers.parquet"
    pd.read_parquet(path).head(7).to_parquet(path)
    text = text_of(bootstrap_table(named(gather(runs, str(file)), "qa")))
    assert "answered 10 questions and divergence forward 7" in text


# --- other sections -----------------------------------------------------------------------------------


def test_headline_and_composite_know_what_the_study_is_about(evidence):
    study = named(evidence, "distillation")
    head = report.headline_table(study).data
    assert "KL to the teacher" in head and "agreement" not in head and "cosine proxy" not in head
    assert "sentence BLEU" in report.headline_table(named(evidence, "qa")).data
    assert mixes(named(evidence, "cosine")) and not mixes(study)
    rows = report.by_study(evidence, composite_table, mixes).data.split("<tbody>")[1]
    assert re.sub("<.*?>", "", rows).startswith("cosinealpha 0.5")


def test_equal_time_is_read_from_the_curves_where_no_control_is_longer(evidence):
    """Distillation takes 1.5 times as long: its curve is read after two thirds of its steps."""
    study = named(evidence, "distillation")
    differences = []
    for seed in SEEDS:
        ce = student_numbers("forward", seed)["eval_ce_loss"]
        steps = np.arange(20, 201, 20)
        curve = np.interp(200 / 1.5, steps, ce + 3 * np.exp(-steps / 40))
        differences.append(curve - final_numbers(0.0, seed, 0)["eval_ce_loss"] - 3 * np.exp(-200 / 40))
    text = text_of(report.budget_table(study))
    assert f"{np.mean(differences):+.4f}" in text and "this arm at 67 % of its steps" in text
    assert "equal time was not measured" in text and "the teacher's own training" in text
    assert "not measured" not in text_of(report.budget_table(named(evidence, "cosine")))


def test_the_method_has_both_objectives_and_each_arms_numbers(evidence):
    text = text_of(report.method(evidence))
    for needed in ("Objective (mixing)", "Objective (distillation)", "0.5 CE + 0.5 T² KL(t ‖ p), T = 2.0", "live"):
        assert needed in text
    assert "CE alone" in text  # qa's control
    assert "reduction batchmean" in objective_text({"divergence": "jsd", "jsd_beta": 0.3, "kd_reduction": "batchmean"})


def test_the_log_carries_teachers_and_students(evidence):
    log = results_log(evidence)
    assert "## Run: runs/kd/teacher" in log and '- Before fine-tuning metrics: {"before_eval_ce_loss": 4.4' in log
    assert "Teacher: runs/kd/teacher | Divergence: forward | Weights CE/KL: 0.5/0.5 | Temp: 2.0" in log
    assert "## kd-distillation: divergence forward against alpha 0.0 (stage cosine)" in log
    assert "Pursue: the contrast holds." in log and "The contrast teaching: supported." in log
    content = plan_metrics(evidence, evidence.plans[0])
    assert content["arms"]["kd-distillation"].keys() == {"divergence forward", "divergence reverse"}
    assert content["arms"]["kd-teacher"]["teacher"]["test_ce_loss"] == TEACHER_CE
    assert content["composite"]["kd-distillation"] == {}


# --- figures ------------------------------------------------------------------------------------------


def test_loss_terms_are_weight_times_raw_value(evidence):
    left, right = figures.loss_terms(named(evidence, "distillation")).axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["divergence forward", "divergence reverse"]
    mean_ce, mean_kl = (
        np.mean([student_numbers("forward", seed)[f"eval_{name}"] for seed in SEEDS])
        for name in ("ce_loss", "kl_to_teacher")
    )
    first, second = (line.get_ydata()[-1] for line in left.lines[:2])
    assert first == pytest.approx(0.5 * (mean_ce + 3 * np.exp(-5)), abs=2e-3)
    assert second == pytest.approx(0.5 * (4 * mean_kl + 4 * np.exp(-5)), abs=2e-3)


def test_overfitting_marks_the_best_validation(evidence):
    (axes,) = figures.overfitting(named(evidence, "teacher")).axes
    assert axes.lines[2].get_xdata()[0] == pytest.approx(4 * 140 / 200) and axes.get_xlabel() == "epoch"


def test_distance_to_the_teacher_is_comparable_at_the_end(evidence):
    left, right = figures.distance_to_teacher(named(evidence, "distillation")).axes
    assert "divergence term" in left.get_ylabel() and "KL to the teacher" in right.get_xlabel()
    assert [label.get_text() for label in right.get_yticklabels()] == ["divergence forward", "divergence reverse"]
    ends = sorted(round(float(line.get_xdata()[0]), 1) for line in right.lines if len(line.get_xdata()) == 1)
    assert ends == [GAINS["forward"][1], GAINS["reverse"][1]]
