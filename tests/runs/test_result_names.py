"""A contrast over a number that no run writes is refused before any run; any number that one writes is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nbutils.foundation.errors import PlanError
from nbutils.foundation.places import NOTEBOOKS, PARAMS
from nbutils.runs.contrasts import check_metric
from nbutils.runs.plans import load_plan


def with_metric(folder: Path, key: str, name: str, stage: str = "") -> Path:
    """The quick plan with another name at `key` of its first contrast that has it, or of its noise floor."""
    plan = yaml.safe_load((PARAMS / "quick.yaml").read_text())
    places = [plan["noise_floor"]] if stage == "noise_floor" else plan["contrasts"]
    next(each for each in places if key in each)[key] = name
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


@pytest.mark.parametrize(
    ("key", "name", "stage", "told"),
    [
        ("metric", "test_ce_los", "", r"contrast '.*': metric test_ce_los is no known result of 04_cosine_mixing\. "
         r"Did you mean 'test_ce_loss'\?"),
        ("metric", "ce_loss", "", "metric ce_loss is no known result of 04_cosine_mixing. Did you mean 'test_ce_loss'"),
        ("control_metric", "test_bits_per_bite", "", "control_metric test_bits_per_bite is no known result of .*"
         "Did you mean 'test_bits_per_byte'"),
        ("metric", "test_ce_los", "noise_floor", "plan.yaml: noise_floor: metric test_ce_los is no known result"),
    ],
)  # fmt: skip
def test_a_metric_that_no_run_writes_is_refused(tmp_path, key, name, stage, told):
    with pytest.raises(PlanError, match=told):
        load_plan(with_metric(tmp_path, key, name, stage))


def test_the_control_is_judged_by_what_its_own_notebook_writes(tmp_path):
    """Of the two sides in two stages, the one-hot control has no smoothing to take out."""
    plan = yaml.safe_load((PARAMS / "quick.yaml").read_text())
    del next(each for each in plan["contrasts"] if "control_metric" in each)["control_metric"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    with pytest.raises(PlanError, match="test_unsmoothed_bits_per_byte is no known result of 04_cosine_mixing"):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("notebook", "names"),
    [
        ("02_teacher_finetune", "before_test_perplexity test_corpus_bleu early_gradient_peak expected_after"),
        ("03_distillation", "teacher_test_ce_loss teacher_parameters test_kl_to_teacher test_bleu"),
        ("04_cosine_mixing", "test_cosine_tuned tuned_temperature eval_cosine_loss samples_similarity best_step"),
        ("05_prefix_smoothing", "eval_predicted_cost unsmoothing_d spelling_acc samples_distinct_2 test_prefix_mass"),
        ("06_interaction", "blimp_anaphor_agreement_acc pairs_acc test_judge_score test_story_second_judge_variety "
         "test_judge_grammar test_story_repetition story_judges_agreement kl_to_start test_judge_not_asked"),
    ],
)  # fmt: skip
def test_what_runs_write_is_accepted(notebook, names):
    for name in names.split():
        check_metric("metric", name, NOTEBOOKS / f"{notebook}.ipynb")


def test_notebooks_of_a_users_own_write_what_they_like(tmp_path):
    check_metric("metric", "test_ce_los", tmp_path / "04_cosine_mixing.ipynb")
    check_metric("metric", "test_ce_los", NOTEBOOKS / "my_study.ipynb")
