"""The variants of a batch on this machine: several at a time, each in a process of its own with its GPUs to itself.

Runners are forked from a process that has imported what they and their kernels need (nbutils/batch/fork_server.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar

from nbutils.batch.fork_server import PRELOADED, ForkServer
from nbutils.batch.kernel_keeper import fork_keeper
from nbutils.batch.runner import BROKEN, Outcome, run_in_batch, runner_killed
from nbutils.foundation import SAVE_SECONDS, PlanError, RunError, environment, relative
from nbutils.runs import FAILED, LOGS, Place, Variant

STOP_SECONDS = SAVE_SECONDS + 15  # a runner has to end its kernel and write its record; then it is killed
SERVER_LOG = ".fork-server"  # beside the logs of the runners
VISIBLE = "CUDA_VISIBLE_DEVICES"
UUIDS = ("GPU-", "MIG-")  # what ids of GPUs that are no numbers begin with
DEVICES = Path("/dev")


def machine_gpus() -> tuple[str, ...]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs kept as they are."""
    there = [str(number) for number in range(len(environment.gpus()))]
    given = os.environ.get(VISIBLE)
    if given is None or not there:
        return tuple(there)
    visible = []
    for each in (word.strip() for word in given.split(",")):
        if each not in there and not each.startswith(UUIDS):
            break  # as CUDA does: what stands behind an id that is none does not count
        visible.append(each)
    return tuple(visible)


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
    """A process at work on a variant; `connection` brings its number, then the outcome."""

    variant: Variant
    connection: Connection
    share: Share
    gpus: tuple[str, ...]
    start: float
    process: int = 0

    def told(self) -> Outcome | None:
        """The outcome, once the process has ended; None where it has told its number. Raises EOFError of one killed."""
        with suppress(OSError):
            outcome = self.connection.recv()
            if isinstance(outcome, Outcome):
                with suppress(EOFError):
                    self.connection.recv()
                return outcome
            self.process = outcome
            return None
        raise EOFError

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with suppress(EOFError, ProcessLookupError):
            if self.process or self.told() is None:
                os.kill(self.process, number)


