"""One notebook executed by papermill in a kernel of its own, with the truth about how it ended.

papermill alone lets kernels race for ports, starts whatever kernel a user's home folder calls `python3`, and writes a
notebook that says "completed" when its kernel was killed or left by `sys.exit`. Here a kernel talks over sockets in a
private folder, is this Python, and a notebook that ended badly says so.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.execute import ERROR_MARKER_TAG, execute_notebook
from traitlets import default
from traitlets.config import Config

from nbutils.batch.hosting import THRIFT, short_temporary_folder
from nbutils.batch.thrift import shorten_printed
from nbutils.batch.warm_kernels import exit_code, peak_memory_mib, provisioner
from nbutils.foundation.environment import memory_kills
from nbutils.foundation.files import atomic_write
from nbutils.foundation.processes import FROM_OUTSIDE
from nbutils.foundation.stopping import Watch

LOG_LINES = 20
IOPUB_SECONDS = 60  # the default of 4 fails a cell whose output is slow to arrive on a busy machine
START_SECONDS = 180  # many kernels that start at once on few cores
NEVER_READY = "Kernel died before replying to kernel_info"  # a RuntimeError of jupyter_client, of no kind of its own
AUTOSAVE_SECONDS = 60  # the whole notebook is written each time
_STARTED: list[AsyncKernelManager] = []  # by the `execute` at work in this process
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


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
    `output` claims no cell that did not end.
    """
    watch = watch or Watch()
    killed_before = memory_kills()
    with _thrift(output), _private_kernel(watch) as (settings, managers), _environment(THRIFT | dict(environment)):
        try:
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
                mark_ending(output, watch)
                raise
            code, memory = exit_code(managers[-1].provisioner), memory_kills() > killed_before
            died = {"type": KernelDied.__name__, "message": _death(code, memory)}
            raise KernelDied(mark_ending(output, watch, died) | {"crash": -code not in FROM_OUTSIDE}) from None
    failure = _failure(nbformat.read(output, as_version=4))
    if failure:
        raise NotebookFailed(failure)


def signal_kernel(number: int) -> bool:
    """Send a signal to the kernel that `execute` runs now, SIGKILL to all it started; False where none runs yet."""
    process = next((manager.provisioner for manager in _STARTED if getattr(manager.provisioner, "pid", None)), None)
    if process is None:
        return False
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pgid, number) if number == signal.SIGKILL else os.kill(process.pid, number)
    return True


@contextmanager
def _private_kernel(watch: Watch) -> Iterator[tuple[dict[str, Any], list[AsyncKernelManager]]]:
    """(settings for nbclient, managers of the kernels it starts): this Python, sockets in a folder of its own.

    Whatever the kernel started is ended with it, and the kernel itself where nbclient forgets it: after an interrupt
    while it starts.
    """
    managers: list[AsyncKernelManager] = []

    class PrivateKernelManager(AsyncKernelManager):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.provisioner = provisioner(self)
            managers.append(self)
            _STARTED.append(self)

        async def _async_interrupt_kernel(self) -> None:
            """Of a shutdown it is the first thing: a kernel still busy with its last answer would tell of an error."""
            if watch.in_cell:
                await super()._async_interrupt_kernel()

        @default("kernel_spec_manager")
        def _native_kernel(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])  # a kernel called python3 in a home folder may be another Python

    with tempfile.TemporaryDirectory(prefix="kernel-", dir=short_temporary_folder()) as folder:
        sockets = {"transport": "ipc", "ip": f"{folder}/socket", "connection_file": f"{folder}/connection.json"}
        config = Config({"KernelManager": sockets})
        try:
            yield {"config": config, "kernel_manager_class": PrivateKernelManager}, managers
        finally:
            for manager in managers:
                _end_group(getattr(manager.provisioner, "pgid", None))
                _STARTED.remove(manager)
                watch.peak_memory_mib = peak_memory_mib(manager.provisioner)


@contextmanager
def _thrift(output: Path) -> Iterator[None]:
    """Whatever ends the run, what its cells printed at length is shortened in the saved notebook."""
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # not there, no room beside it, half a notebook: it stays as it is
            shorten_printed(output)


def _end_group(group: int | None) -> None:
    if group:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return  # nothing was left


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
        return (
            f"the kernel was ended by SIGKILL, {why}. Try a smaller per_device_train_batch_size or fewer workers at a "
            "time."
        )
    return f"the kernel was ended by {name}, a crash in compiled code or a signal from outside."


