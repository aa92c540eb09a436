"""Attempts at a run and the checkpoints they leave: found by the same run, kept from another, never lost on the way."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_notebooks import PARAMETERS, write_notebook

from nbutils.runs.attempts import Place
from nbutils.runs.manifest import begin, end
from nbutils.runs.plans import Variant
from nbutils.runs.run_folder import start_run


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    return Variant("v", "", write_notebook(tmp_path / "a.ipynb", parameters=PARAMETERS), {"seed": 1})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs", "v")


def attempt(place: Place, variant: Variant, status: str) -> str:
    """An attempt that saved something and ended so; its key."""
    with place.lock():
        place.clear("")
        manifest = begin(place.attempt, "plan", variant, [])
        (place.attempt / "checkpoints" / "step-1").mkdir(parents=True)
        (place.attempt / "metrics.csv").write_text("step\n1\n")
        if status != "running":
            end(place.attempt, manifest, status, 75, None)
            place.publish()
    return manifest["key"]


@pytest.mark.parametrize("status", ["running", "preempted", "killed", "failed"])
def test_an_attempt_with_the_same_key_finds_the_checkpoints(place, variant, status, caplog):
    key = attempt(place, variant, status)
    with place.lock():
        place.clear(key)
        assert (place.attempt / "checkpoints" / "step-1").is_dir()
        assert sorted(path.name for path in place.attempt.iterdir()) == ["checkpoints", "manifest.json"]
        place.clear("another")
        assert [*place.attempt.iterdir()] == []
    assert "v: parameters, code or data have changed since its checkpoints were written" in caplog.text


def test_checkpoints_of_other_parameters_are_set_aside_and_found_again(place, variant, caplog):
    """Whoever mistypes a parameter loses no training: back to the old one, it goes on."""
    key = attempt(place, variant, "killed")
    with place.lock():
        place.clear("mistyped")
        assert not (place.attempt / "checkpoints").exists()
        assert "They lie in" in caplog.text and "set back what changed" in caplog.text
        begin(place.attempt, "plan", replace(variant, params={"seed": 2}), [])
        (place.attempt / "checkpoints" / "step-9").mkdir(parents=True)
        place.clear(key)
        assert (place.attempt / "checkpoints" / "step-1").is_dir()
        assert (place.aside / "checkpoints" / "step-9").is_dir()


@pytest.mark.parametrize("status", ["running", "preempted"])
@pytest.mark.parametrize("dies_at", range(12))
def test_a_restart_killed_at_any_moment_loses_no_checkpoint(place, variant, status, dies_at, monkeypatch):
    """After each change that it makes to the disk."""
    calls = iter(range(100))
    key = attempt(place, variant, status)

    def or_die(function):
        def change(*given, **named):
            if next(calls) == dies_at:
                raise KeyboardInterrupt
            return function(*given, **named)

        return change

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for owner, name in ((shutil, "rmtree"), (shutil, "copyfile"), (Path, "rename"), (Path, "mkdir")):
            patch.setattr(owner, name, or_die(getattr(owner, name)))
        place.clear(key)
    place.clear(key)
    assert (place.attempt / "checkpoints" / "step-1").is_dir()


def test_a_finished_run_keeps_no_checkpoints(place, variant, tmp_path):
    attempt(place, variant, "finished")
    assert not (tmp_path / "runs" / "v" / "checkpoints").exists()
    assert (tmp_path / "runs" / "v" / "metrics.csv").is_file()


def test_a_notebook_run_by_hand_goes_on_where_it_is_the_same(tmp_path):
    kept = tmp_path / "run" / "checkpoints" / "step-1"
    given = {"run_folder": str(tmp_path / "run"), "max_steps": 5}
    start_run("04_cosine_mixing", given)
    kept.mkdir(parents=True)
    run = start_run("04_cosine_mixing", given)
    assert kept.is_dir()
    start_run("04_cosine_mixing", given | {"max_steps": 6})
    assert not kept.exists()
    kept.mkdir(parents=True)
    run.write_result({})
    assert not kept.exists()
