"""What a power cut leaves of a run folder: none can be made here, so what is asked of the system is looked at.

python -m pytest tests/test_files.py
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbutils.foundation.files import flush_tree


@pytest.fixture
def flushed(monkeypatch) -> list[Path]:
    """The files and folders that are written to the disk, in their order."""
    seen: list[Path] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return seen


def test_all_of_a_run_is_written_to_the_disk(tmp_path, flushed):
    run = tmp_path / "run"
    for name in ("result.json", "figures/loss.svg", "checkpoints/step-1/weights", "figures/checkpoints"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(run / "pipe")  # nobody writes to it: it must not be waited for
    flush_tree(run, {"checkpoints"})
    names = ("result.json", "figures", "figures/loss.svg", "figures/checkpoints")
    assert {run, *(run / name for name in names)} == {each for each in flushed if each != run / "pipe"}
    assert flushed.index(run / "figures/loss.svg") < flushed.index(run / "figures")


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        flush_tree(tmp_path)
