"""Questions and answers as documents: how a pair is written for a model, and how rows become pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from nbutils.data.sources import CorpusRequest, Document
from nbutils.foundation import CorpusError

logger = logging.getLogger(__name__)

PROMPT = "Question: {question}\nAnswer:"
ROWS_LOOKED_AT = 1000  # after the first row without a pair, to say how many there are


def prompt_of(question: str) -> str:
    """What a model is asked; it ends without a space, since the answer's first token begins with one."""
    return PROMPT.replace("{question}", question)


def pair_document(name: str, question: str, answer: str, split: str = "") -> Document:
    """A question and its answer as one document, whose text is what a model reads; the end token comes after it."""
    return Document(name, f"{prompt_of(question)} {answer}", split, question, answer)


def examples_of_rows(rows: Iterable[tuple[str, tuple[Any, ...]]], request: CorpusRequest, split: str = "") -> Any:
    """A document for each row of a question and an answer. An answer may be a number, a question is a text.

    A row without one of the two is refused: CorpusError says how many there are, which is the first and what it lacks.
    With skip_non_text it is passed on with an empty answer, so that whoever drops it can count it.
    """
    pairs, missing = 0, 0
    rows = iter(rows)
    for place, (question, answer) in rows:
        lacks = _lacks(question, answer, request)
        pairs, missing = pairs + (not lacks), missing + bool(lacks)
        if lacks and (not request.skip_non_text or missing == ROWS_LOOKED_AT > pairs == 0):
            raise CorpusError(_without_pair(place, lacks, missing, rows, request))
        yield Document(place, "", split) if lacks else pair_document(place, question, _written(answer), split)


def _lacks(question: object, answer: object, request: CorpusRequest) -> str:
    """What a row has in place of a question or an answer, "" where it has both."""
    if not isinstance(question, str) or not question.strip():
        return f"{request.question_field} is {_kind(question)}"
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if number or (isinstance(answer, str) and answer.strip()):
        return ""
    return f"{request.answer_field} is {_kind(answer)}"


def _kind(value: object) -> str:
    if value is None or value != value:  # a table of numbers writes a null as NaN
        return "null"
    return "empty" if isinstance(value, str) and not value.strip() else f"a {type(value).__name__}, {str(value)[:40]!r}"


def _written(answer: str | float) -> str:
    return answer if isinstance(answer, str) else str(answer)


def _without_pair(
    place: str, lacks: str, missing: int, rows: Iterator[tuple[str, tuple[Any, ...]]], request: CorpusRequest
) -> str:
    further = list(islice(rows, ROWS_LOOKED_AT))
    others = missing - 1 + sum(bool(_lacks(*values, request)) for _, values in further)
    skip = "" if request.skip_non_text else ", or set skip_non_text to true to leave them out"
    return (
        f"There are rows without a question and an answer: in {place} {lacks}, and of the "
        f"{missing - 1 + len(further)} other rows looked at {others} are no pairs either. Set question_field and "
        f"answer_field to columns that hold them, mend the rows{skip}."
    )
