"""Several processes from a notebook: launch(function, config, processes).

One process is a plain call. More go through torch's elastic launcher with fresh interpreters (spawn), a free port, and
a log and an error record for each rank. torch reports whichever rank it notices first, often only "connection closed by
peer"; here the rank that failed first is named, with its own error.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from threading import Event, Thread
from typing import Any

from nbutils.foundation import errors
from nbutils.foundation.errors import Preempted, RankKilled, RunError, WorkbookError
from nbutils.foundation.processes import FROM_OUTSIDE, end_with_parent
from nbutils.foundation.stopping import AGAIN, leave_quickly, noted, stop_at_once

STOP = "stop"  # a file in the folder of logs: ranks that start later were asked to stop, too
TERMINATED = {signal.SIGTERM, signal.SIGABRT}  # how ranks end that torch or NCCL ends because another one failed
LOOK_SECONDS = 0.2
KILLED_AFTER = 20.0  # seconds after a first error: then torch may have killed a rank that would not end


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
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    log_folder = Path(log_folder or Path.cwd() / "ranks")
    log_folder.mkdir(parents=True, exist_ok=True)
    for stale in [*log_folder.glob("rank*"), *log_folder.glob(STOP)]:
        stale.unlink()
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT",  # of SIGTERM it would kill the ranks half a minute later
    )
    deaths = Deaths(log_folder, processes)
    try:
        with noted(partial(_tell_ranks, log_folder / STOP)) as stop, deaths.watched():
            returned = elastic_launch(settings, _rank)(function, config, str(log_folder), os.getpid())
    except ChildFailedError as error:
        failure = _first_failure(log_folder, deaths)
        stopped = stop.asked and isinstance(failure, RankFailed | RankKilled)
        raise Preempted(AGAIN) if stopped else failure from error
    stopped = [each for each in returned.values() if isinstance(each, Preempted)]
    if stopped:
        raise stopped[0]
    return returned[0]


def _tell_ranks(mark: Path) -> None:
    mark.touch()  # for those that are not started yet
    for rank in multiprocessing.active_children():
        rank.terminate()


@dataclass
class Deaths:
    """When and how ranks end; torch tells of one of them alone, and not when.

    They are looked at from their start on, for one may live a moment only after it has said which rank it is. Their
    ends are not collected here: torch does that, often sooner; their exit codes are read when all is over.
    """

    log_folder: Path
    processes: int
    ranks: list[multiprocessing.process.BaseProcess] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)  # time by process id
    over: Event = field(default_factory=Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, ends are noted as they happen; on Linux alone."""
        if not hasattr(os, "pidfd_open"):
            yield
            return
        others = {child.pid for child in multiprocessing.active_children()}
        thread = Thread(target=self._look, args=(others,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            thread.join()

    def in_order(self) -> list[tuple[float, int, int]]:
        """(time, rank, exit code) of the ranks that have ended and have said which they are, the first one first."""
        told = {path.stem.removeprefix("rank"): path.read_text() for path in self.log_folder.glob("rank*.pid")}
        rank_of = {int(process): int(rank) for rank, process in told.items() if process}
        ended = [process for process in self.ranks if process.pid in rank_of.keys() & self.ended.keys()]
        return sorted((self.ended[each.pid], rank_of[each.pid], each.exitcode or 0) for each in ended)

    def _look(self, others: set[int]) -> None:
        alive: dict[int, int] = {}  # process id by its descriptor
        last = False
        while not last:
            last = self.over.is_set()
            if len(self.ranks) < self.processes:
                self._find(alive, others)
            for descriptor in wait([*alive], 0 if last else LOOK_SECONDS) if alive else ():
                self.ended[alive.pop(descriptor)] = time.time()
                os.close(descriptor)
            if not alive:
                self.over.wait(LOOK_SECONDS)
        for descriptor in alive:
            os.close(descriptor)

    def _find(self, alive: dict[int, int], others: set[int]) -> None:
        for child in multiprocessing.active_children():
            if child.pid not in others:
                others.add(child.pid)
                self.ranks.append(child)
                try:
                    alive[os.pidfd_open(child.pid)] = child.pid
                except OSError:  # it has ended and was collected
                    self.ended[child.pid] = time.time()


def _rank(function: Callable[[Any], Any], config: Any, log_folder: str, parent: int) -> Any:
    end_with_parent(parent)()
    stop_at_once()
    leave_quickly()
    rank = int(os.environ["RANK"])
    (Path(log_folder) / f"rank{rank}.pid").write_text(str(os.getpid()))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "")
    log = (Path(log_folder) / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if (Path(log_folder) / STOP).exists():
            raise Preempted(AGAIN)
        return function(config)
    except BaseException as error:
        if isinstance(error, Preempted) and error.agreed:
            return error  # no failure: that would have the others killed while they end, too
        record = {
            "time": time.time(),
            "rank": rank,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        (Path(log_folder) / f"rank{rank}.error.json").write_text(json.dumps(record))
        raise


def _first_failure(log_folder: Path, deaths: Deaths) -> Exception:
    records = [json.loads(path.read_text()) for path in log_folder.glob("rank*.error.json")]
    first = min(records, key=lambda record: record["time"], default=None)
    killed = _first_killed(deaths)
    if killed and (first is None or killed[0] < first["time"] + KILLED_AFTER):
        return killed[1](f"{killed[2]} Its log is in {log_folder}.")
    if first is None:
        return RankFailed(f"A rank ended without a word. The logs of all ranks are in {log_folder}.")
    kind = getattr(errors, first["type"], None)
    if isinstance(kind, type) and issubclass(kind, WorkbookError):
        return kind(first["message"])
    return RankFailed(
        f"Rank {first['rank']} failed first: {first['type']}: {first['message']}\n{first['traceback']}\n"
        f"The logs of all ranks are in {log_folder}."
    )


def _first_killed(deaths: Deaths) -> tuple[float, type[RankKilled | RankFailed], str] | None:
    """(time, the error, what happened) of the first rank that a signal ended which no other rank's failure explains.

    Killed is what came from outside; a crash in compiled code is a failure.
    """
    for when, rank, code in deaths.in_order():
        if code < 0 and -code not in TERMINATED:
            name = signal.Signals(-code).name
            if -code not in FROM_OUTSIDE:
                return when, RankFailed, f"Rank {rank} failed first: {name}, a crash in compiled code."
            why = ", most often because the machine ran out of memory" if name == "SIGKILL" else ""
            return when, RankKilled, f"Rank {rank} was ended first, by {name}{why}."
    return None
