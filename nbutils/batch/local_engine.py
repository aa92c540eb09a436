"""The variants of a batch on this machine: several at a time, each in a process of its own with its GPUs to itself.

Runners are forked from a process that has imported papermill once, which takes over a second, and their kernels from
one that has imported what notebooks do, which takes many (nbutils/batch/kernel_host.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from nbutils.batch.engine import run_in_batch, runner_died
from nbutils.batch.gpu_ids import VISIBLE, check_gpu_ids, machine_gpus
from nbutils.batch.hosting import PRELOADED, kernel_host, use_host
from nbutils.batch.runner import BROKEN, Outcome
from nbutils.foundation import environment
from nbutils.foundation.errors import PlanError, RunError
from nbutils.foundation.places import relative
from nbutils.foundation.stopping import SAVE_SECONDS
from nbutils.runs.attempts import LOGS, Place
from nbutils.runs.manifest import FAILED
from nbutils.runs.plans import Variant

STOP_SECONDS = SAVE_SECONDS + 15  # a runner has to end its kernel and write its record; then it is killed
FORKS, FORK_SECONDS = 5, 0.2  # tries at a runner, and what lies between them
HOST_LOG = ".kernel-host"  # beside the logs of the runners


def default_workers(gpus: Sequence[str] | None = None) -> int:
    """Variants at a time: as many as GPUs are shared out; without any, half the cores, but both of two.

    gpus: as LocalEngine takes them.
    """
    cores = environment.cores()
    return len(machine_gpus() if gpus is None else gpus) or max(min(2, cores), cores // 2)


@dataclass(frozen=True)
class Share:
    """What variants take, or what is left: workers, GPUs, cores."""

    workers: int = 0
    gpus: int = 0
    cores: Fraction = Fraction(0)

    def __add__(self, other: Share) -> Share:
        return Share(self.workers + other.workers, self.gpus + other.gpus, self.cores + other.cores)

    def fits(self, left: Share) -> bool:
        """Whether it can be had where so much is left."""
        return self.workers <= left.workers and self.gpus <= left.gpus and self.cores <= left.cores


@dataclass
class Runner:
    """A process at work on a variant; `connection` brings its outcome."""

    variant: Variant
    process: BaseProcess
    connection: Connection
    share: Share
    gpus: tuple[str, ...]
    start: float


@dataclass
class NextInLine:
    """The first variant that found no room. It waits for runners `awaited` alone; what else becomes free is others'."""

    variant: str
    share: Share
    awaited: set[str]
    asked: bool = True  # since the last wait


