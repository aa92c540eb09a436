"""The variants of a batch on a Ray cluster: one that exists, or one of this machine alone that ends with the batch.

    python -m nbutils batch params/quick.yaml --engine ray --address 10.0.0.5:6379 --out /shared/runs/quick

The nodes share the folder of the runs and have the same checkout and packages; the batch itself runs on one of them.
Ray finds a place for each variant (GPUs, cores), and ray_worker.py runs it there. A variant whose node is lost
is queued again, however often that happens, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from nbutils.batch.engine import runner_died
from nbutils.batch.local_engine import signals_held_back
from nbutils.batch.ray_cluster import LOCAL, Cluster, cluster_now, connected, first_line, import_ray, look_at
from nbutils.batch.ray_worker import STOP_SECONDS, Ended, Task, work
from nbutils.batch.runner import KERNEL_DIED, Outcome
from nbutils.foundation.errors import PlanError, RunError
from nbutils.foundation.places import relative
from nbutils.runs.keys import nbutils_sha256
from nbutils.runs.manifest import KILLED
from nbutils.runs.plans import Plan, Variant

MARKS = ".ray"  # in the plan's folder: a folder for each batch at work, which its nodes must see
NODES_SECONDS = 30.0  # between looks at the nodes, for what none of them can run
NO_GPUS = "Where it is to train on cores, let its stage say `resources: {gpus: 0}`."
FORCE_SECONDS = 10.0  # for Ray to end what does not stop
SAME_PLACES = "Every node needs the same checkout, at the same path, and the same packages as the batch."

logger = logging.getLogger(__name__)


@dataclass
class RayEngine:
    """Runs variants of `plan` on a Ray cluster; results lie in `plan_folder` (engine.py says what methods do).

    address: `host:port` of the cluster's head, `auto` for one that this machine belongs to, `local` for one of this
    machine alone; empty: what RAY_ADDRESS says, else `local`.
    """

    plan: Plan
    plan_folder: Path
    address: str = ""
    counts_preemption: ClassVar[bool] = False  # a node that goes asks its runners to stop, if there is time
    _cluster: Cluster | None = field(default=None, init=False)
    _tasks: dict[Any, Task] = field(default_factory=dict, init=False)  # by Ray's reference to what they return
    _begun: set[str] = field(default_factory=set, init=False)
    _stuck: bool = field(default=False, init=False)  # and the user knows
    _looked: float = field(default=0.0, init=False)  # at the nodes
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
        self._cluster = self._cluster or look_at(self.address)
        self._code = nbutils_sha256()
        with ExitStack() as stack:
            stack.callback(self._remove_marks)
            try:
                self._marks.mkdir(parents=True)
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"{relative(self._marks)} cannot be made ({reason}). Mend it, then run again.") from None
            stack.enter_context(connected(self._ray, self.address, self._cluster))
            self._looked = time.monotonic()
            self._function = self._ray.remote(max_retries=0, retry_exceptions=False)(work)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._open:
            self.stop()

    def check(self, variants: list[Variant]) -> None:
        """Raise PlanError where one asks for more than any node has, unless the cluster may start others.

        Raises RunError where Ray is not installed or the cluster does not answer. Asks nobody for no variants.
        """
        if not variants:
            return
        import_ray()
        self._cluster = look_at(self.address)
        for variant in variants:
            gpus, cpus = self._request(variant)
            if self._cluster.has_node_for(gpus, cpus):
                continue
            told = f"{variant.name} asks for {gpus} GPUs and {cpus} cores on one machine, and the Ray cluster at "
            told += f"{self.address} has machines with {self._cluster.told()}."
            if not self._cluster.grows:
                raise PlanError(
                    f"{told} Let its stage ask for fewer, with processes or `resources: {{gpus: ..., cpus: ...}}`, or "
                    "start Ray on a larger machine first."
                )
            self._stuck = True
            logger.warning("%s It waits until the cluster starts one that has. %s", told, NO_GPUS if gpus else "")

    def has_room(self, variant: Variant) -> bool:
        """Always: Ray has a queue, and a cluster that grows does so by what it finds there."""
        return True

    def start(self, variant: Variant) -> None:
        """Queue it."""
        gpus, cpus = self._request(variant)
        folder = self.plan_folder.resolve()
        self._submit(Task(variant, self.plan.name, folder, self._marks.resolve(), self._code, gpus, cpus))

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
        if time.monotonic() - self._looked > NODES_SECONDS:
            self._looked = time.monotonic()
            self.tell_stuck(cluster_now(self._ray))
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

    def tell_stuck(self, cluster: Cluster) -> None:
        """Warn, once until it is over, where no node of the `cluster` is large enough for something queued."""
        queued = [task for task in self._tasks.values() if task.variant.name not in self._begun]
        stuck = [task for task in queued if not cluster.has_node_for(task.gpus, task.cpus)]
        if stuck and not self._stuck:
            others = f" and {len(stuck) - 1} more wait" if len(stuck) > 1 else " waits"
            logger.warning(
                "Nothing in the Ray cluster at %s can run %s now, which asks for %d GPUs and %d cores on one machine; "
                "there is %s. It%s until there is such a node. Start one, or end the batch by Ctrl-C and go on later.",
                *(self.address, stuck[0].variant.name, stuck[0].gpus, stuck[0].cpus, cluster.told(), others),
            )
        self._stuck = bool(stuck)

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
        return variant.resources.gpus_for(variant.params, self._cluster.has_gpus()), variant.resources.cpus or 1

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
            ended: Ended = self._ray.get(reference)
        except errors.NodeDiedError:
            logger.warning("%s: its node was lost. It is queued again and goes on from its newest checkpoint.", name)
            self._submit(task)
            self._looked = 0.0
            return None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            message = f"Ray's worker ended while it ran, as where memory is short: {first_line(error)}"
            return Outcome(name, KILLED, KERNEL_DIED, message, again=True)
        except errors.RayError as error:
            raise RunError(f"Ray failed to run {name}: {first_line(error)} {SAME_PLACES}") from None
        if ended.other_code and nbutils_sha256() != task.code:  # somebody edits the checkout, which is not the node's
            self._code = nbutils_sha256()
            self._submit(replace(task, code=self._code))
            return None
        if ended.problem:
            raise RunError(ended.problem)
        return ended.outcome or runner_died(name, self.plan_folder, ended.exit_code, ended.seconds)

    def _remove_marks(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._marks)
            self._marks.parent.rmdir()  # another batch may have its own there
