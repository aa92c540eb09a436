"""Runs grouped into arms and pairs: what counts, what is left out, and that it is said.

python -m pytest tests/test_studies.py -v
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import yaml
from page_structure import text_of
from synthetic_runs import CONTRASTS, final_numbers, write_plan, write_run, write_runs

from nbutils.batch.batch import register_plan
from nbutils.foundation.errors import PlanError
from nbutils.report import judging
from nbutils.report.evidence import Slot, gather, group_arms
from nbutils.report.verdict_sentences import verdicts
from nbutils.report.warnings import contrasts_registered
from nbutils.runs.contrasts import record_contrasts
from nbutils.runs.plans import load_plan


def judged(evidence, name):
    return next(j for study in evidence.studies for j in study.judged if j.contrast.name == name)


def paired(metric: str, alpha: float, seeds=range(1, 6)) -> np.ndarray:
    return np.array([final_numbers(alpha, s, 0)[metric] - final_numbers(0.0, s, 0)[metric] for s in seeds])


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_arms_are_matrix_combinations_without_seeds_and_the_control_leads(toy_evidence):
    (study,) = toy_evidence.studies
    assert [arm.label for arm in study.arms] == ["alpha 0.0", "alpha 0.5", "alpha 1.0"]
    assert study.control is study.arms[0]
    assert [len(arm.runs) for arm in study.arms] == [5, 5, 5]  # the A/A repeats of alpha 0 are not averaged in
    assert study.arms[1].results("test_ce_loss") == [final_numbers(0.5, s, 0)["test_ce_loss"] for s in range(1, 6)]


def test_a_contrast_is_the_paired_t_test_of_the_seeds(toy_evidence):
    verdict = judged(toy_evidence, "mixing-perplexity").verdict
    differences = paired("test_ce_loss", 0.5)
    assert verdict.difference == pytest.approx(differences.mean())
    assert verdict.p_value == pytest.approx(scipy.stats.ttest_1samp(differences, 0.01).pvalue)
    interval = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.96)
    assert (verdict.low, verdict.high) == pytest.approx((interval.low, interval.high))


def test_holm_takes_in_all_secondary_contrasts_of_the_plan(toy_evidence):
    levels = [judged(toy_evidence, name).verdict.alpha for name in ("cosine-alone", "mixing-proxy", "mixing-accuracy")]
    assert sorted(levels) == pytest.approx([0.04 / 3, 0.04 / 2, 0.04])
    assert judged(toy_evidence, "mixing-perplexity").verdict.alpha == 0.04


def test_the_noise_floor_is_in_each_contrasts_own_metric(toy_evidence):
    for name, metric in (("mixing-perplexity", "test_ce_loss"), ("mixing-proxy", "test_cosine")):
        again = [final_numbers(0.0, s, 1)[metric] - final_numbers(0.0, s, 0)[metric] for s in range(1, 6)]
        assert judged(toy_evidence, name).floor.differences == pytest.approx(again)


def test_a_control_can_be_judged_on_another_result(tmp_path):
    runs = write_runs(tmp_path / "runs", keep=lambda m: m["noise_seed"] == 0)
    for path in runs.glob("toy/*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"test_cosine_tuned": result["test_cosine"] + 0.1}))
    contrast = CONTRASTS[1] | {"control_metric": "test_cosine_tuned", "primary": True}
    file = write_plan(tmp_path, contrasts=[contrast], noise_floor=None)
    (study,) = gather(runs, str(file)).studies
    assert study.judged[0].verdict.difference == pytest.approx(paired("test_cosine", 0.5).mean() - 0.1)
    assert study.asked(study.arms[1], "test_cosine") is None  # another question than the plain difference
    (tmp_path / "runs" / "toy" / "cosine-alpha0.0-seed1-noise_seed0" / "result.json").write_text('{"test_cosine": 1}')
    (missing,) = gather(runs, str(file)).studies[0].judged[0].missing
    assert missing == "cosine-alpha0.0-seed1-noise_seed0: has no test_cosine_tuned"


def test_labels_leave_out_what_an_arm_has_from_the_first():
    rows = [(0.0, 1.0), (0.5, 1.0), (0.5, 0.7)]
    slots = [Slot("s", str(row), dict(zip(("alpha", "temperature"), row, strict=True)), None) for row in rows]
    assert [arm.label for arm in group_arms(slots)] == ["alpha 0.0", "alpha 0.5", "alpha 0.5, temperature 0.7"]


def test_the_foremost_arms_are_the_control_and_those_asked_about(toy_evidence):
    (study,) = toy_evidence.studies
    last_asked = replace(study, judged=tuple(each for each in study.judged if each.contrast.name == "cosine-alone"))
    assert [arm.label for arm in last_asked.foremost(2).arms] == ["alpha 0.0", "alpha 1.0"]
    assert study.foremost(9).arms == study.arms


def test_missing_failed_and_changed_runs_leave_their_pair_out_and_are_named(tmp_path):
    runs = write_runs(tmp_path / "runs", keep=lambda m: m != {"alpha": 0.5, "seed": 1, "noise_seed": 0})
    edit_manifest(runs / "toy" / "cosine-alpha0.5-seed2-noise_seed0", status="failed")
    other = {"alpha": 0.0, "seed": 3, "noise_seed": 0, "max_steps": 10}
    edit_manifest(runs / "toy" / "cosine-alpha0.0-seed3-noise_seed0", params=other)
    write_run(runs / "toy", "cosine", {"alpha": 0.7, "seed": 1, "noise_seed": 0}, final_numbers(0.5, 1, 0))
    evidence = gather(runs, str(write_plan(tmp_path)))

    verdict, missing = judged(evidence, "mixing-perplexity").verdict, judged(evidence, "mixing-perplexity").missing
    assert verdict.pairs == 2 and verdict.difference == pytest.approx(paired("test_ce_loss", 0.5, (4, 5)).mean())
    assert len(missing) == 3
    assert "seed1-noise_seed0: not run yet" in missing[0] and "seed2-noise_seed0: failed" in missing[1]
    assert "alpha0.0-seed3" in missing[2] and "max_steps 10, not 200" in missing[2]
    assert [run.matrix["alpha"] for run in evidence.unplanned] == [0.7]
    assert [(len(arm.runs), arm.planned) for arm in evidence.studies[0].arms] == [(4, 5), (3, 5), (5, 5)]


def test_a_diverged_run_makes_its_contrast_impossible_to_judge(tmp_path):
    runs = write_runs(tmp_path / "runs")
    result = runs / "toy" / "cosine-alpha0.5-seed2-noise_seed0" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"test_ce_loss": None}))
    evidence = gather(runs, str(write_plan(tmp_path)))
    assert judged(evidence, "mixing-perplexity").verdict.outcome == judging.NOT_JUDGED
    assert judged(evidence, "mixing-proxy").verdict.outcome == judging.SUPPORTED
    assert math.isnan(evidence.studies[0].arms[1].by_seed("test_ce_loss")[2])


def test_a_plan_that_is_gone_leaves_its_runs_exploratory_and_says_so(tmp_path):
    evidence = gather(write_runs(tmp_path / "runs"))
    (study,) = evidence.studies
    assert study.control is None and not study.judged
    assert len(study.arms) == 3
    assert "toy" in evidence.plans[0].problems[0] and "exploratory" in evidence.plans[0].problems[0]


@pytest.mark.parametrize(("matrix", "shown"), [({}, False), ({"seed": [1, 2, 3, 4, 5]}, True)])
def test_the_one_model_that_others_begin_with_is_no_study(tmp_path, matrix, shown):
    runs, file = write_runs(tmp_path / "runs", keep=lambda m: m["seed"] == 1), write_plan(tmp_path)
    plan = yaml.safe_load(file.read_text())
    start = {"name": "start", "notebook": plan["stages"][0]["notebook"], "matrix": matrix}
    plan["stages"] = [start, plan["stages"][0] | {"needs": {"data_folder": "start"}}]
    file.write_text(yaml.safe_dump(plan))
    for values in [{"seed": seed} for seed in matrix["seed"]] if matrix else [{}]:
        write_run(runs / "toy", "start", values, final_numbers(0.0, 1, 0))
    evidence = gather(runs, str(file))
    assert ("start" in [study.stage for study in evidence.studies]) == shown
    assert "start" in [slot.stage for slot in evidence.slots]  # its runs are in the manifest all the same


def test_a_plan_that_is_neither_a_file_nor_has_runs_is_refused(tmp_path):
    with pytest.raises(PlanError, match="toyy"):
        gather(write_runs(tmp_path / "runs"), "toyy")


def test_interactive_runs_are_shown_only_by_name_each_notebook_alone(tmp_path):
    for name in ("04_cosine_mixing", "03_distillation"):
        folder = write_run(tmp_path / "interactive", name, {}, final_numbers(0.0, 1, 0))
        edit_manifest(folder, stage="", plan="interactive")
    assert gather(tmp_path).studies == []
    studies = gather(tmp_path, "interactive").studies
    assert [study.stage for study in studies] == ["03_distillation", "04_cosine_mixing"]
    assert all(len(study.arms) == 1 for study in studies)


def test_the_plan_is_read_from_the_copy_its_last_batch_left(tmp_path):
    runs, file = write_runs(tmp_path / "runs", keep=lambda m: m["seed"] == 1), write_plan(tmp_path)
    register_plan(load_plan(file), runs / "toy")
    file.unlink()
    evidence = gather(runs)
    assert len(evidence.studies[0].judged) == 4
    assert gather(runs, "toy").plans[0].problems == evidence.plans[0].problems == ()


def test_an_edit_after_the_last_batch_is_called_out(tmp_path, monkeypatch):
    runs, file = write_runs(tmp_path / "runs", keep=lambda m: m["seed"] == 1), write_plan(tmp_path)
    monkeypatch.setattr("nbutils.runs.plans.PARAMS", tmp_path)
    register_plan(load_plan(file), runs / "toy")
    file.write_text(file.read_text().replace("no worse than cross", "as good as cross"))
    (plan,) = gather(runs).plans
    assert "no worse than cross" in plan.studies[0].judged[0].contrast.question
    assert "edited after the last batch" in plan.problems[0]


# --- what was registered, and when -----------------------------------------------------------------


def with_seeds(folder, file, last: int):
    """The plan with seeds 1 to `last`, loaded from a file of its own."""
    plan = yaml.safe_load(file.read_text())
    plan["stages"][0]["matrix"]["seed"] = [*range(1, last + 1)]
    path = folder / f"of{last}" / "toy.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def register(file, folder, monkeypatch, at: str) -> None:
    monkeypatch.setattr("nbutils.runs.contrasts.now", lambda: at)
    plan = load_plan(file)
    record_contrasts(plan.comparisons, folder, plan.variants)


BEFORE, AFTER = "2026-11-18T09:00:00.000+00:00", "2026-11-18T12:00:00.000+00:00"  # the runs began at 10:00


def test_contrasts_count_as_registered_before_the_runs_only_if_they_were(tmp_path, monkeypatch):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    assert not gather(runs, str(file)).plans[0].registered.at  # no batch has recorded them
    register(file, runs / "toy", monkeypatch, BEFORE)
    (plan,) = gather(runs, str(file)).plans
    assert plan.registered.is_before and "before the first run began" in text_of(
        contrasts_registered(gather(runs, str(file)))
    )
    (runs / "toy" / "contrasts.json").unlink()
    register(file, runs / "toy", monkeypatch, AFTER)
    evidence = gather(runs, str(file))
    assert not evidence.plans[0].registered.is_before and not evidence.plans[0].registered.changed
    for shown in (contrasts_registered(evidence), verdicts(evidence)):
        assert "after the first run began, 2026-11-18 10:00: read its verdicts as exploratory" in text_of(shown)


def test_contrasts_that_were_edited_after_the_first_run_are_found_out(tmp_path, monkeypatch):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    register(file, runs / "toy", monkeypatch, BEFORE)
    plan = yaml.safe_load(file.read_text())
    plan["contrasts"][0]["smallest_effect"] = 0.5
    file.write_text(yaml.safe_dump(plan))
    for _ in range(2):  # edited, no batch since; and after one
        (found,) = gather(runs, str(file)).plans
        assert found.registered.changed and not found.registered.is_before
        register(file, runs / "toy", monkeypatch, AFTER)


def test_a_registered_seed_that_is_taken_out_of_the_plan_counts_all_the_same(tmp_path, monkeypatch):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    register(file, runs / "toy", monkeypatch, BEFORE)
    whole = judged(gather(runs, str(file)), "mixing-perplexity").verdict
    fewer = gather(runs, str(with_seeds(tmp_path, file, 4)))
    assert judged(fewer, "mixing-perplexity").verdict == whole and whole.pairs == whole.planned == 5
    gone = runs / "toy" / "cosine-alpha0.5-seed5-noise_seed0"
    gone.rename(tmp_path / "elsewhere")
    lost = judged(gather(runs, str(with_seeds(tmp_path, file, 4))), "mixing-perplexity")
    assert lost.verdict.outcome == judging.INTERIM and "its run is gone" in lost.missing[0]


def test_pairs_that_are_added_are_another_look(tmp_path, monkeypatch):
    runs, file = write_runs(tmp_path / "runs"), write_plan(tmp_path)
    register(with_seeds(tmp_path, file, 3), runs / "toy", monkeypatch, BEFORE)
    register(file, runs / "toy", monkeypatch, AFTER)
    for each in gather(runs, str(file)).studies[0].judged:
        first_decides = each.verdict.look == 1
        assert (each.verdict.pairs, each.verdict.alpha <= 0.005) == ((3, False) if first_decides else (5, True))
        assert len(each.seeds) == each.verdict.pairs
    assert {each.verdict.look for each in gather(runs, str(file)).studies[0].judged} == {1, 2}


def test_an_empty_folder_is_no_evidence(tmp_path):
    evidence = gather(tmp_path / "nothing")
    assert (evidence.studies, evidence.slots, evidence.plans) == ([], [], ())
