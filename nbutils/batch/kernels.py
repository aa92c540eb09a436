"""One notebook executed by papermill in a kernel of its own, with the truth about how it ended.

papermill alone lets kernels race for ports and starts whatever kernel a user's home folder calls `python3`. Here a
kernel talks over sockets in a private folder, is this Python, and is started by a keeper (kernel_keeper.py).
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from jupyter_client import AsyncKernelManager
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.provisioning import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook
from traitlets import default
from traitlets.config import Config

from nbutils.batch.executed_notebook import find_failure, mark_ending, shorten_printed
from nbutils.batch.kernel_keeper import THRIFT, Keeper, KeeperGone, take_keeper
from nbutils.foundation import FROM_OUTSIDE, Watch, memory_kills

IOPUB_SECONDS = 60  # the default of 4 fails a cell whose output is slow to arrive on a busy machine
START_SECONDS = 180  # many kernels that start at once on few cores
NEVER_READY = "Kernel died before replying to kernel_info"  # a RuntimeError of jupyter_client, of no kind of its own
AUTOSAVE_SECONDS = 60  # the whole notebook is written each time
LONGEST_SOCKET_FOLDER = 80  # of the 107 bytes a socket's path may have
_at_work: Keeper | None = None  # of the `execute` at work in this process


class NotebookFailed(Exception):
    """A cell failed. `record` has `type`, `message`, `cell` and `log`, for manifest.json."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(f"{record['cell']}: {record['type']}: {record['message']}")
        self.record = record


class KernelDied(NotebookFailed):
    """The kernel's process ended in the middle of a cell."""


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    watch: Watch | None = None,
) -> None:
    """Run `notebook` with `parameters` in the folder it lies in and write the executed notebook to `output`.

    The kernel gets `environment` on top of this process's. `watch` is told when a cell starts, and what memory was
    taken. Raises NotebookFailed or its kind KernelDied; `output` then shows which cell it was. Whatever else ends it,
    `output` claims no cell as completed that did not end.
    """
    watch = watch or Watch()
    killed_before = memory_kills()
    try:
        with _kernel(watch, THRIFT | dict(environment)) as (settings, keeper):
            execute_notebook(
                _no_template(notebook),
                _no_template(output),
                dict(parameters),
                kernel_name=NATIVE_KERNEL_NAME,
                progress_bar=False,
                start_timeout=START_SECONDS,
                autosave_cell_every=AUTOSAVE_SECONDS,
                iopub_timeout=IOPUB_SECONDS,
                coalesce_streams=True,
                resources={"metadata": {"path": str(notebook.parent)}},
                on_cell_start=lambda cell, cell_index: watch.cell_starts(),
                on_cell_execute=lambda cell, cell_index: setattr(watch, "in_cell", True),
                on_cell_executed=lambda cell, cell_index, execute_reply: setattr(watch, "in_cell", False),
                **settings,
            )
    except PapermillExecutionError:
        pass  # the saved notebook has the error, and is read below
    except BaseException as error:
        if not _is_death(error):
            mark_ending(output, None, watch.make_room)
            raise
        died = {"type": KernelDied.__name__, "message": _death(keeper.returncode, memory_kills() > killed_before)}
        record = mark_ending(output, died, watch.make_room)
        raise KernelDied(record | {"crash": -keeper.returncode not in FROM_OUTSIDE}) from None
    finally:
        with suppress(OSError, ValueError):  # not there, no room beside it, half a notebook: it stays as it is
            shorten_printed(output)
    failure = find_failure(output)
    if failure:
        raise NotebookFailed(failure)


def signal_kernel(number: int) -> bool:
    """Send a signal to the kernel that `execute` runs now, SIGKILL to all its group; False where none runs yet."""
    if _at_work is None or not _at_work.pid:
        return False
    _at_work.send_signal(number)
    return True


class KeptProvisioner(LocalProvisioner):
    """jupyter_client starts, signals and ends a kernel through this; the process comes from the keeper."""

    keeper: Keeper
    variables: Mapping[str, str]  # on top of the runner's

    async def launch_kernel(self, cmd: list[str], **settings: Any) -> KernelConnectionInfo:
        """Start the kernel that `cmd` would."""
        self.cwd = str(settings.get("cwd") or Path.cwd())
        self.keeper.start(cmd, {**settings["env"], **self.variables}, self.cwd)
        self.process, self.pid, self.pgid = self.keeper, self.keeper.pid, self.keeper.pid
        return self.connection_info


@contextmanager
def _kernel(watch: Watch, variables: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], Keeper]]:
    """(settings for nbclient, keeper of the kernel it starts): this Python, sockets in a folder of its own.

    Whatever the kernel started is ended with it, and the kernel itself where nbclient forgets it: after an interrupt
    while it starts.
    """
    global _at_work
    keeper = take_keeper()

    class PrivateKernelManager(AsyncKernelManager):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.provisioner = KeptProvisioner(kernel_id=str(uuid4()), kernel_spec=self.kernel_spec, parent=self)
            self.provisioner.keeper, self.provisioner.variables = keeper, variables

        async def _async_interrupt_kernel(self) -> None:
            """Of a shutdown it is the first thing: a kernel still busy with its last answer would tell of an error."""
            if watch.in_cell:
                await super()._async_interrupt_kernel()

        @default("kernel_spec_manager")
        def _native_kernel(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])  # a kernel called python3 in a home folder may be another Python

    base = tempfile.gettempdir()
    short = base if len(base) < LONGEST_SOCKET_FOLDER else "/tmp"
    try:
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=short) as folder:
            sockets = {"transport": "ipc", "ip": f"{folder}/socket", "connection_file": f"{folder}/connection.json"}
            _at_work = keeper
            yield {"config": Config({"KernelManager": sockets}), "kernel_manager_class": PrivateKernelManager}, keeper
    finally:
        _at_work = None
        keeper.close()
        watch.peak_memory_mib = keeper.peak_memory_mib


def _no_template(path: Path) -> str:
    """papermill fills `{name}` in paths from the parameters; a path is a path."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _death(code: int, memory: bool) -> str:
    """Why a kernel's process ended with this code; `memory`: the memory killer was at work meanwhile."""
    if code >= 0:
        return f"the kernel ended by itself (exit code {code}), as by os._exit. See the last lines of its log."
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        why = "by the memory killer" if memory else "most often because the machine ran out of memory"
        cure = "Try a smaller per_device_train_batch_size or fewer workers at a time."
        return f"the kernel was ended by SIGKILL, {why}. {cure}"
    return f"the kernel was ended by {name}, a crash in compiled code or a signal from outside."


def _is_death(error: BaseException | None) -> bool:
    """Whether the kernel died; what failed after that, as a save on a full disk, hides it."""
    while error is not None:
        if isinstance(error, DeadKernelError | KeeperGone) or str(error) == NEVER_READY:
            return True
        error = error.__context__
    return False
