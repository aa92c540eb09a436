"""The variants of a batch on a Ray cluster: one that exists, or one of this machine alone that ends with the batch.

    python -m nbutils batch params/quick.yaml --engine ray --address 10.0.0.5:6379 --out /shared/runs/quick

The nodes share the folder of the runs and have the same checkout and packages; the batch itself runs on one of them.
Ray finds a place for each variant (GPUs, cores), and ray_node.py runs it there. A variant whose node is lost is queued
again, however often that happens, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import psutil

from nbutils.batch.local_engine import machine_gpus, signals_held_back
from nbutils.batch.ray_node import STOP_SECONDS, Task, work
from nbutils.batch.runner import KERNEL_DIED, Outcome
from nbutils.foundation import PlanError, RunError, environment, relative
from nbutils.runs import KILLED, Plan, Variant, nbutils_sha256

LOCAL = "local"  # the address of a cluster of this machine alone
MARKS = ".ray"  # in the plan's folder: a folder for each batch at work, which its nodes must see
CONNECT_SECONDS = 5.0
FORCE_SECONDS = 10.0  # for Ray to end what does not stop
STARTS = 3  # tries at a cluster of this machine: Ray waits only half a minute for its processes
STORE_BYTES = 80 << 20  # about the least Ray takes; nothing of a run goes through its object store
LONGEST_FOLDER = 20  # characters; with ours and what Ray adds a socket's path has 86 more, and may have 107
QUIET = {"log_to_driver": False, "logging_level": "error"}
WHICH = (
    "Give host:port of its head, the port being that of `ray start --head` (6379 where none was said), and let this "
    "machine have its versions of Ray and Python; or leave out --address and RAY_ADDRESS to use this machine alone."
)

logger = logging.getLogger(__name__)


@dataclass
class RayEngine:
    """Runs variants of `plan` on a Ray cluster; results lie in `plan_folder` (batch.Engine says what methods do).

    address: `host:port` of the cluster's head, `auto` for one that this machine belongs to, `local` for one of this
    machine alone; empty: what RAY_ADDRESS says, else `local`.
    """

    plan: Plan
    plan_folder: Path
    address: str = ""
    counts_preemption: ClassVar[bool] = False  # a node that goes asks its runners to stop, if there is time
    _nodes: list[tuple[int, int]] = field(default_factory=list, init=False)  # (GPUs, cores) of each
    _expected: list[Variant] = field(default_factory=list, init=False)
    _tasks: dict[Any, Task] = field(default_factory=dict, init=False)  # by Ray's reference to what they return
    _begun: set[str] = field(default_factory=set, init=False)
    _ray: ModuleType | None = field(default=None, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        self.address = self.address or os.environ.get("RAY_ADDRESS") or LOCAL
        self._marks = self.plan_folder / MARKS / uuid.uuid4().hex

    @property
    def workers(self) -> int:
        """Variants that run now: Ray decides."""
        return max(1, len(self._begun))

    def __enter__(self) -> RayEngine:
        self._ray = import_ray()
        with ExitStack() as stack:
            stack.callback(self._remove_marks)
            try:
                self._marks.mkdir(parents=True)
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"{relative(self._marks)} cannot be made ({reason}). Mend it, then run again.") from None
            stack.enter_context(_connected(self._ray, self.address))
            self._check_room()
            self._function = self._ray.remote(max_retries=0, retry_exceptions=False)(work)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._open:
            self.stop()

    def check(self, variants: list[Variant]) -> None:
        """Raise RunError where Ray is not installed or nothing listens at the address. Asks nobody for no variants."""
        self._expected = variants
        if variants:
            import_ray()
            _check_address(self.address)

    def _check_room(self) -> None:
        """Raise PlanError where a variant asks for more than any node has."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._nodes = [(int(node.get("GPU", 0)), int(node.get("CPU", 0))) for node in alive]
        for variant in self._expected:
            gpus, cpus = self._request(variant)
            if not any(node[0] >= gpus and node[1] >= cpus for node in self._nodes):
                nodes = " or ".join(f"{gpus} GPUs and {cpus} cores" for gpus, cpus in sorted(set(self._nodes))[::-1])
                raise PlanError(
                    f"{variant.name} asks for {gpus} GPUs and {cpus} cores on one machine, and the Ray cluster at "
                    f"{self.address} has machines with {nodes or 'nothing'}. Let its stage ask for fewer, with "
                    "processes or `resources: {gpus: ..., cpus: ...}`, or start Ray on a larger machine first."
                )

    def has_room(self, variant: Variant) -> bool:
        """Always: Ray has a queue."""
        return True

    def start(self, variant: Variant) -> None:
        """Queue it."""
        gpus, cpus = self._request(variant)
        folder, marks = self.plan_folder.resolve(), self._marks.resolve()
        self._submit(Task(variant, self.plan.name, folder, marks, nbutils_sha256(), gpus, cpus))

    def is_at_work(self, name: str) -> bool:
        """Whether it has begun on a node, as known since the last `wait`."""
        return name in self._begun

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended since the last call. Raises RunError where a node cannot be used, or Ray itself fails."""
        ended = self._ended(seconds)
        with signals_held_back():
            outcomes = [self._take(reference) for reference in ended]
        at_work = {task.variant.name for task in self._tasks.values()}
        self._begun = at_work & {each.name for each in self._marks.iterdir()}
        return [outcome for outcome in outcomes if outcome]

    def stop(self) -> None:
        """Cancel all tasks, which gives their runners time to save; after STOP_SECONDS or a second Ctrl-C, end them."""
        try:
            for reference in self._tasks:
                self._ray.cancel(reference)
            self._await_end(STOP_SECONDS)
        finally:
            for reference in self._tasks:
                self._ray.cancel(reference, force=True)
            self._await_end(FORCE_SECONDS)
            self._tasks.clear()
            self._begun.clear()

    def _await_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._tasks and time.monotonic() < deadline:
            for reference in self._ended(1.0):
                self._tasks.pop(reference)

    def _ended(self, seconds: float) -> list[Any]:
        """References to the tasks that have ended; waits so long where none has."""
        references = list(self._tasks)
        if not references:
            time.sleep(seconds)
            return []
        with signals_held_back():  # Ray would raise KeyboardInterrupt for each of them
            if not self._ray.wait(references, timeout=seconds)[0]:
                return []
            return self._ray.wait(references, num_returns=len(references), timeout=0)[0]

    def _request(self, variant: Variant) -> tuple[int, int]:
        """(GPUs, cores) to ask Ray for."""
        there_are_gpus = any(gpus for gpus, _ in self._nodes)
        return variant.resources.gpus_for(variant.params, there_are_gpus), variant.resources.cpus or 1

    def _submit(self, task: Task) -> None:
        function = self._function.options(num_gpus=task.gpus, num_cpus=task.cpus, name=task.variant.name)
        with signals_held_back():
            self._tasks[function.remote(task)] = task

    def _take(self, reference: Any) -> Outcome | None:
        """The outcome of a task that has ended; None where it is queued again."""
        task = self._tasks.pop(reference)
        name, errors = task.variant.name, self._ray.exceptions
        (self._marks / name).unlink(missing_ok=True)
        try:
            ended: Outcome | str = self._ray.get(reference)
        except errors.NodeDiedError:
            logger.warning(
                "%s: its node was lost. It is queued again, for a node of %d GPUs and %d cores, and goes on from its "
                "newest checkpoint.",
                *(name, task.gpus, task.cpus),
            )
            self._submit(task)
            return None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            message = f"Ray's worker ended while it ran, as where memory is short: {_first_line(error)}"
            return Outcome(name, KILLED, KERNEL_DIED, message, again=True)
        except errors.RayError as error:
            cure = "Every node needs the same checkout, at the same path, and the same packages as the batch."
            raise RunError(f"Ray failed to run {name}: {_first_line(error)} {cure}") from None
        if isinstance(ended, str):
            raise RunError(ended)
        return ended

    def _remove_marks(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._marks)
            self._marks.parent.rmdir()  # another batch may have its own there


# ---- the cluster -----------------------------------------------------------------------------------------------------


def import_ray() -> ModuleType:
    """The module `ray`. Raises RunError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        reason = "is not installed" if error.name == "ray" else f"cannot be imported ({error})"
        raise RunError(f"Ray {reason}. Install it with `make ray`, or leave --engine ray out.") from None
    return ray


