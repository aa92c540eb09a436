"""Token ids packed into blocks of one length, kept as memory-mapped Arrow.

A split is one long row of tokens, document after document, cut every `block_size` tokens; what does not fill a last
block is dropped. Each token knows its document, so numbers can be summed by document long after the text is gone.

Questions and answers are not cut: an example is a row of its own length, with a label for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbutils.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset


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
    def learnt(self) -> np.ndarray:
        """The tokens whose frequencies a model can learn from, (tokens,): all of them."""
        return self.input_ids.reshape(-1)

    @property
    def scored(self) -> np.ndarray:
        """The tokens that a model is scored on, (tokens,): all but the first of each block."""
        return self.input_ids[:, 1:].reshape(-1)


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
    def learnt(self) -> np.ndarray:
        """The tokens whose frequencies a model can learn from, (tokens,): those with a label."""
        return self.labels[self.labels >= 0]

    @property
    def scored(self) -> np.ndarray:
        """The tokens that a model is scored on, (tokens,): the same, since a prompt stands before them."""
        return self.learnt


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
        raise CorpusError(
            f"The {split} split has {len(tokens)} tokens in {len(ids)} documents: too few for one block of block_size "
            f"{block_size}. Lower block_size, give more documents, or give {split} a larger part of them."
        )
    kept = count * block_size
    return Blocks(
        tokens[:kept].reshape(count, block_size), owners[:kept].reshape(count, block_size), len(tokens) - kept
    )


def pack_examples(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], document_ids: Sequence[int], end_token_id: int
) -> Examples:
    """An example for each prompt and its answer, closed by the end token, which has a label as the answer has."""
    from nbutils.objectives.head import UNLABELLED

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


def save_blocks(blocks: Blocks | Examples, folder: Path) -> None:
    """Writes an Arrow data set of lists of int32: `input_ids`, `document_ids` and of examples `labels`.

    The lists of blocks are all of block_size, those of examples of the examples' lengths.
    """
    import pyarrow
    from datasets import (
        Dataset,
        Features,
        List,
        Value,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    flat = {name: pyarrow.array(values.reshape(-1)) for name, values in blocks.columns.items()}
    if isinstance(blocks, Blocks):
        length = blocks.shape[1]
        arrays = {name: pyarrow.FixedSizeListArray.from_arrays(values, length) for name, values in flat.items()}
    else:
        length = -1  # of any length
        ends = pyarrow.array(np.concatenate([[0], blocks.lengths.cumsum()]).astype(np.int32))
        arrays = {name: pyarrow.ListArray.from_arrays(ends, values) for name, values in flat.items()}
    features = Features({name: List(Value("int32"), length=length) for name in arrays})
    table = pyarrow.table(arrays, schema=features.arrow_schema)
    bars = not are_progress_bars_disabled()
    disable_progress_bars()  # one shard, written in a moment
    Dataset(table).save_to_disk(folder)
    if bars:
        enable_progress_bars()


def load_blocks(folder: Path) -> Dataset:
    """The data set that `save_blocks` wrote, memory-mapped."""
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def unigram_cross_entropy(train: Blocks | Examples, held_out: Blocks | Examples, vocab_size: int) -> float:
    """Nats per token of a model that knows frequencies alone: the floor that a language model must fall below.

    Counts come from all train tokens, one added to each of `vocab_size`; scored are the tokens that a language model
    scores too, all but the first of each block. Of questions and answers only the answers count and are scored.
    """
    counts = np.bincount(train.learnt, minlength=vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[held_out.scored].mean())
