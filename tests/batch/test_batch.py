"""A plan's variants as a batch: order, failures, skipping, stopping, what is shown meanwhile."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from terminal import in_a_terminal
from tiny_notebooks import write_notebook, write_plan

from nbutils.batch.batch import Batch, register_plan, select
from nbutils.batch.local_engine import LocalEngine, default_workers
from nbutils.batch.progress import Display, Running, Tally
from nbutils.batch.retries import Retry
from nbutils.batch.runner import Outcome
from nbutils.batch.status import folder_status, plan_status
from nbutils.foundation import environment
from nbutils.foundation.errors import CorpusError, ModelError, PlanError, RunError
from nbutils.foundation.files import read_json
from nbutils.runs.plans import load_plan
from nbutils.runs.run_folder import load_runs

STUDY = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
seed: int = 0  # at least 0
"""
NOTE = "import os, time\nopen(run_folder + '/times', 'w').write(f'{time.time()} {os.environ[\"OMP_NUM_THREADS\"]}')"
PLAN = """\
name: p
stages:
  - {name: data, notebook: {here}/data.ipynb}
  - {name: study, notebook: {here}/study.ipynb, needs: {data_folder: data}, matrix: {seed: [1, 2, 3]}}
  - {name: after, notebook: {here}/after.ipynb, needs: {data_folder: study}, matrix: {seed: [1, 2]}}
"""


@pytest.fixture
def plan(tmp_path):
    write_notebook(tmp_path / "data.ipynb", NOTE, parameters=STUDY)
    write_notebook(tmp_path / "study.ipynb", NOTE, "if seed == 2: raise ValueError('diverged')", parameters=STUDY)
    write_notebook(tmp_path / "after.ipynb", NOTE, parameters=STUDY)
    return load_plan(write_plan(tmp_path / "p.yaml", PLAN))


def go(plan, folder: Path, workers: int = 2, only: str = "*") -> tuple[Batch, str]:
    """Run a batch to its end; returns it with what it logged."""
    log = io.StringIO()
    engine = LocalEngine(plan.name, folder, workers, preloaded=("json",))  # forked kernels that took no imports
    work = Batch(plan, folder, select(plan, only), engine, backoff_seconds=0.1)
    work.check()
    register_plan(plan, folder)
    work.run(Display("p", log))
    return work, log.getvalue()


