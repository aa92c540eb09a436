"""The executed notebook put right: what failed, which cells ended, and long printed outputs shortened.

papermill writes "completed" where a kernel was killed or left by `sys.exit`; here a notebook that ended badly says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from papermill.execute import ERROR_MARKER_TAG

from nbutils.foundation import atomic_write

LOG_LINES = 20
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
PRINTED = "printed.txt"  # beside the notebook: all that its cells printed, where the notebook has not all of it
BUDGET, SHORT = 80_000, 2_000  # characters of all long printed outputs together; those that are never shortened


# ---- what failed -----------------------------------------------------------------------------------------------------


def mark_ending(output: Path, told: Mapping[str, Any] | None, make_room: Callable[[], None]) -> dict[str, Any]:
    """Put the saved notebook right where its kernel was stopped, with the error `told`; the record of that.

    A notebook that was cut in a save, or cannot be written any more, goes: it would claim cells that did not end.
    """
    nowhere = {**(told or {}), "cell": None, "log": []}
    try:
        saved = nbformat.read(output, as_version=4)
    except (OSError, ValueError):
        output.unlink(missing_ok=True)
        return nowhere
    index = _last_started(saved)
    record = _record(told["type"], told["message"], saved, index) if told else nowhere
    if told:
        error = nbformat.v4.new_output("error", ename=told["type"], evalue=told["message"])
        saved.cells[index].outputs = [*saved.cells[index].get("outputs", []), error]
    for cell in saved.cells[index:]:
        cell.metadata.papermill = cell.metadata.get("papermill", {}) | {"status": "pending", "exception": None}
    saved.cells[index].metadata.papermill.update(status="failed", exception=True)
    saved.metadata.papermill.exception = True
    make_room()
    try:
        atomic_write(output, nbformat.writes(saved) + "\n")
    except OSError:
        output.unlink(missing_ok=True)
    return record


def _last_started(saved: NotebookNode) -> int:
    started = [index for index, cell in enumerate(saved.cells) if cell.metadata.get("papermill", {}).get("start_time")]
    first = next((index for index, cell in enumerate(saved.cells) if cell.cell_type == "code"), 0)
    return started[-1] if started else first


def find_failure(output: Path) -> dict[str, Any] | None:
    """The record of the first cell that has an error or was never run, None where all is well."""
    saved = nbformat.read(output, as_version=4)
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


def _failed_line(cell: NotebookNode, error: NotebookNode) -> str:
    """The line of the cell that the traceback names last; empty where it names none, as of a user's mistake."""
    named = re.findall(rf"Cell In\[{cell.execution_count}\], line (\d+)", plain("\n".join(error.traceback)))
    lines = cell.source.splitlines()
    return lines[int(named[-1]) - 1].strip() if named and int(named[-1]) <= len(lines) else ""


def _record(kind: str, message: str, saved: NotebookNode, index: int, failed_line: str = "") -> dict[str, Any]:
    """type, message, cell and log of an error, for manifest.json."""
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


# ---- what is long ----------------------------------------------------------------------------------------------------


def shorten_printed(notebook: Path) -> None:
    """Leave the middle of long printed outputs out of `notebook`; PRINTED beside it then has them whole.

    What a cell printed becomes one text for stdout and one for stderr. Raises OSError where there is no room for
    PRINTED; the notebook is then as it was.
    """
    saved = nbformat.read(notebook, as_version=4)
    before, cells = nbformat.writes(saved), [cell for cell in saved.cells if cell.get("outputs")]
    printed = "".join(each.text for cell in cells for each in cell.outputs if each.output_type == "stream")
    for cell in cells:
        cell.outputs = _merged(cell.outputs)
    streams = [each for cell in cells for each in cell.outputs if each.output_type == "stream"]
    share = max(SHORT, BUDGET // max(1, sum(len(each.text) > SHORT for each in streams)))
    long = [each for each in streams if len(each.text) > share]
    for stream in long:
        stream.text = _ends_of_text(stream.text, share)
    if long:
        atomic_write(notebook.with_name(PRINTED), printed)
    if (after := nbformat.writes(saved)) != before:
        atomic_write(notebook, after)


def _merged(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """One output for stdout and one for stderr, each without what a carriage return let later text overwrite."""
    merged: list[NotebookNode] = []
    pieces: dict[str, list[str]] = {}
    for output in outputs:
        if output.output_type != "stream" or output.name not in pieces:
            merged.append(output)
        if output.output_type == "stream":
            pieces.setdefault(output.name, []).append(output.text)
    for output in merged:
        if output.output_type == "stream":
            lines = "".join(pieces[output.name]).split("\n")
            output.text = "\n".join(line[line.rfind("\r", 0, max(0, len(line) - 1)) + 1 :] for line in lines)
    return merged


def _ends_of_text(text: str, characters: int) -> str:
    """The first and the last lines of `text`, of so many characters together, and between them how much is missing."""
    head, tail = text[: characters // 2], text[len(text) - characters // 2 :]
    head = head[: head.rfind("\n") + 1] or head
    tail = tail[tail.find("\n") + 1 :] or tail
    missing = len(text) - len(head) - len(tail)
    between = "" if head.endswith("\n") else "\n"
    return f"{head}{between}[... {missing:,} characters are left out here; {PRINTED} has all ...]\n{tail}"
