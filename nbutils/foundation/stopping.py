"""Asked to stop (SIGTERM, Ctrl-C, a limit of time): a run ends where it can go on from, and says so.

The runner passes the request on to its kernel. There it ends the cell at once with Preempted, but while a model trains
it is only noted: after the next optimiser step the state is saved, then Preempted is raised. A file in the run's folder
tells the runner that this is so and that it has to wait. Of several training processes each gets the request.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from nbutils.foundation.errors import PlanError, Preempted, did_you_mean

PROCESSES = "processes"  # the parameter of a notebook that trains; each process takes a GPU

DRIVEN_FOLDER = "WORKBOOK_RUN_FOLDER"  # environment variable: the folder of the run that a runner is recording
MARK = ".training"  # begins the name of a file in that folder while a stop is obeyed after a step
SOON_SECONDS = 6.0  # a kernel that does not train has so long to end by itself
SAVE_SECONDS = 300.0  # one that trains: a step, an evaluation, gigabytes on a slow disk; schedulers rarely wait longer
ECHO_SECONDS = 2.0  # a scheduler that signals all processes of a job asks each of them more than once
TICK_SECONDS = 0.1
AGAIN = "asked to stop. Run it again."
TIME_LIMIT, CELL_TIMEOUT = "TimeLimit", "CellTimeout"  # types of error in a run's record


WITH_PARENT = "--with-parent"  # before a command: it is stopped when that process ends


class Stopped(KeyboardInterrupt):
    """The runner itself ends now. A KeyboardInterrupt, because asyncio swallows most others."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    asked: bool = False


# ---- where the work is done ------------------------------------------------------------------------------------------


def leave_quickly() -> None:
    """At its end this process looks for no garbage: among all that torch and transformers bring that takes seconds."""
    atexit.register(gc.freeze)


