"""Why nothing outlives its runner: a keeper beside each runner starts the runner's kernel and ends all of it.

    fork server (fork_server.py)        has imported what notebooks import; one for each batch
      └ runner                          papermill is at work here
          └ keeper                      waits for the kernel to end, or the runner
              └ kernel                  forked, with the fork server's imports; or a fresh Python

A runner without a fork server, as of `python -m nbutils run`, starts its keeper as a process. A kernel is forked only
where that is the same as a fresh Python: the environment is the one of the imports, and nbutils has not changed since.

A kernel adopts the orphans among its descendants, and when it ends they become the keeper's, in whatever session they
are. So all that is then left among the keeper's children is killed. If the keeper is killed, so is the kernel.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

from nbutils.foundation import DRIVEN_FOLDER, ROOT, adopt_orphans, end_with_parent

THRIFT = {"TQDM_MININTERVAL": "30"}  # seconds between redraws of a progress bar that nobody watches
OF_ONE_KERNEL = {DRIVEN_FOLDER, "JPY_PARENT_PID", "JPY_SESSION_NAME", "CUDA_VISIBLE_DEVICES"}
ORPHAN_SECONDS, ORPHAN_TICK = 2.0, 0.005  # what was killed ends at once, but for one that the system holds
KIB_OF_A_MIB = 1024  # Linux counts in KiB


@dataclass(frozen=True)
class Imports:
    """What a fork server has imported, and under which environment; `refusal` says why no kernel may be forked."""

    refusal: str
    environment: Mapping[str, str]
    added: Mapping[str, str]  # what the imports put into the environment
    sources: Mapping[Path, tuple[int, int] | None]  # nbutils as it was imported
    files: frozenset[int]  # that libraries have open

    def why_not(self, environment: Mapping[str, str]) -> str:
        """Why a kernel forked now would not be what a fresh one is; empty where it would."""
        if self.refusal:
            return self.refusal
        names = {name for name, _ in environment.items() ^ self.environment.items()} - OF_ONE_KERNEL
        if names:
            return f"its environment is not the one of the imports: {', '.join(sorted(names))}"
        changed = [path.name for path, status in self.sources.items() if file_status(path) != status]
        return f"nbutils has changed since it was imported: {', '.join(changed)}" if changed else ""


imports: Imports | None = None  # set by the fork server, for all that is forked from it
_forked: Keeper | None = None  # by a runner as it began


def file_status(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file, None where it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def open_files() -> frozenset[int]:
    """The descriptors of the files that this process has open."""
    listed = list(Path("/dev/fd").iterdir())  # with the listing's own, which is closed by now
    return frozenset(int(file.name) for file in listed if file.is_symlink())


# ---- in the runner ---------------------------------------------------------------------------------------------------


class KeeperGone(Exception):
    """The process that was to start the kernel has ended."""


class Keeper:
    """The runner's side: one kernel, with as much of subprocess.Popen as jupyter_client uses."""

    stdin = stdout = stderr = None

    def __init__(self, connection: Connection, join: Callable[[], object]) -> None:
        self._connection, self._join = connection, join
        self.pid = 0  # of the kernel, once it has started
        self.returncode: int | None = None
        self.peak_memory_mib: float | None = None  # of the kernel's process, as the system counted, once it has ended

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        """Start the kernel `command`. Raises KeeperGone where the keeper was killed."""
        try:
            self._connection.send((list(command), dict(environment), folder))
            self.pid = self._connection.recv()
        except (EOFError, OSError):
            self.returncode = -signal.SIGKILL
            raise KeeperGone from None

    def poll(self, seconds: float | None = 0) -> int | None:
        """The kernel's exit code, -N where signal N ended it; None where it still runs after so long (None: waits)."""
        if self.returncode is None and self._connection.poll(seconds):
            try:
                self.returncode, self.peak_memory_mib = self._connection.recv()
            except (OSError, EOFError):
                self.returncode = -signal.SIGKILL  # the keeper was killed, and with it the kernel
        return self.returncode

    def wait(self) -> int:
        """The exit code, when the kernel has ended."""
        return self.poll(None)

    def send_signal(self, number: int) -> None:
        """Send a signal, SIGKILL to all the kernel's group; nothing where the kernel has ended."""
        if self.pid and self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number) if number == signal.SIGKILL else os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the kernel and all that it started, and return when it has ended."""
        if self.pid:
            _kill_group(self.pid)  # where the keeper was killed, the kernel's group is left
            self.wait()
        self._connection.close()
        self._join()


def fork_keeper() -> None:
    """Fork this runner's keeper, for `take_keeper`: the first thing a runner does, while it has no threads."""
    global _forked
    ours, theirs = Pipe()
    process = os.fork()
    if process == 0:
        end_after(_keep, theirs)
    theirs.close()
    _forked = Keeper(ours, partial(os.waitpid, process, 0))


