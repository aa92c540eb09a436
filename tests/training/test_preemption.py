"""A run that is asked to stop saves its state and ends with 75; run again, it ends with the numbers it would have had.

python -m pytest tests/test_preemption.py
"""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kill_many import untimed, write_data
from tiny_notebooks import write_notebook

from nbutils.batch.progress import read_steps
from nbutils.runs.attempts import Place
from nbutils.runs.run_folder import load_runs

pytestmark = pytest.mark.slow
SETTINGS = {"eval_steps": 40, "samples": 0, "audit_blocks": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def command(folder: Path, data: Path, name: str, **given: object) -> list[str]:
    """`run` of 04_cosine_mixing, with few and small steps."""
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump({"data_folder": str(data), **SETTINGS, **given}))
    words = ["run", "04_cosine_mixing", "--params", str(params), "--variant", name, "--out", str(folder / "runs")]
    return [sys.executable, "-m", "nbutils", *words]


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=900)


def stop_in_training(words: list[str], place: Place, step: int) -> tuple[int, float, str]:
    """Start, send SIGTERM after so many steps; exit code, how long it took, what was said."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        while (read_steps(place.attempt) or (0, 0))[0] < step:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=600)
    return process.returncode, time.monotonic() - start, told


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [untimed(row) for row in csv.DictReader(file)]


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_saves_leaves_with_75_and_goes_on(data, tmp_path, processes):
    number = 400 if processes == 1 else 60  # two take ten times as long for a step on a busy machine
    words = command(tmp_path, data, "stopped", processes=processes, max_steps=number)
    place = Place(tmp_path / "runs", "stopped")
    code, seconds, told = stop_in_training(words, place, 1)
    assert code == 75, (seconds, told)
    assert "asked to stop at step" in told and "is saved. Run it again to go on." in told
    (stopped,) = load_runs(tmp_path / "runs")
    assert (stopped.status, stopped.manifest["exit_code"]) == ("preempted", 75)
    (saved,) = (stopped.folder / "checkpoints").glob("step-*")
    again = run(words)
    assert again.returncode == 0, again.stderr
    (ended,) = load_runs(tmp_path / "runs")
    assert [each["status"] for each in ended.manifest["attempts"]] == ["preempted", "finished"]
    assert not (ended.folder / "checkpoints").exists()  # nothing goes on from a finished run
    if processes == 1:  # with more, ranks have logs of their own
        told = (ended.folder / "notebook.ipynb").read_text()
        assert f"Training goes on from step {saved.name.removeprefix('step-')}" in told, again.stderr
    steps = [int(row["step"]) for row in rows_of(ended.folder) if row["loss"]]
    assert steps == list(range(1, number + 1))


CELL = """
from nbutils.runs.run_folder import start_run
run = start_run("04_cosine_mixing", globals())
open(run.path / "begun", "w").close()
"""


def test_outside_training_a_cell_is_ended_at_once_and_may_clean_up(tmp_path):
    """The notebook says that it is 04, whose parameters it has."""
    cell = "import time\ntry:\n    time.sleep(100)\nfinally:\n    open(run.path / 'cleaned', 'w').close()"
    notebook = write_notebook(tmp_path / "study.ipynb", CELL, cell, parameters='run_folder: str = ""  # r\n')
    (tmp_path / "params.yaml").write_text("{}")
    words = ["run", str(notebook), "--params", str(tmp_path / "params.yaml"), "--variant", "v"]
    words = [sys.executable, "-m", "nbutils", *words, "--out", str(tmp_path / "runs")]
    place = Place(tmp_path / "runs", "v")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (place.attempt / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 75 and "Traceback" not in told, told
    assert "Preempted: asked to stop. Run it again. (In [" in told
    assert (place.published / "cleaned").exists()
