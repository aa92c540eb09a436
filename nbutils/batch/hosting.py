"""The side of those who use the process that kernels are forked from (kernel_host.py), and what is said to it.

A batch has one that has imported what notebooks do. A runner by itself has one too, which has imported nothing: it
ends the kernel and all that the kernel started when the runner is killed, and knows how much memory was taken.
Kept apart so that batch and runners import none of what the host does.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nbutils.foundation.places import ROOT

PRELOADED = (
    "nbutils.data.data_card",
    "nbutils.evaluation.perplexity",
    "nbutils.report.figures",
    "nbutils.evaluation.generation",
    "nbutils.evaluation.harness.loading",
    "nbutils.training.launching",
    "nbutils.objectives",
    "nbutils.objectives.check",
    "nbutils.evaluation.prefix_study",
    "nbutils.data.preparation",
    "nbutils.evaluation.question_answering",
    "nbutils.evaluation.sample_measures",
    "nbutils.training.stability",
    "nbutils.report.studies",
    "nbutils.models.teachers",
    "nbutils.training.trainer",
    "nbutils.evaluation.unsmoothing",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
)  # what the notebooks import, and with it torch, transformers, datasets, pandas, seaborn
THRIFT = {"TQDM_MININTERVAL": "30"}  # seconds between redraws of a progress bar that nobody watches
LONGEST_SOCKET_FOLDER = 80  # of the 107 bytes a socket's path may have
LONGEST_MESSAGE = 1 << 20  # bytes; an environment can be long
CLOSE_SECONDS = 5


_in_use: Path | None = None
_spare: tuple[ExitStack, Path] | None = None  # until when a host of this process's own would be there, and its log


def use_host(address: Path | None) -> None:
    """From now on this process's kernels are forked by the host at `address`."""
    global _in_use
    _in_use = address


def host_in_use() -> Path | None:
    """The address of the host that forks this process's kernels, None where each is a fresh process."""
    return _in_use


@contextmanager
def hosted(log: Path) -> Iterator[None]:
    """Within, this process's kernels have a host: the batch's where there is one, else one of its own.

    Where the batch's refuses, `own_host` gives one.
    """
    global _spare
    if sys.platform != "linux":
        yield
        return
    batch_host = host_in_use()
    with ExitStack() as until:
        _spare = (until, log)
        try:
            if batch_host is None:
                use_host(own_host())
            yield
        finally:
            _spare = None
            use_host(batch_host)


def own_host() -> Path | None:
    """A host of this process's own, to the end of `hosted`; None outside of that. Raises OSError where none starts."""
    if _spare is None:
        return None
    until, log = _spare
    until.callback(_remove_empty, log)
    return until.enter_context(kernel_host((), os.environ, log))


def _remove_empty(log: Path) -> None:
    if log.is_file() and not log.stat().st_size:
        log.unlink()


def short_temporary_folder() -> str:
    """Where a folder for sockets can lie: a socket's path must be short."""
    base = tempfile.gettempdir()
    return base if len(base) < LONGEST_SOCKET_FOLDER else "/tmp"


@contextmanager
def kernel_host(modules: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Path]:
    """A host that imports `modules` under `environment`; gives the socket it answers at, before it has imported them.

    What it prints goes to `log`. At the end no process of it is left.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=short_temporary_folder()) as folder:
        address = Path(folder) / "socket"
        with message_socket() as listener, log.open("w", encoding="utf-8") as output:
            listener.bind(str(address))
            listener.listen()
            host = subprocess.Popen(
                [sys.executable, "-m", "nbutils.batch.kernel_host", str(listener.fileno()), *modules],
                stdin=subprocess.PIPE,  # its end tells the host that the batch has ended
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**environment, **THRIFT},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the batch, which lets runners end their kernels
            )
        try:
            yield address
        finally:
            _close(host)


def _close(host: subprocess.Popen) -> None:
    host.stdin.close()
    host.terminate()  # heard only while it imports
    try:
        host.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        host.kill()
        host.wait()


def message_socket(descriptor: int | None = None) -> socket.socket:
    """A socket on which every message arrives whole or not at all."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=descriptor)


def send(connection: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send one message, with open files of this process. Raises OSError where the other side has gone."""
    socket.send_fds(connection, [json.dumps(message).encode()], files)


def receive(connection: socket.socket, files: int = 0) -> tuple[dict[str, Any], list[int]]:
    """One message and the open files that came with it. Raises EOFError where the other side has gone."""
    message, received, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, files)
    if not message:
        raise EOFError("the connection was closed")
    return json.loads(message), received