def take_keeper() -> Keeper:
    """The keeper that this process forked as it began, or one started now."""
    global _forked
    keeper, _forked = _forked, None
    if keeper:
        return keeper
    ours, theirs = Pipe()
    with theirs:
        code = "from nbutils.batch.kernel_keeper import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
    return Keeper(ours, process.wait)


def end_after(work: Callable[..., None], *arguments: Any) -> None:
    """Do the work of a forked process and end it, whatever happens: it must not go on as its parent does."""
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


# ---- in the keeper ---------------------------------------------------------------------------------------------------


def main() -> None:
    """The keeper of a runner that has no fork server; the descriptor of its connection is on the command line."""
    _keep(Connection(int(sys.argv[1])))


def _keep(runner: Connection) -> None:
    """Start the kernel that the runner asks for; end with it, or with the runner."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal, a scheduler: they are for runner and kernel
    _close_all_but(runner.fileno())
    adopt_orphans()
    try:
        command, environment, folder = runner.recv()
    except EOFError:
        return
    reason = imports.why_not(environment) if imports else ""
    if reason:
        print(f"This kernel imports for itself: {reason}.", file=sys.stderr, flush=True)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    keeper = os.getpid()
    kernel = os.fork()
    if kernel == 0:
        signal.set_wakeup_fd(-1)
        runner.close()
        _close_all_but()
        end_after(_be_kernel, keeper, command, environment, folder, bool(imports) and not reason)
    with suppress(OSError):
        runner.send(kernel)
    code, peak = _wait_for(kernel, runner, woken)
    _end_orphans()
    with suppress(OSError):
        runner.send((code, peak))


def _wait_for(kernel: int, runner: Connection, woken: int) -> tuple[int, float]:
    """(exit code, peak memory in MiB) of the kernel, which is killed where the runner has gone."""
    watched = [runner, woken]
    while True:
        process, status, usage = os.wait4(kernel, os.WNOHANG)
        if process:
            _kill_group(kernel)
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss / KIB_OF_A_MIB
        ready, _, _ = select.select(watched, [], [])
        if woken in ready:
            os.read(woken, 1 << 10)
        if runner in ready:  # it says nothing after its request: this is its end
            watched.remove(runner)
            os.kill(kernel, signal.SIGKILL)


def _kill_group(process: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _end_orphans() -> None:
    """Kill what the dead kernel has started: the children of each that is killed are found in the next round."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (orphans := psutil.Process().children()) and time.monotonic() < deadline:
        for orphan in orphans:
            with suppress(psutil.Error, PermissionError):
                orphan.kill()
            with suppress(ChildProcessError):
                os.waitpid(orphan.pid, os.WNOHANG)
        time.sleep(ORPHAN_TICK)


def _close_all_but(kept: int = -1) -> None:
    """Close what a runner has open, for itself alone; not what the imports have."""
    for file in open_files() - {0, 1, 2, kept} - (imports.files if imports else set()):
        os.close(file)


# ---- in the kernel ---------------------------------------------------------------------------------------------------


def _be_kernel(keeper: int, command: Sequence[str], environment: Mapping[str, str], folder: str, warm: bool) -> None:
    """Become the kernel, in a session of its own with a fresh process's signals, to its end."""
    os.setsid()
    adopt_orphans()
    end_with_parent(keeper)()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(folder)
    variables = {**(imports.added if warm else {}), **environment, "JPY_PARENT_PID": str(keeper)}
    if not warm:
        os.execvpe(command[0], command, variables)
    os.environ.clear()
    os.environ.update(variables)
    arguments = command[command.index("ipykernel_launcher") + 1 :]
    sys.argv = [importlib.util.find_spec("ipykernel_launcher").origin, *arguments]
    _reseed()
    early = _handlers_on(sys.stderr)
    from ipykernel.kernelapp import IPKernelApp

    application = IPKernelApp.instance(parent_handle=keeper)
    application.initialize(arguments)
    for handler in early:
        handler.setStream(sys.stderr)  # the notebook's, where a fresh kernel's libraries would have found it
    application.start()
    atexit._run_exitfuncs()


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
