"""Chunks at random positions: python -m pytest tests/test_chunks.py"""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from nbutils.data.batches import RandomChunks
from nbutils.data.packing import Blocks, load_blocks, save_blocks
from nbutils.foundation.errors import CorpusError

BLOCK, COUNT = 16, 2500  # more than the 1000 rows that Arrow may keep in one piece
STREAM = np.arange(BLOCK * COUNT)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("blocks")
    tokens = STREAM.astype(np.int32).reshape(COUNT, BLOCK)
    save_blocks(Blocks(tokens, np.zeros_like(tokens), 0), folder)
    return load_blocks(folder)


def positions(chunks: RandomChunks, epoch: int) -> np.ndarray:
    chunks.set_epoch(epoch)
    return np.array([chunks.position(index) for index in range(len(chunks))])


def test_a_chunk_is_the_stream_from_its_position_on(blocks) -> None:
    chunks = RandomChunks(blocks, BLOCK, seed=1)
    assert len(chunks) == COUNT - 1
    for epoch in (0, 3):
        chunks.set_epoch(epoch)
        for index in [*range(0, COUNT - 1, 7), COUNT - 2]:
            item = chunks[index]
            assert index * BLOCK <= item["position"] < (index + 1) * BLOCK
            assert item["input_ids"].dtype == np.int64
            assert (item["input_ids"] == STREAM[item["position"] :][:BLOCK]).all()
    with pytest.raises(IndexError, match="2499 chunks"):
        chunks[COUNT - 1]


def test_a_chunk_depends_on_seed_epoch_and_index_alone(blocks) -> None:
    read = RandomChunks(blocks, BLOCK, seed=1)
    for index in np.random.default_rng(0).integers(len(read), size=50):
        read[int(index)]
    fresh = RandomChunks(blocks, BLOCK, seed=1)
    assert (positions(read, 2) == positions(fresh, 2)).all()
    assert (positions(read, 2) == positions(pickle.loads(pickle.dumps(read)), 2)).all()
    for other in (positions(fresh, 3), positions(RandomChunks(blocks, BLOCK, seed=2), 2)):
        same = np.mean(positions(read, 2) == other)
        assert same == pytest.approx(1 / BLOCK, abs=0.02)


def test_offsets_are_uniform_and_cover_the_stream(blocks) -> None:
    chunks = RandomChunks(blocks, BLOCK, seed=0)
    offsets = np.concatenate([positions(chunks, epoch) % BLOCK for epoch in range(4)])
    counts = np.bincount(offsets, minlength=BLOCK)
    expected = len(offsets) / BLOCK
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi squared, 15 degrees of freedom, p = .001
    seen = np.zeros(len(STREAM), bool)
    for epoch in range(12):
        for position in positions(chunks, epoch):
            seen[position : position + BLOCK] = True
    assert seen[BLOCK:-BLOCK].all()


def test_the_data_set_is_read_where_it_lies(blocks, tmp_path: Path) -> None:
    tokens = np.arange(2**22, dtype=np.int32).reshape(-1, 1024)
    save_blocks(Blocks(tokens, np.zeros_like(tokens), 0), tmp_path)
    large = load_blocks(tmp_path)
    tracemalloc.start()
    chunks = RandomChunks(large, 1024, seed=0)
    for index in range(0, len(chunks), 13):
        chunks[index]
    assert tracemalloc.get_traced_memory()[1] < tokens.nbytes / 16
    tracemalloc.stop()
    assert len(pickle.dumps(chunks)) < tokens.nbytes / 16


def test_a_data_loader_reads_it_with_workers_and_sets_the_epoch(blocks) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    chunks = RandomChunks(blocks, BLOCK, seed=5)
    loader = Accelerator(cpu=True).prepare(DataLoader(chunks, batch_size=64, num_workers=2))
    loader.set_epoch(4)
    read = np.concatenate([batch["position"].numpy() for batch in loader])
    assert chunks.epoch == 4
    assert (read == positions(RandomChunks(blocks, BLOCK, seed=5), 4)).all()


def test_a_slice_of_the_blocks_is_a_stream_too(blocks) -> None:
    chunks = RandomChunks(blocks.select(range(100, 110)), BLOCK, seed=0)
    item = chunks[8]
    assert (item["input_ids"] == STREAM[100 * BLOCK + item["position"] :][:BLOCK]).all()


def test_what_cannot_be_a_stream_is_refused(blocks) -> None:
    with pytest.raises(CorpusError, match=r"at least 2 blocks, but there are 1\. Give more text"):
        RandomChunks(blocks.select([0]), BLOCK, seed=0)
    with pytest.raises(ValueError, match="shuffled"):
        RandomChunks(blocks.shuffle(seed=0), BLOCK, seed=0)
    with pytest.raises(ValueError, match="not of 8 tokens"):
        RandomChunks(blocks, 8, seed=0)