def _check_address(address: str) -> None:
    """Raise RunError for the address of another kind, or where nothing listens: Ray would try for two minutes."""
    if address in (LOCAL, "auto"):
        return
    if "://" in address:
        raise RunError(
            f"{address} is an address for clients outside the cluster. The batch runs on a machine of the cluster, "
            "which sees the folder of the runs. Start it there, with --address auto."
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        raise RunError(f"No Ray cluster at {address}: {getattr(error, 'strerror', '') or error}. {WHICH}") from None


def _first_line(error: BaseException) -> str:
    """What an error of Ray says, without the pages that follow."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """Within, Ray can be used. Afterwards a cluster of this machine alone has ended, with all its processes.

    Raises RunError where Ray does not start.
    """
    settings: dict[str, Any] = {"address": address, **QUIET}
    folder, tries = "", 1
    with ExitStack() as stack:
        if address == LOCAL:
            base = tempfile.gettempdir()
            base = base if len(base) <= LONGEST_FOLDER else "/tmp"
            temporary = tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True)
            folder, tries = stack.enter_context(temporary), STARTS
            settings |= {"_temp_dir": folder, "object_store_memory": STORE_BYTES, "include_dashboard": False}
            settings |= {"num_gpus": len(machine_gpus()), "num_cpus": environment.cores()}
        stack.callback(_shut_down, ray, folder)
        for left in reversed(range(tries)):
            try:
                with (
                    signals_held_back()
                ):  # Ray sets a handler of its own for SIGTERM, which would end the batch at once
                    ray.init(**settings)
                break
            except Exception as error:
                _shut_down(ray, folder)
                if not left:
                    raise RunError(f"Ray does not start for {address}: {_first_line(error)} {WHICH}") from None
        ray._private.worker.print_to_stdstream = lambda *said, **how: None  # pages about each node that is lost
        yield


def _shut_down(ray: ModuleType, folder: str) -> None:
    """Leave the cluster; end all of one that was started in `folder`, also what Ray has forgotten."""
    ray.shutdown(wait_for_processes=bool(folder))
    for process in psutil.Process().children(recursive=True) if folder else ():
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                process.kill()
