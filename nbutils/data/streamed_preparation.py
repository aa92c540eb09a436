"""Preparation of a corpus that does not fit memory: read once, cleaned, split, tokenised and written as it comes.

    documents -> batches -> clean -> exact copies dropped -> split by hash -> tokens -> blocks -> shards on disk

Held are a batch of documents, a shard of each split, a hash of each text (exact copies) and a bounded sample of word
runs (leakage). Blocks, their order, the card's numbers and the fingerprint are those that `preparation.prepare_data`
gives with streamed=false for the same parameters.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data.corpora import SPLITS, CorpusRequest, Document, stream_corpus
from nbutils.data.data_card import (
    EXAMPLE_CHARACTERS,
    EXAMPLES,
    SIZES,
    Duplicates,
    Selection,
    check_ascii,
    data_card,
    near_copies,
    token_ids,
)
from nbutils.data.documents import (
    Duplicate,
    check_filled,
    is_long_enough,
    none_left,
    position_of,
    split_at,
    text_hash,
    tidy_text,
)
from nbutils.data.packing import Tally, Totals, block_writer, too_few
from nbutils.data.streamed_measures import LeakageSample, SeenTexts
from nbutils.data.tokenization import load_tokenizer, tokenize
from nbutils.foundation import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbutils.data.settings import DataConfig

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 22  # whichever is reached first
TABLE_ROWS = 1 << 16  # of documents.parquet written together
LOGGED_DOCUMENTS = 100_000  # read between two lines of the log
COLUMNS = ("input_ids", "document_ids")
STAGES = ("read", "cleaned", "without duplicates", "split")


def prepare_streamed(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Writes blocks, documents.parquet and tokenizer into `folder`; returns the data card, but for its `config`.

    Raises CorpusError or ModelError. `config` is one that check_config passes.
    """
    corpus = stream_corpus(CorpusRequest.of(asdict(config)))
    tokenizer = load_tokenizer(config.tokenizer)
    with ExitStack() as files:
        stream = _Stream(config, tokenizer, folder, files)
        for batch in _batches(corpus.documents):
            stream.take(batch)
        totals = stream.finish()
    if config.ascii_only:
        check_ascii(totals, tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    duplicates = Duplicates(stream.copies, 0, _named(stream.last_copies, folder / "documents.parquet"))
    selection = Selection([], stream.stages(), duplicates, stream.example, corpus.origin, corpus.fallback_taken)
    card = data_card(selection, stream.sizes, totals, tokenizer, config.block_size, stream.leakage.table())
    return {"task": "lm", "near_copies": near_copies(config.dedup), **card}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _named(copies: Iterable[tuple[str, int]], table: Path) -> list[Duplicate]:
    """Copies with the names of the documents that were kept for them."""
    import pyarrow.parquet

    copies = list(copies)
    wanted = [("document", "in", [kept for _, kept in copies])]
    rows = pyarrow.parquet.read_table(table, columns=["document", "name"], filters=wanted) if copies else None
    names = dict(zip(*(rows[name].to_pylist() for name in ("document", "name")), strict=True)) if copies else {}
    return [Duplicate(dropped, names[kept], 1.0, exact=True) for dropped, kept in copies]


class _Stream:
    """What is known of the documents so far, and the files that are written."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, files: ExitStack) -> None:
        self.config, self.tokenizer, self.folder, self._files = config, tokenizer, folder, files
        self.copies, self.last_copies = 0, deque(maxlen=EXAMPLES)
        self.example: dict[str, str] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.leakage = LeakageSample()
        self._counts = {stage: [0, 0] for stage in STAGES}
        self._seen, self._documents, self._longest = SeenTexts(), 0, 0
        self._splits: dict[str, _SplitBlocks] = {}
        self._table = files.enter_context(_DocumentTable(folder / "documents.parquet"))

    def take(self, batch: list[Document]) -> None:
        """The documents of a batch that stay are tokenised and written."""
        first = self._documents
        chosen = list(filter(None, map(self._choose, batch)))
        ids = tokenize([document.text for document in chosen], self.tokenizer)
        for split in SPLITS:
            rows = [row for row, document in enumerate(chosen) if document.split == split]
            if rows and split not in self._splits:
                blocks = _SplitBlocks(self.folder / "blocks" / split, split, self.config, self.tokenizer)
                self._splits[split] = self._files.enter_context(blocks)
                self.sizes[split] = dict.fromkeys(("documents", *SIZES), 0)
            if rows:
                self._splits[split].add([ids[row] for row in rows], [first + row for row in rows])
        for number, document, tokens in zip(range(first, self._documents), chosen, map(len, ids), strict=True):
            size = (len(document.text), len(document.text.encode()), tokens)
            self._table.add(number, document.name, document.split, *size)
            for name, added in zip(("documents", *SIZES), (1, *size), strict=True):
                self.sizes[document.split][name] += added
            self.leakage.add(document.text, document.split)

    def finish(self) -> dict[str, Totals]:
        """The rows of each split, after the last batch. Raises CorpusError where one has no block."""
        config, documents = self.config, self._counts["split"][0]
        if not self._counts["cleaned"][0]:
            raise CorpusError(none_left(self._longest, config.minimum_characters))
        needed = SPLITS if config.split == "hash" else SPLITS[:2]
        check_filled(self._splits, needed, f"split={config.split} of {documents} documents")
        return {split: self._splits[split].totals() for split in SPLITS if split in self._splits}

    def stages(self) -> list[dict[str, Any]]:
        """How many documents and characters there were after each stage."""
        return [
            {"stage": stage, "documents": documents, "characters": characters}
            for stage, (documents, characters) in self._counts.items()
        ]

    def _choose(self, document: Document) -> Document | None:
        """The document cleaned and with its split, None where it does not stay."""
        config = self.config
        self._count("read", document.text)
        text = tidy_text(document.text, config.clean, config.ascii_only)
        self._longest = max(self._longest, len(text))
        if not is_long_enough(text, config.clean, config.minimum_characters):
            return None
        self._count("cleaned", text)
        if not self.example:
            before, after = document.text[:EXAMPLE_CHARACTERS], text[:EXAMPLE_CHARACTERS]
            self.example = {"name": document.name, "before": before, "after": after}
        hashed = text_hash(text)
        if config.dedup == "exact" and (kept := self._seen.first(hashed, self._documents)) != self._documents:
            self.copies += 1
            self.last_copies.append((document.name, kept))
            return None
        self._count("without duplicates", text)
        split = document.split if config.split == "given" else split_at(position_of(hashed), config.held_out_share)
        if not split:
            raise CorpusError(
                f"split=given needs a corpus with splits of its own, but the document {document.name!r} has none. Set "
                "split to hash."
            )
        self._count("split", text)
        self._documents += 1
        return replace(document, text=text, split=split)

    def _count(self, stage: str, text: str) -> None:
        counts = self._counts[stage]
        counts[0] += 1
        counts[1] += len(text)
        if stage == "read" and counts[0] % LOGGED_DOCUMENTS == 0:
            logger.info("%d documents read, %d kept, %d characters", counts[0], self._documents, counts[1])


class _SplitBlocks:
    """The blocks of a split, written as they fill; a context manager."""

    def __init__(self, folder: Path, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.split, self.block_size = split, config.block_size
        self._end = np.array([tokenizer.eos_token_id], np.int32)
        self._writer = block_writer(folder, config.storage, COLUMNS, config.block_size)
        self._tally = Tally(COLUMNS, token_ids(tokenizer))
        self._rest = [np.zeros(0, np.int32), np.zeros(0, np.int32)]  # tokens and documents that fill no block yet
        self._blocks, self._documents = 0, 0

    def __enter__(self) -> _SplitBlocks:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def add(self, ids: list[np.ndarray], numbers: list[int]) -> None:
        """Documents in their order: tokens without the end token, and numbers."""
        self._documents += len(ids)
        lengths = [len(row) + 1 for row in ids]
        tokens = np.concatenate([self._rest[0], *(part for pair in zip(ids, repeat(self._end)) for part in pair)])
        owners = np.concatenate([self._rest[1], np.repeat(np.array(numbers, np.int32), lengths)])
        count = len(tokens) // self.block_size
        kept = count * self.block_size
        if count:
            flat = (tokens[:kept], owners[:kept])
            blocks = {name: each.reshape(count, -1) for name, each in zip(COLUMNS, flat, strict=True)}
            self._writer.write(blocks)
            self._tally.add(blocks)
        self._blocks += count
        self._rest = [tokens[kept:].copy(), owners[kept:].copy()]

    def totals(self) -> Totals:
        """Of all that was written. Raises CorpusError where that is nothing."""
        rest = len(self._rest[0])
        if not self._blocks:
            raise CorpusError(too_few(self.split, rest, self._documents, self.block_size))
        return self._tally.totals((self._blocks, self.block_size), rest)


class _DocumentTable:
    """documents.parquet, written some rows at a time; a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        kinds = {"document": pyarrow.int32(), "name": pyarrow.large_string(), "split": pyarrow.large_string()}
        self._schema = pyarrow.schema({**kinds, **dict.fromkeys(SIZES, pyarrow.int64())})
        self._path, self._rows, self._open = path, [], ExitStack()

    def __enter__(self) -> _DocumentTable:
        import pyarrow.parquet

        file = self._open.enter_context(self._path.open("wb"))
        self._writer = self._open.enter_context(pyarrow.parquet.ParquetWriter(file, self._schema))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._write()
        self._open.__exit__(kind, *error)

    def add(self, *row: int | str) -> None:
        """document, name, split and SIZES of one document."""
        self._rows.append(row)
        if len(self._rows) == TABLE_ROWS:
            self._write()

    def _write(self) -> None:
        import pyarrow

        columns = zip(*self._rows, strict=True) if self._rows else [[] for _ in self._schema]
        arrays = [pyarrow.array(list(column), kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._writer.write_table(pyarrow.table(arrays, schema=self._schema))
        self._rows = []
