"""The processes of a batch as /proc shows them, and waiting for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

MARK = "BATCH_UNDER_TEST"  # environment variable: the batch that a process was started for, and all it started in turn
# For a cell: the processes of the kernel, what it has started by then, its keeper and its runner.
PIDS = """\
import os, subprocess, time
child = subprocess.Popen(["sleep", "300"])
keeper = os.getppid()
runner = int(open(f"/proc/{keeper}/stat").read().rsplit(")", 1)[1].split()[1])
open(run_folder + "/pids", "w").write(f"{os.getpid()} {child.pid} {keeper} {runner}")
"""


def is_alive(process: int) -> bool:
    """Whether it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(mark: str) -> list[int]:
    """All processes that were started under this mark, by themselves or by those that were."""
    wanted = f"{MARK}={mark}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = wanted in (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if marked and is_alive(int(folder.name)):
            found.append(int(folder.name))
    return found


def wait_until(holds: Callable[[], object], seconds: float = 90) -> None:
    """Wait, for so long that no busy machine needs it."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def numbers_in(path: Path) -> list[int]:
    """The numbers in a file, once it is there."""
    wait_until(lambda: path.is_file() and path.read_text())
    return [*map(int, path.read_text().split())]


def assert_gone(processes: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, processes)), 30)


def start_marked(mark: Path, *words: str) -> subprocess.Popen:
    """`python -m nbutils` with these words under a mark; it hears Ctrl-C though tests may not."""
    return subprocess.Popen(
        [sys.executable, "-m", "nbutils", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARK: str(mark)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
