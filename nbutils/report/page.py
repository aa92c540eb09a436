"""Pieces of a report page: headings, tables, code. Strings become HTML through `nbutils.plaintext.escaped`, always."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from nbutils import figures
from nbutils.plaintext import LONGEST_PARAGRAPH, escaped, shortened, visible
from nbutils.studies import Evidence, Study

MOST_ARMS = 8  # as many as there are colours
NOWHERE = "This does not apply to the studies here."


def heading(study: Study) -> str:
    """A third-level heading that names the study."""
    return f"<h3>{escaped(study.stage)} <small>({escaped(study.plan)})</small></h3>"


def every(study: Study) -> bool:
    """Any study."""
    return True


def by_study(
    evidence: Evidence, show: Callable[[Study], HTML], where: Callable[[Study], bool] = every, absent: str = NOWHERE
) -> HTML:
    """What `show` makes of each study `where` holds of, one after the other, under its name if there are several.

    `absent` is said where it holds of none.
    """
    several = len(evidence.studies) > 1
    studies = [study for study in evidence.studies if where(study)]
    parts = [(heading(study) if several else "") + show(study).data for study in studies]
    told = escaped(absent if evidence.studies else "Nothing to show yet.")
    return HTML("".join(parts) or f'<p class="note">{told}</p>')


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
    """The figure `draw` makes of each study, saved as `<study>-<name>` in `folder`, under one caption.

    Of many arms the control and those that contrasts ask about are drawn, unless `whole`: more lines cannot be told
    apart. The caption says how many are left to the tables.
    """
    return by_study(evidence, lambda study: figure_of(study, draw, name, caption, folder, whole), where, absent)


def figure_of(
    study: Study, draw: Callable[[Study], Figure], name: str, caption: str, folder: Path, whole: bool = False
) -> HTML:
    """One study's figure, as in `figure_by_study`."""
    shown = study if whole else study.foremost(MOST_ARMS)
    left = len(study.arms) - len(shown.arms)
    told = caption + f" {left} more arms are in the tables alone." * bool(left)
    return figures.show(draw(shown), f"{study.name}-{name}", told, folder)


def stacked(*parts: HTML) -> HTML:
    """Outputs of one cell, one below the other."""
    return HTML("\n".join(part.data for part in parts))


def code(text: str) -> str:
    """`text` as code."""
    return f"<code>{escaped(text)}</code>"


def side_by_side(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str) -> HTML:
    """Texts beside each other: for each prompt, which is plain text, a shaded line, then cells of HTML."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    body = ""
    for prompt, cells in rows:
        body += f'<tr class="prompt"><th colspan="{len(columns)}">{escaped(prompt)}</th></tr>'
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return HTML(
        f'<div class="table"><table class="samples"><caption>{escaped(caption, LONGEST_PARAGRAPH)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """`content`, which is HTML, behind a line of plain text to open it by."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def frame_of(rows: Iterable[Mapping[str, object]] | Mapping[str, Sequence[object]]) -> pd.DataFrame:
    """Rows, or columns by their titles, for `table`, every character visible: pandas holds no half of one."""
    if isinstance(rows, Mapping):
        return pd.DataFrame({visible(title): [*map(visible, column)] for title, column in rows.items()})
    return pd.DataFrame([{visible(title): visible(value) for title, value in row.items()} for row in rows])


def table(frame: pd.DataFrame, caption: str, marked: Sequence[bool] = (), text: Iterable[str] | None = None) -> HTML:
    """`frame` with every cell escaped; a newline starts a new line, one in brackets is set small.

    `marked` rows are shaded. Columns in `text` (default: the first) hold words, the others numbers.
    """
    text = {visible(name) for name in (frame.columns[:1] if text is None else text)}
    marked = list(marked) or [False] * len(frame)
    head = "".join(_cell("th", name, name in text) for name in frame.columns)
    body = ""
    for shaded, row in zip(marked, frame.itertuples(index=False), strict=True):
        cells = zip(frame.columns, row, strict=True)
        body += '<tr class="control">' if shaded else "<tr>"
        body += "".join(_cell("td", value, name in text) for name, value in cells) + "</tr>"
    return HTML(
        f'<div class="table"><table class="numbers"><caption>{escaped(caption, LONGEST_PARAGRAPH)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(tag: str, value: object, is_text: bool) -> str:
    """One cell of a table, its lines apart."""
    lines = [escaped(line) for line in shortened(str(value)).split("\n")]
    content = "<br>".join(f"<small>{line}</small>" if line.startswith(("[", "(")) else line for line in lines)
    kind = ' class="text"' if is_text else ""
    return f"<{tag}{kind}>{content}</{tag}>"
