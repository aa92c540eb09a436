"""Two sides beside each other, as text for a terminal and as a page that looks like the report."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from nbutils.batch.repeat.circumstances import in_few, listed
from nbutils.foundation.places import REPORTS, relative, resolve
from nbutils.foundation.plaintext import escaped, visible
from nbutils.report.comparison import OTHER_DATA, Comparison, MeanRow, Told, VerdictRow, compare_sides
from nbutils.report.export import ReportError, export
from nbutils.report.log import text as markdown
from nbutils.report.page import details, frame_of, table
from nbutils.report.sides import read_sides
from nbutils.runs.metric_labels import UNKNOWN, Measure

LONGEST_NAME = 60  # of a side, in the file's name

COLUMNS = 110  # of a terminal
INDENT, GAP = "  ", "  "
LEAST_LABEL = 16  # characters of what a row is called
MOST_CHANGES = 15  # lines of the text about what is different, packages apart; the page has all
LONGEST_CONTRAST = 60  # characters of its name where more must stand behind it
UNPAIRED = "B − A: difference of means; intervals need two folders of runs."
PAIRED = "B − A: mean over the seeds that both have, with its 95 % interval. Exploratory: no contrast asked for it,"
WORDS = "and the interval is not corrected for the number of rows. Undecided: it holds 0."
NOT_KNOWN = (
    "A report's numbers tell no parameters, data, packages or machine: give two folders of runs to compare those."
)
NOTHING_ELSE = "Nothing: plan, parameters, code, packages and machine are the same."
OTHER_METRICS = "the metrics differ, so this is not one question"
OTHER_DATA_NOTE = (
    "Other data: runs of one seed read other documents, or other tokens of them. Their numbers do not compare."
)
NO_VERDICTS = "No contrast was planned."
NO_MEANS = "No run has a number to compare."


def as_text(comparison: Comparison) -> str:
    """The comparison in lines of at most COLUMNS characters."""
    blocks = [
        [f"A  {comparison.first.told()}", f"B  {comparison.second.told()}"],
        ["VERDICTS", *(_verdict_lines(comparison.verdicts) or [INDENT + NO_VERDICTS])],
        [*_mean_lines(comparison)],
        ["RUNS", *(INDENT + line for line in _run_lines(comparison))],
        ["WHAT ELSE IS DIFFERENT", *_change_lines(comparison)],
    ]
    return "\n\n".join("\n".join(_cut(line) for line in block) for block in blocks)


def _cut(line: str, width: int = COLUMNS) -> str:
    """A line in which all is seen, no longer than `width`."""
    line = visible(line).replace("\n", " ").replace("\t", " ").rstrip()
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _verdict_lines(rows: Sequence[VerdictRow]) -> list[str]:
    both = [row for row in rows if Told() not in (row.first, row.second)]
    lines = []
    for row in both:
        behind = row.measure.axis if row.measure else OTHER_METRICS
        lines.append(f"{_cut(row.contrast, LONGEST_CONTRAST)}: {behind}")
        for name, told in (("A", row.first), ("B", row.second)):
            lines.append(INDENT + _verdict_line(name, told))
            lines += [] if row.measure else [f"{INDENT}   in {told.measure.axis}"]
    return lines + _alone("contrasts", [(row.contrast, row.second == Told()) for row in rows if row not in both])


def _alone(what: str, names: Iterable[tuple[str, bool]]) -> list[str]:
    """What the page alone has the numbers of, since there is nothing to put beside it: (name, whether of A)."""
    names = list(dict.fromkeys(names))
    lines = []
    for side, of_first in (("A", True), ("B", False)):
        own = [name for name, is_of_first in names if is_of_first == of_first]
        if own:
            lines.append(_naming(f"{what} in {side} alone, on the page: ", own))
    return lines


def _naming(words: str, names: Sequence[str], end: str = "") -> str:
    """A line with as many whole names as fit, and how many more there are."""
    names = [visible(name).replace("\n", " ") for name in names]
    return words + listed(names, COLUMNS - len(INDENT) - len(words) - len(end)) + end


def _verdict_line(side: str, told: Told) -> str:
    pairs = f"{told.pairs} pairs" if told.pairs != UNKNOWN else ""
    return f"{side}  {told.outcome:<38}{told.difference:>12}  {told.interval:<28}{pairs}"


def _mean_lines(comparison: Comparison) -> list[str]:
    """The means, an arm's under its name, in columns as wide as their widest entry."""
    one_sided = _one_sided(comparison)
    rows = [row for row in comparison.means if row.study not in one_sided]
    alone = _alone("studies", one_sided.items())
    if not rows:
        return ["MEANS", *(alone or [INDENT + NO_MEANS])]
    header = ("", "A", "B", "B − A", "interval", "pairs", "reading")[: 7 if comparison.paired else 4]
    cells = [_cells(row)[: len(header)] for row in rows]
    widths = [max(len(each[i]) for each in (header, *cells)) for i in range(1, len(header))]
    label = max(LEAST_LABEL, COLUMNS - len(INDENT) - sum(widths) - len(GAP) * len(widths))
    label = min(label, max(len(each[0]) for each in cells))
    lines = ["MEANS", _mean_line(header, label, widths)]
    for (study, arm), members in groupby(zip(rows, cells, strict=True), key=lambda pair: (pair[0].study, pair[0].arm)):
        lines.append(study if study.endswith(arm) else f"{study}: {arm}")
        lines += [_mean_line(each, label, widths) for _, each in members]
    return [*lines, *((PAIRED, WORDS) if comparison.paired else (UNPAIRED,)), *_data_notes(comparison), *alone]


