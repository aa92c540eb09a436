"""A contrast whose control stands in another stage: how it is paired, judged and shown.

python -m pytest tests/test_borrowed_control.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_plans import PLAN, STUDY
from tiny_notebooks import write_notebook, write_plan

from nbutils.contrasts import contrasts_sha256
from nbutils.errors import ParameterError, PlanError
from nbutils.plans import load_plan

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
