"""Two reports, or two sets of runs, side by side: verdicts, means, runs that one alone has, what else is different.

    print(compare(Path("runs/quick"), Path("runs/quick-again")))

Of two folders of runs, means are compared over the seeds that both have, with Student's 95 % interval. No contrast
asked for that: it is exploratory and not corrected. Without an interval nothing is called better or worse, and runs
on other data, prepared in another way or cut by another tokenizer, have none.
"""

from __future__ import annotations

import math
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbutils.batch import Change, changes, in_few, listed, text_table
from nbutils.foundation import REPORTS, escaped, relative, resolve, visible
from nbutils.report import statistics
from nbutils.report.arms import Arm, number
from nbutils.report.html_export import ReportError, export
from nbutils.report.log import text as markdown
from nbutils.report.page import frame_of, table
from nbutils.report.sides import Side, read_sides
from nbutils.runs import UNKNOWN, Manifest, Measure, measure

SAME, UNDECIDED, OTHER_DATA = "same", "undecided", "other data"
COLUMNS = 110  # of a terminal
CELL = 38  # characters of a cell there
LONGEST_NAME = 60  # of a side, in the file's name
MOST_CHANGES = 15  # lines of the text about what is different, packages apart; the page has all
UNPAIRED = "B − A: difference of means; intervals need two folders of runs."
PAIRED = (
    "B − A: mean over the seeds that both have, with its 95 % interval. Exploratory: no contrast asked for it, and the "
    "interval is not corrected for the number of rows. Undecided: it holds 0."
)
EACH_SIDE = "Each side's verdict from its own runs. Shaded on the page: the sides differ in the outcome."
NOT_KNOWN = (
    "A report's numbers tell no parameters, data, packages or machine: give two folders of runs to compare those."
)
NOTHING_ELSE = "Nothing: plan, parameters, code, packages and machine are the same."
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
    sides = read_sides(a, b)
    names = (re.sub(r"[^\w.-]+", "-", side.name)[:LONGEST_NAME] for side in sides)
    path = resolve(html_file) if html_file else REPORTS / f"{'-beside-'.join(names)}.html"
    if path in [side.path.with_suffix(".html") for side in sides if not side.evidence]:
        raise ReportError(f"{relative(path)} is one of the two reports. Name another file for the comparison.")
    parts = [verdicts(*sides), means(*sides), runs(*sides)]
    else_different = changed(*sides)
    _write_page(sides, [*parts, what_else(else_different)], path)
    opening = "\n".join(_cut(f"{name}  {side.told()}", COLUMNS) for name, side in zip("AB", sides, strict=True))
    parts.append(what_else(else_different, MOST_CHANGES))
    return "\n\n".join([opening, *(each.as_text() for each in parts), relative(path)])


def verdicts(first: Side, second: Side) -> Section:
    """What the runs of each side say to each planned contrast, two rows a contrast."""
    cells, differ = [], []
    for name in dict.fromkeys([*first.verdicts, *second.verdicts]):
        both = [side.verdicts.get(name) for side in (first, second)]
        metrics = [str(verdict.get("metric")) if verdict else UNKNOWN for verdict in both]
        known = {*metrics} - {UNKNOWN}
        asked = (name, f"  {measure(known.pop()).label}")
        if known:
            asked = f"{name} (not one question: the metrics differ):\n{metrics[0]}", f"  {metrics[1]}"
        told = [_told(verdict) for verdict in both]
        cells += [(title, side, *own) for title, side, own in zip(asked, "AB", told, strict=True)]
        differ += [told[0][0] != told[1][0]] * 2
    header = ("Contrast", "Side", "Outcome", "Difference", "Interval", "Pairs")
    notes = (EACH_SIDE,) if cells else ("No contrast was planned.",)
    return Section("Verdicts", header, tuple(cells), notes, tuple(differ))


