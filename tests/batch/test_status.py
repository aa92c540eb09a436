"""The table of a plan's variants, from another terminal than the batch's, and how it is followed."""

from __future__ import annotations

import json
import re

import pytest
from small_batches import study_plan
from terminal import in_a_terminal
from tiny_notebooks import write_notebook

from nbutils.batch.batch import BATCH_LOCK, is_going_on
from nbutils.batch.preflight import made_now
from nbutils.batch.status import plan_folders, plan_status, watch
from nbutils.foundation.files import now, shared
from nbutils.runs.attempts import LOCKS, Place
from nbutils.runs.keys import run_key

STUDY = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
seed: int = 0  # at least 0
"""


@pytest.fixture
def plan(tmp_path):
    """Two stages: four studies and, for each, what comes after."""
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    study = "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3, 4]}}"
    after = "{name: after, notebook: {here}/study.ipynb, needs: {data_folder: study}, matrix: {seed: [1, 2, 3, 4]}}"
    return study_plan(tmp_path, study, after)


def record(plan, name: str, status: str, attempts: int = 1, message: str = "") -> Place:
    """A run of the plan as its runner leaves it: published, or in the making where it is running."""
    place = Place(plan.file.parent / "runs", name)
    folder = place.attempt if status == "running" else place.published
    folder.mkdir(parents=True)
    error = {"type": "KernelDied", "message": message, "cell": None, "log": []} if message else None
    end = None if status == "running" else now()
    manifest = {"status": status, "plan": "p", "variant": name, "stage": name.split("-")[0], "error": error}
    manifest["key"] = run_key(made_now(plan.variant(name), place.plan_folder))
    manifest["attempts"] = [{"start": now(), "end": end, "exit_code": None, "status": status}] * attempts
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return place


def rows(table: str) -> dict[str, str]:
    """What the table says of each variant, columns apart by one space."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in table.splitlines()[2:]}


def test_what_runs_waits_and_is_blocked(plan, tmp_path):
    record(plan, "study-seed1", "finished")
    place = record(plan, "study-seed2", "running", attempts=2)
    (place.attempt / "progress.json").write_text('{"step": 100, "steps": 400}')
    record(plan, "study-seed3", "failed", message="diverged")
    record(plan, "study-seed4", "killed", message="too much memory")
    runs = tmp_path / "runs"
    with shared(runs / LOCKS / BATCH_LOCK), place.lock():
        table = plan_status(plan, runs)
        assert is_going_on(runs)
    assert table.splitlines()[0] == "p: 1 of 8 finished, 1 running, 1 failed, 1 killed, 3 waiting, 1 blocked"
    told = rows(table)
    assert told["study-seed2"] == "running 2 0 s step 100 of 400"
    assert told["study-seed3"] == "failed 1 0 s KernelDied: diverged"
    assert told["after-seed1"] == told["after-seed2"] == "waiting 0"
    assert told["after-seed3"] == "blocked 0 needs study-seed3, which is failed"
    assert told["after-seed4"] == "waiting 0"  # the batch may try again what was killed

    table = plan_status(plan, runs)
    assert not is_going_on(runs)
    headline = "p: 1 of 8 finished, 2 killed, 1 failed, 1 waiting, 3 blocked, no batch is at work"
    assert table.splitlines()[0] == headline
    told = rows(table)
    assert told["study-seed2"].startswith("killed 2 RunnerKilled: The runner was ended")
    assert told["after-seed4"] == "blocked 0 needs study-seed4, which is killed"


def test_a_runner_without_a_batch_is_going_on_too(plan, tmp_path):
    place = Place(tmp_path / "runs", "study-seed1")
    assert not is_going_on(tmp_path / "runs")
    with place.lock():
        assert is_going_on(tmp_path / "runs")
    assert not is_going_on(tmp_path / "runs")
    assert plan_folders(tmp_path) == [tmp_path / "runs"]


# ---- following ------------------------------------------------------------------------------------------------------


def test_a_log_is_told_what_has_changed_and_when(capsys):
    """Times and steps go on at every look: they alone are no news."""
    tables = ["p: 0 of 2\na  running  9 s  step 1 of 10", "p: 0 of 2\na  running  10 s  step 2 of 10"]
    tables += ["p: 1 of 2\na  finished  12 s", "p: 2 of 2"]
    looks = iter(tables)
    going_on = iter([True, True, True, False])
    watch(lambda: next(looks), 0.01, lambda: next(going_on))
    told = re.sub(r"\d\d:\d\d:\d\d", "TIME", capsys.readouterr().out)
    assert told == "".join(f"---- TIME\n{tables[number]}\n" for number in (0, 2, 3))


@pytest.mark.parametrize("stop", [False, True])
def test_a_terminal_is_redrawn_in_place_until_the_end_or_ctrl_c(stop):
    code = f"""
from nbutils.batch.status import watch
looks = iter(["first look", "second [red]look", *["second look"] * ({stop} * 1000), "last look"])
going_on = iter([True, True, *[True] * ({stop} * 1000), False])
watch(lambda: next(looks), 0.1, lambda: next(going_on))
"""
    exit_code, shown = in_a_terminal(code, 60, 9, "second look" if stop else "")
    assert exit_code == 0, shown
    assert "Traceback" not in shown
    screen, after = shown.split("\x1b[?1049l")  # back from the screen of its own
    assert "\x1b[?1049h" in screen and "first look" in screen and "second [red]look" in screen
    assert after.split() == (["second", "look"] if stop else ["last", "look"])


def test_a_table_fits_its_terminal(plan, tmp_path):
    for number, status in enumerate(["finished", "failed", "finished", "failed"], 1):
        record(plan, f"study-seed{number}", status, message="it diverged, " * 20 if status == "failed" else "")
    code = f"""
from pathlib import Path
from nbutils.runs.plans import load_plan
from nbutils.batch.status import plan_status
for fit in (False, True):
    print(plan_status(load_plan(Path({str(plan.file)!r})), Path({str(tmp_path / "runs")!r}), fit), end="\\n====\\n")
"""
    exit_code, shown = in_a_terminal(code, 60, 9)
    assert exit_code == 0, shown
    whole, fitting, _ = shown.replace("\r", "").split("\n====\n")
    assert "study-seed2  failed    1         0 s       KernelDied: it d…" in whole.splitlines()
    assert max(map(len, whole.splitlines()[1:])) == 60
    assert len(rows(whole)) == 8
    kept = [line.split()[0] for line in fitting.splitlines()[2:-1]]
    assert kept == ["study-seed2", "study-seed4", "after-seed1", "after-seed2", "after-seed4"]
    assert fitting.splitlines()[-1] == "and 2 finished, 1 waiting that do not fit here"
