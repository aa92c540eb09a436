"""A run made again from its manifest: the same numbers are called the same, others are told with their size."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from kill_many import write_data
from tiny_notebooks import write_notebook

from nbutils.batch import repeating
from nbutils.batch.differences import compare_runs
from nbutils.batch.repeating import repeat
from nbutils.batch.runner import flat_variant, run_variant
from nbutils.batch.status import folder_status
from nbutils.foundation.errors import ParameterError, PlanError, RunError, WorkbookError
from nbutils.foundation.files import read_json, write_json
from nbutils.foundation.places import NOTEBOOKS
from nbutils.foundation.stopping import Resources
from nbutils.runs.run_folder import load_runs

PARAMETERS = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
shift: str = ""  # a file: the loss is higher by what it holds
seed: int = 0  # of everything, at least 0
"""
STUDY = """\
import json, os, time
added = float(open(shift).read()) if shift else 0.0
with open(run_folder + "/metrics.csv", "w") as file:
    file.write("step,wall_seconds,loss\\n")
    for step in (1, 2, 3):
        file.write(f"{step},{time.time()},{2.0 / step + added * (step == 2)}\\n")
threads = int(os.environ["OMP_NUM_THREADS"])
result = {"eval_loss": 2.0 + added, "threads": threads, "steps": 3, "train_seconds": time.time(), "nothing": None}
json.dump(result, open(run_folder + "/result.json", "w"))
"""


