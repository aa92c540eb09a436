"""What a batch asks of whatever runs its variants: this machine (local_engine.py), Ray (ray_engine.py).

A batch decides what may start and what is tried again; an engine finds the place for it and tells how it ended. Every
engine does the work of `python -m nbutils run`, so the record in the run folder is the same.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from nbutils.batch.preflight import check_inputs
from nbutils.batch.runner import BROKEN, KERNEL_DIED, REFUSED, Outcome, run_variant
from nbutils.foundation.errors import LockedRunError, WorkbookError
from nbutils.foundation.places import relative
from nbutils.runs.attempts import Place
from nbutils.runs.manifest import FAILED, KILLED
from nbutils.runs.plans import Variant

PYTHON_ERROR = 1  # the exit code of a process that an exception ended
HELD = "held"  # no ending: another runner, not of this batch, is at work on the variant


class Engine(Protocol):
    """Runs variants, several at a time. Within `with` its processes are there; after it none is."""

    workers: int  # variants at a time, for the time that is left
    counts_preemption: bool  # against the retries; not where nodes come and go, and tell their runners before

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def check(self, variants: list[Variant]) -> None:
        """Raise WorkbookError where one of them could never start here, as for want of GPUs; before `with`."""

    def has_room(self, variant: Variant) -> bool:
        """Whether `start` may be called for it now. An engine with a queue of its own always has."""

    def start(self, variant: Variant) -> None:
        """Begin the variant, or queue it."""

    def is_at_work(self, name: str) -> bool:
        """Whether a started variant has begun and is not only queued."""

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended since the last call, after at most so many seconds; empty where nothing has."""

    def stop(self) -> None:
        """Ask all that was started to stop as SIGTERM does, and return when it has ended, each with its record."""


def run_in_batch(variant: Variant, plan: str, plan_folder: Path) -> Outcome:
    """`run_variant`, for an engine's runners, of a variant that its batch has checked: a refusal is an outcome, too."""
    start = time.monotonic()
    try:
        outcome = run_variant(variant, plan, plan_folder, check_inputs)
    except LockedRunError as error:
        outcome = Outcome(variant.name, HELD, REFUSED, str(error))
    except WorkbookError as error:
        outcome = Outcome(variant.name, FAILED, REFUSED, f"{type(error).__name__}: {error}")
    return replace(outcome, seconds=time.monotonic() - start)


def runner_died(name: str, plan_folder: Path, code: int, seconds: float) -> Outcome:
    """Of a runner that said nothing; an exception is a mistake of ours, all else came from outside."""
    log = relative(Place(plan_folder, name).log)
    message = f"the runner itself ended (exit code {code}); its log is {log}"
    again = code != PYTHON_ERROR
    return Outcome(name, KILLED, KERNEL_DIED if again else BROKEN, message, seconds, again=again)
