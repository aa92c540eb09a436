"""Packing: python -m pytest tests/test_packing.py"""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nbutils.data.packing import Blocks, load_blocks, pack, save_blocks, unigram_cross_entropy
from nbutils.foundation.errors import CorpusError

END = 99


def rows(*lengths: int) -> list[np.ndarray]:
    """Token rows of these lengths: document d holds d * 10, d * 10 + 1, ..."""
    return [np.arange(length, dtype=np.int32) + 10 * number for number, length in enumerate(lengths)]


def test_documents_stand_in_order_each_closed_by_the_end_token() -> None:
    blocks = pack(rows(3, 0, 4, 2), [7, 8, 9, 20], 4, END, "train")
    assert blocks.input_ids.tolist() == [[0, 1, 2, END], [END, 20, 21, 22], [23, END, 30, 31]]
    assert blocks.document_ids.tolist() == [[7, 7, 7, 7], [8, 9, 9, 9], [9, 9, 20, 20]]
    assert blocks.dropped_tokens == 1
    assert blocks.input_ids.dtype == blocks.document_ids.dtype == np.int32


def test_running_text_has_no_end_token() -> None:
    blocks = pack(rows(3, 4), [0, 1], 3, None, "train")
    assert blocks.input_ids.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert blocks.document_ids.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert blocks.dropped_tokens == 1


def test_documents_can_be_told_apart_again() -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, END, size=length, dtype=np.int32) for length in generator.integers(0, 40, 200)]
    blocks = pack(documents, range(200), 16, END, "train")
    tokens, owners = blocks.input_ids.reshape(-1), blocks.document_ids.reshape(-1)
    total = sum(len(row) + 1 for row in documents)
    assert len(tokens) == total - blocks.dropped_tokens
    assert 0 <= blocks.dropped_tokens < 16
    for number in range(int(owners[-1])):  # the last one may be cut
        assert tokens[owners == number].tolist() == [*documents[number], END]


@pytest.mark.parametrize("documents", [rows(2, 3), []])
def test_too_few_tokens_for_one_block(documents: list[np.ndarray]) -> None:
    tokens = sum(len(row) + 1 for row in documents)
    message = f"validation split has {tokens} tokens in {len(documents)} documents.*block_size 8. Lower block_size"
    with pytest.raises(CorpusError, match=message):
        pack(documents, range(len(documents)), 8, END, "validation")


def test_blocks_come_back_from_disk_as_int32_lists(tmp_path: Path) -> None:
    from datasets import List, Value

    blocks = pack(rows(9, 9, 9), [0, 1, 2], 5, END, "train")
    save_blocks(blocks, tmp_path / "train")
    loaded = load_blocks(tmp_path / "train")
    assert set(loaded.features) == {"input_ids", "document_ids"}
    assert all(feature == List(Value("int32"), length=5) for feature in loaded.features.values())
    assert loaded[:]["input_ids"] == blocks.input_ids.tolist()
    assert loaded[:]["document_ids"] == blocks.document_ids.tolist()


def test_blocks_are_memory_mapped(tmp_path: Path) -> None:
    import pyarrow

    blocks = Blocks(*(np.zeros((40_000, 128), np.int32) for _ in range(2)), dropped_tokens=0)  # 20 MB each
    save_blocks(blocks, tmp_path / "train")
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    loaded = load_blocks(tmp_path / "train")
    assert len(loaded) == 40_000 and loaded[39_999]["input_ids"] == [0] * 128
    assert pyarrow.total_allocated_bytes() - before < 1e6
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_saving_is_the_same_to_the_byte_and_leaves_progress_bars_as_they_were(tmp_path: Path) -> None:
    from datasets import are_progress_bars_disabled, enable_progress_bars

    blocks = pack(rows(9, 9, 9), [0, 1, 2], 5, END, "train")
    enable_progress_bars()
    for name in "ab":
        save_blocks(blocks, tmp_path / name)
        assert not are_progress_bars_disabled()
    (one,), (other,) = ((tmp_path / name).glob("*.arrow") for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_unigram_cross_entropy_is_that_of_counts() -> None:
    generator = np.random.default_rng(1)
    train, held_out = generator.integers(0, 12, (30, 8)), generator.integers(0, 15, (9, 8))  # 12 to 14 never seen
    counts = Counter(train.reshape(-1).tolist())
    total, losses = train.size + 15, []
    for block in held_out.tolist():
        losses += [-math.log((counts[token] + 1) / total) for token in block[1:]]
    value = unigram_cross_entropy(*(Blocks(tokens, tokens, 0).totals(15) for tokens in (train, held_out)))
    assert value == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_unigram_cross_entropy_of_a_uniform_text() -> None:
    blocks = Blocks(np.tile(np.arange(8), (4, 1)), np.zeros((4, 8)), 0)
    assert unigram_cross_entropy(blocks.totals(8), blocks.totals(8)) == pytest.approx(math.log(8))
