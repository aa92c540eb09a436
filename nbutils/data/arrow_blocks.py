"""Blocks as one Arrow file, `blocks.arrow`: lists of int32, written batch after batch, read memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.foundation import CorpusError, relative

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "blocks.arrow"
CURE = "Prepare the data again with 01_data_prep, or copy the folder again."
ROWS_AT_ONCE = 1000  # in a piece that is mapped as one


class ArrowWriter:
    """Writes rows of a split into `folder`; a context manager."""

    def __init__(self, folder: Path, names: Sequence[str], block_size: int | None) -> None:
        """names: of the columns; block_size: tokens in each row, None where rows have any length."""
        from datasets import Features, List, Value

        self._folder, self._length = folder, block_size or -1
        self._schema = Features({name: List(Value("int32"), length=self._length) for name in names}).arrow_schema
        self._open = ExitStack()

    def __enter__(self) -> ArrowWriter:
        import pyarrow

        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._open.enter_context((self._folder / FILE).open("wb"))
        self._stream = self._open.enter_context(pyarrow.ipc.new_stream(file, self._schema))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Rows: for each column an array (rows, block_size), or one array for each row."""
        import pyarrow

        arrays = [self._lists(columns[name]) for name in self._schema.names]
        self._stream.write_table(pyarrow.table(arrays, schema=self._schema), ROWS_AT_ONCE)

    def _lists(self, rows: Sequence[np.ndarray]) -> Any:
        import pyarrow

        values = pyarrow.array(np.concatenate([np.zeros(0, np.int32), *rows]))
        if self._length > 0:
            return pyarrow.FixedSizeListArray.from_arrays(values, self._length)
        ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
        return pyarrow.ListArray.from_arrays(pyarrow.array(ends), values)


def read_arrow(folder: Path, block_size: int | None = None) -> Dataset:
    """The rows that an ArrowWriter wrote. Raises CorpusError where they are damaged or not of `block_size`."""
    from datasets import Dataset
    from pyarrow import ArrowException

    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{relative(path)} is missing")
    try:
        blocks = Dataset.from_file(str(path))
    except (ArrowException, OSError) as error:
        raise CorpusError(f"{relative(path)} is damaged ({error}). {CURE}") from None
    if block_size and (found := blocks.features["input_ids"].length) != block_size:
        raise CorpusError(
            f"{relative(path)} holds blocks of {found} tokens, and the data card says block_size {block_size}: they "
            f"are of other data. {CURE}"
        )
    return blocks