def _told(verdict: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Outcome, difference, interval and pairs in the verdict's own measure; dashes where a side does not have it."""
    if verdict is None:
        return (UNKNOWN,) * 4
    quantity = measure(str(verdict.get("metric")))
    difference, low, high = (number(verdict.get(name)) for name in ("difference", "low", "high"))
    interval = quantity.difference_interval(low, high)
    outcome, pairs = (str(verdict.get(name, UNKNOWN)) for name in ("outcome", "pairs"))
    return outcome, quantity.difference(difference), interval, pairs


def means(first: Side, second: Side) -> Section:
    """Every arm's mean in every measure on both sides, and what the interval of the difference supports."""
    columns = ("Arm", "Measure", "A", "B", "B − A", "Interval", "Pairs", "Reading")
    rows = tuple(_mean_rows(first, second))
    told = [PAIRED] + [OTHER_DATA_NOTE] * any(row[-1] == OTHER_DATA for row in rows)
    if first.evidence is None or second.evidence is None:
        columns, rows, told = columns[:5], tuple(row[:5] for row in rows), [UNPAIRED]
    return Section("Means", columns, rows, tuple(told) if rows else ("No run has a number to compare.",))


def _mean_rows(first: Side, second: Side) -> Iterator[tuple[str, ...]]:
    arms, of_sides = (first.arms, second.arms), (first.means, second.means)
    for study in dict.fromkeys(name for side in of_sides for name in side):
        of_study = [side.get(study, {}) for side in of_sides]
        for arm in dict.fromkeys(name for side in of_study for name in side):
            of_arm = [side.get(arm, {}) for side in of_study]
            for metric in dict.fromkeys(name for side in of_arm for name in side):
                values = [number(side.get(metric)) for side in of_arm]
                cells = _mean_cells(metric, values, [side.get((study, arm)) for side in arms])
                yield study if study.endswith(arm) else f"{study}: {arm}", measure(metric).label, *cells


def _mean_cells(metric: str, values: Sequence[float], arms: Sequence[Arm | None]) -> tuple[str, ...]:
    """Both means, their difference, its interval, pairs of seeds, and what the interval supports."""
    quantity = measure(metric)
    both = tuple(map(quantity.number, values))
    if None in arms:
        return *both, quantity.difference(values[1] - values[0]), UNKNOWN, UNKNOWN, UNKNOWN
    if _read_other_data(metric, *arms):
        return *both, UNKNOWN, UNKNOWN, "0", OTHER_DATA
    differences = arms[1].minus(arms[0], metric)
    low, high = statistics.mean_interval(differences)
    difference = float(np.mean(differences)) if differences else values[1] - values[0]
    interval = quantity.difference_interval(low, high)
    return *both, quantity.difference(difference), interval, str(len(differences)), _reading(quantity, low, high)


def _read_other_data(metric: str, first: Arm, second: Arm) -> bool:
    """Whether runs of both arms with one seed, which would be a pair, read other data."""
    data = [
        {run.matrix.get("seed"): _data(run.manifest) for run in arm.runs if metric in run.result}
        for arm in (first, second)
    ]
    return any(data[1][seed] != read for seed, read in data[0].items() if seed in data[1])


def _data(manifest: Manifest) -> str | None:
    """What tells the data that a run read or made: documents, tokenizer and all that was done to them."""
    return manifest.get("data_fingerprint")


def _reading(quantity: Measure, low: float, high: float) -> str:
    """What an interval of second minus first supports; a dash where there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    if low == high == 0:
        return SAME
    if low <= 0 <= high:
        return UNDECIDED
    higher = low > 0
    if not quantity.better:
        return "B higher" if higher else "B lower"
    return "B better" if higher == (quantity.better == "higher") else "B worse"


def runs(first: Side, second: Side) -> Section:
    """How many runs finished on both sides, on other data, and on one side alone."""
    both = [name for name in first.finished if name in second.finished]
    data = [{name: _data(manifest) for name, manifest in side.manifests.items()} for side in (first, second)]
    other = [name for name in data[0] if name in data[1] and data[0][name] != data[1][name]]
    told = {"of the same name on other data": other} if other else {}
    told["in A alone"] = [name for name in first.finished if name not in both]
    told["in B alone"] = [name for name in second.finished if name not in both]
    notes = [f"finished on both sides: {len(both) - len(other)}"]
    for words, names in told.items():
        notes.append(f"{words}: {len(names)}" + (f" ({listed(names, COLUMNS - 40)})" if names else ""))
    return Section("Runs", notes=tuple(notes))


def changed(first: Side, second: Side) -> list[Change] | None:
    """What differs between two sets of runs: their plans, then the facts of the runs that both have, else of all.

    None where a side is a report, which does not know them.
    """
    if first.evidence is None or second.evidence is None:
        return None
    sides = first.manifests, second.manifests
    both = [name for name in sides[0] if name in sides[1]]
    return _plan_changes(first, second) + changes(*([side[name] for name in both or side] for side in sides))


def _plan_changes(first: Side, second: Side) -> list[Change]:
    found = []
    if set(first.runs) != set(second.runs):
        counts = (
            f"{len(side.runs)}, {len(set(side.runs) - set(other.runs))} of them alone"
            for side, other in ((first, second), (second, first))
        )
        found.append(Change("planned runs", *counts))
    contrasts = [{name: asdict(each.contrast) for name, each in side.judged.items()} for side in (first, second)]
    for name in (name for name in contrasts[0] if name in contrasts[1]):
        ours, theirs = contrasts[0][name], contrasts[1][name]
        fields = [field for field in ours if ours[field] != theirs[field]]
        found += [Change(f"{field} of {name}", str(ours[field]), str(theirs[field])) for field in fields]
    return found


def what_else(found: Sequence[Change] | None, most: int = 0) -> Section:
    """What else is different, at most so many lines where `most` is given."""
    title = "What else is different"
    if not found:
        return Section(title, notes=(NOT_KNOWN if found is None else NOTHING_ELSE,))
    shown, more = in_few(found, most) if most else (found, 0)
    notes = (f"and {more} more, on the page",) if more > 0 else ()
    return Section(title, ("What", "A", "B"), tuple((each.what, each.first, each.second) for each in shown), notes)


def _cut(line: str, width: int) -> str:
    """A line in which all is seen, no longer than `width`."""
    line = visible(line).replace("\n", " ").replace("\t", " ").rstrip()
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _write_page(sides: tuple[Side, Side], sections: Sequence[Section], html_file: Path) -> None:
    """Write the comparison as one safe HTML file, by the report's own way from notebook to page."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    opening = "".join(
        f'<p class="lead"><strong>{name}</strong> {escaped(side.told())}</p>'
        for name, side in zip("AB", sides, strict=True)
    )
    title = f"# {' beside '.join(markdown(side.name) for side in sides)}"
    cells = []
    for place, (heading, content) in enumerate([(title, opening), *((f"## {s.title}", s.as_html()) for s in sections)]):
        shown = new_output("display_data", {"text/html": content})
        cells.append(new_markdown_cell(heading, id=f"heading-{place}"))
        cells.append(new_code_cell("", outputs=[shown], id=f"content-{place}"))
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "comparison.ipynb"
        nbformat.write(new_notebook(cells=cells), notebook)
        export(notebook, html_file)
