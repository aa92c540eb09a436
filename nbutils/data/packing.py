"""Token ids packed into blocks of one length, kept as memory-mapped Arrow or as MDS shards.

A split is one long row of tokens, document after document, cut every `block_size` tokens; what does not fill a last
block is dropped. Each token knows its document, so numbers can be summed by document long after the text is gone.

Questions and answers are not cut: an example is a row of its own length, with a label for each token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data.mds_blocks import INDEX, MdsBlocks, MdsWriter, missing_packages
from nbutils.foundation import CorpusError, relative

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "blocks.arrow"
CURE = "Prepare the data again with 01_data_prep, or copy the folder again."
ROWS_AT_ONCE = 1000  # in a piece that is mapped as one


@dataclass(frozen=True)
class Totals:
    """What the data card says of a split's rows. `counts`, `learnt` and `scored` are numbers of each token, (vocab,).

    counts: of all tokens; learnt: of those whose frequencies a model can learn from; scored: of those that it is scored
    on. `shape` is (blocks, block_size) or (examples,); `digest` a hash over every column.
    """

    shape: tuple[int, ...]
    counts: np.ndarray
    learnt: np.ndarray
    scored: np.ndarray
    dropped_tokens: int
    digest: str


class Tally:
    """Totals of blocks that are added up as they come."""

    def __init__(self, names: Iterable[str], vocab_size: int) -> None:
        self._hashes = {name: hashlib.sha256() for name in names}
        self._counts, self._scored = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """Further blocks: arrays (blocks, block_size)."""
        for name, values in columns.items():
            self._hashes[name].update(_bytes(values))
        self._counts += _count(columns["input_ids"], len(self._counts))
        self._scored += _count(columns["input_ids"][:, 1:], len(self._counts))

    def totals(self, shape: tuple[int, ...], dropped_tokens: int) -> Totals:
        """All tokens are learnt; the first of each block is context alone."""
        return Totals(shape, self._counts, self._counts, self._scored, dropped_tokens, _digest(self._hashes))


def _count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.bincount(tokens.reshape(-1), minlength=vocab_size)


def _bytes(values: np.ndarray) -> bytes:
    return values.astype("<i4").tobytes()


def _digest(hashes: Mapping[str, Any]) -> str:
    return hashlib.sha256("".join(f"{name} {each.hexdigest()} " for name, each in hashes.items()).encode()).hexdigest()


@dataclass(frozen=True)
class Blocks:
    """The tokens of one split and, in the same places, the documents they belong to: int32, (blocks, block_size)."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    dropped_tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, block_size)."""
        return self.input_ids.shape

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What is written, by name."""
        return {"input_ids": self.input_ids, "document_ids": self.document_ids}

    @property
    def rows(self) -> dict[str, Sequence[np.ndarray]]:
        """The columns, row by row."""
        return self.columns

    def totals(self, vocab_size: int) -> Totals:
        """What the data card says of the blocks."""
        tally = Tally(self.columns, vocab_size)
        tally.add(self.columns)
        return tally.totals(self.shape, self.dropped_tokens)


@dataclass(frozen=True)
class Examples:
    """Questions and answers of one split, one after the other: int32 of shape (tokens,), and `lengths` (examples,).

    `labels` are the tokens of answers and the end tokens, UNLABELLED elsewhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    lengths: np.ndarray
    dropped_tokens: int = 0  # none: what is too long is left out as a whole

    @property
    def shape(self) -> tuple[int, ...]:
        """(examples,): their lengths differ."""
        return self.lengths.shape

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What is written, by name."""
        return {"input_ids": self.input_ids, "labels": self.labels, "document_ids": self.document_ids}

    @property
    def rows(self) -> dict[str, Sequence[np.ndarray]]:
        """The columns, row by row."""
        ends = self.lengths.cumsum()[:-1]
        return {name: np.split(values, ends) for name, values in self.columns.items()}

    def totals(self, vocab_size: int) -> Totals:
        """What the data card says of the examples; a prompt stands before all that is learnt or scored."""
        columns = {**self.columns, "lengths": self.lengths}
        labelled = _count(self.labels[self.labels >= 0], vocab_size)
        digest = _digest({name: hashlib.sha256(_bytes(values)) for name, values in columns.items()})
        return Totals(self.shape, _count(self.input_ids, vocab_size), labelled, labelled, 0, digest)


def pack(
    ids: Sequence[np.ndarray],
    document_ids: Sequence[int],
    block_size: int,
    end_token_id: int | None,
    split: str,
) -> Blocks:
    """Blocks of the documents in their order.

    ids: the tokens of each document; document_ids: its number; end_token_id: closes each document and belongs to it, or
    None in running text. Raises CorpusError where `split` has too few tokens for one block.
    """
    closed = ids if end_token_id is None else [np.append(row, np.int32(end_token_id)) for row in ids]
    tokens = np.concatenate([np.zeros(0, np.int32), *closed])
    owners = np.repeat(np.array(document_ids, np.int32), [len(row) for row in closed])
    count = len(tokens) // block_size
    if count == 0:
        raise CorpusError(too_few(split, len(tokens), len(ids), block_size))
    kept = count * block_size
    return Blocks(
        tokens[:kept].reshape(count, block_size), owners[:kept].reshape(count, block_size), len(tokens) - kept
    )


def too_few(split: str, tokens: int, documents: int, block_size: int) -> str:
    """Why a split has no block, and what to do."""
    return (
        f"The {split} split has {tokens} tokens in {documents} documents: too few for one block of block_size "
        f"{block_size}. Lower block_size, give more documents, or give {split} a larger part of them."
    )


def pack_examples(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], document_ids: Sequence[int], end_token_id: int
) -> Examples:
    """An example for each prompt and its answer, closed by the end token, which has a label as the answer has."""
    from nbutils.data.batches import UNLABELLED

    end = np.array([end_token_id], np.int32)
    unlabelled = [np.full(len(prompt), UNLABELLED, np.int32) for prompt in prompts]
    lengths = [len(prompt) + len(answer) + 1 for prompt, answer in zip(prompts, answers, strict=True)]
    return Examples(
        np.concatenate(
            [part for prompt, answer in zip(prompts, answers, strict=True) for part in (prompt, answer, end)]
        ),
        np.concatenate(
            [part for none, answer in zip(unlabelled, answers, strict=True) for part in (none, answer, end)]
        ),
        np.repeat(np.array(document_ids, np.int32), lengths),
        np.array(lengths, np.int32),
    )


def save_blocks(blocks: Blocks | Examples, folder: Path, storage: str = "arrow") -> None:
    """Writes the rows of a split: `input_ids`, `document_ids` and of examples `labels`.

    The rows of blocks are all of block_size, those of examples of the examples' lengths.
    """
    length = blocks.shape[1] if isinstance(blocks, Blocks) else None
    with block_writer(folder, storage, list(blocks.columns), length) as writer:
        writer.write(blocks.rows)


def block_writer(folder: Path, storage: str, names: Sequence[str], block_size: int | None) -> ArrowWriter | MdsWriter:
    """Where rows of a split go as they come; block_size None: of any length. Storage auto: mds where it can be."""
    if storage == "auto":
        storage = "arrow" if missing_packages() else "mds"
    return {"arrow": ArrowWriter, "mds": MdsWriter}[storage](folder, names, block_size)


def load_blocks(folder: Path, block_size: int | None = None) -> Dataset | MdsBlocks:
    """The rows that were written, in either storage; nothing is held in memory.

    Raises CorpusError where they are damaged or not of `block_size`, FileNotFoundError where there are none.
    """
    return MdsBlocks(folder, block_size) if (folder / INDEX).is_file() else read_arrow(folder, block_size)


def unigram_cross_entropy(train: Totals, held_out: Totals) -> float:
    """Nats per token of a model that knows frequencies alone: the floor that a language model must fall below.

    Counts come from all train tokens, one added to each of the vocabulary; scored are the tokens that a language model
    scores too, all but the first of each block. Of questions and answers only the answers count and are scored.
    """
    counts = train.learnt + 1
    log_probabilities = np.log(counts / counts.sum())
    return float(-(held_out.scored @ log_probabilities) / held_out.scored.sum())


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
