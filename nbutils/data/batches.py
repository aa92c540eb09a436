"""Rows of prepared data become batches: right-padded, labels unshifted.

Causal attention looks back alone, so padding on the right changes nothing at real positions and needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

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
