"""What happens on a node of a Ray cluster for one variant: a runner is started there, watched, and asked to stop.

The runner is a process of its own, which does what one of this machine's engine does. It ends with Ray's worker.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from nbutils.batch.runner import BROKEN, Outcome, run_in_batch, runner_killed
from nbutils.foundation import ROOT, SAVE_SECONDS, end_with_parent, relative
from nbutils.runs import FAILED, Place, Variant, nbutils_sha256

STOP_SECONDS = SAVE_SECONDS + 15  # a runner has to end its kernel and write its record; then it is killed
LOOK_SECONDS = 0.2  # between looks at the runner and at whether it is to stop
SHARED_SECONDS = 10.0  # a network file system may take so long to show a folder made on another machine
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """One variant to run in `plan_folder`.

    marks: a folder made by the batch, of a name that no other has: a node that does not see it shares no folder with
    the batch. A file there says that the variant has begun. code: nbutils_sha256 of the batch.
    """

    variant: Variant
    plan: str
    plan_folder: Path
    marks: Path
    code: str
    gpus: int
    cpus: int


def work(task: Task) -> Outcome | str:
    """Run the variant on this node; why nothing can run here, where that is so.

    A request to cancel lets the runner save what it has and write its record first.
    """
    with _asked_to_stop() as asked:
        machine = f"{platform.node()}, a node of the Ray cluster,"
        if not _sees(task.marks):
            cure = (
                "Put the runs on a file system that all nodes share, with --out, or take the node out of the cluster."
            )
            return f"{machine} does not see the batch's folder {task.plan_folder}. {cure}"
        if nbutils_sha256() != task.code:
            cure = "Give all nodes the same checkout, best on a file system that they share, and run the batch again."
            return f"{machine} has another nbutils in {ROOT} than the batch. {cure}"
        (task.marks / task.variant.name).touch()
        start = time.monotonic()
        log = Place(task.plan_folder, task.variant.name).log
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:  # earlier attempts', and of another batch's runner at work
                runner, connection = _start(task, file.fileno())
        except OSError as error:
            told = f"{relative(log)} cannot be written ({error.strerror or error}). Make room or mend it."
            return Outcome(task.variant.name, FAILED, BROKEN, told)
        with connection, runner:
            outcome = _watch(runner, connection, asked)
        return outcome or runner_killed(task.variant.name, task.plan_folder, time.monotonic() - start)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is not empty once Ray wants to cancel the task: it says so as Ctrl-C does, in the main thread."""
    asked: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, former)


def _sees(marks: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not marks.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _start(task: Task, log: int) -> tuple[subprocess.Popen, Connection]:
    """The runner's process, and the connection that brings its outcome."""
    variables = {**os.environ, **dict.fromkeys(THREADS, str(task.cpus)), "TOKENIZERS_PARALLELISM": "false"}
    if not task.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them in sight
    ours, theirs = Pipe()
    code = "from nbutils.batch.ray_node import main; main()"
    with theirs:
        runner = subprocess.Popen(
            [sys.executable, "-c", code, str(os.getpid()), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=variables,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    ours.send(task)
    return runner, ours


def _watch(runner: subprocess.Popen, connection: Connection, asked: list[int]) -> Outcome | None:
    """The runner's outcome, None where it ended without one."""
    deadline = 0.0
    while not connection.poll(LOOK_SECONDS):
        if asked and not deadline:
            runner.terminate()
            deadline = time.monotonic() + STOP_SECONDS
        elif asked and time.monotonic() > deadline:
            runner.kill()
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def main() -> None:
    """The runner: a task from the connection on the command line, and its outcome back."""
    end_with_parent(int(sys.argv[1]))()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it for all it starts; kernels hear it
    connection = Connection(int(sys.argv[2]))
    task = connection.recv()
    connection.send(run_in_batch(task.variant, task.plan, task.plan_folder))
