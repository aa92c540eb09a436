"""Endings that have to do with the machine: memory, crashes, limits, full disks; each is recorded as what it was."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from one_run import WRITE, cells_of, run, small_disk
from tiny_notebooks import write_notebook

from nbutils.batch.runner import flat_variant, run_variant
from nbutils.foundation.errors import RunError
from nbutils.foundation.stopping import Resources
from nbutils.runs.plans import Variant

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def test_what_memory_a_killed_kernel_had_taken_is_in_the_record(folder):
    """As the system counts it: a look now and then would miss what grew in the last moment."""
    code = "import os, signal\nmuch = b'x' * (300 << 20)\nos.kill(os.getpid(), signal.SIGKILL)"
    outcome, record = run(folder, code)
    peak = record.manifest["attempts"][-1]["peak_memory_mib"]
    assert 300 < peak < 900
    assert outcome.message.endswith(f" Its kernel had taken {peak:,.0f} MiB at most.")
    assert outcome.again
    _, record = run(folder, "x = 1")
    assert 20 < record.manifest["attempts"][-1]["peak_memory_mib"] < 300


RANK = "from nbutils.foundation.errors import RankKilled\nraise RankKilled('Rank 1 was ended first')"


@pytest.mark.parametrize(
    ("cell", "again"), [("import os; os.kill(os.getpid(), 11)", False), ("import os; os._exit(3)", False), (RANK, True)]
)
def test_a_crash_is_a_bug_and_a_killed_rank_is_none(folder, cell, again):
    outcome, _ = run(folder, cell)
    assert (outcome.status, outcome.exit_code, outcome.again) == ("killed", 138, again)


SLEEP = "import time\nprint('asleep')\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("limits", "kind", "message"),
    [
        (Resources(cell_minutes=0.025), "CellTimeout", "the cell took longer than cell_minutes 0.025. Give it more"),
        (Resources(run_minutes=0.05), "TimeLimit", "the variant took longer than run_minutes 0.05. Give it more"),
    ],
)
def test_a_limit_ends_the_run_and_is_named(folder, limits, kind, message):
    run(folder, WRITE)
    outcome, record = run(folder, "import time; time.sleep(1)", SLEEP, "never = 1", limits=limits)
    assert (outcome.status, outcome.exit_code, outcome.again) == ("failed", 1, False)
    assert outcome.message.startswith(f"{kind}: {message}")
    assert outcome.log == ("asleep",) or kind == "TimeLimit"
    assert (record.status, record.newer["error"]["type"]) == ("finished", kind)  # the good result stands
    attempt = folder / ".attempts" / "variant"
    assert cells_of(attempt)[-1] == ("never = 1", "pending")
    assert message in (attempt / "notebook.ipynb").read_text()


def test_a_training_that_reaches_a_limit_saves_first_and_is_gone_on_with(folder):
    train = """
from nbutils.foundation.stopping import noted
import pathlib, time
saved = pathlib.Path(run_folder, "checkpoints"); print("found", saved.exists())
with noted() as stop:
    while not stop.asked and not saved.exists(): time.sleep(0.01)
    time.sleep(0.5)
    saved.mkdir(exist_ok=True)
    if stop.asked: raise RuntimeError("whatever a notebook makes of it")
"""
    outcome, record = run(folder, train, limits=Resources(cell_minutes=0.03))
    assert (outcome.status, record.manifest["error"]["type"]) == ("failed", "CellTimeout")
    outcome, record = run(folder, train, limits=Resources(cell_minutes=1))
    assert outcome.status == "finished"
    assert "found True" in (record.folder / "notebook.ipynb").read_text()


FILL = "with open(run_folder + '/big', 'wb') as file:\n    while True: file.write(bytes(4096))"


def test_a_full_disk_is_recorded_on_it_and_keeps_the_good_result(folder):
    with small_disk(folder, "1200k"):
        _, good = run(folder, WRITE)
        outcome, record = run(folder, FILL, "never = 1")
        assert (outcome.status, outcome.exit_code, outcome.again) == ("failed", 2, False)
        assert outcome.message.startswith("RunError: ") and "No space left on device" in outcome.message
        assert "Make room or mend it, then run again." in outcome.message
        assert (record.key, record.status, record.newer["status"]) == (good.key, "finished", "failed")
        assert record.newer["attempts"][-1]["exit_code"] == 2
        assert (record.folder / "out.txt").read_text() == "0.5 0"
        (folder / ".attempts" / "variant" / "big").unlink()
        outcome, record = run(folder, "x = 1")
        assert (outcome.status, record.newer) == ("finished", None)


def test_a_kernel_killed_on_a_full_disk_is_killed_and_its_notebook_claims_nothing(folder):
    kill = "import os, signal, time\ntime.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)"
    with small_disk(folder, "1200k"):
        fill = FILL.replace("    while", "    while ") + "\n"
        quietly = f"try:\n    {fill.strip().replace(chr(10), chr(10) + '    ')}\nexcept OSError: pass\n{kill}"
        outcome, record = run(folder, "x = 1", quietly, "never = 1")
        assert (outcome.status, outcome.exit_code) == ("killed", 138), outcome
        assert (record.status, record.manifest["error"]["type"]) == ("killed", "KernelDied")
        notebook = record.folder / "notebook.ipynb"
        assert not notebook.exists() or cells_of(record.folder)[-1] == ("never = 1", "pending")


def test_a_limit_holds_before_there_is_a_kernel(folder):
    def slow_check(variant: Variant) -> None:
        time.sleep(20)

    notebook = write_notebook(folder.parent / "variant.ipynb", "x = 1")
    variant = replace(flat_variant(notebook, "variant", {}), resources=Resources(run_minutes=0.02))
    outcome = run_variant(variant, "plan", folder, slow_check)
    assert (outcome.status, outcome.exit_code, outcome.message[:9]) == ("failed", 1, "TimeLimit")


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(folder):
    folder.write_text("a file")
    with pytest.raises(
        RunError, match=r"runs cannot be written \((File exists|Not a directory)\). Name another folder"
    ):
        run(folder, "x = 1")
    folder.unlink()
    with small_disk(folder, "16k"), pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
        run(folder, "x = 1")
