"""What happens on a node of a Ray cluster for one variant: a runner is started there, watched, and asked to stop.

The runner is a process of its own, `python -m nbutils.batch.ray_worker`, which does what one of this machine's engine
does. It ends with Ray's worker, and the kernel ends with the runner.
"""

from __future__ import annotations

import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nbutils.batch.runner import BROKEN, Outcome
from nbutils.foundation.places import ROOT, relative
from nbutils.foundation.processes import end_with_parent
from nbutils.foundation.stopping import SAVE_SECONDS
from nbutils.runs.attempts import Place
from nbutils.runs.keys import nbutils_sha256
from nbutils.runs.manifest import FAILED
from nbutils.runs.plans import Variant

STOP_SECONDS = SAVE_SECONDS + 15  # a runner has to end its kernel and write its record; then it is killed
LOOK_SECONDS = 0.2  # between looks at the runner and at whether it is to stop
SHARED_SECONDS = 10.0  # a network file system may take so long to show a folder made on another machine
SHARE = "Put the runs on a file system that all nodes share, with --out, or take the node out of the cluster."
SAME = "Give all nodes the same checkout, best on a file system that they share."
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


@dataclass(frozen=True)
class Ended:
    """How a task ended. outcome: None where the runner could not say.

    problem: why nothing can run on this node. other_code: it has another nbutils than the task says, and ran nothing.
    """

    outcome: Outcome | None = None
    exit_code: int = 0
    seconds: float = 0.0
    problem: str = ""
    other_code: bool = False


def work(task: Task) -> Ended:
    """Run the variant on this node; a request to cancel lets it save what it has and write its record first."""
    with _asked_to_stop() as asked:
        machine = f"{platform.node()}, a node of the Ray cluster,"
        if not _sees(task.marks):
            return Ended(problem=f"{machine} does not see the batch's folder {task.plan_folder}. {SHARE}")
        if nbutils_sha256() != task.code:
            return Ended(problem=f"{machine} has another nbutils in {ROOT} than the batch. {SAME}", other_code=True)
        (task.marks / task.variant.name).touch()
        start = time.monotonic()
        log = Place(task.plan_folder, task.variant.name).log
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("ab")  # earlier attempts', and of another batch's runner at work
        except OSError as error:
            reason = error.strerror or error
            message = f"{relative(log)} cannot be written ({reason}). Make room or mend it, then run again."
            return Ended(Outcome(task.variant.name, FAILED, BROKEN, message))
        with file, tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as answer:
            pickle.dump(task, request)
            request.seek(0)
            code = _watch(_start(task, request, answer, file), asked)
            answer.seek(0)
            outcome = pickle.load(answer) if code == 0 else None
        return Ended(outcome, code, time.monotonic() - start)


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


def _start(task: Task, request: IO[bytes], answer: IO[bytes], log: IO[bytes]) -> subprocess.Popen:
    variables = {**os.environ, **dict.fromkeys(THREADS, str(task.cpus)), "TOKENIZERS_PARALLELISM": "false"}
    if not task.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them in sight
    return subprocess.Popen(
        [sys.executable, "-m", "nbutils.batch.ray_worker", str(os.getpid()), str(answer.fileno())],
        stdin=request,
        stdout=log,
        stderr=log,
        cwd=ROOT,
        env=variables,
        pass_fds=[answer.fileno()],
        start_new_session=True,
    )


def _watch(runner: subprocess.Popen, asked: list[int]) -> int:
    """The runner's exit code, once it has ended."""
    deadline = 0.0
    while True:
        try:
            return runner.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if asked and not deadline:
            runner.terminate()
            deadline = time.monotonic() + STOP_SECONDS
        elif asked and time.monotonic() > deadline:
            runner.kill()


def main() -> None:
    """The runner: a task from standard input, its outcome to the file whose descriptor is given."""
    end_with_parent(int(sys.argv[1]))()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it for all it starts; kernels hear it
    task = pickle.load(sys.stdin.buffer)
    from nbutils.batch.engine import run_in_batch

    outcome = run_in_batch(task.variant, task.plan, task.plan_folder)
    with os.fdopen(int(sys.argv[2]), "wb") as answer:
        pickle.dump(outcome, answer)


if __name__ == "__main__":
    main()
