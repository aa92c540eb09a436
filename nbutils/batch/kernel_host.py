"""The process a batch's kernels are forked from: it has imported what notebooks import, which takes seconds.

The batch starts it (hosting.py); a runner asks it for a kernel (warm_kernels.py). A kernel is what
a fresh process would be: its own session, environment, folder and output, no thread, no CUDA, new random numbers where
nobody gave a seed. Where that cannot be had the host refuses, and the runner starts a fresh process.

A kernel ends with its runner, whose connection the host watches, and with the host. The host ends with the batch, or
with the last runner of a batch that was killed.

What a kernel has started ends with it, also in a session of its own. A living kernel adopts the orphans among its
descendants; when it dies they all become the host's. So a child of the host that is no kernel was started by one that
has died.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nbutils.batch.hosting import message_socket, receive, send
from nbutils.foundation.places import ROOT
from nbutils.foundation.processes import adopt_orphans, end_with_parent
from nbutils.foundation.stopping import DRIVEN_FOLDER

INLINE_FIGURES = "module://matplotlib_inline.backend_inline"  # what ipykernel sets before a notebook imports matplotlib
WHILE_IMPORTING = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's spare allocator would start a thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not initialise CUDA
}
OF_ONE_KERNEL = {DRIVEN_FOLDER, "JPY_PARENT_PID", "JPY_SESSION_NAME", "CUDA_VISIBLE_DEVICES"}
REQUEST_SECONDS = 10  # a runner sends its request at once
ORPHAN_SECONDS, ORPHAN_TICK = 2.0, 0.005  # what was killed ends at once, but for one that the system holds
KIB_OF_A_MIB = 1024  # Linux counts in KiB


@dataclass(frozen=True)
class Launch:
    """What a forked process is to become: a kernel with these arguments, environment and folder."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


