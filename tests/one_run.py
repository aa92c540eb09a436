"""One variant of a few lines' notebook, run here or by the command; a disk that is soon full."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from batch_processes import wait_until
from tiny_notebooks import write_notebook

from nbutils.batch.runner import flat_variant, run_variant
from nbutils.foundation.files import read_json
from nbutils.foundation.stopping import Resources
from nbutils.runs.run_folder import load_runs

WRITE = "from pathlib import Path\nPath(run_folder, 'out.txt').write_text(f'{alpha} {seed}')"
PID = "import os, time\nopen(run_folder + '/pid', 'w').write(str(os.getpid()))"


def run(folder: Path, *cells: str, name: str = "variant", limits: Resources | None = None, **given: object):
    """Write a notebook of these cells and run it; returns (outcome, run)."""
    notebook = write_notebook(folder.parent / f"{name}.ipynb", *cells)
    variant = replace(flat_variant(notebook, name, given), resources=limits or Resources())
    outcome = run_variant(variant, "plan", folder)
    return outcome, next(each for each in load_runs(folder) if each.variant == name)


def cells_of(folder: Path) -> list[tuple[str, str]]:
    """(source, what papermill's metadata says of it) of the code cells a user wrote, parameters left out."""
    notebook = read_json(folder / "notebook.ipynb")
    return [
        ("".join(cell["source"]), cell["metadata"]["papermill"]["status"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and not cell["metadata"].get("tags")
    ]


def start_cli(folder: Path, *cells: str) -> subprocess.Popen:
    notebook = write_notebook(folder.parent / "variant.ipynb", *cells)
    params = folder.parent / "params.yaml"
    params.write_text("seed: 1\n")
    command = [sys.executable, "-m", "nbutils", "run", str(notebook), "--params", str(params)]
    command += ["--variant", "variant", "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> str:
    wait_until(lambda: path.is_file() and path.read_text())
    return path.read_text()


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of so many bytes at `folder`; the test is skipped where this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
