"""An HTML page as a browser would take it apart, for tests of what a report shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from IPython.display import HTML


class Structure(HTMLParser):
    """Collects a page's tags, attributes and text as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def text_of(html: HTML) -> str:
    """The words of an output, single spaces between them."""
    return " ".join(Structure(html.data).text.split())


def row_of(html: HTML, text: str) -> list[str]:
    """The cells of the first row of a table that has `text`."""
    row = next(row for row in re.findall(r"<tr.*?</tr>", html.data)[1:] if text in row)
    return [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", row)]
