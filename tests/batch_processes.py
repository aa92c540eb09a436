"""The processes of a batch as /proc shows them: which is which, whose kernel is whose, who is still there."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

MARK = "KILL_BATCHES"  # environment variable: the batch that a process was started for, and all it started in turn
GONE_SECONDS = 5.0  # after which nothing may be left of what belonged to the killed, where cores are free
RUN_SECONDS = 60.0  # for a run that is at work when its batch is killed
FORKSERVER, TRACKER, HOST, FRESH = (
    "multiprocessing.forkserver",
    "resource_tracker",
    "nbutils.batch.kernel_host",
    "ipykernel",
)


@dataclass(frozen=True)
class Process:
    """A process; `began` tells it from a later one with the same number."""

    pid: int
    parent: int
    session: int
    began: int
    command: str

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        there = read_process(self.pid)
        return there is not None and there.began == self.began


def read_process(pid: int) -> Process | None:
    """The process with this number, None where there is none or it waits for its parent to ask how it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), command)


def processes_of(mark: str) -> list[Process]:
    """All processes that were started under this mark, by themselves or by those that were."""
    wanted = f"{MARK}={mark}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = wanted in (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if marked and (process := read_process(int(folder.name))):
            found.append(process)
    return found


def by_role(processes: list[Process], batch: int) -> dict[str, list[Process]]:
    """The living processes of the batch with this number: batch, runner, kernel, host, forkserver, tracker."""
    commands = {each.pid: each.command for each in processes}
    roles: dict[str, list[Process]] = {}
    for process in processes:
        roles.setdefault(_role(process, batch, commands.get(process.parent, "")), []).append(process)
    return roles


def _role(process: Process, batch: int, parents_command: str) -> str:
    if process.pid == batch:
        return "batch"
    if TRACKER in process.command:
        return "tracker"
    if HOST in process.command:  # what it forks has its command line
        return "kernel" if HOST in parents_command else "host"
    if FRESH in process.command:
        return "kernel"
    if FORKSERVER in process.command:  # a runner is forked from it, and makes a session of its own
        return "runner" if process.session == process.pid or FORKSERVER in parents_command else "forkserver"
    return "other"


def kernels_of(runner: int, pids: Path) -> list[Process]:
    """The living kernels that told `pids` that this runner is theirs."""
    lines = pids.read_text().splitlines() if pids.exists() else []
    told = [int(kernel) for kernel, of in map(str.split, lines) if int(of) == runner]
    found = [read_process(kernel) for kernel in told]
    return [each for each in found if each and (HOST in each.command or FRESH in each.command)]


def is_lock_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass
class Orphans:
    """What is left of a batch that was killed just now. Its runners may end what they are at, the rest ends after them.

    outlived: seconds for which something was still there after the last runner.
    """

    mark: str
    killed: float = field(default_factory=time.monotonic)
    last_runner: float = field(default_factory=time.monotonic)
    outlived: float = 0.0

    def are_left(self) -> bool:
        """Whether any is. Raises AssertionError where one is there for too long."""
        now, left = time.monotonic(), by_role(processes_of(self.mark), 0)
        if not left:
            return False
        if left.get("runner"):
            self.last_runner = now
        self.outlived = now - self.last_runner
        soon = GONE_SECONDS * max(1, os.getloadavg()[0] / os.cpu_count())  # what still imports ends when it has
        assert self.outlived <= soon, f"{now - self.killed:.1f} s after their batch there still are {left}"
        assert now - self.killed <= RUN_SECONDS, f"runners of a batch are at work {RUN_SECONDS} s after it: {left}"
        return True
