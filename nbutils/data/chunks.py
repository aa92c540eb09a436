"""Training chunks that begin anywhere in the text, as BabyLlama trains (Timiryasov & Tastet 2023, random_chunk).

Packed blocks are cut at the same places in every epoch. Here chunk `index` of an epoch begins up to a block later, by
an offset drawn from (seed, epoch, index) and nothing else: an interrupted run that goes on sees the chunks it would
have seen, whatever was read ahead and by however many workers.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data.mds_blocks import MdsBlocks
from nbutils.foundation import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset


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
