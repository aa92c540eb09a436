"""One variant run, whatever happens: skipped where it is done, locked, executed, recorded, published.

    python -m nbutils run 04_cosine_mixing --params params/quick.yaml --variant cosine-alpha0.5-seed1-noise_seed0

Exit codes: 0 finished, now or before; 1 a cell failed; 2 a mistake in parameters, data or model that the user can mend;
75 the run was asked to stop (SIGTERM, Ctrl-C): run it again, it goes on from what it saved; 138 the kernel died.
"""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbutils.batch.preflight import check_inputs, check_variant, place_needs
from nbutils.foundation import (
    AGAIN,
    CELL_TIMEOUT,
    DRIVEN_FOLDER,
    LockedRunError,
    PlanError,
    Preempted,
    RankKilled,
    Resources,
    RunError,
    Watch,
    WorkbookError,
    flush_tree,
    kernel_stopped,
    relative,
    resolve,
    shortened,
    visible,
)
from nbutils.runs import (
    FAILED,
    FINISHED,
    KILLED,
    PREEMPTED,
    RUN_FOLDER,
    Manifest,
    Place,
    Variant,
    begin,
    end,
    made_of,
    read_schema,
    run_key,
)
from nbutils.training import CHECKPOINTS

DONE, BROKEN, REFUSED, RUN_AGAIN, KERNEL_DIED = 0, 1, 2, 75, 138
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a folder that is full, or not to be written
CANNOT_WRITE = ("OSError", "SafetensorError", "RuntimeError")  # what a notebook raises then, by who writes
HELD = "held"  # no ending: another runner, not of this batch, is at work on the variant
KERNEL_KILLED = "KernelDied"  # the type of that error, as kernels.py records it
NOTEBOOK = "notebook.ipynb"
LONGEST_CELL = 100  # characters of the line that failed, in a message


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `skipped`: it was finished before. `message` and `log`, its last lines, say why it failed.

    again: it was stopped or killed from outside, so that another attempt may well finish; never of a bug.
    """

    variant: str
    status: str
    exit_code: int
    message: str = ""
    seconds: float = 0.0
    skipped: bool = False
    folder: Path | None = None  # where it can be looked at
    log: tuple[str, ...] = ()
    again: bool = False


def run_variant(
    variant: Variant, plan: str, plan_folder: Path, check: Callable[[Variant], None] = check_variant
) -> Outcome:
    """Run one variant of `plan` unless it is finished; its results are then in `plan_folder`/<variant name>.

    `check` raises WorkbookError where the run would come to nothing, which is recorded as its end. Raises WorkbookError
    where the run cannot be made or recorded at all: another runner is at work, a run it needs is not finished, the
    folder cannot be written. What happens in the notebook is in the outcome and never raised.
    """
    start = time.monotonic()
    place = Place(resolve(plan_folder), variant.name)
    with _told_where(place), place.lock():
        place.mend()
        variant = place_needs(variant, place.plan_folder)
        if place.is_finished(run_key(made_of(variant.notebook, variant.params))):
            return Outcome(variant.name, FINISHED, DONE, skipped=True, folder=place.published)
        manifest, folder = _attempt(place, plan, variant, check)
    return Outcome(
        variant.name,
        manifest["status"],
        manifest["exit_code"],
        summary(manifest),
        time.monotonic() - start,
        folder=folder,
        log=tuple(manifest["error"]["log"]) if manifest["error"] else (),
        again=manifest["status"] == PREEMPTED or (manifest["status"] == KILLED and not manifest["error"].get("crash")),
    )


def flat_variant(notebook: Path, name: str, params: dict[str, Any]) -> Variant:
    """A variant of no plan, from parameters alone. Raises ParameterError where they do not fit the notebook."""
    schema = read_schema(notebook)
    if RUN_FOLDER in params:
        raise PlanError(f"{RUN_FOLDER} is set by the runner. Leave it out, and say where with --out.")
    resolved = schema.resolve(params)
    resolved.pop(RUN_FOLDER, None)
    return Variant(name, "", notebook, resolved)


def run_in_batch(variant: Variant, plan: str, plan_folder: Path) -> Outcome:
    """`run_variant`, for an engine's runners, of a variant that its batch has checked: a refusal is an outcome, too."""
    start = time.monotonic()
    try:
        outcome = run_variant(variant, plan, plan_folder, check_inputs)
    except LockedRunError as error:
        outcome = Outcome(variant.name, HELD, REFUSED, str(error))
    except WorkbookError as error:
        outcome = Outcome(variant.name, FAILED, REFUSED, f"{type(error).__name__}: {error}")
    except Exception:
        traceback.print_exc()
        message = f"the runner itself failed; its log is {relative(Place(plan_folder, variant.name).log)}"
        outcome = Outcome(variant.name, FAILED, BROKEN, message)
    return replace(outcome, seconds=time.monotonic() - start)


def runner_killed(name: str, plan_folder: Path, seconds: float) -> Outcome:
    """Of a runner that ended without a word: somebody has killed it."""
    message = f"the runner itself was killed; its log is {relative(Place(plan_folder, name).log)}"
    return Outcome(name, KILLED, KERNEL_DIED, message, seconds, again=True)


def summary(manifest: Manifest) -> str:
    """Why a run is not finished, in one line; empty where it is, or still runs."""
    error = manifest["error"]
    if not error:
        return ""
    first = error["message"].strip().splitlines()[0] if error["message"].strip() else ""
    told = shortened(visible(f"{error['type']}: {first}")) + (
        f" ({shortened(visible(error['cell']), LONGEST_CELL)})" if error["cell"] else ""
    )
    peak = manifest["attempts"][-1].get("peak_memory_mib")
    return told + (f" Its kernel had taken {peak:,.0f} MiB at most." if manifest["status"] == KILLED and peak else "")


