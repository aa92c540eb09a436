"""Asked to stop (SIGTERM, Ctrl-C): a run ends where it can go on from, and says so.

The runner passes the request on to its kernel. There it ends the cell at once with Preempted, but while a model trains
it is only noted: after the next optimiser step the state is saved, then Preempted is raised. A file in the run's folder
tells the runner that this is so and that it has to wait. Of several training processes each gets the request.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from nbutils.errors import Preempted

DRIVEN_FOLDER = "WORKBOOK_RUN_FOLDER"  # environment variable: the folder of the run that a runner is recording
MARK = ".training"  # begins the name of a file in that folder while a stop is obeyed after a step
SOON_SECONDS = 6.0  # a kernel that does not train has so long to end by itself
SAVE_SECONDS = 300.0  # one that trains: a step, an evaluation, gigabytes on a slow disk; schedulers rarely wait longer
AGAIN = "asked to stop. Run it again."


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


@contextmanager
def kernel_stopped(run_folder: Path, send: Callable[[int], bool]) -> Iterator[StopRequest]:
    """Within, the first SIGTERM or Ctrl-C asks the kernel to stop and waits for it to end; the next raises Stopped.

    `send` sends a signal to the kernel, SIGKILL to all it started, and is False where there is none: then Stopped is
    raised at once. A kernel that does not end in time is killed.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked or not send(signal.SIGTERM):
            request.asked = True
            raise Stopped
        request.asked = True
        Thread(target=_kill_when_late, args=(run_folder, send, over), daemon=True).start()

    over = StopRequest()
    try:
        with _handled(ask, signal.SIGTERM, signal.SIGINT):
            yield request
    finally:
        over.asked = True


def _kill_when_late(run_folder: Path, send: Callable[[int], bool], over: StopRequest) -> None:
    asked = busy = time.monotonic()
    while not over.asked and (now := time.monotonic()) - busy < SOON_SECONDS and now - asked < SAVE_SECONDS:
        if any(run_folder.glob(f"{MARK}-*")):
            busy = now
        time.sleep(0.1)
    if not over.asked:
        send(signal.SIGKILL)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise Stopped where SIGTERM arrives, which would else end this process and leave those it started."""

    def stop(number: int, frame: FrameType | None) -> None:
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