@dataclass
class KernelHost:
    """Forks kernels for runners until the batch has ended and no kernel is left. `refusal` says why it forks none."""

    listener: socket.socket | None
    refusal: str | None
    environment: dict[str, str] | None  # what the modules were imported under, None where there are none
    added: dict[str, str]  # what the imports put into it
    sources: dict[Path, tuple[int, int] | None]  # nbutils as it was imported
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    kernels: dict[int, socket.socket | None] = field(default_factory=dict)  # by process, the runner's connection
    helpers: frozenset[int] = frozenset()  # processes of libraries that it has imported

    def serve(self) -> Launch | None:
        """Returns None in the host, at its end, and in every kernel what it is to become."""
        woken, waker = socket.socketpair()
        for end in (woken, waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        adopt_orphans()
        self.helpers = self._children()
        with woken, waker, self.selector:
            self.selector.register(woken, selectors.EVENT_READ, "kernel ended")
            self.selector.register(self.listener, selectors.EVENT_READ, "request")
            self.selector.register(sys.stdin, selectors.EVENT_READ, "batch ended")
            while self.listener or self.kernels:
                for key, _ in self.selector.select():
                    if key.data == "request" and self.listener:
                        launch = self._answer()
                        if launch:
                            return launch
                    elif key.data == "kernel ended":
                        woken.recv(1 << 10)
                        self._reap()
                    elif key.data == "batch ended":
                        self._take_no_more()
                    elif isinstance(key.data, int):
                        self._runner_gone(key.data)
        return None

    def _answer(self) -> Launch | None:
        """Fork the kernel that a runner asks for, or say why not; what to become where this is the kernel."""
        connection, _ = self.listener.accept()
        connection.settimeout(REQUEST_SECONDS)
        files: list[int] = []
        try:
            request, files = receive(connection, files=2)
            reason = self.refusal or self._another_kernel(request["environment"])
            if reason:
                send(connection, {"refused": reason})
                connection.close()
                return None
            end_with_host = end_with_parent(os.getpid())
            process = os.fork()
            if process == 0:
                request["environment"] = self.added | request["environment"]
                return self._child(Launch(**request), connection, files, end_with_host)
            self.kernels[process] = connection
            self.selector.register(connection, selectors.EVENT_READ, process)
        except (OSError, EOFError, ValueError):  # the runner has gone, or is none
            connection.close()
        finally:
            for file in files:
                os.close(file)
        return None

    def _another_kernel(self, environment: Mapping[str, str]) -> str | None:
        """Why a kernel forked now would not be what a fresh process is; None where it would."""
        under = environment if self.environment is None else self.environment
        names = {name for name, _ in environment.items() ^ under.items()} - OF_ONE_KERNEL
        if names:
            return f"the environment is not the one it imported under: {', '.join(sorted(names))}"
        changed = [path.name for path, status in self.sources.items() if _status(path) != status]
        if changed:
            return f"nbutils has changed since it was imported: {', '.join(changed)}"
        return None

    def _reap(self) -> None:
        """Tell runners of their kernels' ends; what a kernel has started ends with it."""
        ended: list[tuple[socket.socket, dict[str, float]]] = []
        for process in list(self.kernels):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill_group(process)  # before the process is collected: until then nobody else can have its number
            _, status, usage = os.wait4(process, 0)
            connection = self.kernels.pop(process)
            if connection:
                self.selector.unregister(connection)
                code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss / KIB_OF_A_MIB
                ended.append((connection, {"exit_code": code, "peak_memory_mib": peak}))
        self._end_orphans()
        for connection, message in ended:
            with connection, suppress(OSError):
                send(connection, message)

    def _end_orphans(self) -> None:
        """Kill what dead kernels have started. The children of each that is killed are the host's in the next round."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while orphans := self._children() - self.kernels.keys() - self.helpers:
            for process in orphans:  # not collected yet, so nobody else can have its number
                with suppress(PermissionError):
                    os.kill(process, signal.SIGKILL)
                os.waitpid(process, os.WNOHANG)
            if time.monotonic() > deadline:
                return
            time.sleep(ORPHAN_TICK)

    @staticmethod
    def _children() -> frozenset[int]:
        return frozenset(child.pid for child in psutil.Process().children())

    def _runner_gone(self, process: int) -> None:
        connection = self.kernels.get(process)
        if connection:  # it says nothing after its request: this is its end
            self.selector.unregister(connection)
            connection.close()
            self.kernels[process] = None
            _kill_group(process)

    def _take_no_more(self) -> None:
        self.selector.unregister(sys.stdin)
        self.selector.unregister(self.listener)
        self.listener.close()
        self.listener = None

    def _child(
        self, launch: Launch, connection: socket.socket, output: Sequence[int], end_with_host: Callable[[], None]
    ) -> Launch:
        """In a new kernel: keep nothing of the host's, and tell the runner. Ends the process where that fails."""
        try:
            signal.set_wakeup_fd(-1)
            for each in (self.listener, *self.kernels.values()):
                if each:
                    each.close()
            _detach(output, end_with_host)
            send(connection, {"process": os.getpid()})
            connection.close()
        except BaseException:  # must not go on as a second host
            traceback.print_exc()
            os._exit(1)
        return launch


def _kill_group(process: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _detach(output: Sequence[int], end_with_host: Callable[[], None]) -> None:
    """Make the forked process a session of its own, with the signals and the output of a fresh one."""
    os.setsid()
    adopt_orphans()
    end_with_host()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, file in enumerate(output, start=1):
        os.dup2(file, number)


def become(launch: Launch) -> None:
    """Be the kernel, to its end."""
    os.environ.clear()
    os.environ.update(launch.environment)
    os.chdir(launch.folder)
    sys.argv = [importlib.util.find_spec("ipykernel_launcher").origin, *launch.arguments[1:]]
    _reseed()
    early = _handlers_on(sys.stderr)
    from ipykernel.kernelapp import IPKernelApp

    application = IPKernelApp.instance(parent_handle=os.getppid())
    application.initialize(launch.arguments[1:])
    for handler in early:
        handler.setStream(sys.stderr)  # the notebook's, where a fresh kernel's libraries would have found it
    application.start()


def _reseed() -> None:
    """Random numbers that nobody seeds differ from kernel to kernel; the standard library sees to its own."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "datasets" in sys.modules:  # names cache files by it
        sys.modules["datasets"].fingerprint.fingerprint_rng.seed()


def _handlers_on(stream: Any) -> list[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for each in loggers for handler in getattr(each, "handlers", ())}
    return [each for each in handlers if vars(each).get("stream") is stream]


# ---- its start -------------------------------------------------------------------------------------------------------


def read_sources() -> dict[Path, tuple[int, int] | None]:
    """Size and time of change of every nbutils file."""
    return {path: _status(path) for path in (ROOT / "nbutils").rglob("*.py")}


def _status(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def import_all(modules: Sequence[str]) -> str | None:
    """Import as a kernel would. Returns why nothing can be forked now, None where all is well."""
    os.environ.update(WHILE_IMPORTING)
    os.environ.setdefault("MPLBACKEND", INLINE_FIGURES)
    try:
        importlib.import_module("ipykernel.kernelapp")
        with _in_a_notebook():
            for module in modules:
                importlib.import_module(module)
    except Exception:  # whatever it is, a kernel that imports it tells the reader
        traceback.print_exc()
        return f"it could not import {module}"
    trial = os.fork()  # ends the threads of libraries that can do without them over a fork, OpenBLAS before all
    if trial == 0:
        os._exit(0)
    os.waitpid(trial, 0)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    if len(threads) > 1:
        return f"it has threads: {', '.join(threads)}"
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    if any(file.startswith("/dev/nvidia") for file in opened):
        return "an import has initialised CUDA"
    gc.collect()
    gc.freeze()  # so that collections in the kernels do not copy these pages
    return None


@contextmanager
def _in_a_notebook() -> Iterator[None]:
    """Libraries that ask IPython, while they are imported, find what they would in a kernel."""
    import IPython

    class KernelToBe:
        config = {"IPKernelApp": {}}  # noqa: RUF012

    real = IPython.get_ipython
    importing = True
    IPython.get_ipython = lambda: KernelToBe() if importing else real()
    try:
        yield
    finally:
        importing = False
        IPython.get_ipython = real


def main(listener: int, modules: Sequence[str]) -> None:
    """Import, then fork kernels; in a kernel, be it."""
    if sys.path[0] in ("", str(Path.cwd())):
        del sys.path[0]  # as a kernel's; ipykernel adds the notebook's folder
    environment, sources = dict(os.environ), read_sources()
    refusal = import_all(modules)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # kernels may still have to save what they did
    loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
    sources = {path: status for path, status in sources.items() if str(path) in loaded}
    own = {*environment, *WHILE_IMPORTING, "MPLBACKEND"}
    added = {name: value for name, value in os.environ.items() if name not in own}
    under = environment if modules else None
    launch = KernelHost(message_socket(listener), refusal, under, added, sources).serve()
    if launch:
        become(launch)
    else:
        sys.stderr.flush()
        os._exit(0)  # tearing down all that was imported takes seconds, and nothing of it is open


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