@dataclass
class LocalEngine:
    """Runs variants of `plan` here; results lie in `plan_folder` (nbutils/batch/engine.py says what its methods do).

    workers: variants at a time. gpus: ids to share out; None: those of the machine, within CUDA_VISIBLE_DEVICES.
    Kernels find the `preloaded` modules imported; where there are none, each kernel is a fresh process.
    """

    plan: str
    plan_folder: Path
    workers: int
    gpus: Sequence[str] | None = None
    preloaded: tuple[str, ...] = PRELOADED
    counts_preemption: ClassVar[bool] = True
    _runners: dict[str, Runner] = field(default_factory=dict, init=False)
    _next: NextInLine | None = field(default=None, init=False)
    _expected: list[Variant] | None = field(default=None, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        self._named_gpus = self.gpus is not None
        self._told_gpus = self._named_gpus or bool(environment.gpus())
        self.gpus = machine_gpus() if self.gpus is None else tuple(self.gpus)

    def __enter__(self) -> LocalEngine:
        """Runners are multiprocessing's: a script that comes here does so behind `if __name__ == "__main__":`."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["nbutils.batch.runner", "nbutils.batch.kernels"])
        self._variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._host = None
        few = self._expected is not None and len(self._expected) < 2  # no second kernel to gain by a host
        if self.preloaded and not few and sys.platform == "linux":
            threads = Counter(map(self._threads, self._expected or ()))  # a kernel with others imports for itself
            variables = self._variables | _thread_variables(max(threads, key=threads.get, default=self._cores_each()))
            log = self.plan_folder / LOGS / HOST_LOG
            self._host = self._open.enter_context(kernel_host(self.preloaded, variables, log))
        return self

    def __exit__(self, *error: object) -> None:
        with self._open:
            self.stop()

    def check(self, variants: list[Variant]) -> None:
        """Raise PlanError where one asks for more than this machine has, or an id is no GPU's or given twice.

        `variants` are all that will be started.
        """
        check_gpu_ids(self.gpus, self._named_gpus)
        self._expected = variants
        for variant in variants:
            share, cores = self._share(variant), environment.cores()
            if share.gpus > len(self.gpus):
                asked = f"{share.gpus} GPU{'s' * (share.gpus > 1)}"
                there = f"{_count(len(self.gpus))} ({', '.join(self.gpus)})" if self.gpus else "there is none"
                raise PlanError(
                    f"{variant.name} asks for {asked} and here {there}. Let its stage ask for fewer, with processes or "
                    "`resources: {gpus: ...}`, or run it where there are as many."
                )
            if share.cores > cores:
                raise PlanError(
                    f"{variant.name} asks for {share.cores} cores and here {_count(cores)}. Let its stage ask for "
                    "fewer, with `resources: {cpus: ...}`, or run it where there are as many."
                )

    def has_room(self, variant: Variant) -> bool:
        """Whether it can start now. Where not, the first to ask gets what those that now run longest give back."""
        share = self._share(variant)
        if self._next and self._next.variant == variant.name:
            self._next.asked = True
        if not share.fits(self._left()):
            self._next = self._next or self._line_up(variant.name, share)
            return False
        if self._next is None or self._next.variant == variant.name:
            return True
        return (share + self._next.share).fits(self._left(without=self._next.awaited))

    def start(self, variant: Variant) -> None:
        """Fork a runner for it. Ctrl-C and SIGTERM are heard when it is known."""
        taken = {each for runner in self._runners.values() for each in runner.gpus}
        share = self._share(variant)
        gpus = tuple(each for each in self.gpus if each not in taken)[: share.gpus]
        variables = self._variables | _thread_variables(self._threads(variant))
        if self._told_gpus:
            variables[VISIBLE] = ",".join(gpus)
        with signals_held_back():
            process, ours = self._fork(variant, variables)
            self._runners[variant.name] = Runner(variant, process, ours, share, gpus, time.monotonic())
        if self._next and self._next.variant == variant.name:
            self._next = None

    def is_at_work(self, name: str) -> bool:
        """Whether its runner is there."""
        return name in self._runners

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended since the last call, after at most so many seconds."""
        if self._next:
            if not self._next.asked:
                self._next = None  # it is nobody's any more, as where another batch has begun it
            else:
                self._next.asked = False
        names = {runner.connection: name for name, runner in self._runners.items()}
        return [self._collect(names[connection]) for connection in wait(list(names), seconds)]

    def stop(self) -> None:
        """Ask every runner to stop; kill what has not after STOP_SECONDS, or at a second Ctrl-C."""
        for runner in self._runners.values():
            runner.process.terminate()
        left = {runner.connection: runner.process for runner in self._runners.values()}
        deadline = time.monotonic() + STOP_SECONDS
        try:
            while left and (seconds := deadline - time.monotonic()) > 0:
                for connection in wait(list(left), seconds):
                    try:
                        connection.recv()
                    except (EOFError, OSError):  # the end of the process, also where multiprocessing knows of none
                        left.pop(connection).join()
        finally:
            for process in left.values():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
            self._runners.clear()

    def _fork(self, variant: Variant, variables: Mapping[str, str]) -> tuple[BaseProcess, Connection]:
        """A runner's process and what brings its outcome. Raises RunError where none can be had."""
        left = FORKS
        while True:
            ours, theirs = self._context.Pipe(duplex=False)
            arguments = (theirs, variant, self.plan, self.plan_folder, variables, self._host)
            process = self._context.Process(target=_work, args=arguments, name=variant.name)
            left -= 1
            try:
                process.start()
                return process, ours
            except (OSError, EOFError) as error:  # the process that runners are forked from was killed
                ours.close()
                if not left:
                    raise RunError(f"No runner can be started ({error}). Run the batch again, to go on.") from None
                time.sleep(FORK_SECONDS)  # once the system knows that it has ended, the next start makes another
            finally:
                theirs.close()  # so that the end of the process is the end of the pipe

    def _cores_each(self) -> int:
        return max(1, environment.cores() // self.workers)

    def _threads(self, variant: Variant) -> int:
        return variant.resources.cpus or self._cores_each()

    def _share(self, variant: Variant) -> Share:
        """What the variant takes; of the cores its part as one of the workers, where it does not say."""
        cores = Fraction(variant.resources.cpus or Fraction(environment.cores(), self.workers))
        return Share(1, variant.resources.gpus_for(variant.params, len(self.gpus)), cores)

    def _left(self, without: Iterable[str] = ()) -> Share:
        """What is free, or would be without some of the runners."""
        taken = sum((each.share for name, each in self._runners.items() if name not in without), Share())
        cores = environment.cores() - taken.cores
        return Share(self.workers - taken.workers, len(self.gpus) - taken.gpus, cores)

    def _line_up(self, variant: str, share: Share) -> NextInLine:
        awaited: set[str] = set()
        for runner in sorted(self._runners.values(), key=lambda each: each.start):
            if share.fits(self._left(without=awaited)):
                break
            awaited.add(runner.variant.name)
        return NextInLine(variant, share, awaited)

    def _collect(self, name: str) -> Outcome:
        runner = self._runners.pop(name)
        with runner.connection as connection:
            try:
                outcome = connection.recv()
            except (EOFError, OSError):  # it ended before it could say how, or while it did
                outcome = None
        runner.process.join()
        seconds = time.monotonic() - runner.start
        return outcome or runner_died(name, self.plan_folder, runner.process.exitcode, seconds)


def _count(number: int) -> str:
    return f"is {number}" if number == 1 else f"are {number}"


def _thread_variables(threads: int) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM wait: a process that was started and is not known yet could not be stopped."""
    came: list[int] = []
    former: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, lambda number, frame: came.append(number))
    except ValueError:  # not the main thread, which alone gets signals
        pass
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


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
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:  # earlier attempts', and of another batch's runner at work
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    except OSError as error:
        message = (
            f"{relative(log)} cannot be written ({error.strerror or error}). Make room or mend it, then run again."
        )
        connection.send(Outcome(variant.name, FAILED, BROKEN, message))
        return
    os.environ.clear()  # the environment of the process this one was forked from may be an older one
    os.environ.update(variables)
    if host:
        use_host(host)
    connection.send(run_in_batch(variant, plan, plan_folder))
