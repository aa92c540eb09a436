"""An executed notebook that stays small: what its cells printed at length is shortened there and kept beside it, whole.

Ten thousand lines make no notebook better, and every reader of it slower.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from nbutils.foundation.files import atomic_write

PRINTED = "printed.txt"  # beside the notebook: all that its cells printed, where the notebook has not all of it
BUDGET = 100_000  # bytes of printed text in the notebook's file; figures and tables take as much again
FLOOD = 30  # outputs of one cell, above which figures and tables are left out
MOST_OUTPUTS = 38  # of all cells, where one has a flood of them; a flood's first and last stay in any case
LEAST_OUTPUTS = 5  # of a cell
INDENT = 9  # bytes that a line takes in the file beside its JSON


def shorten_printed(notebook: Path) -> bool:
    """Leave the middle of long printed outputs out of the `notebook`, with a line that says so, and write PRINTED.

    Each cell's printed pieces become one for stdout and one for stderr, which nbclient sees to only where a cell ends.
    Short ones stay whole, long ones share what is left of the budget. In a flood of figures and tables the first and
    the last stay. Errors stay. Returns whether anything was left out; where nothing is, PRINTED is not written. Raises
    OSError where there is no room for PRINTED; the notebook is then as it was.
    """
    saved = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in saved.cells if cell.get("outputs")]
    printed = "".join(_in_words(output) for cell in cells for output in cell.outputs)
    merged = [_merge_streams(cell) for cell in cells]
    left_out = _thin_out(cells)
    left_out = _shorten([each for cell in cells for each in cell.outputs if each.output_type == "stream"]) or left_out
    if left_out:
        atomic_write(notebook.with_name(PRINTED), printed)
    if left_out or any(merged):
        atomic_write(notebook, nbformat.writes(saved))
    return left_out


def _in_words(output: NotebookNode) -> str:
    """What PRINTED has of an output: the text of figures and tables, which holds no picture and no HTML."""
    if output.output_type == "stream":
        return output.text
    text = output.get("data", {}).get("text/plain", "")
    return f"{text}\n" if text else ""


def _merge_streams(cell: NotebookNode) -> bool:
    """Make one output of all that the cell wrote to stdout, and one of stderr, as nbclient does; whether it changed."""
    merged: list[NotebookNode] = []
    pieces: dict[str, list[str]] = {}
    for output in cell.outputs:
        if output.output_type != "stream":
            merged.append(output)
            continue
        if output.name not in pieces:
            merged.append(output)
        pieces.setdefault(output.name, []).append(output.text)
    changed = len(merged) < len(cell.outputs)
    for output in merged:
        if output.output_type == "stream":
            text = _without_overwritten("".join(pieces[output.name]))
            changed, output.text = changed or text != output.text, text
    cell.outputs = merged
    return changed


def _without_overwritten(text: str) -> str:
    """`text` without what a carriage return let later text overwrite, as the earlier states of a bar."""
    lines = text.split("\n")
    return "\n".join(line[line.rfind("\r", 0, max(0, len(line) - 1)) + 1 :] for line in lines)


def _thin_out(cells: Sequence[NotebookNode]) -> bool:
    """Keep the first and the last figures and tables of cells with a flood of them; whether any was left out."""
    floods = [cell for cell in cells if len(cell.outputs) > FLOOD]
    calm = sum(len(cell.outputs) for cell in cells) - sum(len(cell.outputs) for cell in floods)
    left_out = False
    for cell in floods:
        errors = [number for number, each in enumerate(cell.outputs) if each.output_type == "error"]
        always = {number for number, each in enumerate(cell.outputs) if each.output_type == "stream"}
        always |= {*errors[:1], *errors[-1:]}
        others = [number for number in range(len(cell.outputs)) if number not in always]
        most = max((MOST_OUTPUTS - calm) // len(floods), LEAST_OUTPUTS) - len(always) - 1
        if len(others) <= max(most + 1, 2):  # that one more would take the place of the line that says so
            continue
        left_out = True
        sizes = [len(json.dumps(cell.outputs[number])) for number in others]
        kept = next((n for n in range(most, 2, -1) if sum(_ends(sizes, n)) <= BUDGET // len(floods)), 2)
        stay = always | set(_ends(others, kept))
        note = f"[... {len(cell.outputs) - len(stay):,} outputs are left out here ...]"
        missing = next(number for number in others if number not in stay)
        noted = {missing: nbformat.v4.new_output("display_data", {"text/plain": note})}
        cell.outputs = [
            noted.get(number, each) for number, each in enumerate(cell.outputs) if number in stay or number in noted
        ]
    return left_out


def _ends(items: Sequence[int], number: int) -> list[int]:
    """The first and the last of the items, so many together."""
    return [*items[: (number + 1) // 2], *items[len(items) - number // 2 :]]


def _shorten(streams: Sequence[NotebookNode]) -> bool:
    """Let the texts of the streams have the budget together; whether anything was left out."""
    sizes = [_bytes_in_file(each.text) for each in streams]
    if sum(sizes) <= BUDGET:
        return False
    most = _fair_share(sizes, BUDGET * 9 // 10)  # room for the lines that say so
    left_out = False
    for stream, size in zip(streams, sizes, strict=True):
        shorter = _shortened(stream.text, round(len(stream.text) * most / size)) if size > most else stream.text
        if _bytes_in_file(shorter) < size:  # the line that says so may take more than what is left out
            stream.text, left_out = shorter, True
    return left_out


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
