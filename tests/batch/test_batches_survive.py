"""Batches, their runners, kernels and hosts are killed: nothing that was published is lost, and the batch goes on.

python -m pytest tests/test_batches_survive.py; 200 kills at random moments: python tests/kill_batches.py --kills 200
"""

from __future__ import annotations

import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import nbformat
import pytest
from published_runs import MODEL_BYTES, Fault, Looker, read_published, write_study
from small_batches import LIGHT, STUDY, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.runner import flat_variant, run_variant
from nbutils.foundation.files import read_json, write_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]
HERE = Path(__file__).parents[1]


def test_random_kills_lose_nothing():
    """Batches, runners, kernels and what they are forked from; every published run is read in full all the while."""
    words = [sys.executable, str(HERE / "kill_batches.py"), "--kills", "15"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 kills in " in done.stdout
    assert "none lost, none half, none wrong" in done.stdout


# ---- what random kills found ----------------------------------------------------------------------------------------


def test_a_kernel_that_is_killed_before_its_first_cell_is_killed(tmp_path, monkeypatch):
    """jupyter_client then raises a RuntimeError like any other, and nbclient forgets the process."""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "kill.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    variant = flat_variant(write_notebook(tmp_path / "study.ipynb", "x = 1", parameters=STUDY), "study", {})
    outcome = run_variant(variant, "p", tmp_path / "runs")
    assert (outcome.status, outcome.exit_code, outcome.again) == ("killed", 138, True), outcome
    assert "ended by SIGKILL" in outcome.message
    notebook = nbformat.read(outcome.folder / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    told = [cell.outputs[0].ename for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert told == ["KernelDied"]


def test_runners_are_started_where_the_process_they_are_forked_from_is_killed(tmp_path):
    """Even in the moment when it is asked for one."""
    write_notebook(tmp_path / "study.ipynb", "x = 1", parameters=STUDY)
    plan = study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}}")
    outcomes = []
    with LocalEngine("p", tmp_path / "runs", 1, (), LIGHT) as engine:
        engine.start(plan.variants[0])
        while not outcomes:
            outcomes += engine.wait(1)
        forks = multiprocessing.forkserver._forkserver._forkserver_pid
        os.kill(forks, signal.SIGSTOP)  # it takes the request and does not answer
        Timer(0.5, os.kill, (forks, signal.SIGKILL)).start()
        engine.start(plan.variants[1])
        while len(outcomes) < 2:
            outcomes += engine.wait(1)
    assert [(each.variant, each.status) for each in outcomes] == [(v.name, "finished") for v in plan.variants]


# ---- the looker sees what is wrong ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a plan with one finished run."""
    folder = tmp_path_factory.mktemp("finished")
    variant = flat_variant(write_study(folder, "study", resumes=True), "study", {"generation": 3, "pause": 0.0})
    assert run_variant(variant, "plan", folder / "runs").status == "finished"
    return folder / "runs"


@pytest.fixture
def looker(finished, tmp_path) -> Looker:
    """One that has seen the run."""
    shutil.copytree(finished, tmp_path / "runs")
    looker = Looker(tmp_path / "runs", ["study", "never-made"])
    looker.look()
    assert looker.counts == {"finished": 1, "resumed": 0}
    return looker


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: halve(run / "metrics.csv"),
        lambda run: halve(run / "per_document.parquet"),
        lambda run: halve(run / "notebook.ipynb"),
        lambda run: halve(run / "result.json"),
        lambda run: (run / "model" / "weights.bin").write_bytes(random.Random(0).randbytes(MODEL_BYTES)),
        lambda run: shutil.rmtree(run / "model"),
        lambda run: (run / ".result.json.12345678").touch(),
        lambda run: write_json(run / "result.json", read_json(run / "result.json") | {"state": 1}),
    ],
)
def test_what_is_half_or_wrong_is_seen(looker, damage):
    damage(looker.folder / "study")
    looker.seen.clear()
    with pytest.raises(Fault, match="study is half"):
        looker.look()


def changed(run: Path, **values: object) -> None:
    write_json(run / "manifest.json", read_json(run / "manifest.json") | values)


def test_what_is_lost_or_replaced_by_something_worse_is_seen(looker):
    run = looker.folder / "study"
    before = read_published(run)
    changed(run, status="killed")
    with pytest.raises(Fault, match=r"was .*status='finished'.* and is .*status='killed'"):
        looker.look()
    record = read_json(run / "manifest.json")
    changed(run, status="finished", attempts=record["attempts"] * 2)
    looker.look()  # a newer one
    assert (looker.last["study"].attempts, looker.counts["replaced"]) == (2 * before.attempts, 1)
    changed(run, attempts=record["attempts"])
    with pytest.raises(Fault, match=r"attempts=2.* and is .*attempts=1"):
        looker.look()
    shutil.rmtree(run)
    with pytest.raises(Fault, match="and is lost"):
        looker.look()


def test_a_run_that_is_being_replaced_is_not_lost(looker):
    previous = looker.folder / ".previous"
    previous.mkdir(exist_ok=True)
    (looker.folder / "study").rename(previous / "study")
    looker.look()
    assert looker.counts["replaced"] == 0
