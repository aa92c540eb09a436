"""Plan files by name and place: whose runs a folder holds, and what a word that names no plan means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from synthetic_runs import final_numbers, write_plan, write_run

from nbutils import __main__ as cli
from nbutils.batch.batch import BATCH_LOCK, LOCKS, PLAN_RECORD, register_plan
from nbutils.foundation.errors import PlanError, did_you_mean
from nbutils.foundation.files import read_json, shared
from nbutils.foundation.places import PARAMS, ROOT
from nbutils.runs.plans import PLAN_FILE, find_plan, load_plan

MATRIX = {"alpha": 0.5, "seed": 1, "noise_seed": 0}


def other_file(plan: Path, name: str = "r.yaml") -> Path:
    """A copy of `plan` that trains with another dropout."""
    content = yaml.safe_load(plan.read_text())
    content["stages"][0]["params"]["max_steps"] = 7
    path = plan.with_name(name)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def finish_a_run(folder: Path) -> None:
    write_run(folder, "cosine", MATRIX, final_numbers(0.5, 1, 0))


@pytest.fixture
def made(tmp_path):
    """(a plan, its folder of runs, with one finished run)."""
    plan, folder = write_plan(tmp_path), tmp_path / "runs" / "toy"
    register_plan(load_plan(plan), folder)
    finish_a_run(folder)
    return plan, folder


def test_another_file_of_the_same_name_makes_no_runs_anew(made, capsys):
    plan, folder = made
    kept, other = (folder / PLAN_FILE).read_bytes(), other_file(plan)
    told = f"{folder} holds runs of {plan}, and {other} has the same name. Give it another name, or --out another"
    words = ("--params", str(other), "--variant", "cosine-alpha0.5-seed1-noise_seed0", "--out", str(folder))
    assert cli.main(["run", str(plan.parent / "study"), *words]) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(PlanError, match="holds runs of"):
        register_plan(load_plan(other), folder)
    assert (folder / PLAN_FILE).read_bytes() == kept
    register_plan(load_plan(other), folder.with_name("other"))


def test_an_edited_file_and_a_copy_of_it_go_on(made):
    plan, folder = made
    shutil.copy(other_file(plan), plan)  # the same file, edited
    register_plan(load_plan(plan), folder)
    assert (folder / PLAN_FILE).read_bytes() == plan.read_bytes()
    register_plan(load_plan(folder / PLAN_FILE), folder)  # the copy kept with the runs says the same
    assert read_json(folder / PLAN_RECORD) == {"file": str(plan)}
    kept = plan.rename(plan.with_name("kept"))
    register_plan(load_plan(folder / PLAN_FILE), folder)
    kept.rename(plan)
    assert read_json(folder / PLAN_RECORD) == {"file": str(plan)}


def test_a_file_that_was_moved_or_renamed_goes_on(made):
    plan, folder = made
    moved = plan.rename(plan.with_name("moved.yaml"))
    register_plan(load_plan(other_file(moved, "moved.yaml")), folder)
    assert read_json(folder / PLAN_RECORD) == {"file": str(moved)}
    other = other_file(moved)
    moved.write_text(moved.read_text().replace("name: toy", "name: another"))
    register_plan(load_plan(other), folder)  # what made the runs has another name now
    assert read_json(folder / PLAN_RECORD) == {"file": str(other)}


def test_without_finished_runs_the_name_is_free_unless_a_batch_is_at_work(tmp_path):
    plan, folder = write_plan(tmp_path), tmp_path / "runs" / "toy"
    register_plan(load_plan(plan), folder)
    other = other_file(plan)
    (folder / LOCKS).mkdir()
    with shared(folder / LOCKS / BATCH_LOCK), pytest.raises(PlanError, match="holds runs of"):
        register_plan(load_plan(other), folder)
    register_plan(load_plan(other), folder)
    assert (folder / PLAN_FILE).read_bytes() == other.read_bytes()


# ---- words ----------------------------------------------------------------------------------------------------------


def test_status_knows_a_plan_by_its_runs(made, capsys, monkeypatch):
    folder = made[1]
    monkeypatch.setattr(cli, "RUNS", folder.parent)
    assert cli.main(["status", "toy"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("toy: 1 of 20 finished") and "waiting" in told
    assert cli.main(["status", "toi"]) == 2
    assert "There is no file params/toi.yaml" in capsys.readouterr().err
    assert cli.main(["status", "toi", "--out", str(folder)]) == 2  # the folder is another plan's


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "params"], "params is a folder. Name one of its files: babylm.yaml, benchmarks.yaml, "),
        (["check", "{here}"], "{here} is a folder. It holds no YAML file."),
        (["check", "04_cosine_mixing"], "is a notebook, no plan. Run it with: python -m nbutils run 04_cosine_mixing "),
        (["batch", "notebooks/04_cosine_mixing.ipynb"], "notebooks/04_cosine_mixing.ipynb is a notebook, no plan."),
        (["check", "my.yaml"], "There is no file {here}/my.yaml. {here} holds no YAML file."),
        (["status", "--out", "nowhere"], "--out: there is no folder {here}/nowhere."),
        (["report", "--plan", "quik"], "There is no file params/quik.yaml. Did you mean 'quick.yaml'?"),
        (["report", "--plan", "my.yaml"], "There is no file {here}/my.yaml."),
        (["report", "--runs", "nowhere"], "--runs: there is no folder {here}/nowhere."),
        (["report", "--out", "page.htm"], "--out page.htm is the name of no HTML file. Let it end in .html, as "),
        (["report", "--compare", "a.html", "b.html"], "There is no {here}/a.html. Give a report"),
    ],
)
def test_what_is_no_plan_and_no_place_is_told_before_anything_starts(tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nbutils.batch.execute", None)  # a kernel that starts would end in a TypeError
    monkeypatch.setattr("nbutils.batch.kernels.execute", None)  # after the door, which keeps what it finds first
    assert cli.main([word.replace("{here}", str(tmp_path)) for word in words]) == 2
    error = capsys.readouterr().err
    assert told.replace("{here}", str(tmp_path)) in error and error.count("\n") == 1


def test_paths_are_typed_from_here_and_names_from_anywhere(made, capsys, monkeypatch):
    plan, folder = made
    monkeypatch.chdir(plan.parent)
    assert (
        find_plan("toy.yaml") == plan and find_plan("quick") == find_plan("params/quick.yaml") == PARAMS / "quick.yaml"
    )
    assert cli.main(["status", "toy.yaml", "--out", "runs/toy"]) == 0
    assert capsys.readouterr().out.startswith("toy: 1 of 20 finished")
    assert cli.main(["status", "toy.yaml", "--out", "runs/tyo"]) == 0
    assert f"There is no folder {folder.with_name('tyo')}: nothing has run there." in capsys.readouterr().err
    words = ("--params", "r.yaml", "--variant", "x", "--out", "runs/toy")
    other_file(plan)
    assert cli.main(["run", "./study", *words]) == 2
    assert "Plan 'toy' has no variant 'x'" in capsys.readouterr().err
    assert not (ROOT / "runs" / "tyo").exists()


def test_no_command_at_all_gets_the_help(capsys):
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "valid", "told"),
    [
        ("server", ["trace", "seed"], "Valid names: seed, trace."),
        ("server.yaml", ["trace.yaml"], "Valid names: trace.yaml."),
        ("quik.yaml", ["quick.yaml", "qa.yaml"], "Did you mean 'quick.yaml'?"),
        ("teacher", ["correcting_teacher", "trace"], "Did you mean 'correcting_teacher'?"),
        (
            "teacher",
            ["correcting_teacher", "distilling_teacher"],
            "Did you mean 'correcting_teacher' or 'distilling_teacher'?",
        ),
        ("cosine_loss_weight", ["loss", "kl"], "Did you mean 'loss'?"),
        ("l", ["loss", "kl"], "Valid names: kl, loss."),
        ("alpah", ["alpha", "beta"], "Did you mean 'alpha'?"),
        ("x", [], "Valid names: ."),
    ],
)
def test_a_near_name_is_suggested_and_no_other(name, valid, told):
    assert did_you_mean(name, valid) == told