@dataclass
class LocalEngine:
    """Runs variants of `plan` here; results lie in `plan_folder` (batch.Engine says what its methods do).

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
    _next: Share | None = field(default=None, init=False)  # of the first variant that found no room since the last wait
    _expected: list[Variant] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._named_gpus = self.gpus is not None
        self._told_gpus = self._named_gpus or bool(environment.gpus())
        self.gpus = machine_gpus() if self.gpus is None else tuple(self.gpus)

    def __enter__(self) -> LocalEngine:
        self._variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._server = self._new_server()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def check(self, variants: list[Variant]) -> None:
        """Raise PlanError where one asks for more than this machine has, or an id is no GPU's or given twice.

        `variants` are all that will be started.
        """
        self._check_gpu_ids()
        self._expected = variants
        for variant in variants:
            share, gpus, cores = self._share(variant), len(self.gpus), environment.cores()
            short = f"{share.gpus} GPUs, and there are {gpus}" if share.gpus > gpus else ""
            short = short or (f"{share.cores} cores, and there are {cores}" if share.cores > cores else "")
            if short:
                raise PlanError(
                    f"{variant.name} asks for {short} here. Let its stage ask for fewer, with `resources: {{gpus: ..., "
                    "cpus: ...}`, or run it where there are as many."
                )

    def _check_gpu_ids(self) -> None:
        """Raise PlanError where an id is empty, given twice or, as somebody named them, no GPU of this machine."""
        twice = [each for each, times in Counter(self.gpus).items() if times > 1]
        if twice or not all(each.strip() for each in self.gpus):
            wrong = f"{twice[0]} is there twice" if twice else "an id is empty"
            told = f"The GPUs to share out are {','.join(self.gpus)!r}, and {wrong}."
            raise PlanError(f"{told} Name each once, with --gpus or {VISIBLE}, as 0,1.")
        there = [str(number) for number in range(len(environment.gpus()))]
        if not self._named_gpus or (not there and any(DEVICES.glob("nvidia[0-9]*"))):  # the driver without its tool
            return
        for each in self.gpus:
            if each not in there and not (there and each.startswith(UUIDS)):
                cure = "Name some of those with --gpus" if there else "Leave --gpus out"
                raise PlanError(f"There is no GPU {each} on this machine; it has {', '.join(there) or 'none'}. {cure}.")

    def has_room(self, variant: Variant) -> bool:
        """Whether it can start now. The first that cannot is next: for it is kept what the oldest runners give back."""
        share = self._share(variant)
        if not share.fits(self._left()):
            self._next = self._next or share
            return False
        return self._next is None or (share + self._next).fits(self._left(without=self._awaited(self._next)))

    def start(self, variant: Variant) -> None:
        """Fork a runner for it. Ctrl-C and SIGTERM are heard when it is known."""
        taken = {each for runner in self._runners.values() for each in runner.gpus}
        share = self._share(variant)
        gpus = tuple(each for each in self.gpus if each not in taken)[: share.gpus]
        variables = self._variables | _thread_variables(self._threads(variant))
        if self._told_gpus:
            variables[VISIBLE] = ",".join(gpus)
        with signals_held_back():
            connection = self._fork(variant, self.plan, self.plan_folder, variables)
            self._runners[variant.name] = Runner(variant, connection, share, gpus, time.monotonic())

    def is_at_work(self, name: str) -> bool:
        """Whether its runner is there."""
        return name in self._runners

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended since the last call, after at most so many seconds."""
        self._next = None
        runners = {runner.connection: runner for runner in self._runners.values()}
        ended = []
        for runner in map(runners.get, wait(list(runners), seconds)):
            name = runner.variant.name
            try:
                outcome = runner.told()
            except EOFError:
                outcome = runner_killed(name, self.plan_folder, time.monotonic() - runner.start)
            if outcome:
                self._runners.pop(name).connection.close()
                ended.append(outcome)
        return ended

    def stop(self) -> None:
        """Ask every runner to stop; kill what has not after STOP_SECONDS, or at a second Ctrl-C."""
        try:
            self._server.close()
            for runner in self._runners.values():
                runner.signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while self._runners and (seconds := deadline - time.monotonic()) > 0:
                self.wait(seconds)
        finally:
            for runner in self._runners.values():
                runner.signal(signal.SIGKILL)
                with suppress(EOFError):
                    runner.told()
            self._runners.clear()

    def _new_server(self) -> ForkServer:
        """The process to fork runners from. It imports for kernels where there will be more than one."""
        modules = self.preloaded if len(self._expected) != 1 and sys.platform == "linux" else ()
        threads = Counter(map(self._threads, self._expected))  # a kernel with others imports for itself
        variables = self._variables | _thread_variables(max(threads, key=threads.get, default=self._cores_each()))
        return ForkServer(modules, variables, self.plan_folder / LOGS / SERVER_LOG)

    def _fork(self, *arguments: Any) -> Connection:
        """A runner's connection. Raises RunError where none can be had."""
        try:
            return self._server.fork(_work, *arguments)
        except OSError:  # it was killed
            self._server.close()
        try:
            self._server = self._new_server()
            return self._server.fork(_work, *arguments)
        except OSError as error:
            raise RunError(f"No runner can be started ({error}). Run the batch again, to go on.") from None

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

    def _awaited(self, share: Share) -> set[str]:
        """The oldest runners, as many as have to end until there is room for `share`."""
        awaited: set[str] = set()
        for name in self._runners:  # in the order of their starts
            if share.fits(self._left(without=awaited)):
                break
            awaited.add(name)
        return awaited


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


def _work(connection: Connection, variant: Variant, plan: str, plan_folder: Path, variables: Mapping[str, str]) -> None:
    """The life of a runner's process: one variant, its outcome sent to the batch."""
    log = Place(plan_folder, variant.name).log
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:  # earlier attempts', and of another batch's runner at work
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    except OSError as error:
        told = f"{relative(log)} cannot be written ({error.strerror or error}). Make room or mend it, then run again."
        connection.send(Outcome(variant.name, FAILED, BROKEN, told))
        return
    os.environ.clear()  # the environment of the process this one was forked from may be an older one
    os.environ.update(variables)
    fork_keeper()
    connection.send(run_in_batch(variant, plan, plan_folder))
