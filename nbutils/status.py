"""The table of a plan's variants: what is finished, what runs, what failed and why, what waits."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from nbutils.batch import PLAN_FILE, is_finished
from nbutils.errors import WorkbookError
from nbutils.manifest import FINISHED, RUNNING, Manifest
from nbutils.plans import INTERACTIVE, Plan, Variant, load_plan
from nbutils.progress import duration, read_steps, text_table
from nbutils.runner import summary
from nbutils.runs import Run, load_runs

WAITING = "waiting"
HEADER = ("variant", "status", "attempts", "duration", "message")
Row = tuple[str, str, int, str, str]


def plan_status(plan: Plan, plan_folder: Path) -> str:
    """The table of all variants of `plan`, in its order, then of runs that the plan no longer has."""
    runs = {run.variant: run for run in load_runs(plan_folder)} if plan_folder.is_dir() else {}
    rows = [_planned_row(variant, runs.pop(variant.name, None), plan_folder) for variant in plan.variants]
    return _table(plan.name, rows + [_row(run, "no longer in the plan") for run in runs.values()])


def folder_status(runs_folder: Path) -> str:
    """The tables of all plans with runs in `runs_folder`."""
    folders = [each for each in sorted(runs_folder.glob("[!.]*")) if each.is_dir() and each.name != INTERACTIVE]
    tables = [_recorded_status(folder) for folder in folders]
    return "\n\n".join(filter(None, tables)) or "No runs yet. Start some: python -m nbutils batch params/quick.yaml"


def _recorded_status(plan_folder: Path) -> str:
    try:
        return plan_status(load_plan(plan_folder / PLAN_FILE), plan_folder)
    except WorkbookError:  # runs of no plan, or of one that its notebooks have outgrown
        runs = load_runs(plan_folder)
        return _table(plan_folder.name, [_row(run) for run in runs]) if runs else ""


def _planned_row(variant: Variant, run: Run | None, plan_folder: Path) -> Row:
    if run is None:
        return variant.name, WAITING, 0, "", ""
    stale = run.status == FINISHED and not is_finished(variant, plan_folder)
    return _row(run, "parameters, code or data have changed since: batch makes it again" if stale else "")


def _row(run: Run, note: str = "") -> Row:
    """The message tells what goes on now, else why a newer attempt came to nothing, else why the run did."""
    latest = run.newer or run.manifest
    if latest["status"] == RUNNING:
        steps = read_steps(run.attempt_folder)
        note = f"step {steps[0]} of {steps[1]}" if steps else note
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


def _table(name: str, rows: Iterable[Row]) -> str:
    rows = list(rows)
    finished = sum(row[1] == FINISHED for row in rows)
    return f"{name}: {finished} of {len(rows)} finished\n{text_table(HEADER, rows)}"
