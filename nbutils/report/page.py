"""Pieces of a report page: headings, tables, code. Strings become HTML through `plaintext.escaped`, always."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from nbutils.foundation import LONGEST_PARAGRAPH, escaped, shortened, visible
from nbutils.report import figures
from nbutils.report.evidence import Evidence, Study

MOST_ARMS = 8  # as many as there are colours
NOWHERE = "This does not apply to the studies here."


class Table(HTML):
    """A table that knows its parts, all of them HTML: so that alike ones of several studies can stand as one.

    `kind` is the class that styles it: numbers, words (columns of text alone) or samples.
    """

    def __init__(self, kind: str, caption: str, head: str, rows: str) -> None:
        self.kind, self.caption, self.head, self.rows = kind, caption, head, rows
        super().__init__(_framed(kind, caption, head, f"<tbody>{rows}</tbody>"))


def _framed(kind: str, caption: str, head: str, bodies: str) -> str:
    caption = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="table"><table class="{kind}">{caption}<thead><tr>{head}</tr></thead>{bodies}</table></div>'


def name_of(study: Study, evidence: Evidence) -> str:
    """How a study is called among the others: by its stage, with its plan where there are several plans."""
    return f"{study.stage} ({study.plan})" if len(evidence.plans) > 1 else study.stage


def heading(study: Study, evidence: Evidence) -> str:
    """A third-level heading that names the study."""
    return f"<h3>{escaped(name_of(study, evidence))}</h3>"


def every(study: Study) -> bool:
    """Any study."""
    return True


def by_study(
    evidence: Evidence, show: Callable[[Study], HTML], where: Callable[[Study], bool] = every, absent: str = NOWHERE
) -> HTML:
    """What `show` makes of each study `where` holds of, under their names if there are several; see `together`.

    `absent` is said where it holds of none.
    """
    return of_studies(evidence, filter(where, evidence.studies), show) or _absent(evidence, absent)


def of_studies(evidence: Evidence, studies: Iterable[Study], show: Callable[[Study], HTML]) -> HTML | None:
    """What `show` makes of these studies, as in `by_study`; None where that is nothing."""
    parts = [(name_of(study, evidence), part) for study in studies if (part := show(study)).data]
    if not parts:
        return None
    return together(parts) if len(evidence.studies) > 1 or len(parts) > 1 else parts[0][1]


def together(parts: Iterable[tuple[str, HTML]]) -> HTML:
    """Outputs of several studies under their names, what they share said once.

    Tables with the same caption and columns become one, with a line for each study; a caption that was given before
    is left out; the same sentence stands once, behind the names of all studies it is about.
    """
    groups: dict[tuple[str, ...], list[tuple[str, HTML]]] = {}
    for name, part in parts:
        key = (part.kind, part.caption, part.head) if isinstance(part, Table) else (part.data,)
        groups.setdefault(key, []).append((escaped(name), part))
    shown, said = "", set()
    for members in groups.values():
        names, first = ", ".join(name for name, _ in members), members[0][1]
        if isinstance(first, Table):
            shown += _framed(first.kind, first.caption * (first.caption not in said), first.head, _bodies(members))
            said.add(first.caption)
        elif first.data.startswith(("<p>", "<p ")):
            shown += first.data.replace(">", f">{names}: ", 1)
        else:
            shown += f"<h3>{names}</h3>{first.data}"
    return HTML(shown)


def _bodies(members: Iterable[tuple[str, Table]]) -> str:
    """The rows of each table behind a line with the study's name."""
    return "".join(
        f'<tbody><tr class="study"><th colspan="{table.head.count("<th")}">{name}</th></tr>{table.rows}</tbody>'
        for name, table in members
    )


def _absent(evidence: Evidence, absent: str) -> HTML:
    told = absent if evidence.studies else "Nothing to show yet."
    return HTML(f'<p class="note">{escaped(told)}</p>' if told else "")


def figure_by_study(
    evidence: Evidence,
    draw: Callable[[Study], Figure],
    name: str,
    caption: str,
    folder: Path,
    whole: bool = False,
    where: Callable[[Study], bool] = every,
    absent: str = NOWHERE,
) -> HTML:
    """The figure `draw` makes of each study, saved as `<study>-<name>` in `folder`.

    The caption stands below the first; below each stands the study's name if there are several. Of many arms the
    control and those that contrasts ask about are drawn, unless `whole`: more lines cannot be told apart. The caption
    says how many are left to the tables.
    """
    studies = [*filter(where, evidence.studies)]
    return figures_of(evidence, studies, draw, name, caption, folder, whole) or _absent(evidence, absent)


