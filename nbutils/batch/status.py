"""The table of a plan's variants: what is finished, runs, waits or is blocked, what failed and why.

    python -m nbutils status quick --watch

It reads files and locks alone, so it works in any terminal while a batch or a cluster is at work. `--watch` follows
until neither is any more.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from nbutils.batch.batch import is_going_on
from nbutils.batch.preflight import stale_of
from nbutils.batch.progress import BLOCKED, duration, steps_told, terminal_width, text_table
from nbutils.batch.runner import summary
from nbutils.foundation import WorkbookError
from nbutils.runs import (
    FAILED,
    FINISHED,
    INTERACTIVE,
    KILLED,
    PLAN_FILE,
    PREEMPTED,
    RUNNING,
    CodeOf,
    Manifest,
    Plan,
    Run,
    Variant,
    load_plan,
    load_runs,
)

WAITING = "waiting"
HEADER = ("variant", "status", "attempts", "duration", "message")
OF_LEAST_INTEREST = (FINISHED, WAITING, BLOCKED)  # left out first where a table must fit a screen
PASSING = re.compile(r"step \d+ of \d+|\b\d+ (?:s|min|h)\b|\s+")  # what is another at each look
Row = tuple[str, str, int, str, str]


def plan_status(plan: Plan, plan_folder: Path, fit: int = 0) -> str:
    """The table of all variants of `plan`, in its order, then of runs that the plan no longer has.

    fit: leave out what a terminal has no room for, finished variants first, where so many tables share it; 0: nothing.
    """
    runs = {run.variant: run for run in load_runs(plan_folder)} if plan_folder.is_dir() else {}
    code, going_on = CodeOf(), is_going_on(plan_folder)
    rows: dict[str, Row] = {}
    for variant in plan.variants:
        run = runs.pop(variant.name, None)
        rows[variant.name] = _planned_row(variant, run, plan_folder, code) if run else _waiting(variant, rows, going_on)
    more = [_row(run, "no longer in the plan") for run in runs.values()]
    return _table(plan.name, [*rows.values(), *more], going_on, fit)


def folder_status(runs_folder: Path, fit: bool = False) -> str:
    """The tables of all plans with runs in `runs_folder`; `fit`: leave out what a terminal has no room for."""
    folders = plan_folders(runs_folder)
    tables = [recorded_status(folder, fit * len(folders)) for folder in folders]
    return "\n\n".join(filter(None, tables)) or "No runs yet. Start some: python -m nbutils batch params/quick.yaml"


def plan_folders(runs_folder: Path) -> list[Path]:
    """The folders of plans in the folder of all of them."""
    return [each for each in sorted(runs_folder.glob("[!.]*")) if each.is_dir() and each.name != INTERACTIVE]


def watch(show: Callable[[], str], seconds: float = 2.0, going_on: Callable[[], bool] = lambda: True) -> None:
    """Show what `show` tells every so many seconds, until `going_on` is False or Ctrl-C: quietly, it is no error.

    In a terminal in place, and once more at the end; elsewhere again when more has changed than times and steps.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, shown, text = Console(), None, ""
    in_place = console.is_terminal and not console.is_dumb_terminal
    with suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) if in_place else nullcontext() as live:
        ends = False
        while not ends:
            if shown is not None:
                time.sleep(seconds)
            ends = not going_on()  # asked before: what has changed since is then shown
            text, before = show(), shown
            shown = PASSING.sub("", text)
            if live:
                live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)
            elif shown != before:
                print(f"---- {time.strftime('%H:%M:%S')}\n{text}", flush=True)
    if in_place:
        print(text)


def recorded_status(plan_folder: Path, fit: int = 0) -> str:
    """The table of the plan whose copy lies with its runs, of the runs alone where it cannot be read; empty of none."""
    try:
        return plan_status(load_plan(plan_folder / PLAN_FILE), plan_folder, fit)
    except WorkbookError:  # runs of no plan, or of one that its notebooks have outgrown
        runs = load_runs(plan_folder)
        return _table(plan_folder.name, list(map(_row, runs)), is_going_on(plan_folder), fit) if runs else ""


def _planned_row(variant: Variant, run: Run, plan_folder: Path, code: CodeOf) -> Row:
    stale = stale_of(run.manifest, variant, plan_folder, code) if run.status == FINISHED else ""
    return _row(run, f"stale, batch makes it again: {stale}" if stale else "")


def _waiting(variant: Variant, rows: dict[str, Row], going_on: bool) -> Row:
    """Of a variant that has not run. A batch at work may yet try again what was killed or stopped."""
    hopeless = {FAILED, BLOCKED} if going_on else {FAILED, BLOCKED, KILLED, PREEMPTED}
    for needed in variant.needs.values():
        if rows[needed][1] in hopeless:
            return variant.name, BLOCKED, 0, "", f"needs {needed}, which is {rows[needed][1]}"
    return variant.name, WAITING, 0, "", ""


def _row(run: Run, note: str = "") -> Row:
    """The message tells what goes on now, else why a newer attempt came to nothing, else why the run did."""
    latest = run.newer or run.manifest
    if latest["status"] == RUNNING:
        note = steps_told(run.attempt_folder) or note
    elif run.newer:
        note = f"a newer attempt is {latest['status']}: {summary(latest)}"
    shown = latest if latest["status"] == RUNNING else run.manifest
    return run.variant, shown["status"], len(latest["attempts"]), _duration(shown), note or summary(shown)


def _duration(manifest: Manifest) -> str:
    last = manifest["attempts"][-1]
    if last["end"] is None and manifest["status"] != RUNNING:
        return ""
    end = datetime.fromisoformat(last["end"]) if last["end"] else datetime.now(UTC)
    return duration((end - datetime.fromisoformat(last["start"])).total_seconds())


def _table(name: str, rows: list[Row], going_on: bool, fit: int) -> str:
    counts = Counter(row[1] for row in rows)
    others = [f"{number} {status}" for status, number in counts.items() if status != FINISHED]
    at_work = [] if going_on or len(rows) == counts[FINISHED] else ["no batch is at work"]
    headline = ", ".join([f"{name}: {counts[FINISHED]} of {len(rows)} finished", *others, *at_work])
    shown = _fitting(rows, shutil.get_terminal_size().lines // fit - 4) if fit and sys.stdout.isatty() else rows
    left_out = Counter(row[1] for row in rows) - Counter(row[1] for row in shown)
    more = ", ".join(f"{number} {status}" for status, number in left_out.items())
    return "\n".join(
        [headline, text_table(HEADER, shown, terminal_width()), *([f"and {more} that do not fit here"] if more else [])]
    )


def _fitting(rows: list[Row], number: int) -> list[Row]:
    """As many rows, in their order, with what is of least interest left out first, and of that the last."""
    for status in (*OF_LEAST_INTEREST, None):
        excess = len(rows) - max(1, number)
        if excess > 0:
            out = {row[0] for row in [each for each in rows if status in (each[1], None)][-excess:]}
            rows = [row for row in rows if row[0] not in out]
    return rows
