"""All variants of a plan, in the order of their needs: what may start, what is tried again, what is blocked.

    python -m nbutils batch params/quick.yaml --workers 2 --only 'cosine-*'

A variant starts as soon as the runs it needs are finished. One that fails stops only those that need it. What was
stopped or killed from outside is tried again after a while, a mistake never. An engine runs what is started: this
machine's (nbutils/batch/local_engine.py) or Ray's (nbutils/batch/ray_engine.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from nbutils.batch.preflight import check_variant, is_finished, place_needs, place_of, stale_of
from nbutils.batch.progress import BLOCKED, Display, Running, Tally, duration, terminal_width, text_table
from nbutils.batch.retries import Retry, next_try
from nbutils.batch.runner import BROKEN, DONE, HELD, RUN_AGAIN, Outcome
from nbutils.foundation import (
    PlanError,
    RunError,
    WorkbookError,
    atomic_write,
    is_held,
    nearest,
    read_json,
    read_yaml,
    relative,
    resolve,
    shared,
    stop_on_sigterm,
    write_json,
)
from nbutils.runs import FINISHED, LOCKS, PLAN_FILE, PREEMPTED, CodeOf, Place, Plan, Variant, record_contrasts

TICK_SECONDS = 0.5  # between looks at the running variants
PLAN_RECORD = "plan_file.json"  # and the place of the file that this is a copy of
BATCH_LOCK = ".batch"  # among the locks of the variants; every batch at work over the folder holds it with the others


def register_plan(plan: Plan, plan_folder: Path) -> None:
    """Keep a copy of the plan beside its runs, and note its file and since when its contrasts are what they are.

    Raises PlanError where another plan of the same name made the runs, RunError where the folder cannot be written.
    """
    try:
        owner, content, kept = _other_file(plan, plan_folder), plan.file.read_bytes(), plan_folder / PLAN_FILE
        if owner and content != kept.read_bytes():
            raise PlanError(
                f"{relative(plan_folder)} holds runs of {relative(owner)}, and {relative(plan.file)} has the same "
                "name. Give it another name, or --out another folder."
            )
        plan_folder.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, content)
        if not owner and plan.file.resolve() != kept.resolve():  # the copy may be run by itself
            write_json(plan_folder / PLAN_RECORD, {"file": relative(plan.file.resolve())})
        record_contrasts(plan.comparisons, plan_folder, plan.variants)
    except OSError as error:
        folder, reason = relative(plan_folder), error.strerror or error
        raise RunError(f"{folder} cannot be written ({reason}). Name another folder, or mend it.") from None


def _other_file(plan: Plan, plan_folder: Path) -> Path | None:
    """The other plan file that made the runs in the folder; None without one, or where it has gone or been renamed."""
    from nbutils.runs import load_runs

    if not (plan_folder / PLAN_FILE).is_file() or not (plan_folder / PLAN_RECORD).is_file():
        return None
    other = resolve(read_json(plan_folder / PLAN_RECORD)["file"])
    if not other.is_file() or other.samefile(plan.file) or _name_in(other) != plan.name:
        return None
    made = is_going_on(plan_folder) or any(run.status == FINISHED for run in load_runs(plan_folder))
    return other if made else None


def _name_in(file: Path) -> str | None:
    """The name that a plan file has now, None where it is no longer one."""
    try:
        content = read_yaml(file)
    except PlanError:
        return None
    return content.get("name") if isinstance(content, dict) else None


def select(plan: Plan, pattern: str) -> list[Variant]:
    """The variants whose names match `pattern` and all they need. Raises PlanError where none matches."""
    wanted = {variant.name for variant in plan.variants if fnmatchcase(variant.name, pattern)}
    if not wanted:
        stages = [stage.name for stage in plan.stages]
        raise PlanError(
            f"No variant of plan {plan.name!r} matches {pattern!r}. {_nearest_pattern(plan, pattern)}Its stages are "
            f"{', '.join(stages)}; `check` lists the variants."
        )
    for variant in reversed(plan.variants):
        if variant.name in wanted:
            wanted.update(variant.needs.values())
    return [variant for variant in plan.variants if variant.name in wanted]


def _nearest_pattern(plan: Plan, pattern: str) -> str:
    """A question that names the pattern or the variant that was meant; empty where none is near."""
    names = [variant.name for variant in plan.variants]
    patterns = [stage.name if stage.name in names else f"{stage.name}-*" for stage in plan.stages]
    near = nearest(pattern, [*patterns, *names])
    return f"Did you mean {near[0]!r}? " if near else ""


def is_going_on(plan_folder: Path) -> bool:
    """Whether a batch or a runner is at work over the runs of a plan."""
    locks = plan_folder / LOCKS
    return is_held(locks / BATCH_LOCK, by_anyone=True) or any(map(is_held, locks.glob("[!.]*")))


class Engine(Protocol):
    """Runs variants, several at a time. Within `with` its processes are there; after it none is.

    Every engine does the work of `python -m nbutils run`, so the record in the run folder is the same.
    """

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


@dataclass
class Batch:
    """A batch in progress. `outcomes` has every variant that ended for good, was skipped or is blocked.

    retries: more attempts, at most, at a variant that was stopped or killed from outside. The first comes after
    `backoff_seconds`, each next one after twice the time. An engine may lose its places often: what was stopped there
    is tried again without limit.
    """

    plan: Plan
    plan_folder: Path
    variants: list[Variant]
    engine: Engine
    retries: int = 3
    backoff_seconds: float = 10
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    started: dict[str, Variant] = field(default_factory=dict)
    at_work: dict[str, Running] = field(default_factory=dict)
    retrying: dict[str, Retry] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # by runners that are not this batch's
    stale: dict[str, str] = field(default_factory=dict)  # finished, to be made again, and what has changed

    def check(self) -> None:
        """Find what is finished and check the rest, before anything starts. Raises WorkbookError naming the variant."""
        code = CodeOf()
        for variant in self.variants:
            done = all(self._is_done(needed) for needed in variant.needs.values())
            if done and is_finished(variant, self.plan_folder, code):
                self.outcomes[variant.name] = Outcome(variant.name, FINISHED, DONE, skipped=True)
                continue
            self._note_stale(variant, done, code)
            try:
                check_variant(place_needs(variant, self.plan_folder) if done else variant, self.plan)
            except WorkbookError as error:
                raise type(error)(f"{place_of(variant, self.plan)}: {error}") from None
        self.engine.check(self._open())

    def _note_stale(self, variant: Variant, needs_are_done: bool, code: CodeOf) -> None:
        result = Place(self.plan_folder, variant.name).result()
        if result and result["status"] == FINISHED:
            again = "a run it needs is made again"
            self.stale[variant.name] = stale_of(result, variant, self.plan_folder, code) if needs_are_done else again

    def stale_table(self) -> list[str]:
        """A line for each cause for which finished runs are made again."""
        by_cause: dict[str, list[str]] = {}
        for name, cause in self.stale.items():
            by_cause.setdefault(cause, []).append(name)
        return [
            f"Made again: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, for {cause}."
            for cause, names in by_cause.items()
        ]

    def run(self, display: Display) -> None:
        """Run all variants that are not finished. Ctrl-C and SIGTERM end the running ones, each with its record."""
        if not self._open():
            return
        with display, stop_on_sigterm(), shared(self.plan_folder / LOCKS / BATCH_LOCK), self.engine:
            try:
                while self._fill(display) or self.started:
                    for outcome in self.engine.wait(TICK_SECONDS):
                        self._take(outcome, display)
                    self._note_begun(display)
                    display.tick(self.tally())
            except KeyboardInterrupt:  # or Stopped
                display.stopping(self.tally())
                self.engine.stop()
                raise

    def exit_code(self) -> int:
        """0 where every variant is finished, 75 where the others were only asked to stop, else 1."""
        statuses = {self.outcomes[variant.name].status for variant in self.variants} - {FINISHED}
        if not statuses:
            return DONE
        return RUN_AGAIN if PREEMPTED in statuses and statuses <= {PREEMPTED, BLOCKED} else BROKEN

    def table(self) -> str:
        """The variants with how they ended, for the end of a batch."""
        outcomes = [self.outcomes[variant.name] for variant in self.variants]
        rows = [
            (each.variant, each.status, "before" if each.skipped else duration(each.seconds), each.message)
            for each in outcomes
        ]
        return text_table(("variant", "status", "time", "message"), rows, terminal_width())

    def tally(self) -> Tally:
        """Where the batch stands."""
        waiting = [v.stage for v in self.variants if v.name not in self.outcomes and v.name not in self.at_work]
        known: dict[str, list[float]] = {}
        for variant in self.variants:
            outcome = self.outcomes.get(variant.name)
            if outcome and outcome.status == FINISHED and not outcome.skipped:
                known.setdefault(variant.stage, []).append(outcome.seconds)
        ended, running = list(self.outcomes.values()), list(self.at_work.values())
        retrying = [each for each in self.retrying.values() if each.seconds_left() and each.variant not in self.started]
        return Tally(len(self.variants), self.engine.workers, ended, running, waiting, known, retrying)

    def _open(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.name not in self.outcomes]

    def _is_done(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].status == FINISHED

    def _fill(self, display: Display) -> bool:
        """Start what can be started; whether anything still waits."""
        waiting = False
        for variant in self._open():
            if variant.name in self.started:
                continue
            failed = [n for n in variant.needs.values() if n in self.outcomes and not self._is_done(n)]
            if failed:
                message = f"needs {failed[0]}, which is {self.outcomes[failed[0]].status}"
                self._end(Outcome(variant.name, BLOCKED, BROKEN, message), display)
            elif self._may_start(variant, display):
                self.started[variant.name] = variant
                self.engine.start(variant)
                self._note_begun(display)
            else:
                waiting = True
        return waiting

    def _may_start(self, variant: Variant, display: Display) -> bool:
        retry = self.retrying.get(variant.name)
        if (retry and retry.seconds_left()) or not all(map(self._is_done, variant.needs.values())):
            return False
        if variant.name in self.held and self._is_held(variant.name, display):
            return False
        return self.engine.has_room(variant) and not self._is_held(variant.name, display)

    def _is_held(self, name: str, display: Display) -> bool:
        """Whether somebody else's runner is at work on it. When that ends the variant is looked at anew."""
        place = Place(self.plan_folder, name)
        if not place.is_locked():
            self.held.discard(name)
            return False
        if name not in self.held:
            self.held.add(name)
            display.put_off(name, "waiting", place.holder(), self.tally())
        return True

    def _note_begun(self, display: Display) -> None:
        """An engine may have a queue of its own: not all that is started runs."""
        for name, variant in self.started.items():
            if name not in self.at_work and self.engine.is_at_work(name):
                folder = Place(self.plan_folder, name).attempt
                self.at_work[name] = Running(name, variant.stage, folder, time.monotonic())
                display.started(self.at_work[name], self.tally())

    def _take(self, outcome: Outcome, display: Display) -> None:
        name = outcome.variant
        variant = self.started.pop(name)
        self.at_work.pop(name, None)
        made = self.retrying[name].number if name in self.retrying else 0
        if outcome.status == HELD:
            return  # it began between our look at the lock and our runner's
        made_by = made, self.retries, self.backoff_seconds, self.engine.counts_preemption
        retry = next_try(outcome, variant.stage, *made_by)
        if retry is None:
            self._end(outcome, display)
            return
        self.retrying[name] = retry
        display.put_off(name, outcome.status, f"{outcome.message.rstrip('.')}; {retry.told()}", self.tally())

    def _end(self, outcome: Outcome, display: Display) -> None:
        self.outcomes[outcome.variant] = outcome
        display.ended(outcome, self.tally())