def make(folder: Path, *cells: str, **params) -> Path:
    """A finished run of a notebook in `folder`; returns its manifest."""
    notebook = write_notebook(folder / "study.ipynb", *(cells or (STUDY,)), parameters=PARAMETERS)
    outcome = run_variant(flat_variant(notebook, "one", params), "tiny", folder / "runs" / "tiny")
    assert outcome.status == "finished", outcome
    return folder / "runs" / "tiny" / "one" / "manifest.json"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of all runs, in which a repeat finds its place by itself."""
    monkeypatch.setattr(repeating, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The manifest of a run that no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        return make(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The manifest of a copy of it, to be changed."""
    shutil.copytree(finished.parents[3], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "runs" / "tiny" / "one" / "manifest.json"
    change(file, notebook=str(tmp_path / "study.ipynb"))
    return file


def change(file: Path, **entries) -> None:
    write_json(file, read_json(file) | entries)


# ---- made again -----------------------------------------------------------------------------------------------------


def test_the_same_numbers_are_called_the_same_with_the_threads_of_then(copied, runs):
    before = copied.read_bytes()
    done = repeat(copied)
    assert done.same and done.exit_code == 0
    made = runs / ".repeated" / "tiny" / "one"
    assert read_json(made / "result.json")["threads"] == 2  # this process has 1
    assert read_json(made / "manifest.json")["hardware"]["threads"] == 2 and os.environ["OMP_NUM_THREADS"] == "1"
    text = done.told()
    assert "tiny/one: the same numbers, bit for bit" in text and "may explain" not in text
    assert "4 entries" in text and "2 columns" in text  # without the clock's
    assert read_json(made / "repeat.json")["same"] is True
    assert copied.read_bytes() == before
    assert [run.folder for run in load_runs(runs)] == [copied.parent]
    assert folder_status(runs).count("one") == 1


def test_other_numbers_are_told_with_their_size_and_an_earlier_repeat_is_no_answer(tmp_path, runs):
    shift = tmp_path / "shift"
    shift.write_text("0")
    manifest = make(tmp_path, shift=str(shift))
    first = repeat(manifest)
    shift.write_text("0.5")
    done = repeat(manifest)
    assert first.same and not done.same and done.exit_code == 1
    metrics, result = done.files
    assert (result.differing, result.largest) == (("eval_loss",), pytest.approx(0.2))
    assert (metrics.differing, metrics.largest) == (("loss",), pytest.approx(1 / 3))
    text = done.told()
    assert "OTHER NUMBERS" in text and "eval_loss: 2.0 → 2.5" in text and "loss, row 2: 1.0 → 1.5" in text
    assert "2.0e-01" in text and "Nothing else that is recorded is different" in text
    told = read_json(runs / ".repeated" / "tiny" / "one" / "repeat.json")
    assert not told["same"] and told["files"][1]["where"] == "eval_loss: 2.0 → 2.5"


def test_what_else_is_different_is_named(copied, runs, tmp_path):
    write_notebook(tmp_path / "study.ipynb", STUDY + "result['eval_loss'] += 1\n", parameters=PARAMETERS)
    source = read_json(copied)["source"] | {"nbutils_sha256": "0123456789abcdef", "git_commit": "fedcba9876543210"}
    packages = read_json(copied)["packages"] | {"torch": "1.0"}
    machine = read_json(copied)["hardware"] | {"gpus": ["H200"]}
    change(copied, source=source | {"git_dirty": False}, packages=packages, hardware=machine)
    (copied.parent / "result.json").write_text('{"eval_loss": 3.0, "threads": 2, "gone": 1}')
    done = repeat(copied)
    changed = {each.what: each.first for each in done.changes}
    assert {"notebook's code", "nbutils' code", "git commit", "package torch", "GPU"} == {*changed}
    assert (changed["package torch"], changed["GPU"], changed["git commit"]) == ("1.0", "H200", "fedcba987654")
    text = done.told()
    assert "which may explain it" in text and "0123456789ab " in text and "gone is missing" in text
    assert "result.json has now in addition: steps, nothing." in text and not done.same


def test_a_repeat_that_fails_says_why(copied, runs, tmp_path):
    write_notebook(tmp_path / "study.ipynb", "1 / 0", parameters=PARAMETERS)
    done = repeat(copied, tmp_path / "again")
    assert not done.same and done.exit_code == 1
    assert "ZeroDivisionError" in done.told() and "the repeat is failed" in done.told()
    assert [each.what for each in done.changes] == ["notebook's code"] and "notebook's code  " in done.told()
    record = read_json(tmp_path / "again" / "one" / "repeat.json")
    assert (record["status"], record["changes"][0]["what"]) == ("failed", "notebook's code")
    write_notebook(tmp_path / "study.ipynb", STUDY, parameters=PARAMETERS)
    assert repeat(copied.parent, tmp_path / "again").same  # by its folder; the failed repeat makes room


def test_a_repeat_may_be_given_a_limit(copied, runs, tmp_path):
    write_notebook(tmp_path / "study.ipynb", "import time\ntime.sleep(60)", parameters=PARAMETERS)
    done = repeat(copied, resources=Resources(cell_minutes=0.02))
    assert done.outcome.status == "failed" and "cell_minutes 0.02" in done.told()


@pytest.mark.soak
@pytest.mark.slow
def test_a_small_training_comes_out_the_same_bit_for_bit(tmp_path, runs):
    data = write_data(tmp_path)
    params = {"data_folder": str(data), "max_steps": 8, "eval_steps": 4, "samples": 1, "alpha": 0.5, "seed": 1}
    variant = flat_variant(NOTEBOOKS / "04_cosine_mixing.ipynb", "one", params)
    assert run_variant(variant, "small", runs / "small").status == "finished"
    done = repeat(runs / "small" / "one" / "manifest.json")
    files = {file.file: file for file in done.files}
    assert done.same, done.told()
    assert {"result.json", "metrics.csv", "per_document.parquet", "samples.jsonl", "model/model.safetensors"} <= {
        *files
    }
    assert files["result.json"].compared > 20 and files["model/model.safetensors"].what.startswith("bytes, SHA-256")
    assert done.outcome.folder == runs / ".repeated" / "small" / "one"
    weights = done.outcome.folder / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of the last weight, a bit of its exponent
    weights.write_bytes(content)
    changed = next(file for file in compare_runs(done.original, done.outcome.folder) if file.file.startswith("model/"))
    assert len(changed.differing) == 1 and changed.largest > 0 and changed.where in changed.differing


# ---- refused --------------------------------------------------------------------------------------------------------


def refusal(kind: type[WorkbookError], *arguments) -> str:
    with pytest.raises(kind) as caught:
        repeat(*arguments)
    return str(caught.value)


def test_what_is_no_manifest_is_refused(tmp_path, copied):
    assert "There is no manifest" in refusal(RunError, tmp_path / "gone" / "manifest.json")
    for content, cause in (
        ("{cut", "no manifest that can be read"),
        ("[]", "it has no plan"),
        ("{}", "it has no plan"),
    ):
        (tmp_path / "other.json").write_text(content)
        message = refusal(RunError, tmp_path / "other.json")
        assert cause in message and "runs/<plan>/<variant>/manifest.json" in message
    for name in ("../../one", ".hidden", ""):
        change(copied, variant=name)
        assert "cannot be a folder's name" in refusal(RunError, copied)


def test_a_run_without_numbers_is_refused(copied, runs):
    (copied.parent / "result.json").write_text('{"train_seconds": 3.0, "peak_memory_mib": 8}')
    (copied.parent / "metrics.csv").unlink()
    assert "times and memory alone" in refusal(RunError, copied)
    (copied.parent / "result.json").unlink()
    assert "no numbers beside its manifest" in refusal(RunError, copied)
    error = {"type": "ValueError", "message": "no.", "cell": None, "log": []}
    change(copied, status="failed", error=error)
    assert "is failed, not finished (ValueError: no.)" in refusal(RunError, copied)
    change(copied, status="finished", params={"study": "", "space": [], "trials": 4})
    assert "is a search" in refusal(RunError, copied)
    assert not (runs / ".repeated").exists()


def test_a_damaged_file_is_named(copied):
    (copied.parent / "metrics.csv").write_text("step,loss\n1\n")
    assert "metrics.csv cannot be read" in refusal(RunError, copied)


def test_another_notebook_is_refused_with_its_commit(copied, tmp_path):
    change(copied, source={"git_commit": "fedcba9876543210", "git_dirty": True})
    parameters = PARAMETERS.replace("seed: int", "seeds: int")
    write_notebook(tmp_path / "study.ipynb", STUDY, parameters=parameters)
    message = refusal(ParameterError, copied)
    assert "no parameter 'seed'" in message and "commit fedcba987654, with changes that were not" in message
    (tmp_path / "study.ipynb").unlink()
    assert "its notebook is gone" in refusal(PlanError, copied)


def test_another_input_is_refused_with_what_made_it(copied, runs):
    data = runs / "tiny" / "data"
    change(copied, inputs={"data_folder": {"folder": str(data), "fingerprint": "0123456789abcdef" * 4}})
    message = refusal(RunError, copied)
    assert "data_folder: the folder" in message and "is gone" in message
    assert "(content 0123456789ab)" in message
    shutil.copytree(copied.parent, data)
    change(data / "manifest.json", variant="data", fingerprint="f" * 64)
    message = refusal(RunError, copied)
    assert "ffffffffffff, not 0123456789ab." in message and "made by tiny/data" in message


def test_only_repeats_make_room(copied, tmp_path):
    assert "is the run to repeat itself" in refusal(RunError, copied, copied.parents[1])
    other = shutil.copytree(copied.parent, tmp_path / "other" / "one")
    assert "taken by a run of plan tiny" in refusal(RunError, copied, tmp_path / "other")
    assert (other / "result.json").is_file()
    shutil.rmtree(other)
    shutil.copytree(copied.parent, tmp_path / "other" / ".attempts" / "one")  # one that goes on from checkpoints
    assert "taken by a run of plan tiny" in refusal(RunError, copied, tmp_path / "other")
    assert json.loads((tmp_path / "other" / ".attempts" / "one" / "manifest.json").read_text())["plan"] == "tiny"
