"""Run folders, keys and publishing, without a kernel: what is written, when it is the same run, who sees what."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_notebooks import write_notebook

from nbutils.batch.batch import is_going_on
from nbutils.batch.status import folder_status
from nbutils.foundation.errors import LockedRunError, ParameterError, RunError
from nbutils.foundation.files import atomic_write, exclusively, read_json, shared, write_json
from nbutils.runs.attempts import Place
from nbutils.runs.keys import read_inputs
from nbutils.runs.manifest import begin, end, read_manifest
from nbutils.runs.plans import Variant
from nbutils.runs.run_folder import DRIVEN_FOLDER, describe, load_runs, start_run


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "study.ipynb", "x = 1")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "runs", "study-seed1")


def make_run(place: Place, notebook: Path, status="finished", seed=1, **files: str) -> dict:
    """A run as the runner makes it, from lock to publication."""
    variant = Variant(place.variant, "study", notebook, {"alpha": 0.5, "seed": seed}, {"seed": seed})
    with place.lock():
        earlier = place.history()
        place.clear()
        record = begin(place.attempt, "plan", variant, earlier)
        for name, text in files.items():
            (place.attempt / name.replace("_", ".")).write_text(text)
        error = None if status == "finished" else {"type": "E", "message": "m", "cell": None, "log": []}
        record = end(place.attempt, record, status, 0 if status == "finished" else 1, error)
        place.publish()
    return record


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "result.json"
    contents = [json.dumps({"value": str(n) * 200_000}) for n in range(2)]
    atomic_write(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                atomic_write(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {path.read_text() for _ in range(2000)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        atomic_write(path, 3)
    assert read_json(path) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


# ---- publishing -----------------------------------------------------------------------------------------------------


def test_a_good_result_survives_a_failed_rerun(place, notebook):
    good = make_run(place, notebook, result_json='{"eval_loss": 1.5}')
    make_run(place, notebook, "failed", seed=2)
    (run,) = load_runs(place.plan_folder)
    assert (run.status, run.key, run.result) == ("finished", good["key"], {"eval_loss": 1.5})
    assert run.newer["status"] == "failed"
    again = make_run(place, notebook, seed=2, result_json='{"eval_loss": 1.25}')
    (run,) = load_runs(place.plan_folder)
    assert (run.status, run.key, run.result, run.newer) == ("finished", again["key"], {"eval_loss": 1.25}, None)


def test_a_failed_first_run_is_published_and_replaced(place, notebook):
    make_run(place, notebook, "failed", seed=1)
    make_run(place, notebook, "killed", seed=2)
    (run,) = load_runs(place.plan_folder)
    assert (run.status, run.folder, run.params["seed"]) == ("killed", place.published, 2)
    assert [attempt["status"] for attempt in run.manifest["attempts"]] == ["failed", "killed"]


def test_a_cut_publication_is_mended(place, notebook):
    """Killed between the two renames: no published folder; readers and the next runner still find the result."""
    make_run(place, notebook, "failed", seed=1)
    place.published.rename(place.previous)
    (run,) = load_runs(place.plan_folder)
    assert (run.status, run.folder) == ("failed", place.previous)
    with place.lock():
        place.mend()
    assert place.published.is_dir()
    finished = make_run(place, notebook, seed=2)
    place.published.rename(place.attempt)  # ended and recorded, not yet published
    with place.lock():
        place.mend()
    assert place.is_finished(finished["key"])


def test_a_dead_runner_leaves_a_killed_run(place, notebook):
    with place.lock():
        place.clear()
        begin(place.attempt, "plan", Variant("study-seed1", "study", notebook, {"seed": 1}), [])
        assert [run.status for run in load_runs(place.plan_folder)] == ["running"]
    (run,) = load_runs(place.plan_folder)  # the lock is free, the record still says running
    assert run.status == "killed"
    assert run.manifest["attempts"][-1]["status"] == "killed"
    assert "Run it again" in run.manifest["error"]["message"]


def test_a_lock_keeps_other_runners_off_and_dies_with_its_process(place):
    code = f"""
import time
from pathlib import Path
from nbutils.runs.attempts import Place
with Place(Path({str(place.plan_folder)!r}), {place.variant!r}).lock():
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        assert place.is_locked()
        with pytest.raises(LockedRunError) as told, place.lock():
            pass
        who = f"process {holder.pid} on {platform.node()}"
        gone = f"if its machine is gone for good, delete {place.lock_file}."
        assert str(told.value) == f"study-seed1: another runner is at work on it ({who}). Wait until it ends; {gone}"
        holder.kill()
    assert not place.is_locked()
    with place.lock():
        assert place.is_locked()


@pytest.mark.parametrize("number", [errno.ENOLCK])
def test_a_file_system_without_locks_is_told(place, notebook, monkeypatch, number):
    make_run(place, notebook)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    other = place.plan_folder / ".other"
    asked = [(place.lock(), ".locks"), (exclusively(other / "1"), ".other"), (shared(other / "2"), ".other")]
    for lock, folder in asked:
        with pytest.raises(RunError) as told, lock:
            pass
        reason = f"lies on a file system that locks no files ({os.strerror(number)})"
        assert str(told.value).startswith(f"{place.plan_folder / folder} {reason}")
        assert "mounted with flock" in str(told.value) and "--out" in str(told.value)
    assert not is_going_on(place.plan_folder)
    assert "1 of 1 finished" in folder_status(place.plan_folder.parent)


def test_a_plan_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "runs").write_text("")
    told = r"cannot be written \(.*\). Name another folder"
    with pytest.raises(RunError, match=told), Place(tmp_path / "runs", "a").lock():
        pass


