"""One variant run in a real kernel: every ending leaves the right record, exit code, message and notebook."""

from __future__ import annotations

import errno
import json
import os
import sys
import time

import pytest
from batch_processes import assert_gone, is_alive
from one_run import PID, WRITE, cells_of, run, start_cli, wait_for
from tiny_notebooks import write_notebook

from nbutils.batch.runner import place_needs, run_variant
from nbutils.foundation.errors import RunError
from nbutils.foundation.files import read_json
from nbutils.runs.attempts import Place
from nbutils.runs.plans import Variant
from nbutils.runs.run_folder import load_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def test_a_finished_run_is_recorded_and_not_run_again(folder):
    outcome, record = run(folder, WRITE, "print('hello')", alpha="1e-4")
    assert (outcome.status, outcome.exit_code, outcome.skipped) == ("finished", 0, False)
    assert (record.status, record.manifest["exit_code"], record.manifest["error"]) == ("finished", 0, None)
    assert (record.folder / "out.txt").read_text() == "0.0001 0"
    assert record.params == {"alpha": 1e-4, "seed": 0}
    assert record.folder == folder / "variant"
    modified = (record.folder / "out.txt").stat().st_mtime_ns
    outcome, record = run(folder, WRITE, "print('hello')", alpha=0.0001)
    assert (outcome.status, outcome.exit_code, outcome.skipped) == ("finished", 0, True)
    assert (record.folder / "out.txt").stat().st_mtime_ns == modified
    outcome, record = run(folder, WRITE, "print('hello')", alpha=0.25)
    assert not outcome.skipped
    assert (record.folder / "out.txt").read_text() == "0.25 0"
    assert len(record.manifest["attempts"]) == 2


def test_an_exception_names_its_cell_and_the_last_lines(folder):
    outcome, record = run(folder, "for i in range(50): print('line', i)", "import os\n\n# why\nx = 1 / 0", "never = 1")
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    error = record.manifest["error"]
    assert (error["type"], error["message"]) == ("ZeroDivisionError", "division by zero")
    assert error["cell"] == "In [4]: x = 1 / 0"
    assert error["log"] == [f"line {i}" for i in range(30, 50)]
    assert outcome.message == "ZeroDivisionError: division by zero (In [4]: x = 1 / 0)"
    assert record.folder == folder / "variant"  # a failed first run is published
    assert [status for _, status in cells_of(record.folder)] == ["completed", "failed", "pending"]


def test_a_mistake_of_any_module_is_the_users(folder):
    cell = "from nbutils.data.sources import UnreachableCorpusError as Mistake\nraise Mistake('no such thing')"
    outcome, record = run(folder, cell)
    assert (outcome.exit_code, outcome.message) == (2, "UnreachableCorpusError: no such thing (In [3])")
    assert record.status == "failed"


@pytest.mark.parametrize(
    ("number", "told"), [(errno.EACCES, "read or written (Perm"), (errno.ENOSPC, "written (No space")]
)
def test_a_file_that_cannot_be_had_is_told(tmp_path, monkeypatch, number, told):
    def look(place: Place, key: str) -> bool:
        raise OSError(number, os.strerror(number), str(tmp_path / "data" / "card.json"))

    monkeypatch.setattr(Place, "is_finished", look)
    with pytest.raises(RunError) as refusal:
        run(tmp_path / "runs", WRITE)
    assert str(refusal.value).startswith(f"{tmp_path / 'data' / 'card.json'} cannot be {told}")
    assert "Make room or mend it, then run again." in str(refusal.value)


def test_an_error_that_cannot_be_sent_is_a_failure_all_the_same(folder):
    """Half a character: the kernel's message about it never arrives, and papermill sees a notebook without an error."""
    outcome, record = run(folder, "raise ValueError('\\ud800')")
    assert (outcome.status, outcome.exit_code, record.status) == ("failed", 1, "failed")
    assert outcome.message.startswith("UnknownError: the cell failed, and its error holds characters that cannot be")


