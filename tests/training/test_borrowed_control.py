"""A contrast whose control stands in another stage: how it is paired, judged and shown.

python -m pytest tests/test_borrowed_control.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from page_structure import text_of
from small_plans import PLAN, STUDY
from synthetic_distillation import SEEDS, student_numbers, write_distillation
from synthetic_runs import final_numbers
from tiny_notebooks import write_notebook, write_plan

from nbutils import report
from nbutils.batch.listing import plan_listing
from nbutils.foundation.errors import ParameterError, PlanError
from nbutils.report.evidence import gather
from nbutils.report.weekly import summary
from nbutils.runs.contrasts import contrasts_sha256
from nbutils.runs.plans import load_plan

DISTILLED = """\
  - name: distilled
    notebook: {here}/student.ipynb
    needs: {data_folder: data}
    matrix: {divergence: [forward, reverse], seed: [1, 10, 11]}
"""
BORROWED = """\
  - name: teaching
    question: Does a teacher help?
    stage: distilled
    metric: test_ce_loss
    treatment: {divergence: forward}
    control_stage: cosine
    control: {alpha: 0, noise_seed: 0}
    better: lower
    claim: better
    smallest_effect: 0.01
"""
STUDENT = STUDY.replace("alpha: float = 0.5  # in [0, 1]", 'divergence: str = "forward"  # one of forward, reverse')


@pytest.fixture
def here(tmp_path):
    write_notebook(tmp_path / "prep.ipynb", parameters='run_folder: str = ""  # r\nvocab_size: int = 512  # tokens\n')
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    return tmp_path


def borrowing(here: Path, distilled: str = DISTILLED, borrowed: str = BORROWED) -> Path:
    write_notebook(here / "student.ipynb", parameters=STUDENT)
    text = PLAN.replace("contrasts:\n", distilled + "contrasts:\n").replace("noise_floor:", borrowed + "noise_floor:")
    return write_plan(here / "borrowing.yaml", text)


def test_a_control_of_another_stage_is_paired_by_seed(here):
    plan = load_plan(borrowing(here))
    pairs = [(a.name, b.name) for a, b in plan.contrasts[1].pairs(plan.variants)]
    assert pairs == [
        (f"distilled-divergenceforward-seed{seed}", f"cosine-alpha0.0-seed{seed}-noise_seed0") for seed in (1, 10)
    ]
    other = load_plan(borrowing(here, borrowed=BORROWED.replace("alpha: 0,", "alpha: 1,")))
    assert contrasts_sha256(other.contrasts) != contrasts_sha256(plan.contrasts)


def test_a_stage_of_seeds_alone_needs_no_values(here):
    plan = load_plan(
        borrowing(
            here, DISTILLED.replace("divergence: [forward, reverse], ", ""), BORROWED.replace("divergence: forward", "")
        )
    )
    assert [a.name for a, _ in plan.contrasts[1].pairs(plan.variants)] == ["distilled-seed1", "distilled-seed10"]
    assert "every run against cosine alpha 0.0, noise_seed 0, 2 pairs" in plan_listing(plan, "A100", 0.4)


def test_what_both_stages_vary_must_be_equal_in_a_pair(here):
    """Both have noise_seed; the control names it, so the treatment's own value is not compared with it."""
    both = DISTILLED.replace("seed: [1, 10, 11]", "seed: [1, 10], noise_seed: [1]")
    plan = load_plan(borrowing(here, both))
    assert len(plan.contrasts[1].pairs(plan.variants)) == 2
    unnamed = borrowing(here, both, BORROWED.replace("alpha: 0, noise_seed: 0", "alpha: 0.5"))
    with pytest.raises(
        PlanError, match="no variant of the treatment has a partner"
    ):  # alpha 0.5 has noise_seed 0 alone
        load_plan(unnamed)


@pytest.mark.parametrize(
    ("distilled", "borrowed", "words"),
    [
        (("", ""), ("control_stage: cosine", "control_stage: cosin"), "no stage 'cosin'. Did you mean 'cosine'"),
        (("", ""), ("control_stage: cosine", "control_stage: distilled"), "is the contrast's own stage. Leave it out"),
        (("", ""), ("control_stage: cosine", "control_stage: 3"), "control_stage is 3. Give text"),
        (("", ""), ("control_stage: cosine", "control_stage: data"), "prep has no parameter 'alpha'"),
        (("", ""), ("alpha: 0,", "alpah: 0,"), "'alpah'.*Did you mean 'alpha'"),
        (("", ""), ("alpha: 0,", "alpha: 0.25,"), "control has alpha 0.25; the matrix has 0.0, 0.5, 1.0"),
        (("", ""), (", noise_seed: 0", ""), "differ in noise_seed, but.*Name one value of each in control"),
        (("", ""), ("divergence: forward", ""), "differ in divergence, but.*Name one value of each in treatment"),
        (("", ""), ("divergence: forward", "divergence: forward, seed: 1"), "treatment names seed, by which.*Leave it"),
        ((", seed: [1, 10, 11]", ""), ("", ""), "the matrix of stage 'distilled' has no seed, by which runs of two"),
        (("[1, 10, 11]", "[11, 12]"), ("", ""), "no variant of the treatment has a partner"),
    ],
)
def test_a_mistake_in_a_borrowed_control_is_told_with_its_cure(here, distilled, borrowed, words):
    file = borrowing(here, DISTILLED.replace(*distilled), BORROWED.replace(*borrowed))
    with pytest.raises((PlanError, ParameterError), match=words):
        load_plan(file)