@contextmanager
def noted(pass_on: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Within, SIGTERM is noted in the request and raises nothing, and the runner waits.

    pass_on: tells the processes that do the work.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        if pass_on:
            pass_on()

    with _marked(), _handled(note, signal.SIGTERM):
        yield request


@contextmanager
def _marked() -> Iterator[None]:
    driven = os.environ.get(DRIVEN_FOLDER)
    if not driven:
        yield
        return
    mark = Path(driven) / f"{MARK}-{os.getpid()}"
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def stop_with_parent(parent: int) -> None:
    """From here on this process asks itself to stop, as SIGTERM does, when its parent has ended.

    A kernel that is killed cannot stop the runs it started.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def stop_at_once(cells: Mapping[str, Any] | None = None) -> None:
    """From here on SIGTERM raises Preempted where nothing else was set to handle it.

    cells: the globals of a notebook's cells; between two cells, and at the kernel's end, SIGTERM is what it was.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if cells is None or any(each.f_globals is cells for each in _callers(frame)):
            raise Preempted(AGAIN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone gets signals
        return


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---- where the work is watched ---------------------------------------------------------------------------------------


@dataclass
class Watch(StopRequest):
    """What a runner knows of its kernel's run. `limit` names the one that was reached, empty where none was."""

    limit: str = ""
    ended: bool = False  # the kernel; what is left is to record how, and no signal may cut that short
    make_room: Callable[[], None] = lambda: None  # on the disk, for the notebook and the record of an end
    cell_began: float | None = None  # time.monotonic
    in_cell: bool = False  # whether the kernel is at work on one
    peak_memory_mib: float | None = None  # of the kernel's process, once it has ended

    def cell_starts(self) -> None:
        """The time of `cell_minutes` begins."""
        self.cell_began = time.monotonic()


@contextmanager
def kernel_stopped(run_folder: Path, send: Callable[[int], bool], limits: Resources) -> Iterator[Watch]:
    """Within, the first SIGTERM or Ctrl-C asks the kernel to stop and waits for it to end; the next raises Stopped.

    Reaching one of `limits` asks it in the same way. `send` sends a signal to the kernel, SIGKILL to all it started,
    and is False where there is none: then a signal raises Stopped at once. A kernel that takes too long is killed.
    """
    watch, last = Watch(), -math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        echo = number == signal.SIGTERM and (since < ECHO_SECONDS or (watch.limit and since == math.inf))
        if watch.ended or (watch.asked and echo):
            return
        if watch.asked or not send(signal.SIGTERM):
            watch.asked = True
            raise Stopped
        watch.asked = True

    def ask_myself() -> None:  # where there is no kernel yet: whatever goes on in this process
        if signal.getsignal(signal.SIGTERM) is ask:
            os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=_look_after, args=(run_folder, send, ask_myself, watch, limits), daemon=True).start()
    try:
        with _handled(ask, signal.SIGTERM, signal.SIGINT):
            yield watch
    finally:
        watch.ended = True


def _look_after(
    run_folder: Path, send: Callable[[int], bool], ask_myself: Callable[[], None], watch: Watch, limits: Resources
) -> None:
    """Ask the kernel to stop at a limit; end it where it was asked and takes too long."""
    began = time.monotonic()
    while not watch.ended and not watch.asked:
        watch.limit = _limit_reached(began, watch.cell_began, limits)
        if watch.limit and send(signal.SIGTERM):
            watch.asked = True
        elif watch.limit:
            ask_myself()
        time.sleep(TICK_SECONDS)
    asked = busy = time.monotonic()
    while not watch.ended and (now := time.monotonic()) - busy < SOON_SECONDS and now - asked < SAVE_SECONDS:
        if any(map(_is_at_work, run_folder.glob(f"{MARK}-*"))):
            busy = now
        time.sleep(TICK_SECONDS)
    if not watch.ended:
        send(signal.SIGKILL)


def _is_at_work(mark: Path) -> bool:
    """Whether the process that left this mark is there: one that was killed took it nowhere."""
    try:
        os.kill(int(mark.name.rpartition("-")[2]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _limit_reached(began: float, cell_began: float | None, limits: Resources) -> str:
    now = time.monotonic()
    if limits.run_minutes and now - began > 60 * limits.run_minutes:
        return TIME_LIMIT
    if limits.cell_minutes and cell_began and now - cell_began > 60 * limits.cell_minutes:
        return CELL_TIMEOUT
    return ""


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise Stopped where SIGTERM arrives, which would else end this process and leave those it started.

    Several in a moment are one.
    """

    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since >= ECHO_SECONDS:
            raise Stopped

    with _handled(stop, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    before: dict[int, object] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone gets signals: someone else takes care of them
        pass
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former or signal.SIG_DFL)  # None: a handler that Python did not set


@dataclass(frozen=True)
class Resources:
    """What one variant asks for; None where the plan does not say.

    gpus: of its own (not said: one for each training process, where there are any); cpus: cores, and so threads.
    run_minutes, cell_minutes: how long the variant and one of its cells may take; not said: for ever.
    """

    gpus: int | None = None
    cpus: int | None = None
    run_minutes: float | None = None
    cell_minutes: float | None = None

    def gpus_for(self, params: Mapping[str, Any], there: int) -> int:
        """GPUs that a variant with these parameters takes where so many are there, which may be more than there are.

        there: those that may yet be started count, too. Where there are none, processes train on cores.
        """
        if self.gpus is not None:
            return self.gpus
        return int(params.get(PROCESSES, 0)) if there else 0


def read_resources(where: str, given: Mapping[str, Any]) -> Resources:
    """The `resources` of a stage. Raises PlanError, `where` first, for what cannot be asked for."""
    names = [each.name for each in fields(Resources)]
    for name, value in given.items():
        if name not in names:
            raise PlanError(f"{where}: resources has no {str(name)!r}. {did_you_mean(str(name), names)}")
        whole, least = name in ("gpus", "cpus"), 0 if name == "gpus" else 1 if name == "cpus" else None
        fits = isinstance(value, int | None if whole else int | float | None) and not isinstance(value, bool)
        if not fits or (value is not None and (value < least if least is not None else not 0 < value < float("inf"))):
            asked = f"a whole number, at least {least}" if whole else "a number of minutes above 0"
            raise PlanError(f"{where}: resources {name} is {value!r}. Give {asked}.")
    return Resources(**given)


def command(words: Iterable[object]) -> list[str]:
    """The command line that runs `python -m nbutils` with `words`, for a child that ends when this process does."""
    return [sys.executable, "-m", "nbutils", WITH_PARENT, str(os.getpid()), *map(str, words)]