def _attempt(place: Place, plan: str, variant: Variant, check: Callable[[Variant], None]) -> tuple[Manifest, Path]:
    """One attempt, from an empty folder or checkpoints to the published run; returns its manifest and where it lies."""
    from nbutils.batch.kernels import signal_kernel  # it takes a second

    earlier = place.history()
    with _told_where(place):
        place.clear(run_key(made_of(variant.notebook, variant.params)))
        manifest = begin(place.attempt, plan, variant, earlier)
        place.reserve()
    with kernel_stopped(place.attempt, signal_kernel, variant.resources) as watch:
        watch.make_room = place.use_reserve
        status, exit_code, error = _ending(place, variant, check, watch)
        watch.ended = True
        with _told_where(place):
            place.use_reserve()
            flush_tree(place.attempt, {CHECKPOINTS})
            manifest = end(place.attempt, manifest, status, exit_code, error, watch.peak_memory_mib)
            published = place.publish()
    return manifest, place.published if published else place.attempt


@contextmanager
def _told_where(place: Place) -> Iterator[None]:
    """RunError in place of an OSError, which says what to do about the file."""
    try:
        yield
    except OSError as error:
        raise RunError(_not_writable(Path(error.filename or place.attempt), error)) from None


def _not_writable(path: Path, error: OSError) -> str:
    what = "written" if error.errno in UNWRITABLE else "read or written"
    return f"{relative(path)} cannot be {what} ({error.strerror or error}). Make room or mend it, then run again."


def _ending(
    place: Place, variant: Variant, check: Callable[[Variant], None], watch: Watch
) -> tuple[str, int, dict[str, Any] | None]:
    """Check and execute; (status, exit code, error) of how that ended. The notebook's metadata is not asked."""
    from nbutils.batch.kernels import NotebookFailed, execute

    folder = place.attempt
    has_folder = RUN_FOLDER in read_schema(variant.notebook).parameters
    params = variant.params | ({RUN_FOLDER: str(folder)} if has_folder else {})
    try:
        check(variant)
        execute(variant.notebook, folder / NOTEBOOK, params, {DRIVEN_FOLDER: str(folder)}, watch)
    except NotebookFailed as failure:
        return _failed(place, variant, failure, watch)
    except WorkbookError as mistake:
        return FAILED, REFUSED, _outside(mistake)
    except KeyboardInterrupt:  # or Stopped
        return _interrupted(variant, watch)
    except Exception as error:  # of the machinery, not of the notebook: recorded like any other ending
        if watch.asked:
            return _interrupted(variant, watch)
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            return FAILED, REFUSED, _outside(RunError(_not_writable(place.attempt, error)))
        return FAILED, BROKEN, _outside(error)
    return FINISHED, DONE, None


def _interrupted(variant: Variant, watch: Watch) -> tuple[str, int, dict[str, Any]]:
    """(status, exit code, error) of a run that was ended from here: at a limit, or because somebody asked."""
    if watch.limit:
        told = {"type": watch.limit, "message": _over_limit(watch.limit, variant.resources)}
        return FAILED, BROKEN, told | {"cell": None, "log": []}
    return PREEMPTED, RUN_AGAIN, _outside(Preempted(AGAIN))


def _failed(place: Place, variant: Variant, failure: Any, watch: Watch) -> tuple[str, int, dict[str, Any]]:
    """(status, exit code, error) of a notebook that came to no good end: `failure` is a kernels.NotebookFailed."""
    from nbutils.batch.executed_notebook import mark_ending

    record = failure.record
    if watch.limit:
        status, exit_code, told = _interrupted(variant, watch)
        record = record | {"type": told["type"], "message": told["message"]}
        mark_ending(place.attempt / NOTEBOOK, record, watch.make_room)
        return status, exit_code, record
    if record["type"] == Preempted.__name__:
        return PREEMPTED, RUN_AGAIN, record
    if watch.asked:
        return PREEMPTED, RUN_AGAIN, record | _told(Preempted(AGAIN))
    if record["type"] in (KERNEL_KILLED, RankKilled.__name__):
        return KILLED, KERNEL_DIED, record
    if record["type"] in CANNOT_WRITE and any(os.strerror(each) in record["message"] for each in UNWRITABLE):
        told = f"{record['message'].rstrip('.')}. Make room or mend it, then run again."
        return FAILED, REFUSED, record | _told(RunError(told))
    return FAILED, REFUSED if record["type"] in _mistakes(WorkbookError) else BROKEN, record


def _mistakes(kind: type[WorkbookError]) -> set[str]:
    """The names of a kind of mistake that users can mend and of all its kinds, also of those defined elsewhere."""
    return {kind.__name__}.union(*(map(_mistakes, kind.__subclasses__())))


def _over_limit(limit: str, limits: Resources) -> str:
    """What the record says of a run that reached a limit."""
    what, name, minutes = "the variant", "run_minutes", limits.run_minutes
    if limit == CELL_TIMEOUT:
        what, name, minutes = "the cell", "cell_minutes", limits.cell_minutes
    return f"{what} took longer than {name} {minutes:g}. Give it more; a training goes on from what it saved."


def _outside(error: BaseException) -> dict[str, Any]:
    return _told(error) | {"cell": None, "log": []}


def _told(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
