"""The order of training: which block stands where is a function of (seed, epoch) and nothing else.

Position `i` of an epoch's order is one integer from which a run can go on. Neither the number of processes nor how
many blocks are read ahead changes it: with equal micro-batch x accumulation x processes every optimiser step is made
of the same blocks, and each block is seen once an epoch. Where several processes share the last micro-batches of an
epoch, rows that hold nothing fill them up; a process that had no batch at all would leave the others waiting.

accelerate's own way repeats the first blocks of the epoch there, and its seeds are seed + epoch, so that seed 42 in its
second epoch trains in the order of seed 43 in its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from nbutils.data.batches import IGNORE_INDEX, Rows


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
