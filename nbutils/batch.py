"""All variants of a plan on this machine: several at a time, each in a process of its own, in the order of their needs.

    python -m nbutils batch params/quick.yaml --workers 2 --only 'cosine-*'

A variant starts as soon as the runs it needs are finished. One that fails stops only those that need it. Runners are
forked from a process that has imported papermill once, which takes over a second, and their kernels from one that has
imported what notebooks do, which takes many (nbutils/kernel_host.py).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from nbutils import environment
from nbutils.attempts import LOGS, Place
from nbutils.contrasts import record_contrasts
from nbutils.errors import PlanError, WorkbookError
from nbutils.files import atomic_write
from nbutils.hosting import PRELOADED, kernel_host
from nbutils.keys import read_inputs, run_key
from nbutils.manifest import FAILED, FINISHED, KILLED, PREEMPTED
from nbutils.places import relative
from nbutils.plans import Plan, Variant
from nbutils.preflight import check_inputs, check_variant
from nbutils.progress import BLOCKED, Display, Running, Tally, duration, text_table
from nbutils.runner import BROKEN, DONE, REFUSED, RUN_AGAIN, Outcome, place_needs, run_variant
from nbutils.stopping import SAVE_SECONDS, stop_on_sigterm

TICK_SECONDS = 0.5  # between looks at the running variants
STOP_SECONDS = SAVE_SECONDS + 15  # a runner has to end its kernel and write its record; then it is killed
HOST_LOG = ".kernel-host"  # beside the logs of the runners
PLAN_FILE = "plan.yaml"  # the plan's folder keeps a copy of the plan its runs were made from
Start = Callable[[Variant, str, Path], tuple[Connection, BaseProcess]]


def default_workers() -> int:
    """Variants at a time: half the cores, but both of two; one where there is a GPU, which they would share."""
    cores = environment.cores()
    return 1 if environment.gpus() else max(min(2, cores), cores // 2)


def register_plan(plan: Plan, plan_folder: Path) -> None:
    """Keep a copy of the plan beside its runs and note since when its contrasts are what they are."""
    plan_folder.mkdir(parents=True, exist_ok=True)
    atomic_write(plan_folder / PLAN_FILE, plan.file.read_bytes())
    record_contrasts(plan.comparisons, plan_folder)


def select(plan: Plan, pattern: str) -> list[Variant]:
    """The variants whose names match `pattern` and all they need. Raises PlanError where none matches."""
    wanted = {variant.name for variant in plan.variants if fnmatchcase(variant.name, pattern)}
    if not wanted:
        names = ", ".join(variant.name for variant in plan.variants[:10])
        raise PlanError(f"No variant of plan {plan.name!r} matches {pattern!r}. There are, to begin with: {names}.")
    for variant in reversed(plan.variants):
        if variant.name in wanted:
            wanted.update(variant.needs.values())
    return [variant for variant in plan.variants if variant.name in wanted]


def is_finished(variant: Variant, plan_folder: Path) -> bool:
    """Whether a run of exactly this variant is published and finished, its needs included; starts nothing."""
    try:
        variant = place_needs(variant, plan_folder)
        key = run_key(variant.notebook, variant.params, read_inputs(variant.params))
    except WorkbookError:
        return False  # something it reads is not there; the check before a start says what
    return Place(plan_folder, variant.name).is_finished(key)


@dataclass
class Batch:
    """A batch in progress. `outcomes` has every variant that ended, was skipped or is blocked.

    Kernels find the `preloaded` modules imported; where there are none, each kernel is a fresh process.
    """

    plan: Plan
    plan_folder: Path
    variants: list[Variant]
    workers: int
    preloaded: tuple[str, ...] = PRELOADED
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    at_work: dict[Connection, tuple[Variant, BaseProcess, Running]] = field(default_factory=dict)

    def check(self) -> None:
        """Find what is finished and check the rest, before anything starts. Raises WorkbookError naming the variant."""
        for variant in self.variants:
            done = all(self._is_done(needed) for needed in variant.needs.values())
            if done and is_finished(variant, self.plan_folder):
                self.outcomes[variant.name] = Outcome(variant.name, FINISHED, DONE, skipped=True)
                continue
            try:
                check_variant(place_needs(variant, self.plan_folder) if done else variant, self.plan)
            except WorkbookError as error:
                raise type(error)(f"{variant.name}: {error}") from None

    def run(self, display: Display) -> None:
        """Run all variants that are not finished. Ctrl-C and SIGTERM end the running ones, each with its record.

        Runners are multiprocessing's: a script that calls this does so behind `if __name__ == "__main__":`.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nbutils.runner", "nbutils.kernels"])
        variables = _environment(self.workers)
        with display, stop_on_sigterm(), self._kernel_host(variables) as host:
            start = partial(_start_runner, context, variables, host)
            try:
                while self._fill(start, display) or self.at_work:
                    for connection in wait(list(self.at_work), TICK_SECONDS):
                        self._collect(connection, display)
                    display.tick(self.tally())
            except KeyboardInterrupt:  # or Stopped
                self._stop()
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
        return text_table(("variant", "status", "time", "message"), rows)

    def tally(self) -> Tally:
        """Where the batch stands."""
        running = [each for _, _, each in self.at_work.values()]
        busy = {each.variant for each in running}
        waiting = [v for v in self.variants if v.name not in self.outcomes and v.name not in busy]
        known: dict[str, list[float]] = {}
        for variant in self.variants:
            outcome = self.outcomes.get(variant.name)
            if outcome and outcome.status == FINISHED and not outcome.skipped:
                known.setdefault(variant.stage, []).append(outcome.seconds)
        ended = list(self.outcomes.values())
        return Tally(len(self.variants), self.workers, ended, running, [v.stage for v in waiting], known)

    def _is_done(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].status == FINISHED

    def _kernel_host(self, variables: Mapping[str, str]) -> AbstractContextManager[Path | None]:
        """The process that kernels are forked from; None where there is no second kernel to gain by it."""
        if len(self.variants) - len(self.outcomes) < 2 or not self.preloaded or sys.platform != "linux":
            return nullcontext()
        return kernel_host(self.preloaded, variables, self.plan_folder / LOGS / HOST_LOG)

    def _fill(self, start: Start, display: Display) -> bool:
        """Start what can be started; whether anything still waits."""
        busy = {variant.name for variant, _, _ in self.at_work.values()}
        waiting = False
        for variant in self.variants:
            if variant.name in self.outcomes or variant.name in busy:
                continue
            failed = [n for n in variant.needs.values() if n in self.outcomes and not self._is_done(n)]
            if failed:
                message = f"needs {failed[0]}, which is {self.outcomes[failed[0]].status}"
                self._end(Outcome(variant.name, BLOCKED, BROKEN, message), display)
            elif len(self.at_work) < self.workers and all(map(self._is_done, variant.needs.values())):
                self._start(variant, start, display)
            else:
                waiting = True
        return waiting

    def _start(self, variant: Variant, start: Start, display: Display) -> None:
        ours, process = start(variant, self.plan.name, self.plan_folder)
        running = Running(variant.name, variant.stage, Place(self.plan_folder, variant.name).attempt, time.monotonic())
        self.at_work[ours] = (variant, process, running)
        display.started(running, self.tally())

    def _collect(self, connection: Connection, display: Display) -> None:
        variant, process, running = self.at_work.pop(connection)
        try:
            outcome = connection.recv()
        except EOFError:
            process.join()
            log = relative(Place(self.plan_folder, variant.name).log)
            message = f"the runner itself ended (exit code {process.exitcode}); its log is {log}"
            outcome = Outcome(variant.name, KILLED, BROKEN, message, running.elapsed)
        connection.close()
        process.join()
        self._end(outcome, display)

    def _end(self, outcome: Outcome, display: Display) -> None:
        self.outcomes[outcome.variant] = outcome
        display.ended(outcome, self.tally())

    def _stop(self) -> None:
        """Ask every runner to stop; kill what has not after STOP_SECONDS, or at a second Ctrl-C."""
        processes = [process for _, process, _ in self.at_work.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            self.at_work.clear()


def _environment(workers: int) -> dict[str, str]:
    """Of runners and kernels: this process's, with the cores shared out among them."""
    threads = str(max(1, environment.cores() // workers))
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}


def _start_runner(
    context: multiprocessing.context.BaseContext,
    variables: Mapping[str, str],
    host: Path | None,
    variant: Variant,
    plan: str,
    plan_folder: Path,
) -> tuple[Connection, BaseProcess]:
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, variant, plan, plan_folder, variables, host)
    process = context.Process(target=_work, args=arguments, name=variant.name)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return ours, process


def _work(
    connection: Connection,
    variant: Variant,
    plan: str,
    plan_folder: Path,
    variables: Mapping[str, str],
    host: Path | None,
) -> None:
    """The life of a runner's process: one variant, its outcome sent to the batch."""
    os.setsid()  # Ctrl-C in the terminal reaches the batch alone, which asks its runners to stop
    log = Place(plan_folder, variant.name).log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.clear()  # the environment of the process this one was forked from may be an older one
    os.environ.update(variables)
    if host:
        import_module("nbutils.warm_kernels").use_host(host)
    start = time.monotonic()
    try:
        outcome = run_variant(variant, plan, plan_folder, check_inputs)  # the rest was checked before the start
    except WorkbookError as error:
        outcome = Outcome(variant.name, FAILED, REFUSED, f"{type(error).__name__}: {error}")
    connection.send(replace(outcome, seconds=time.monotonic() - start))
