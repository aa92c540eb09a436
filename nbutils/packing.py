"""Token ids packed into blocks of one length, kept as memory-mapped Arrow.

A split is one long row of tokens, document after document, cut every `block_size` tokens; what does not fill a last
block is dropped. Each token knows its document, so numbers can be summed by document long after the text is gone.
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


def save_blocks(blocks: Blocks, folder: Path) -> None:
    """Writes an Arrow data set of two columns, `input_ids` and `document_ids`: lists of block_size int32."""
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

    columns = {"input_ids": blocks.input_ids, "document_ids": blocks.document_ids}
    block_size = blocks.input_ids.shape[1]
    arrays = {
        name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), block_size)
        for name, values in columns.items()
    }
    features = Features({name: List(Value("int32"), length=block_size) for name in columns})
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


def unigram_cross_entropy(train: Blocks, held_out: Blocks, vocab_size: int) -> float:
    """Nats per token of a model that knows frequencies alone: the floor that a language model must fall below.

    Counts come from all train tokens, one added to each of `vocab_size`; scored are the tokens that a language model
    scores too, all but the first of each block.
    """
    counts = np.bincount(train.input_ids.reshape(-1), minlength=vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[held_out.input_ids[:, 1:]].mean())
