"""Several processes from a notebook: launch(function, config, processes).

One process is a plain call. More are fresh interpreters (spawn) that meet at a store which this process keeps on a free
port, each with a log and an error record. Their ends are watched here rather than by torch's elastic launcher, which
reports whichever rank it notices first, often only "connection closed by peer": the rank that failed first is named,
with its own error.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nbutils.foundation import (
    AGAIN,
    FROM_OUTSIDE,
    Preempted,
    RankKilled,
    RunError,
    WorkbookError,
    end_with_parent,
    errors,
    leave_quickly,
    noted,
    stop_at_once,
)

STOP = "stop"  # a file in the folder of logs: ranks that start later were asked to stop, too
TERMINATED = {signal.SIGTERM, signal.SIGABRT}  # how ranks end because another one failed
LEAVING_SECONDS = 20.0  # for the other ranks to end by themselves once one has failed


class RankFailed(RuntimeError):
    """A training process ended in an error; the message has the first rank's own."""


def launch(function: Callable[[Any], Any], config: Any, processes: int = 1, log_folder: Path | None = None) -> Any:
    """function(config) in `processes` ranks; returns what rank 0 returned.

    `function` and `config` must be importable and picklable, because ranks start from nothing. Each rank finds RANK,
    WORLD_SIZE and the rest of torch's variables in its environment; its output goes to `log_folder`/rank<i>.log.
    Raises RankFailed naming the first rank that failed and its error; a user's mistake is raised as what it is,
    RankKilled where that rank was killed, and Preempted where SIGTERM asks to stop, which every rank is told and obeys
    in its own way. Ranks end with this process.
    """
    if processes == 1:
        return function(config)
    if function.__module__ == "__main__":
        raise RunError(f"{function.__name__} is defined in the notebook; move it to a module, ranks must import it.")
    from torch.distributed import TCPStore

    log_folder = Path(log_folder or Path.cwd() / "ranks")
    log_folder.mkdir(parents=True, exist_ok=True)
    for stale in [*log_folder.glob("rank*"), *log_folder.glob(STOP)]:
        stale.unlink()
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    ranks = [
        context.Process(target=_rank, args=(function, config, _environment(i, processes, store.port), log_folder, pipe))
        for i, (_, pipe) in enumerate(pipes)
    ]
    try:
        with noted(partial(_tell_ranks, log_folder / STOP, ranks)) as stop:
            for rank, (_, sender) in zip(ranks, pipes, strict=True):
                rank.start()
                sender.close()
            returned, failed = _watch(ranks, [receiver for receiver, _ in pipes])
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
    if failed is not None:
        failure = _failure(*failed, log_folder)
        raise Preempted(AGAIN) if stop.asked and isinstance(failure, RankFailed | RankKilled) else failure
    stopped = [each for each in returned.values() if isinstance(each, Preempted)]
    if stopped:
        raise stopped[0]
    return returned[0]


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """torch's variables of one rank."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in ranks.items()}


def _tell_ranks(mark: Path, ranks: Sequence[BaseProcess]) -> None:
    mark.touch()  # for those that are not started yet
    for rank in ranks:
        if rank.pid and rank.is_alive():
            rank.terminate()


def _watch(ranks: Sequence[BaseProcess], receivers: list[Connection]) -> tuple[dict[int, Any], tuple[int, int] | None]:
    """{rank: what it returned} once all have ended, and (rank, exit code) of the first that failed, if any."""
    returned: dict[int, Any] = {}
    failed: tuple[int, int] | None = None
    answers = dict(zip(receivers, range(len(ranks)), strict=True))
    alive = {rank.sentinel: i for i, rank in enumerate(ranks)}
    deadline = float("inf")
    while alive:
        ready = wait([*alive, *answers], None if failed is None else max(0.0, deadline - time.monotonic()))
        for receiver in [each for each in ready if each in answers]:
            with suppress(EOFError):  # a rank that failed sends nothing
                returned[answers[receiver]] = receiver.recv()
            del answers[receiver]
        ended = [alive.pop(each) for each in ready if each in alive]
        codes = [(i, _exit_code(ranks[i])) for i in ended]
        codes.sort(key=lambda each: not _from_outside(each[1]))  # where several end at once: a kill is the cause
        failures = [each for each in codes if each[1] != 0]
        if failures and failed is None:
            failed, deadline = failures[0], time.monotonic() + LEAVING_SECONDS
            for i in alive.values():
                ranks[i].terminate()
        if time.monotonic() > deadline:
            for i in alive.values():
                ranks[i].kill()
    return returned, failed


def _exit_code(rank: BaseProcess) -> int:
    rank.join()
    return rank.exitcode or 0


def _from_outside(code: int) -> bool:
    return code < 0 and -code not in TERMINATED


def _rank(
    function: Callable[[Any], Any], config: Any, environment: dict[str, str], log_folder: Path, answer: Connection
) -> None:
    end_with_parent(multiprocessing.parent_process().pid)()
    stop_at_once()
    leave_quickly()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "")
    log = (log_folder / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if (log_folder / STOP).exists():
            raise Preempted(AGAIN)
        answer.send(function(config))
    except BaseException as error:
        if isinstance(error, Preempted) and error.agreed:
            answer.send(error)  # no failure: that would have the others ended while they save, too
            return
        record = {
            "time": time.time(),
            "rank": rank,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        (log_folder / f"rank{rank}.error.json").write_text(json.dumps(record))
        raise


def _failure(rank: int, code: int, log_folder: Path) -> Exception:
    """What to raise where this rank was the first to end, with this exit code.

    Killed is what came from outside; a crash in compiled code is a failure.
    """
    if _from_outside(code):
        name = signal.Signals(-code).name
        if -code not in FROM_OUTSIDE:
            return RankFailed(
                f"Rank {rank} failed first: {name}, a crash in compiled code. Its log is in {log_folder}."
            )
        why = ", most often because the machine ran out of memory" if name == "SIGKILL" else ""
        return RankKilled(f"Rank {rank} was ended first, by {name}{why}. Its log is in {log_folder}.")
    records = [json.loads(path.read_text()) for path in log_folder.glob("rank*.error.json")]
    first = min(records, key=lambda record: record["time"], default=None)
    if first is None:
        return RankFailed(f"A rank ended without a word. The logs of all ranks are in {log_folder}.")
    kind = getattr(errors, first["type"], None)
    if isinstance(kind, type) and issubclass(kind, WorkbookError):
        return kind(first["message"])
    return RankFailed(
        f"Rank {first['rank']} failed first: {first['type']}: {first['message']}\n{first['traceback']}\n"
        f"The logs of all ranks are in {log_folder}."
    )