def test_a_noise_floor_has_no_control_of_another_stage(here):
    text = PLAN.replace("noise_floor: {", "noise_floor: {control_stage: data, ")
    with pytest.raises(PlanError, match="noise_floor has no key 'control_stage'"):
        load_plan(write_plan(here / "quick.yaml", text))


# --- in a report ------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    return write_distillation(tmp_path / "kd")


def of_stage(evidence, stage):
    return next(study for study in evidence.studies if study.stage == stage)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_borrowed_arm_is_the_control_and_says_where_it_stands(written):
    study = of_stage(gather(written[0], str(written[1])), "distillation")
    assert [arm.label for arm in study.arms] == [
        "alpha 0.0 (stage cosine)",
        "divergence forward",
        "divergence reverse",
    ]
    assert study.control is study.arms[0] and [arm.label for arm in study.own_arms] == [a.label for a in study.arms[1:]]
    assert all(slot.stage == "distillation" for slot in study.slots)
    differences = study.differences(study.arms[1], "test_ce_loss")
    expected = [
        student_numbers("forward", seed)["test_ce_loss"] - final_numbers(0.0, seed, 0)["test_ce_loss"] for seed in SEEDS
    ]
    assert differences == pytest.approx(expected)
    judged = study.asked(study.arms[1], "test_ce_loss")
    assert judged.verdict.difference == pytest.approx(sum(expected) / len(expected)) and judged.verdict.pairs == 5


def test_two_contrasts_borrow_one_arm_once(written, tmp_path):
    plan = yaml.safe_load(written[1].read_text())
    other = plan["contrasts"][0] | {"name": "reverse", "treatment": {"divergence": "reverse"}, "primary": False}
    plan["contrasts"].append(other)
    written[1].write_text(yaml.safe_dump(plan, sort_keys=False))
    study = of_stage(gather(written[0], str(written[1])), "distillation")
    assert [arm.borrowed_from for arm in study.arms] == ["cosine", "", ""] and len(study.judged) == 2


def test_the_noise_floor_of_the_controls_stage_serves(written):
    evidence = gather(written[0], str(written[1]))
    again = [final_numbers(0.0, s, 1)["test_ce_loss"] - final_numbers(0.0, s, 0)["test_ce_loss"] for s in SEEDS]
    assert of_stage(evidence, "distillation").judged[0].floor.differences == pytest.approx(again)
    assert of_stage(evidence, "qa").judged[0].floor is None  # neither side is of the floor's stage


def test_a_failed_run_of_the_borrowed_arm_is_named_once(written):
    runs, file = written
    edit(runs / "kd" / "cosine-alpha0.0-seed2-noise_seed0" / "manifest.json", status="failed")
    evidence = gather(runs, str(file))
    assert text_of(report.failed_runs(evidence)).count("cosine-alpha0.0-seed2-noise_seed0") == 1
    text = text_of(report.verdicts(evidence))
    assert "1 of 36 planned runs are missing" in text
    assert "1 of 5 planned pairs are missing (cosine-alpha0.0-seed2-noise_seed0: failed)" in text
    assert "4 of 5" in text_of(report.headline_table(of_stage(evidence, "distillation")))


def test_what_is_said_of_an_arm_is_said_in_its_own_stage_alone(written):
    runs, file = written
    for seed in SEEDS:
        edit(runs / "kd" / f"cosine-alpha0.0-seed{seed}-noise_seed0" / "result.json", eval_ce_loss=6.5)
    evidence = gather(runs, str(file))
    assert text_of(report.verdicts(evidence)).count("ended no better than a unigram model") == 1
    arms = summary(evidence, "")["arms"]
    assert "alpha 0.0" in arms["kd-cosine"] and not any("cosine" in label for label in arms["kd-distillation"])


def test_a_control_that_was_trained_otherwise_is_called_out(written):
    runs, file = written
    assert "trained with other settings" not in text_of(report.verdicts(gather(runs, str(file))))
    plan = yaml.safe_load(file.read_text())
    plan["stages"][1]["params"] = {"max_steps": 400}
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    for path in runs.glob("kd/cosine-*/manifest.json"):
        edit(path, params=json.loads(path.read_text())["params"] | {"max_steps": 400})
    text = text_of(report.verdicts(gather(runs, str(file))))
    assert text.count("trained with other settings than the treatment (max_steps 200, not 400)") == 1


def test_runs_of_other_data_than_the_borrowed_ones_are_called_out(written):
    runs, file = written
    for path in runs.glob("kd/cosine-*/manifest.json"):
        edit(path, data_fingerprint="e" * 64)
    assert "The runs of kd-distillation used 2 different data" in text_of(report.verdicts(gather(runs, str(file))))
