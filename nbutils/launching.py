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
import time
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nbutils import errors
from nbutils.errors import Preempted, RunError, WorkbookError
from nbutils.stopping import AGAIN, leave_quickly, noted, stop_at_once

STOP = "stop"  # a file in the folder of logs: ranks that start later were asked to stop, too


class RankFailed(RuntimeError):
    """A training process ended in an error; the message has the first rank's own."""


def launch(function: Callable[[Any], Any], config: Any, processes: int = 1, log_folder: Path | None = None) -> Any:
    """function(config) in `processes` ranks; returns what rank 0 returned.

    `function` and `config` must be importable and picklable, because ranks start from nothing. Each rank finds RANK,
    WORLD_SIZE and the rest of torch's variables in its environment; its output goes to `log_folder`/rank<i>.log.
    Raises RankFailed naming the first rank that failed and its error; a user's mistake is raised as what it is, and
    Preempted where SIGTERM asks to stop, which every rank is told and obeys in its own way.
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
    with noted(partial(_tell_ranks, log_folder / STOP)) as stop:
        try:
            returned = elastic_launch(settings, _rank)(function, config, str(log_folder))
        except ChildFailedError as error:
            failure = _first_failure(log_folder)
            raise Preempted(AGAIN) if stop.asked and isinstance(failure, RankFailed) else failure from error
    stopped = [each for each in returned.values() if isinstance(each, Preempted)]
    if stopped:
        raise stopped[0]
    return returned[0]


def _tell_ranks(mark: Path) -> None:
    mark.touch()  # for those that are not started yet
    for rank in multiprocessing.active_children():
        rank.terminate()


def _rank(function: Callable[[Any], Any], config: Any, log_folder: str) -> Any:
    stop_at_once()
    leave_quickly()
    rank = int(os.environ["RANK"])
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


def _first_failure(log_folder: Path) -> Exception:
    records = [json.loads(path.read_text()) for path in log_folder.glob("rank*.error.json")]
    if not records:
        return RankFailed(f"A rank died without a word (killed, or out of memory). Its log is in {log_folder}.")
    first = min(records, key=lambda record: record["time"])
    kind = getattr(errors, first["type"], None)
    if isinstance(kind, type) and issubclass(kind, WorkbookError):
        return kind(first["message"])
    return RankFailed(
        f"Rank {first['rank']} failed first: {first['type']}: {first['message']}\n{first['traceback']}\n"
        f"The logs of all ranks are in {log_folder}."
    )