@pytest.mark.slow
def test_a_batch_goes_on_in_order_and_again_where_it_failed(plan, tmp_path):
    folder = tmp_path / "runs"
    work, log = go(plan, folder)
    assert {name: outcome.status for name, outcome in work.outcomes.items()} == {
        **{"data": "finished", "study-seed1": "finished", "study-seed2": "failed", "study-seed3": "finished"},
        **{"after-seed1": "finished", "after-seed2": "blocked"},
    }
    assert work.exit_code() == 1
    assert work.outcomes["study-seed2"].message.startswith("ValueError: diverged")
    assert work.outcomes["after-seed2"].message == "needs study-seed2, which is failed"
    assert re.search(r"\d\d:\d\d:\d\d failed   study-seed2: ValueError: diverged .*\[.* finished, 1 failed", log)
    assert log.index("start    data") < log.index("finished data") < log.index("start    study-seed1")
    times = {run.variant: float((run.folder / "times").read_text().split()[0]) for run in load_runs(folder)}
    assert times["data"] < times["study-seed1"] < times["after-seed1"]
    threads = (folder / "data" / "times").read_text().split()[1]
    assert threads == str(max(1, environment.cores() // 2))

    write_notebook(tmp_path / "study.ipynb", NOTE, "x = 'mended'", parameters=STUDY)
    work, log = go(load_plan(plan.file), folder)
    assert work.exit_code() == 0
    assert work.outcomes["data"].skipped
    assert "start    data" not in log
    assert "start    study-seed1" in log  # another notebook: another key
    work, log = go(load_plan(plan.file), folder)
    assert all(outcome.skipped for outcome in work.outcomes.values())
    assert log == ""
    assert "6 of 6 finished" in plan_status(plan, folder)
    assert (folder / "plan.yaml").read_bytes() == plan.file.read_bytes()
    assert [entry.keys() for entry in read_json(folder / "contrasts.json")] == [{"sha256", "pairs", "first_used"}]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("study", "'study-*'"),
        ("studdy-*", "'study-*'"),
        ("Data", "'data'"),
        ("study-seed9", "'study-seed3'"),
        ("x", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest(plan, pattern, near):
    with pytest.raises(PlanError) as refusal:
        select(plan, pattern)
    cure = f"Did you mean {near}? " * bool(near) + "Its stages are data, study, after; `check` lists the variants."
    assert str(refusal.value) == f"No variant of plan 'p' matches {pattern!r}. {cure}"
    assert not near or select(plan, near.strip("'"))


@pytest.mark.slow
def test_only_some_and_what_they_need(plan, tmp_path):
    assert [variant.name for variant in select(plan, "after-seed1")] == ["data", "study-seed1", "after-seed1"]
    work, _ = go(plan, tmp_path / "runs", only="study-seed1")
    assert list(work.outcomes) == ["data", "study-seed1"]
    table = plan_status(plan, tmp_path / "runs")
    assert table.splitlines()[0] == "p: 2 of 6 finished, 4 waiting, no batch is at work"
    assert re.search(r"^after-seed1  waiting   0", table, re.MULTILINE)
    assert folder_status(tmp_path) == table  # by the plan's copy beside its runs
    assert folder_status(tmp_path / "empty").startswith("No runs yet. Start some: python -m nbutils batch")


def test_nothing_starts_where_a_variant_could_not_run(tmp_path):
    text = "name: p\nstages:\n  - {name: data, notebook: 01_data_prep, params: {dataset_name: text, data_files: %s}}\n"
    with pytest.raises(CorpusError, match=r"p.yaml: stage 'data': data_files 'nowhere/\*.txt' matches no file"):
        go(load_plan(write_plan(tmp_path / "p.yaml", text % "'nowhere/*.txt'")), tmp_path / "runs")
    study = "name: p\nstages:\n  - {name: study, notebook: 04_cosine_mixing, params: {%s}}\n"
    with pytest.raises(ModelError, match=r"p.yaml: stage 'study': model_name 'tiny' is a configuration"):
        go(
            load_plan(write_plan(tmp_path / "p.yaml", study % "model_name: tiny, from_scratch: false")),
            tmp_path / "runs",
        )
    with pytest.raises(RunError, match=r"p.yaml: stage 'study': data_folder: there is no folder"):
        go(load_plan(write_plan(tmp_path / "p.yaml", study % "data_folder: nowhere")), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# ---- what is shown --------------------------------------------------------------------------------------------------


def running(stage: str, elapsed: float, folder: Path) -> Running:
    return Running(f"{stage}-1", stage, folder, time.monotonic() - elapsed)


def test_time_left_is_worked_out_and_never_invented(tmp_path):
    assert Tally(3, 2, waiting=["a"] * 3).headline() == "0 of 3 finished, time left not known yet"
    known = {"a": [50.0, 70.0]}
    assert Tally(6, 2, waiting=["a"] * 4, known=known).time_left() == "about 2 min 00 s left"
    assert Tally(6, 2, waiting=["a"] * 4 + ["b"], known=known).time_left() == "at least 2 min 00 s left"
    half_done = Tally(2, 2, running=[running("a", 20, tmp_path)], known=known)
    assert half_done.time_left() == "about 40 s left"
    (tmp_path / "progress.json").write_text('{"step": 100, "steps": 400}')
    by_steps = Tally(2, 1, running=[running("a", 20, tmp_path)], waiting=["a"])
    assert by_steps.time_left() == "about 2 min 20 s left"  # 60 s for this one, 80 s for the next
    (tmp_path / "progress.json").write_text('{"step": 1, "steps": 100}')  # 20 s, most of them of its start
    assert by_steps.time_left() == "time left not known yet"
    assert half_done.time_left() == "about 40 s left"
    assert Tally(2, 2, running=[running("a", 80, tmp_path)]).time_left() == "about 2 h 12 min left"
    retry = Retry("a-2", "a", time.monotonic() + 500, 1, 3)
    assert Tally(1, 2, waiting=["a"], known=known, retrying=[retry]).headline() == (
        "0 of 1 finished, 1 to be tried again, about 9 min 20 s left"  # 500 s until then, and a minute
    )
    ended = [Outcome("x", "finished", 0), Outcome("y", "failed", 1), Outcome("z", "finished", 0, skipped=True)]
    assert Tally(3, 2, ended=ended).headline() == "2 of 3 finished, 1 failed"


def test_a_terminal_gets_a_live_table(tmp_path):
    """In a pseudo-terminal: which variants run, their steps, how many of how many."""
    code = f"""
import time
from pathlib import Path
from nbutils.batch.progress import Running, Tally, Display
with Display("quick") as display:
    running = Running("study-[red]1", "study", Path({str(tmp_path)!r}), time.monotonic() - 4000)
    display.tick(Tally(4, 2, running=[running], waiting=["study"] * 3))
    time.sleep(0.6)
"""
    (tmp_path / "progress.json").write_text('{"step": 100, "steps": 400}')
    exit_code, shown = in_a_terminal(code, 100)
    assert exit_code == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "quick: 0 of 4 finished, about 8 h 20 min left" in text  # (3 + 3 * 4) times 4000 s of work for two
    assert re.search(r"study-\[red\]1 +step 100 of 400 +1 h 06 min", text)


@pytest.mark.parametrize(
    ("cores", "gpus", "workers"), [(1, (), 1), (2, (), 2), (4, (), 2), (16, (), 8), (16, ("A100",), 1)]
)
def test_workers_by_the_machine(monkeypatch, cores, gpus, workers):
    monkeypatch.setattr(environment, "cores", lambda: cores)
    monkeypatch.setattr(environment, "gpus", lambda: gpus)
    assert default_workers() == workers
