"""An executed notebook that stays small: what its cells printed at length is shortened there and kept beside it, whole.

Ten thousand lines make no notebook better, and every reader of it slower.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nbformat

from nbutils.files import atomic_write

PRINTED = "printed.txt"  # beside the notebook: all that its cells printed, where the notebook has not all of it
BUDGET = 100_000  # bytes of printed text in the notebook's file; figures and tables take as much again
INDENT = 9  # bytes that a line takes in the file beside its JSON


def shorten_printed(notebook: Path) -> bool:
    """Leave the middle of long printed outputs out of the `notebook`, with a line that says so, and write PRINTED.

    Short outputs stay whole, long ones share what is left of the budget. Returns whether anything was left out; where
    nothing is, nothing is written. Raises OSError where there is no room for PRINTED; the notebook is then as it was.
    """
    saved = nbformat.read(notebook, as_version=4)
    streams = [
        output
        for cell in saved.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.text
    ]
    sizes = [_bytes_in_file(each.text) for each in streams]
    if sum(sizes) <= BUDGET:
        return False
    atomic_write(notebook.with_name(PRINTED), "".join(each.text for each in streams))
    most = _fair_share(sizes, BUDGET * 9 // 10)  # room for the lines that say so
    for stream, size in zip(streams, sizes, strict=True):
        if size > most:
            stream.text = _shortened(stream.text, round(len(stream.text) * most / size))
    atomic_write(notebook, nbformat.writes(saved))
    return True


def _bytes_in_file(text: str) -> int:
    """What a stream's text takes in a notebook's file, which holds a list of its lines."""
    return sum(len(json.dumps(line, ensure_ascii=False).encode()) + INDENT for line in text.splitlines(keepends=True))


def _fair_share(sizes: Sequence[int], budget: int) -> int:
    """The most that one may have so that all together have no more than the budget, and as much of it as they can."""
    left = budget
    for number, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - number)
        if size > share:
            return share
        left -= size
    return max(sizes)


def _shortened(text: str, characters: int) -> str:
    """The first and the last lines of `text`, of so many characters together, and between them how much is missing."""
    half = characters // 2
    head, tail = text[:half], text[len(text) - half :]
    head = head[: head.rfind("\n") + 1] or head
    tail = tail[tail.find("\n") + 1 :] or tail
    missing = text[len(head) : len(text) - len(tail)]
    lines = missing.count("\n")
    told = f"{lines:,} lines" if lines > 1 else f"{len(missing):,} characters"
    between = "" if head.endswith("\n") else "\n"
    return f"{head}{between}[... {told} are left out here; {PRINTED} beside this notebook has all ...]\n{tail}"
