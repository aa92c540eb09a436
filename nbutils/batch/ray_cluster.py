"""A Ray cluster, looked at and connected to: one that exists, or one of this machine alone.

Ray tries for two minutes to reach a cluster that is not there and then kills the process, so a process of its own looks
first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nbutils.batch.gpu_ids import machine_gpus
from nbutils.foundation import environment
from nbutils.foundation.errors import RunError
from nbutils.foundation.places import ROOT

LOCAL = "local"  # the address of a cluster of this machine alone
CONNECT_SECONDS = 5.0
LOOK_SECONDS = 60.0  # to import Ray and ask a cluster, on a busy machine
STARTS = 3  # tries
STORE_BYTES = 80 << 20  # about the least Ray takes; nothing of a run goes through its object store
FOLDER = "ray"  # begins the name of a folder among the temporary ones, before the number of its process
LONGEST_FOLDER = 20  # characters; with ours and what Ray adds a socket's path has 86 more, and may have 107
GROUP = "ray.io/node-group"  # a label of nodes that KubeRay or Ray's launcher started; they start more when asked
WHICH = (
    "Give host:port of its head, the port being that of `ray start --head` (6379 where none was said), and let this "
    "machine have its versions of Ray and Python; or leave out --address and RAY_ADDRESS to use this machine alone."
)
QUIET = {"log_to_driver": False, "logging_level": "error"}


@dataclass(frozen=True)
class Cluster:
    """What its nodes have, (GPUs, cores) of each. grows: something may start more when they are asked for."""

    nodes: tuple[tuple[int, int], ...]
    grows: bool = False

    def gpus(self) -> int:
        """In all."""
        return sum(gpus for gpus, _ in self.nodes)

    def has_gpus(self) -> bool:
        """Whether it has some, or may start nodes that have."""
        return self.grows or self.gpus() > 0

    def has_node_for(self, gpus: int, cpus: int) -> bool:
        """Whether one of the nodes, with nothing else on it, has so many."""
        return any(node[0] >= gpus and node[1] >= cpus for node in self.nodes)

    def told(self) -> str:
        """What the nodes have, each kind once."""
        kinds = sorted(set(self.nodes), reverse=True)
        return " or ".join(f"{gpus} GPUs and {cpus} cores" for gpus, cpus in kinds[:4]) or "nothing"


def import_ray() -> ModuleType:
    """The module `ray`. Raises RunError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        reason = "is not installed" if error.name == "ray" else f"cannot be imported ({error})"
        raise RunError(f"Ray {reason}. Install it with `make ray`, or leave --engine ray out.") from None
    return ray


def look_at(address: str) -> Cluster:
    """The cluster at `address`, which is one of this machine alone, not started yet, where it is `local`.

    Raises RunError where it cannot be reached, has another version of Ray or Python, or lets nobody in.
    """
    if address == LOCAL:
        return Cluster(((len(machine_gpus()), environment.cores()),))
    _check_address(address)
    command = [sys.executable, "-c", "from nbutils.batch.ray_cluster import tell; tell()", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_SECONDS, cwd=ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        raise RunError(f"Nothing at {address} answers as a Ray cluster does. {WHICH}") from None
    if "error" in found:
        raise RunError(f"The Ray cluster at {address} cannot be used: {found['error']} {WHICH}")
    return Cluster(tuple(map(tuple, found["nodes"])), found["grows"])


def _check_address(address: str) -> None:
    """Raises RunError for an address of another kind, or where nothing listens."""
    if address == "auto":
        return
    if "://" in address:
        raise RunError(
            f"{address} is an address for clients outside the cluster. The batch runs on a machine of the cluster, "
            "which sees the folder of the runs. Start it there, with --address auto."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RunError(f"{address!r} is no address of a Ray cluster. Give host:port, as 10.0.0.5:6379, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"No Ray cluster at {address}: {getattr(error, 'strerror', '') or error}. {WHICH}") from None


def tell() -> None:
    """For `look_at`, in a process of its own: print what the cluster at the address of the command line has."""
    try:
        ray = import_ray()
        ray.init(address=sys.argv[1], **QUIET)
        found = asdict(cluster_now(ray))
    except Exception as error:
        found = {"error": first_line(error)}
    print(json.dumps(found), flush=True)


def cluster_now(ray: ModuleType) -> Cluster:
    """The cluster that this process is connected to, as it is."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = tuple((int(node["Resources"].get("GPU", 0)), int(node["Resources"].get("CPU", 0))) for node in alive)
    return Cluster(nodes, any(GROUP in node["Labels"] for node in alive))


def first_line(error: BaseException) -> str:
    """What an error of Ray says, without the pages that follow."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def connected(ray: ModuleType, address: str, cluster: Cluster) -> Iterator[None]:
    """Within, Ray can be used. Afterwards a cluster of this machine alone has ended, with all its processes.

    Raises RunError where Ray does not start.
    """
    with ExitStack() as stack:
        if address == LOCAL:
            _start(ray, cluster, stack)
        else:
            stack.callback(ray.shutdown)
            _initialise(ray, address=address)
        ray._private.worker.print_to_stdstream = lambda *said, **how: None  # pages about each node that is lost
        yield


def _start(ray: ModuleType, cluster: Cluster, stack: ExitStack) -> None:
    """A cluster of this machine alone. Ray waits half a minute for its processes, which is little on a busy one."""
    ((gpus, cpus),) = cluster.nodes
    folder = _new_folder()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    stack.callback(_end_all, folder)
    stack.callback(ray.shutdown, wait_for_processes=True)
    own = {"num_gpus": gpus, "num_cpus": cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    for attempt in range(1, STARTS + 1):
        try:
            _initialise(ray, address=LOCAL, _temp_dir=folder, **own)
            return
        except RunError:
            ray.shutdown(wait_for_processes=True)
            _end_all(folder)
            if attempt == STARTS:
                raise


def _initialise(ray: ModuleType, **settings: Any) -> None:
    try:
        with _handlers_kept():
            ray.init(**settings, **QUIET)
    except Exception as error:
        raise RunError(f"Ray does not start for {settings['address']}: {first_line(error)} Try again.") from None


def _end_all(folder: str) -> None:
    """End what Ray started in `folder` and forgot, as after a start that came to nothing."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                process.kill()


def _new_folder() -> str:
    """A folder for the files and sockets of this process's cluster; those of batches that were killed are removed."""
    import psutil

    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_FOLDER else "/tmp"
    for left in Path(base).glob(f"{FOLDER}-[0-9]*-*"):
        if not psutil.pid_exists(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER}-{os.getpid()}-", dir=base)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray sets its own for SIGTERM, which would end the batch without a word to its runners."""
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