def _is_death(error: BaseException | None) -> bool:
    """Whether the kernel died; what failed after that, as a save on a full disk, hides it."""
    while error is not None:
        if isinstance(error, DeadKernelError) or str(error) == NEVER_READY:
            return True
        error = error.__context__
    return False


def mark_ending(output: Path, watch: Watch, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Put the saved notebook right, where papermill wrote `completed`, with the error `told`; the record of that.

    A notebook that was cut in a save, or cannot be written any more, goes: it would claim cells that did not end.
    """
    told = told or {"type": "", "message": ""}
    nowhere = {**told, "cell": None, "log": []}
    try:
        saved = nbformat.read(output, as_version=4)
    except (OSError, ValueError):
        output.unlink(missing_ok=True)
        return nowhere
    index = _last_started(saved)
    record = _record(told["type"], told["message"], saved, index) if told["type"] else nowhere
    if told["type"]:
        error = nbformat.v4.new_output("error", ename=told["type"], evalue=told["message"])
        saved.cells[index].outputs = [*saved.cells[index].get("outputs", []), error]
    _mark_cells(saved, index)
    watch.make_room()
    try:
        _save(saved, output)
    except OSError:
        output.unlink(missing_ok=True)
    return record


def _mark_cells(saved: nbformat.NotebookNode, failed: int) -> None:
    """Set papermill's marks right: cell `failed` did not end, the cells after it did not start."""
    for cell in saved.cells[failed:]:
        cell.metadata.papermill = cell.metadata.get("papermill", {}) | {"status": "pending", "exception": None}
    saved.cells[failed].metadata.papermill.update(status="failed", exception=True)
    saved.metadata.papermill.exception = True


def _last_started(saved: nbformat.NotebookNode) -> int:
    started = [index for index, cell in enumerate(saved.cells) if cell.metadata.get("papermill", {}).get("start_time")]
    first = next((index for index, cell in enumerate(saved.cells) if cell.cell_type == "code"), 0)
    return started[-1] if started else first


def _save(saved: nbformat.NotebookNode, output: Path) -> None:
    atomic_write(output, nbformat.writes(saved) + "\n")


def _failure(saved: nbformat.NotebookNode) -> dict[str, Any] | None:
    """The record of the first cell that has an error or was never run, None where all is well."""
    for index, cell in enumerate(saved.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        error = next((each for each in cell.outputs if each.output_type == "error"), None)
        if error:
            message = error.evalue
            if error.ename == "SystemExit":
                message = f"sys.exit({message or ''}) in a notebook ends nothing well. Raise an error, or end the cell."
            return _record(error.ename, message, saved, index, _failed_line(cell, error))
        if cell.metadata.get("papermill", {}).get("exception"):  # the kernel could not send what it was
            message = "the cell failed, and its error holds characters that cannot be sent. Run the notebook by hand."
            return _record("UnknownError", message, saved, index)
        if cell.execution_count is None:
            return _record("NotRun", "the notebook ended before this cell", saved, index)
    return None


def _failed_line(cell: nbformat.NotebookNode, error: nbformat.NotebookNode) -> str:
    """The line of the cell that the traceback names last; empty where it names none, as of a user's mistake."""
    named = re.findall(rf"Cell In\[{cell.execution_count}\], line (\d+)", plain("\n".join(error.traceback)))
    lines = cell.source.splitlines()
    return lines[int(named[-1]) - 1].strip() if named and int(named[-1]) <= len(lines) else ""


def _record(kind: str, message: str, saved: nbformat.NotebookNode, index: int, failed_line: str = "") -> dict[str, Any]:
    cell = saved.cells[index]
    printed = [
        output.text
        for each in saved.cells[: index + 1]
        for output in each.get("outputs", [])
        if output.output_type == "stream" and ERROR_MARKER_TAG not in each.metadata.get("tags", [])
    ]
    return {
        "type": kind,
        "message": plain(message),
        "cell": f"In [{cell.get('execution_count') or ' '}]" + f": {failed_line}" * bool(failed_line),
        "log": plain("".join(printed)).splitlines()[-LOG_LINES:],
    }


def plain(text: str) -> str:
    """`text` without terminal codes (colours, cursor moves)."""
    return ANSI.sub("", text)
