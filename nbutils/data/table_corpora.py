"""`jsonl`, `csv` and `parquet`: files of rows, one row a document; `text_field` names the column that holds the text.

In task qa a row is a question and its answer, by `question_field` and `answer_field` (question_corpus.py).
Files are read as far as documents are wanted and no further.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from nbutils.data.question_corpus import examples_of_rows
from nbutils.data.sources import YOURS, CorpusRequest, Document, Located, Source, find_files, short_names
from nbutils.foundation import CorpusError, did_you_mean

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
ROWS_LOOKED_AT = 1000  # after the first row without text, to say how many there are
NAMES_SHOWN = 20  # of columns or configurations, some data sets have thousands

Rows = Iterator[tuple[str, tuple[object, ...]]]  # where the row stands, and what it has in each column that is read


# ---- rows to documents, for files and Hub data sets alike ------------------------------------------------------------


def check_columns(request: CorpusRequest, columns: Iterable[str], where: str) -> None:
    """Raises CorpusError where a column that `request` reads is none of the `columns`."""
    columns = list(columns)
    for parameter in ("question_field", "answer_field") if request.task == "qa" else ("text_field",):
        if (name := getattr(request, parameter)) not in columns:
            raise CorpusError(f"{where} has no column for {parameter} {name!r}. {nearest_name(name, columns)}")


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """As did_you_mean, for lists that may be too long to show."""
    valid = sorted(valid)
    near = did_you_mean(name, valid)
    if len(valid) <= NAMES_SHOWN or near.startswith("Did you mean"):
        return near
    return f"Valid names: {', '.join(valid[:NAMES_SHOWN])} and {len(valid) - NAMES_SHOWN} more."


def documents_of_rows(rows: Rows, request: CorpusRequest, split: str = "") -> Iterator[Document]:
    """A document for each row with a text; a null, a number or anything else is refused, or left out where asked.

    Raises CorpusError that says how many rows are no text and which is the first; in any case where the first
    ROWS_LOOKED_AT rows hold no text at all. In task qa as `examples_of_rows`.
    """
    if request.task == "qa":
        yield from examples_of_rows(rows, request, split)
        return
    texts = 0
    without: list[str] = []
    try:
        for place, (value,) in rows:
            if isinstance(value, str):
                texts += 1
                yield Document(place, value, split)
                continue
            without.append(f"{place} ({_kind(value)})")
            if not request.skip_non_text or len(without) == ROWS_LOOKED_AT > texts == 0:
                raise CorpusError(_without_text(request, without, rows))
    finally:
        if request.skip_non_text and without:
            logger.warning("%d rows without text were left out; the first is %s", len(without), without[0])


def _without_text(request: CorpusRequest, without: list[str], rows: Rows) -> str:
    further = list(islice(rows, ROWS_LOOKED_AT))
    others = sum(not isinstance(value, str) for _, (value,) in further)
    skip = "" if request.skip_non_text else ", or set skip_non_text to true to leave them out"
    return (
        f"The column {request.text_field!r} has rows that are no text: {without[0]} is the first, and of the "
        f"{len(without) - 1 + len(further)} rows looked at after it {len(without) - 1 + others} are none either. Set "
        f"text_field to a column of texts, mend the rows{skip}."
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return f"a {type(value).__name__}, {str(value)[:40]!r}"


# ---- files -----------------------------------------------------------------------------------------------------------


def _json_rows(file: Path, name: str, request: CorpusRequest) -> Rows:
    for number, row in _json_lines(file):
        yield f"{name}:{number}", tuple(row.get(column) for column in request.columns)


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The number, from 1, and the object on each line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
            except UnicodeDecodeError as error:
                raise CorpusError(_not_utf8(file, error, f"line {number}")) from None
            except ValueError as error:
                raise CorpusError(
                    f"{file} is damaged: line {number} is not valid JSON ({error}). Mend or remove that line; if the "
                    "file ends there, it was cut off: copy it again."
                ) from None
            if not isinstance(row, dict):
                raise CorpusError(
                    f"{file} is not JSON Lines: line {number} is a {type(row).__name__}, not an object with columns. "
                    'Write one object a line, such as {"text": "..."}.'
                )
            yield number, row


def _json_columns(file: Path) -> list[str]:
    return list(next((row for _, row in _json_lines(file)), {}))


def _csv_rows(file: Path, name: str, request: CorpusRequest) -> Rows:
    """Cells are texts, an empty one is a null; in task lm one that reads as a number is a number."""
    import pandas

    with _csv_errors(file):
        number = 0
        settings = {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
        for chunk in pandas.read_csv(file, chunksize=ROWS_AT_ONCE, **settings):  # usecols would pass over extra cells
            if not isinstance(chunk.index, pandas.RangeIndex):
                raise CorpusError(
                    f"{file} is damaged: its rows have more cells than its header has names. Quote texts that hold "
                    "commas, or name all columns in the first line."
                )
            cells = chunk[list(request.columns)]
            if request.task == "lm":
                texts = chunk[request.text_field].astype(object)
                numbers = pandas.to_numeric(texts, errors="coerce")
                cells = texts.where(numbers.isna(), numbers).to_frame()
            for values in cells.itertuples(index=False, name=None):
                number += 1
                yield f"{name}:{number}", tuple(None if pandas.isna(value) else value for value in values)


def _csv_columns(file: Path) -> list[str]:
    import pandas

    with _csv_errors(file):
        return list(pandas.read_csv(file, nrows=0, encoding="utf-8-sig").columns)


@contextmanager
def _csv_errors(file: Path) -> Iterator[None]:
    from pandas.errors import EmptyDataError, ParserError

    try:
        yield
    except UnicodeDecodeError as error:
        raise CorpusError(_not_utf8(file, error, "it")) from None
    except EmptyDataError:
        raise CorpusError(f"{file} is empty. Leave it out of data_files, or write a header line into it.") from None
    except ParserError as error:
        raise CorpusError(
            f"{file} is damaged: {_first_line(error)}. Mend the line (a quote that is not closed, a comma too many); "
            "if the file ends there, it was cut off: copy it again."
        ) from None


def _parquet_rows(file: Path, name: str, request: CorpusRequest) -> Rows:
    with _parquet_errors(file):
        import pyarrow.parquet

        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=list(request.columns)):
                for values in zip(*(batch.column(column).to_pylist() for column in request.columns), strict=True):
                    number += 1
                    yield f"{name}:{number}", values


def _parquet_columns(file: Path) -> list[str]:
    with _parquet_errors(file):
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(file).names


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:  # a torn page is an OSError, a torn footer an ArrowInvalid
        raise CorpusError(
            f"{file} is damaged or no Parquet file ({_first_line(error)}). If it was cut off, copy it again; else "
            "leave it out of data_files."
        ) from None


def _not_utf8(file: Path, error: UnicodeDecodeError, place: str) -> str:
    return (
        f"{file} is not UTF-8 text: {place} holds the byte 0x{error.object[error.start]:02x}. "
        f"If it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 '{file.name}' > utf8{file.suffix}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- sources ---------------------------------------------------------------------------------------------------------


def _table(
    suffix: str, columns: Callable[[Path], list[str]], rows: Callable[[Path, str, CorpusRequest], Rows]
) -> Source:
    def find(request: CorpusRequest) -> Located:
        """Looks at what names the columns of each file, and no further."""
        files = find_files(request.data_files, suffix)
        for file in files:
            if found := columns(file):
                check_columns(request, found, str(file))
        return Located(files)

    def read(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
        named = zip(located.files, short_names(located.files), strict=True)
        everything = chain.from_iterable(rows(file, name, request) for file, name in named)
        return [documents_of_rows(everything, request)]

    return Source(find, read, YOURS, has_questions=True)


JSONL = _table(".jsonl", _json_columns, _json_rows)
CSV = _table(".csv", _csv_columns, _csv_rows)
PARQUET = _table(".parquet", _parquet_columns, _parquet_rows)