def test_a_killed_kernel_is_killed_in_the_record_and_in_the_notebook(folder):
    cells = (
        "print('start')",
        "import os, signal, time\nprint('doom')\ntime.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)",
        "x = 1",
    )
    outcome, record = run(folder, *cells)
    assert (outcome.status, outcome.exit_code) == ("killed", 138)
    assert "SIGKILL" in record.manifest["error"]["message"]
    assert "out of memory" in record.manifest["error"]["message"]
    assert record.manifest["error"]["log"] == ["start", "doom"]
    assert record.manifest["attempts"][-1]["status"] == "killed"
    assert [status for _, status in cells_of(record.folder)] == ["completed", "failed", "pending"]
    notebook = read_json(record.folder / "notebook.ipynb")
    assert notebook["metadata"]["papermill"]["exception"] is True
    (error,) = [o for cell in notebook["cells"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert error["ename"] == "KernelDied"


def test_sys_exit_is_a_failure(folder):
    """papermill calls a notebook that left by sys.exit(0) a success, with the cells after it never run."""
    outcome, record = run(folder, "import sys; sys.exit(0)", "never = 1")
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert record.manifest["error"]["type"] == "SystemExit"
    assert "ends nothing well" in outcome.message


def test_a_good_result_survives_a_failed_rerun(folder):
    _, good = run(folder, WRITE)
    outcome, record = run(folder, "1 / 0")
    assert outcome.exit_code == 1
    assert (record.status, record.key) == ("finished", good.key)
    assert (record.folder / "out.txt").read_text() == "0.5 0"
    assert record.newer["status"] == "failed"
    assert (folder / ".attempts" / "variant" / "notebook.ipynb").is_file()
    outcome, record = run(folder, "x = 1")
    assert (record.status, record.newer, len(record.manifest["attempts"])) == ("finished", None, 3)


def test_a_kernel_is_this_python_in_the_notebooks_folder(folder, tmp_path, monkeypatch):
    other = tmp_path / "home" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "Another Python", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "home"))
    code = "Path(run_folder, 'out.txt').write_text(f'{sys.executable} {os.getcwd()}')"
    _, record = run(folder, f"import os, sys\nfrom pathlib import Path\n{code}")
    assert (record.folder / "out.txt").read_text() == f"{sys.executable} {folder.parent}"


def test_two_runners_never_share_a_run_and_a_dead_one_is_seen(folder):
    place = Place(folder, "variant")
    cells = (PID, "time.sleep(100)")
    with start_cli(folder, *cells) as first:
        pid = int(wait_for(place.attempt / "pid"))
        with pytest.raises(RunError, match=rf"another runner is at work on it \(process {first.pid} "):
            run(folder, *cells, seed=1)
        assert load_runs(folder)[0].status == "running"
        with start_cli(folder, *cells) as second:
            _, told = second.communicate()
        assert (second.returncode, "another runner is at work on it" in told) == (75, True)  # later, not never
        first.kill()
    (dead,) = load_runs(folder)
    assert (dead.status, dead.manifest["error"]["type"]) == ("killed", "RunnerKilled")
    assert_gone([pid])
    outcome, record = run(folder, "x = 1")
    assert (outcome.status, [a["status"] for a in record.manifest["attempts"]]) == ("finished", ["killed", "finished"])


def test_a_runner_asked_to_stop_ends_its_kernel_and_says_so(folder):
    with start_cli(folder, PID, "time.sleep(100)", "x = 1") as runner:
        pid = int(wait_for(folder / ".attempts" / "variant" / "pid"))
        time.sleep(0.3)
        for _ in range(3):  # as schedulers do that signal each process of a job; all of it is one request
            runner.terminate()
            time.sleep(0.05)
        _, told = runner.communicate()
    assert runner.returncode == 75
    assert "asked to stop" in told
    assert not is_alive(pid)
    (record,) = load_runs(folder)
    assert (record.status, record.manifest["exit_code"]) == ("preempted", 75)
    assert [status for _, status in cells_of(record.folder)] == ["completed", "failed", "pending"]


def test_a_runner_is_stopped_before_its_kernel_is_there(folder):
    with start_cli(folder, "x = 1") as runner:
        wait_for(folder / ".locks" / "variant")
        runner.terminate()
        runner.communicate()
    assert runner.returncode == 75
    assert not list(folder.glob("variant/result.json"))


def test_a_need_that_is_not_finished_is_told(folder):
    notebook = write_notebook(folder.parent / "study.ipynb")
    variant = Variant("study", "study", notebook, {"seed": 1}, needs={"data_folder": "data"})
    with pytest.raises(RunError, match=r"study needs data for data_folder, which is not run yet. Run data first"):
        run_variant(variant, "plan", folder)
    run(folder, "1 / 0", name="data")
    with pytest.raises(RunError, match="which is failed"):
        run_variant(variant, "plan", folder)
    run(folder, "x = 1", name="data")
    assert place_needs(variant, folder).params == {"seed": 1, "data_folder": str(folder / "data")}
