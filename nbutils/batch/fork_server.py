"""The process that runners are forked from: it has imported papermill and what notebooks import, which takes seconds.

A runner's kernel has these imports, too (kernel_keeper.py). The server ends with its batch; runners and kernels go on
without it. One that was killed is replaced with the next runner.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from nbutils.batch import kernel_keeper
from nbutils.batch.kernel_keeper import THRIFT, Imports, end_after, file_status, open_files
from nbutils.foundation import ROOT

PRELOADED = (
    "nbutils.training.trainer",
    "nbutils.report.evidence",
    "nbutils.report.figures",
    "nbutils.evaluation.harness.loading",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
)  # what in the notebooks takes long: with these torch, transformers, datasets, pandas, seaborn
RUNNER = ("nbutils.batch.runner", "nbutils.batch.kernels", "ipykernel.kernelapp")
INLINE_FIGURES = "module://matplotlib_inline.backend_inline"  # what ipykernel sets before a notebook imports matplotlib
WHILE_IMPORTING = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's spare allocator would start a thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not initialise CUDA
}
CLOSE_SECONDS = 5


class ForkServer:
    """The batch's side. modules: for kernels; where there are none each kernel is a fresh process.

    environment: of the imports. log: what the server prints.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._channel, theirs = Pipe()
        with theirs, log.open("w", encoding="utf-8") as output:
            code = "from nbutils.batch.fork_server import main; main()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**environment, **THRIFT},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the batch, which lets runners end their kernels
            )

    def fork(self, function: Callable[..., None], *arguments: Any) -> Connection:
        """Have `function(connection, *arguments)` called in a new process; the other end of its connection.

        The connection brings the number of the process first. It ends where the server ends before it has forked.
        Raises OSError where the server has ended.
        """
        ours, theirs = Pipe()
        try:
            with theirs:
                self._channel.send((function, arguments))
                send_handle(self._channel, theirs.fileno(), self.process.pid)
        except OSError:
            ours.close()
            raise
        return ours

    def close(self) -> None:
        """End the server; what was forked from it goes on."""
        self._channel.close()
        self.process.terminate()  # heard only while it imports
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---- in the server ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Import, then fork for the batch at the connection on the command line, until that has ended."""
    channel, modules = Connection(int(sys.argv[1])), sys.argv[2:]
    if sys.path[0] in ("", str(Path.cwd())):
        del sys.path[0]  # as a kernel's; ipykernel adds the notebook's folder
    if modules:
        kernel_keeper.imports = _imported(modules, channel.fileno())
    else:
        _import(RUNNER)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for runners, which tell the batch how they ended
    while True:
        try:
            function, arguments = channel.recv()
            connection = Connection(recv_handle(channel))
        except (EOFError, OSError):
            break
        if os.fork() == 0:
            channel.close()
            end_after(_run, function, connection, arguments)
        connection.close()
    sys.stderr.flush()
    os._exit(0)  # tearing down all that was imported takes seconds, and nothing of it is open


def _run(function: Callable[..., None], connection: Connection, arguments: Sequence[Any]) -> None:
    """The life of a runner's process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    connection.send(os.getpid())
    function(connection, *arguments)


def _imported(modules: Sequence[str], channel: int) -> Imports:
    """Import; what this process has then, for the kernels forked from it. The refusal is told where none can be."""
    environment = dict(os.environ)
    sources = {path: file_status(path) for path in (ROOT / "nbutils").rglob("*.py")}
    os.environ.update(WHILE_IMPORTING)
    os.environ.setdefault("MPLBACKEND", INLINE_FIGURES)
    refusal = _import((*RUNNER, *modules))
    loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
    own = {*environment, *WHILE_IMPORTING, "MPLBACKEND"}
    return Imports(
        refusal,
        environment,
        added={name: value for name, value in os.environ.items() if name not in own},
        sources={path: each for path, each in sources.items() if str(path) in loaded},
        files=open_files() - {channel},
    )


def _import(modules: Sequence[str]) -> str:
    """Import as a kernel would. Returns why no kernel can be forked from this process, empty where all is well."""
    try:
        with _in_a_notebook():
            for module in modules:
                importlib.import_module(module)
    except Exception:  # whatever it is, a kernel that imports it tells the reader
        traceback.print_exc()
        return f"{module} could not be imported"
    trial = os.fork()  # ends the threads of libraries that can do without them over a fork, OpenBLAS before all
    if trial == 0:
        os._exit(0)
    os.waitpid(trial, 0)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    if len(threads) > 1:
        return f"the imports have started threads: {', '.join(threads)}"
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    if any(file.startswith("/dev/nvidia") for file in opened):
        return "an import has initialised CUDA"
    gc.collect()
    gc.freeze()  # so that collections in the kernels do not copy these pages
    return ""


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