def _data_notes(comparison: Comparison) -> list[str]:
    return [OTHER_DATA_NOTE] if any(row.reading == OTHER_DATA for row in comparison.means) else []


def _one_sided(comparison: Comparison) -> dict[str, bool]:
    """The studies that one side alone has, and whether that is the first."""
    first, second = comparison.first.means, comparison.second.means
    return {study: study in first for study in (*first, *second) if (study in first) != (study in second)}


def _cells(row: MeanRow) -> tuple[str, ...]:
    return row.measure.label, row.first, row.second, row.difference, row.interval, row.pairs, row.reading


def _mean_line(cells: Sequence[str], label: int, widths: Sequence[int]) -> str:
    numbers = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths, strict=True)]
    return INDENT + GAP.join([f"{_cut(cells[0], label):<{label}}", *numbers])


def _run_lines(comparison: Comparison) -> list[str]:
    first, second = comparison.alone()
    other = comparison.on_other_data()
    told = [("in A alone", first), ("in B alone", second)]
    if other:
        told.insert(0, ("of the same name on other data", other))
    lines = [f"finished on both sides: {len(comparison.shared())}"]
    for words, names in told:
        lines.append(_naming(f"{words}: {len(names)} (", names, ")") if names else f"{words}: 0")
    return lines


def _change_lines(comparison: Comparison) -> list[str]:
    found = comparison.changes
    if not found:
        return [INDENT + (NOT_KNOWN if found is None else NOTHING_ELSE)]
    shown, more = in_few(found, MOST_CHANGES)
    rows = [("", "A", "B"), *((each.what, each.first, each.second) for each in shown)]
    widest = [34, 35, 35]
    cut = [[_cut(cell, width) for cell, width in zip(row, widest, strict=True)] for row in rows]
    widths = [max(len(row[i]) for row in cut) for i in range(3)]
    lines = [INDENT + GAP.join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in cut]
    return [*lines, f"{INDENT}and {more} more, on the page"] if more > 0 else lines


def write_page(comparison: Comparison, html_file: Path) -> Path:
    """Write the comparison as one safe HTML file, by the report's own way from notebook to page; returns its path."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    title = f"# {markdown(comparison.first.name)} beside {markdown(comparison.second.name)}"
    cells = []
    for number, (heading, content) in enumerate([(title, _opening(comparison)), *_sections(comparison)]):
        shown = new_output("display_data", {"text/html": content})
        cells.append(new_markdown_cell(heading, id=f"heading-{number}"))
        cells.append(new_code_cell("", outputs=[shown], id=f"content-{number}"))
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "comparison.ipynb"
        nbformat.write(new_notebook(cells=cells), notebook)
        return export(notebook, html_file)


def _opening(comparison: Comparison) -> str:
    sides = (("A", comparison.first), ("B", comparison.second))
    return "".join(f'<p class="lead"><strong>{name}</strong> {escaped(side.told())}</p>' for name, side in sides)


def _sections(comparison: Comparison) -> list[tuple[str, str]]:
    return [
        ("## Verdicts", _verdict_table(comparison.verdicts)),
        ("## Means", _mean_tables(comparison)),
        ("## Runs", _runs(comparison)),
        ("## What else is different", _change_table(comparison)),
    ]


def _verdict_table(rows: Sequence[VerdictRow]) -> str:
    if not rows:
        return _note(NO_VERDICTS)
    frame = frame_of(
        {
            "Contrast": row.contrast,
            "Measure": _measure_cell(row.measure) if row.measure else OTHER_METRICS,
            "A": _verdict_cell(row.first, row.measure),
            "B": _verdict_cell(row.second, row.measure),
        }
        for row in rows
    )
    caption = (
        "Each side's verdict from its own runs: the outcome, treatment minus control with its interval, and pairs of "
        "seeds. Shaded: the sides differ in the outcome."
    )
    differs = [row.first.outcome != row.second.outcome for row in rows]
    return table(frame, caption, differs, text=frame.columns).data


def _measure_cell(measure: Measure) -> str:
    return measure.label + (f"\n({measure.difference_unit})" if measure.difference_unit else "")


def _verdict_cell(told: Told, common: Measure | None) -> str:
    """One side's verdict, with its measure where the sides have none in common."""
    if told == Told():
        return UNKNOWN
    own = "" if common else f"\nin {_measure_cell(told.measure)}"
    return f"{told.outcome}{own}\n{told.difference}\n{_bracketed(told.interval)}\n({told.pairs} pairs)"


