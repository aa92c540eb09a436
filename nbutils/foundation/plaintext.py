"""Text that was written by somebody else, made fit to be shown: in HTML, in a figure, in Markdown, in a terminal.

Names, values, samples and messages come from plans, data, models and errors. Shown as they are they could hide letters,
turn the order of their neighbours round, pile marks over the lines above, or fill a page.
"""

from __future__ import annotations

import html
import re
import unicodedata

LONGEST_TEXT = 400  # characters of a cell
LONGEST_QUOTED = 100  # of what an error repeats of a file
LONGEST_PARAGRAPH = 4000  # of a sentence made of several such texts
LONGEST_WORD = 40  # characters; what has no space for longer is cut where it is
MOST_MARKS = 4  # accents on one letter: Vietnamese and Hebrew need three
# Letters and signs by their category, and nothing to see: fillers of Hangul, inherent vowels, the empty Braille cell.
BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]+")
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
MARKS = {"Mn", "Me"}


def visible(value: object) -> str:
    r"""`value` as text in which every character is seen where it stands: what hides or reorders is written as \u202e.

    So are control characters, halves of characters that UTF-8 cannot hold, and marks piled on one letter past
    MOST_MARKS. Line breaks and tabs stay.
    """
    return UNUSUAL.sub(_spelled, str(value))


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """`text`, cut where it is longer than so many characters, before the word that would be cut in two."""
    if len(text) <= longest:
        return text
    words = text[: longest + 1].rpartition(" ")[0]
    return (words if len(words) >= longest - LONGEST_WORD else text[:longest]).rstrip() + " …"


def escaped(value: object, longest: int = LONGEST_TEXT) -> str:
    """`value` as HTML that shows it: visible, at most so many characters, without markup."""
    return html.escape(shortened(visible(str(value)[: longest + 1]), longest))


def _spelled(found: re.Match[str]) -> str:
    parts, marks = [], 0
    for character in found[0]:
        category = unicodedata.category(character)
        marks = marks + 1 if category in MARKS else 0
        hides = category in HIDDEN or marks > MOST_MARKS or _is_nothing(character)
        parts.append(escape(character) if hides else character)
    return "".join(parts)


def _is_nothing(character: str) -> bool:
    """Whether it is blank though it counts as a letter, or a code that is no character at all."""
    code = ord(character)
    return character in BLANK or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def escape(character: str) -> str:
    r"""A character as its code: \u202e."""
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