def figures_of(
    evidence: Evidence,
    studies: Sequence[Study],
    draw: Callable[[Study], Figure],
    name: str,
    caption: str,
    folder: Path,
    whole: bool = False,
    more: Callable[[Study], Sequence[str]] = lambda study: (),
) -> HTML | None:
    """The figures of these studies, as in `figure_by_study`; None where there are none. `more` adds sentences."""
    parts, several = [], len(evidence.studies) > 1 or len(studies) > 1
    for study in studies:
        told = " ".join([caption if study is studies[0] else "as above.", *more(study)])
        title = f"{name_of(study, evidence)}: " if several else ""
        figure = figure_of(study, draw, name, title + told, folder, whole)
        parts.append(HTML(figure.data.replace(escaped(title), f"<strong>{escaped(title)}</strong>", 1)))
    return stacked(*parts) if parts else None


def figure_of(
    study: Study, draw: Callable[[Study], Figure], name: str, caption: str, folder: Path, whole: bool = False
) -> HTML:
    """One study's figure, as in `figure_by_study`."""
    shown = study if whole else study.foremost(MOST_ARMS)
    told = caption + more_arms(len(study.arms) - len(shown.arms), "in the tables alone")
    return figures.show(draw(shown), f"{study.name}-{name}", told, folder)


def more_arms(count: int, where: str) -> str:
    """A sentence behind others on arms that are not shown: " 2 more arms are in the tables alone."; empty for none."""
    return f" {count} more {'arm is' if count == 1 else 'arms are'} {where}." * bool(count)


def stacked(*parts: HTML | None) -> HTML:
    """Outputs of one cell, one below the other."""
    return HTML("\n".join(part.data for part in parts if part and part.data))


def section(title: str, told: str, *parts: HTML | None) -> HTML:
    """Parts under a heading and a paragraph of plain text; nothing at all where there is none of them."""
    shown = stacked(*parts).data
    return HTML(f"<h2>{escaped(title)}</h2><p>{escaped(told)}</p>{shown}" if shown else "")


def code(text: str) -> str:
    """`text` as code."""
    return f"<code>{escaped(text)}</code>"


def side_by_side(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str) -> Table:
    """Texts beside each other: for each prompt, which is plain text, a shaded line, then cells of HTML."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    body = ""
    for prompt, cells in rows:
        body += f'<tr class="prompt"><th colspan="{len(columns)}">{escaped(prompt)}</th></tr>'
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return Table("samples", escaped(caption, LONGEST_PARAGRAPH), head, body)


def details(summary: str, content: str) -> str:
    """`content`, which is HTML, behind a line of plain text to open it by."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def behind(summary: str, part: HTML) -> HTML:
    """An output that is to be opened; nothing where it is empty."""
    return HTML(details(summary, part.data) if part.data else "")


def frame_of(rows: Iterable[Mapping[str, object]] | Mapping[str, Sequence[object]]) -> pd.DataFrame:
    """Rows, or columns by their titles, for `table`, every character visible: pandas holds no half of one."""
    if isinstance(rows, Mapping):
        return pd.DataFrame({visible(title): [*map(visible, column)] for title, column in rows.items()})
    return pd.DataFrame([{visible(title): visible(value) for title, value in row.items()} for row in rows])


def table(frame: pd.DataFrame, caption: str, marked: Sequence[bool] = (), text: Iterable[str] | None = None) -> Table:
    """`frame` with every cell escaped; a newline starts a new line, one in brackets is set small.

    `marked` rows are shaded. Columns in `text`, and always the first, hold words, the others numbers.
    """
    text = {visible(name) for name in (() if text is None else text)} | {*frame.columns[:1]}
    kind = "words" if text >= {*frame.columns} else "numbers"
    marked = list(marked) or [False] * len(frame)
    # the first column, and those of a table of words, are styled by their place: a class a cell is a third of a page
    classes = [kind == "numbers" and name in text and place > 0 for place, name in enumerate(frame.columns)]
    head = "".join(_cell("th", name, is_text) for name, is_text in zip(frame.columns, classes, strict=True))
    body = ""
    for shaded, row in zip(marked, frame.itertuples(index=False), strict=True):
        body += '<tr class="control">' if shaded else "<tr>"
        body += "".join(_cell("td", value, is_text) for value, is_text in zip(row, classes, strict=True)) + "</tr>"
    return Table(kind, escaped(caption, LONGEST_PARAGRAPH), head, body)


def _cell(tag: str, value: object, is_text: bool) -> str:
    """One cell of a table, its lines apart."""
    lines = [escaped(line) for line in shortened(str(value)).split("\n")]
    content = "<br>".join(f"<small>{line}</small>" if line.startswith(("[", "(")) else line for line in lines)
    kind = ' class="text"' if is_text else ""
    return f"<{tag}{kind}>{content}</{tag}>"