def test_a_folder_that_is_not_there_or_not_finished_is_refused(notebook, place, tmp_path):
    with pytest.raises(RunError, match=r"data_folder: there is no folder .*nowhere. Make the run first"):
        read_inputs({"data_folder": str(tmp_path / "nowhere")})
    make_run(place, notebook, "failed")
    with pytest.raises(RunError, match=r"is failed, not finished. Run it again"):
        read_inputs({"data_folder": str(place.published)})


# ---- reading --------------------------------------------------------------------------------------------------------


def test_runs_are_read_from_any_level_in_natural_order(tmp_path, notebook):
    for seed in (10, 2, 1):
        make_run(Place(tmp_path / "runs" / "plan", f"study-seed{seed}"), notebook, seed=seed)
    make_run(Place(tmp_path / "runs" / "another", "data"), notebook)
    assert [run.variant for run in load_runs(tmp_path / "runs")] == ["data", *(f"study-seed{s}" for s in (1, 2, 10))]
    assert [run.variant for run in load_runs(tmp_path / "runs" / "plan")] == [f"study-seed{s}" for s in (1, 2, 10)]
    (run,) = load_runs(tmp_path / "runs" / "plan" / "study-seed2")
    assert (run.plan, run.stage, run.matrix, run.params) == ("plan", "study", {"seed": 2}, {"alpha": 0.5, "seed": 2})
    assert load_runs(tmp_path / "empty") == []


def test_what_a_killed_run_wrote_last_is_not_read(place, notebook):
    make_run(
        place,
        notebook,
        metrics_csv="step,loss,eval_loss\n1,3.5,\n2,3.25,3.0\n3,2.",
        samples_jsonl='{"prompt": "a\u2028b"}\n{"prom',
    )
    (run,) = load_runs(place.plan_folder)
    metrics = run.metrics()
    assert metrics["loss"].tolist() == [3.5, 3.25]
    assert math.isnan(metrics["eval_loss"][0])
    assert run.samples() == [{"prompt": "a\u2028b"}]
    assert run.per_document().empty


def test_a_damaged_manifest_is_passed_over_with_a_warning(tmp_path, notebook, caplog):
    make_run(Place(tmp_path / "runs", "good"), notebook)
    make_run(Place(tmp_path / "runs", "bad"), notebook)
    (tmp_path / "runs" / "bad" / "manifest.json").write_text('{"plan": ')
    assert [run.variant for run in load_runs(tmp_path / "runs")] == ["good"]
    assert "bad" in caplog.text


def test_the_manifest_says_what_ran_on_what(place, notebook):
    record = make_run(place, notebook)
    assert record["packages"]["papermill"] == "2.7.0"
    assert record["packages"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gib"] > 0
    assert len(record["source"]["nbutils_sha256"]) == len(record["source"]["notebook_sha256"]) == 64
    (attempt,) = record["attempts"]  # the first
    assert attempt["start"] < attempt["end"]
    assert attempt["start"].endswith("+00:00")
    assert (place.published / "params.yaml").read_text() == "alpha: 0.5\nseed: 1\n"
    assert record["fingerprint"] == record["key"]  # it made neither data nor a model


# ---- in a notebook --------------------------------------------------------------------------------------------------


def test_a_notebook_opened_by_hand_keeps_its_own_record(tmp_path, notebook):
    names = {"run_folder": str(tmp_path / "mine"), "alpha": "0.25", "seed": 1, "unrelated": object()}
    run = start_run(str(notebook), names)
    assert run.params == {"alpha": 0.25, "seed": 1}
    assert read_manifest(run.path)["status"] == "running"
    (run.path / "metrics.csv").write_text("step\n")
    run.write_lines("samples.jsonl", [{"prompt": "a"}])
    run.write_result({"eval_loss": np.float32(1.5), "steps": np.int64(3), "eval_perplexity": math.inf})
    (read,) = load_runs(run.path)
    assert (read.plan, read.status, read.manifest["exit_code"]) == ("interactive", "finished", 0)
    assert read.result["eval_loss"] == 1.5
    assert math.isnan(read.result["eval_perplexity"])
    assert json.loads((run.path / "result.json").read_text())["eval_perplexity"] is None
    start_run(str(notebook), names)  # a new try starts without the files of the last
    assert not (run.path / "metrics.csv").exists()
    assert not (run.path / "result.json").exists()
    assert "interactive / mine" in describe(run)


def test_a_driven_notebook_leaves_the_record_to_its_runner(place, notebook, monkeypatch):
    with place.lock():
        place.clear()
        begin(place.attempt, "plan", Variant("study-seed1", "study", notebook, {"alpha": 0.5, "seed": 1}), [])
        monkeypatch.setenv(DRIVEN_FOLDER, str(place.attempt))
        run = start_run(str(notebook), {"run_folder": str(place.attempt), "seed": 1})
        run.write_result({"eval_loss": 1.0})
        assert read_manifest(place.attempt)["status"] == "running"


def test_a_notebook_refuses_what_it_should(tmp_path, notebook, place):
    with pytest.raises(ParameterError, match="alpha"):
        start_run(str(notebook), {"run_folder": str(tmp_path / "mine"), "alpha": 1.5})
    run = start_run(str(notebook), {"run_folder": str(tmp_path / "mine")})
    with pytest.raises(RunError, match="result 'eval_loss' is 'low'"):
        run.write_result({"eval_loss": "low"})
    make_run(place, notebook)
    with pytest.raises(RunError, match="holds a result of a plan"):
        start_run(str(notebook), {"run_folder": str(place.published)})


def test_reading_runs_imports_nothing_heavy():
    code = "import sys, nbutils.batch.status\n"
    code += "print([m for m in ('torch', 'papermill', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
