"""Two sides beside each other: the same sections as text for a terminal and as a page that looks like the report."""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbutils.batch import Change, in_few, listed, text_table
from nbutils.foundation import REPORTS, escaped, relative, resolve, visible
from nbutils.report.comparison import OTHER_DATA, Comparison, VerdictRow, compare_sides
from nbutils.report.html_export import ReportError, export
from nbutils.report.log import text as markdown
from nbutils.report.page import frame_of, table
from nbutils.report.sides import read_sides

COLUMNS = 110  # of a terminal
CELL = 38  # characters of a cell there
LONGEST_NAME = 60  # of a side, in the file's name
MOST_CHANGES = 15  # lines of the text about what is different, packages apart; the page has all
UNPAIRED = "B − A: difference of means; intervals need two folders of runs."
PAIRED = (
    "B − A: mean over the seeds that both have, with its 95 % interval. Exploratory: no contrast asked for it, and the "
    "interval is not corrected for the number of rows. Undecided: it holds 0."
)
NOT_KNOWN = (
    "A report's numbers tell no parameters, data, packages or machine: give two folders of runs to compare those."
)
NOTHING_ELSE = "Nothing: plan, parameters, code, packages and machine are the same."
OTHER_METRICS = "not one question: the metrics differ"
OTHER_DATA_NOTE = (
    "Other data: runs of one seed read other documents, or other tokens of them. Their numbers do not compare."
)


@dataclass(frozen=True)
class Section:
    """A part of the comparison, for a terminal and for a page alike: a table, and sentences under it."""

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    marked: tuple[bool, ...] = ()  # rows to shade

    def as_text(self) -> str:
        """Lines of at most COLUMNS characters."""
        cells = [[_cut(cell.replace("\n", " "), CELL) for cell in row] for row in self.rows]
        lines = text_table(self.header, cells).splitlines() if cells else []
        notes = [line for note in self.notes for line in textwrap.wrap(visible(note), COLUMNS)]
        return "\n".join([self.title.upper(), *(_cut(line, COLUMNS) for line in lines), *notes])

    def as_html(self) -> str:
        """The table and the sentences, all of them."""
        frame = frame_of([dict(zip(self.header, row, strict=True)) for row in self.rows])
        shown = table(frame, "", self.marked, text=self.header[:3]).data if self.rows else ""
        return shown + "".join(f'<p class="note">{escaped(note)}</p>' for note in self.notes)


def compare(a: Path, b: Path, html_file: Path | None = None) -> str:
    """`a` and `b`, each a report or a folder of runs, side by side in text of 110 columns; writes the same as HTML.

    html_file: default reports/<a>-beside-<b>.html. Raises ReportError, with cause and cure, where one of them is
    neither, both are the same, or the file cannot be written.
    """
    comparison = compare_sides(*read_sides(a, b))
    sides = comparison.first, comparison.second
    names = (re.sub(r"[^\w.-]+", "-", side.name)[:LONGEST_NAME] for side in sides)
    path = resolve(html_file) if html_file else REPORTS / f"{'-beside-'.join(names)}.html"
    if path in [side.path.with_suffix(".html") for side in sides if not side.evidence]:
        raise ReportError(f"{relative(path)} is one of the two reports. Name another file for the comparison.")
    _write_page(comparison, path)
    opening = "\n".join(_cut(f"{name}  {side.told()}", COLUMNS) for name, side in zip("AB", sides, strict=True))
    parts = [section.as_text() for section in sections(comparison, whole=False)]
    return "\n\n".join([opening, *parts, relative(path)])


def sections(comparison: Comparison, whole: bool) -> list[Section]:
    """What is told of two sides, in the order it is read; not `whole`: what has no end is cut for a terminal."""
    return [
        _verdicts(comparison.verdicts),
        _means(comparison),
        _runs(comparison, whole),
        _what_else(comparison.changes, whole),
    ]


def _verdicts(rows: Sequence[VerdictRow]) -> Section:
    cells, differ = [], []
    for row in rows:
        if row.measure:
            asked = row.contrast, f"  {row.measure.label}"
        else:
            asked = f"{row.contrast} ({OTHER_METRICS}):\n{row.first.metric}", f"  {row.second.metric}"
        for side, name, told in zip("AB", asked, (row.first, row.second), strict=True):
            cells.append((name, side, told.outcome, told.difference, told.interval, told.pairs))
            differ.append(row.first.outcome != row.second.outcome)
    note = "Each side's verdict from its own runs. Shaded on the page: the sides differ in the outcome."
    header = ("Contrast", "Side", "Outcome", "Difference", "Interval", "Pairs")
    return Section("Verdicts", header, tuple(cells), (note,) if rows else ("No contrast was planned.",), tuple(differ))


def _means(comparison: Comparison) -> Section:
    columns = ("Arm", "Measure", "A", "B", "B − A", "Interval", "Pairs", "Reading")
    cells = [
        (
            row.study if row.study.endswith(row.arm) else f"{row.study}: {row.arm}",
            row.measure.label,
            *(row.first, row.second, row.difference, row.interval, row.pairs, row.reading),
        )
        for row in comparison.means
    ]
    if not comparison.paired:
        columns, cells = columns[:5], [row[:5] for row in cells]
    other = any(row.reading == OTHER_DATA for row in comparison.means)
    notes = [PAIRED if comparison.paired else UNPAIRED, *([OTHER_DATA_NOTE] if other else [])]
    return Section("Means", columns, tuple(cells), tuple(notes) if cells else ("No run has a number to compare.",))


def _runs(comparison: Comparison, whole: bool) -> Section:
    first, second = comparison.alone()
    other = comparison.on_other_data()
    told = [("of the same name on other data", other)] if other else []
    told += [("in A alone", first), ("in B alone", second)]
    notes = [f"finished on both sides: {len(comparison.shared())}"]
    notes += [
        f"{words}: {len(names)}" + (f" ({listed(names, COLUMNS - 40)})" if names else "") for words, names in told
    ]
    return Section("Runs", notes=tuple(notes))


def _what_else(found: Sequence[Change] | None, whole: bool) -> Section:
    title = "What else is different"
    if not found:
        return Section(title, notes=(NOT_KNOWN if found is None else NOTHING_ELSE,))
    shown, more = (found, 0) if whole else in_few(found, MOST_CHANGES)
    notes = (f"and {more} more, on the page",) if more > 0 else ()
    return Section(title, ("What", "A", "B"), tuple((each.what, each.first, each.second) for each in shown), notes)


def _cut(line: str, width: int) -> str:
    """A line in which all is seen, no longer than `width`."""
    line = visible(line).replace("\n", " ").replace("\t", " ").rstrip()
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _write_page(comparison: Comparison, html_file: Path) -> None:
    """Write the comparison as one safe HTML file, by the report's own way from notebook to page."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    sides = (("A", comparison.first), ("B", comparison.second))
    opening = "".join(f'<p class="lead"><strong>{name}</strong> {escaped(side.told())}</p>' for name, side in sides)
    title = f"# {markdown(comparison.first.name)} beside {markdown(comparison.second.name)}"
    parts = [(title, opening), *((f"## {each.title}", each.as_html()) for each in sections(comparison, whole=True))]
    cells = []
    for place, (heading, content) in enumerate(parts):
        shown = new_output("display_data", {"text/html": content})
        cells.append(new_markdown_cell(heading, id=f"heading-{place}"))
        cells.append(new_code_cell("", outputs=[shown], id=f"content-{place}"))
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "comparison.ipynb"
        nbformat.write(new_notebook(cells=cells), notebook)
        export(notebook, html_file)
