"""Rows of prepared data become batches, right-padded, in an order that is a function of (seed, epoch) alone.

Causal attention looks back alone, so padding on the right changes nothing at real positions and needs no mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from nbutils.data.mds_blocks import MdsBlocks
from nbutils.foundation import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_INDEX = -100  # a label that no term scores, as everywhere in PyTorch: padding
UNLABELLED = -1  # a real token that cross entropy leaves out and distillation may score: prompts, the end of a block

PADDING = {"labels": IGNORE_INDEX}  # every other column is padded with 0, which no term reads
NOT_TOKENS = ("position",)  # columns that hold no value for each token


class Rows(Protocol):
    """A map-style data set whose items hold arrays (time, ...) by name: input_ids, and perhaps labels and others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Every column of `rows`, padded to the longest row: (batch, time, ...).

    `labels` are the tokens themselves where the rows have none: the model shifts them.
    """
    names = [name for name in rows[0] if name not in NOT_TOKENS]
    columns = {name: [row[name] for row in rows] for name in names}
    columns["labels"] = [row.get("labels", row["input_ids"]) for row in rows]
    return {
        name: _padded([np.asarray(each) for each in column], PADDING.get(name, 0)) for name, column in columns.items()
    }


def in_order(rows: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All `rows` in batches, in their order; draws no random number, as a DataLoader does."""
    several = getattr(rows, "__getitems__", None)
    for start in range(0, len(rows), batch_size):
        indices = list(range(start, min(start + batch_size, len(rows))))
        yield collate(several(indices) if several else [rows[index] for index in indices])


def _padded(arrays: Sequence[np.ndarray], padding: int) -> Tensor:
    longest = max(len(array) for array in arrays)
    kind = np.int64 if np.issubdtype(arrays[0].dtype, np.integer) else arrays[0].dtype
    full = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, kind)
    for row, array in zip(full, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(full)


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `length` rows in an epoch: int64 of shape (length,)."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(length)


class TrainingOrder(Sampler[int]):
    """Indices of `rows` in the epoch's order, then len(rows), the row that holds nothing, up to a multiple of `filled`.

    filled: micro-batch x processes where there are several processes, else 1.
    """

    def __init__(self, rows: Rows, seed: int, filled: int = 1) -> None:
        self.rows, self.seed, self.filled, self.epoch = rows, seed, filled, 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.filled) * self.filled

    def __iter__(self) -> Iterator[int]:
        yield from map(int, permutation(len(self.rows), self.seed, self.epoch))
        yield from [len(self.rows)] * (len(self) - len(self.rows))

    def set_epoch(self, epoch: int) -> None:
        """The order of `epoch` from here on; told to the rows too, where they draw other items for each epoch."""
        self.epoch = epoch
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class WithEmptyRow:
    """`rows` and after them one that holds nothing: as long as the first, without a labelled token."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Of the rows that hold something."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index < len(self.rows) else self._empty()

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, read together where the rows can; PyTorch's DataLoader asks for them so."""
        several = getattr(self.rows, "__getitems__", None)
        real = [index for index in indices if index < len(self.rows)]
        items = several(real) if several and real else [self.rows[index] for index in real]
        return [*items, *(self._empty() for _ in range(len(indices) - len(real)))]

    def _empty(self) -> dict[str, Any]:
        first = self.rows[0]
        return {**first, "labels": np.full(len(first["input_ids"]), IGNORE_INDEX)}


class RandomChunks:
    """A map-style data set over a split's packed blocks, seen as one stream of tokens.

    Item `index` is {"input_ids": int64 of shape (block_size,), "position": where it begins in the stream}. There is one
    item less than blocks, so that the last offset stays inside. Of Arrow blocks, which are memory-mapped, nothing is
    copied but the chunk itself; of MDS blocks the two that hold it are read.
    """

    def __init__(self, blocks: Dataset | MdsBlocks, block_size: int, seed: int) -> None:
        """blocks: a split as `load_data` opens it, not shuffled. Raises CorpusError where there are fewer than 2."""
        if len(blocks) < 2:
            raise CorpusError(
                f"Chunks at random positions need at least 2 blocks, but there are {len(blocks)}. Give more text, "
                "lower block_size, or set random_chunks to false."
            )
        if not (blocks.is_stream if isinstance(blocks, MdsBlocks) else blocks._indices is None):
            raise ValueError("The blocks are shuffled or selected: they are no stream of text.")
        self.blocks, self.block_size, self.seed, self.epoch = blocks, block_size, seed, 0
        self._pieces: list[np.ndarray] | None = None
        if isinstance(blocks, MdsBlocks):
            self.blocks = blocks.with_format("numpy", columns=["input_ids"])
            tokens = len(self.blocks[0]["input_ids"]) * len(blocks)
        else:
            tokens = sum(len(piece) for piece in self._stream())
        if tokens != len(blocks) * block_size:
            raise ValueError(f"The blocks are not of {block_size} tokens each.")

    def __len__(self) -> int:
        return len(self.blocks) - 1

    def set_epoch(self, epoch: int) -> None:
        """Draws other offsets from here on; the trainer's data loader calls it as each epoch begins."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self.position(index)
        return {"input_ids": self.tokens(position), "position": position}

    def position(self, index: int) -> int:
        """Where item `index` of this epoch begins in the stream."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} chunks, none is number {index}.")
        drawn = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)[0]
        return index * self.block_size + int(drawn % self.block_size)

    def tokens(self, position: int) -> np.ndarray:
        """The block_size tokens from `position` of the stream on, int64."""
        if isinstance(self.blocks, MdsBlocks):
            first, offset = divmod(position, self.block_size)
            both = [self.blocks[number]["input_ids"] for number in range(first, first + 1 + bool(offset))]
            return np.concatenate(both)[offset : offset + self.block_size]
        pieces = self._stream()
        chunk = np.empty(self.block_size, np.int64)
        number, filled = bisect_right(self._starts, position) - 1, 0
        while filled < self.block_size:
            part = pieces[number][position + filled - self._starts[number] :][: self.block_size - filled]
            chunk[filled : filled + len(part)] = part
            number, filled = number + 1, filled + len(part)
        return chunk

    def _stream(self) -> list[np.ndarray]:
        """The pieces of the memory-mapped column, in order, as int32 arrays that own no memory."""
        if self._pieces is None:
            column = self.blocks.data.column("input_ids")
            self._pieces = [piece.flatten().to_numpy(zero_copy_only=True) for piece in column.chunks]
            self._starts = np.cumsum([0, *map(len, self._pieces)])[:-1].tolist()
        return self._pieces

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": None}  # a worker process maps the file itself, rather than gets a copy