def _bracketed(interval: str) -> str:
    return "(no interval)" if interval == UNKNOWN else interval


def _mean_tables(comparison: Comparison) -> str:
    if not comparison.means:
        return _note(NO_MEANS)
    notes = [f"{PAIRED} {WORDS}" if comparison.paired else UNPAIRED, *_data_notes(comparison)]
    parts = [f"<p>{escaped(' '.join(notes))}</p>"]
    for study, members in groupby(comparison.means, key=lambda row: row.study):
        rows = [_mean_row(row, comparison.paired) for row in members]
        parts.append(f"<h3>{escaped(study)}</h3>{table(frame_of(rows), '', text=('Arm', 'Measure')).data}")
    return "".join(parts)


def _mean_row(row: MeanRow, paired: bool) -> dict[str, str]:
    better = f"\n({row.measure.better} is better)" if row.measure.better else ""
    cells = {"Arm": row.arm, "Measure": row.measure.axis + better, "A": row.first, "B": row.second}
    if not paired:
        return cells | {"B − A": row.difference}
    difference = f"{row.difference}\n{row.interval}" if row.interval != UNKNOWN else row.difference
    return cells | {"B − A": difference, "Pairs": row.pairs, "Reading": row.reading}


def _runs(comparison: Comparison) -> str:
    first, second = comparison.alone()
    parts = [f"<p>Finished on both sides: {len(comparison.shared())}.</p>"]
    told = (("under the same name on other data", comparison.on_other_data()), ("in A alone", first))
    for words, names in (*told, ("in B alone", second)):
        if names:
            content = "".join(f"<li>{escaped(name)}</li>" for name in names)
            parts.append(details(f"{len(names)} finished {words}", f"<ul>{content}</ul>"))
    return "".join(parts)


def _change_table(comparison: Comparison) -> str:
    found = comparison.changes
    if not found:
        return _note(NOT_KNOWN if found is None else NOTHING_ELSE)
    frame = frame_of({"What": each.what, "A": each.first, "B": each.second} for each in found)
    both = [name for name in comparison.first.manifests if name in comparison.second.manifests]
    of = (
        f"Of the {len(both)} runs whose names both sides have."
        if both
        else "Of all runs: the sides have none in common."
    )
    return table(frame, f"{of} Several values: not all runs of the side have the same.", text=frame.columns).data


def _note(words: str) -> str:
    return f'<p class="note">{escaped(words)}</p>'


def compare(a: Path, b: Path, html_file: Path | None = None) -> str:
    """`a` and `b`, each a report or a folder of runs, side by side in text of 110 columns; writes the same as HTML.

    html_file: default reports/<a>-beside-<b>.html. Raises ReportError, with cause and cure, where one of them is
    neither, both are the same, or the file cannot be written.
    """
    comparison = compare_sides(*read_sides(a, b))
    path = resolve(html_file) if html_file else REPORTS / f"{_slug(comparison)}.html"
    taken = [side.path.with_suffix(".html") for side in (comparison.first, comparison.second) if not side.evidence]
    if path in taken:
        raise ReportError(f"{relative(path)} is one of the two reports. Name another file for the comparison.")
    return f"{as_text(comparison)}\n\n{relative(write_page(comparison, path))}"


def _slug(comparison: Comparison) -> str:
    names = (re.sub(r"[^\w.-]+", "-", side.name)[:LONGEST_NAME] for side in (comparison.first, comparison.second))
    return "-beside-".join(names)
