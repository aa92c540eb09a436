"""Batches, their runners and kernels are killed: nothing that was published is lost, and the batch goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from one_run import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_random_kills_lose_nothing(kills):
    """Any process of a batch; every published run is read in full all the while."""
    words = [sys.executable, str(Path(__file__).parents[1] / "kill_batches.py"), "--kills", str(kills)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost, none half, none wrong" in done.stdout


def test_a_kernel_that_is_killed_before_its_first_cell_is_killed(tmp_path, monkeypatch):
    """jupyter_client then raises a RuntimeError like any other, and nbclient forgets the process."""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "kill.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    outcome, _ = run(tmp_path / "runs", "x = 1")
    assert (outcome.status, outcome.exit_code, outcome.again) == ("killed", 138, True), outcome
    assert "ended by SIGKILL" in outcome.message
    notebook = nbformat.read(outcome.folder / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    told = [cell.outputs[0].ename for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert told == ["KernelDied"]
