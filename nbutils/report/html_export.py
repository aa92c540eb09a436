"""An executed notebook becomes one HTML file that is safe to open from anyone and complete without a network.

    export(Path("executed.ipynb"), Path("reports/2026-W47.html"))

nbconvert renders the cells with inputs hidden; nh3 keeps what stands on the allow-list (text, headings,
tables, PNG figures) and drops the rest, scripts, styles, links and events included; a template of our own
adds typography, a table of contents and a content security policy under which a browser runs nothing and
asks nobody for anything. The same notebook gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nbutils.foundation import WorkbookError, visible

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATE = Path(__file__).with_name("page.html.j2")
PNG = "data:image/png;base64,"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

TAGS = {
    *("h1", "h2", "h3", "h4", "p", "br", "hr", "blockquote", "pre", "code", "em", "strong", "small", "sub", "sup"),
    *("ul", "ol", "li", "dl", "dt", "dd", "div", "span", "details", "summary"),
    *("table", "caption", "colgroup", "col", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *("figure", "figcaption", "img"),
}
ATTRIBUTES = {
    "img": {"src", "alt"},
    "th": {"colspan", "rowspan", "scope"},
    "td": {"colspan", "rowspan"},
}
# The only class names that survive: those the template styles.
CLASSES = {
    "p": {"note", "lead"},
    "div": {
        *("table", "verdict", "warning"),
        *("supported", "too-small", "not-supported", "undecided", "interim", "not-judged"),
    },
    "table": {"numbers", "words", "samples"},
    "tr": {"control", "prompt", "study"},
    "td": {"text"},
    "th": {"text"},
    "span": {"outcome"},
}
DROPPED_WITH_CONTENT = {"script", "style", "svg", "math", "template", "noscript", "iframe", "object", "title"}

# A tag of nh3's: an attribute's value, always in double quotes, may hold anything else that looks like one.
TAG = re.compile(r"""(<(?:[^">]|"[^"]*")*>)\n?""")
BARE = {"<div>", '<div class="">'}
NEEDLESS = {f"</{name}>" for name in ("td", "th", "tr", "thead", "tbody", "tfoot")}

# Cells with one of these tags stay in the notebook: its set-up, and the banner papermill puts into one that
# failed.
LEFT_OUT = {"not-in-report", "papermill-error-cell-tag", "injected-parameters"}


class ReportError(WorkbookError):
    """A report cannot be made from this notebook."""


def export(executed_notebook: Path, html_file: Path) -> Path:
    """Write `executed_notebook` to `html_file` as one safe, self-contained page, and return its path.

    The title is the notebook's first heading, the table of contents its second-level ones. A notebook that
    stopped at an error is exported under a banner that says so. Raises ReportError where it cannot be read.
    """
    from jinja2 import Environment

    from nbutils.foundation import atomic_write

    notebook = _read(executed_notebook)
    body, contents = _number_sections(_render(notebook))
    heading = re.search(r"<h1>(.*?)</h1>", body, re.DOTALL)
    opening, sections = re.split(r"(?=<h2 |$)", body, maxsplit=1)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_plain(heading[1]) if heading else "Report",
        opening=opening,
        sections=sections,
        contents=contents,
        stopped=any(map(_failed, notebook.cells)),
    )
    try:
        html_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(html_file, page)
    except OSError as error:
        raise ReportError(f"{html_file} cannot be written ({error.strerror}). Name another file with --out.") from None
    return html_file


def clean(fragment: str) -> str:
    """`fragment` reduced to the allow-list, with invisible characters spelled out.

    Pictures are kept only as base64 PNG, so neither a request nor an SVG or HTML document can hide in one.
    """
    import nh3

    cleaned = nh3.clean(
        fragment,
        tags=TAGS,
        clean_content_tags=DROPPED_WITH_CONTENT,
        attributes=ATTRIBUTES,
        attribute_filter=_only_png,
        allowed_classes=CLASSES,
        url_schemes={"data"},
        link_rel=None,
    )
    return visible(_lightened(cleaned))


def _lightened(fragment: str) -> str:
    """Cleaned HTML without the divs whose classes were all dropped, and without end tags that tables need not have.

    nbconvert puts five such divs round every output; a browser ends cells and rows where the next begin.
    """
    kept: list[bool] = []

    def shown(tag: re.Match) -> str:
        if tag[1] in NEEDLESS:
            return ""
        if tag[1] == "</div>":
            return tag[0] if kept.pop() else ""
        if tag[1].startswith("<div"):
            kept.append(tag[1] not in BARE)
            return tag[0] if kept[-1] else ""
        return tag[0]

    return TAG.sub(shown, fragment)


def _only_png(tag: str, attribute: str, value: str) -> str | None:
    """The attribute's value, or None to drop it: a picture's source must be base64 that decodes to a PNG."""
    if (tag, attribute) != ("img", "src"):
        return value
    try:
        content = base64.b64decode(value.removeprefix(PNG).replace("\n", ""), validate=True)
    except ValueError:
        return None
    return value if value.startswith(PNG) and content.startswith(PNG_SIGNATURE) else None


def _read(path: Path) -> NotebookNode:
    """The notebook at `path`, checked to be one."""
    import nbformat

    cure = "Make it from notebooks/08_report.ipynb: python -m nbutils report."
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}. {cure}") from None
    except Exception as error:  # nbformat raises what its converters happen to meet: TypeError, AttributeError, ...
        raise ReportError(f"{path} is not a notebook ({type(error).__name__}). {cure}") from error
    return notebook


def _failed(cell: NotebookNode) -> bool:
    """Whether a cell stopped at an error."""
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def _render(notebook: NotebookNode) -> str:
    """The cells as clean HTML: markdown and outputs without inputs and prompts.

    Each cell is cleaned by itself, so that a tag left open in one cannot swallow the next.
    """
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    parts = []
    for cell in notebook.cells:
        if _failed(cell) or not LEFT_OUT & {*cell.metadata.get("tags", [])}:
            fragment, _ = exporter.from_notebook_node(NotebookNode(notebook | {"cells": [cell]}))
            parts.append(clean(fragment))
    return "".join(parts)


def _number_sections(body: str) -> tuple[str, list[tuple[str, str]]]:
    """`body` with an id on each second-level heading, and (id, text) of each for the table of contents."""
    contents: list[tuple[str, str]] = []

    def with_id(heading: re.Match) -> str:
        contents.append((f"section-{len(contents) + 1}", _plain(heading[1])))
        return f'<h2 id="{contents[-1][0]}">{heading[1]}</h2>'

    return re.sub(r"<h2>(.*?)</h2>", with_id, body, flags=re.DOTALL), contents


def _plain(fragment: str) -> str:
    """The text of cleaned HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", fragment)).strip()
