"""Prefix sets: python -m pytest tests/test_prefix_table.py"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prefix_tokenizers import KINDS, PADDED, llama3, rows_by_name, sentence_piece, word_level, word_piece
from real_data import needs_real_data

from nbutils.data.bytes_of_tokens import token_bytes
from nbutils.foundation import places
from nbutils.foundation.errors import ModelError
from nbutils.objectives.prefixes import prefix_table, table
from nbutils.objectives.prefixes.table import build_table

pytestmark = pytest.mark.usefixtures("own_runs")


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest):
    return KINDS[request.param]()


def test_rows_are_the_tokens_that_the_text_begins_with(tokenizer) -> None:
    vocab = len(tokenizer) + PADDED
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [b"" if n in special else text for n, text in enumerate(token_bytes(tokenizer))] + [b""] * PADDED
    found = prefix_table(tokenizer, vocab)
    for gold, text in enumerate(texts):
        shorter = [v for v, other in enumerate(texts) if other and text.startswith(other) and len(other) < len(text)]
        row = found.row(gold).tolist()
        assert sorted(row[:-1]) == shorter and row[-1] == gold
        assert [len(texts[v]) for v in row] == sorted(len(texts[v]) for v in row)
    assert found.lengths.tolist() == [len(text) for text in texts]
    assert found.ascii.tolist() == [text != b"" and max(text) < 128 for text in texts]


def test_word_pieces_that_begin_a_word_and_that_go_on_are_apart() -> None:
    rows = rows_by_name(word_piece())
    assert rows["playing"] == ["p", "play", "playing"]
    assert rows["##playing"] == ["##p", "##play", "##playing"]
    assert rows["plate"] == ["p", "plate"]


def test_two_tokens_of_one_text_are_both_prefixes_of_others_and_not_of_each_other() -> None:
    rows = rows_by_name(sentence_piece())
    assert rows["▁straw"] == ["▁", "<0x20>", "▁s", "▁straw"]
    assert rows["▁"] == ["▁"] and rows["<0x20>"] == ["<0x20>"]
    assert rows["straw"] == ["s", "<0x73>", "st", "straw"]
    assert rows["ü"] == ["<0xC3>", "ü"]  # a part of a character is a prefix, too
    assert rows["s"] == ["s"] and rows["<0x73>"] == ["<0x73>"]


def test_whitespace_alone_is_told_from_text_that_begins_with_it() -> None:
    texts = [" ", "\n\n", "\t ", "\u3000", "\xa0", " a", "a ", "\x1f", "\xa0a"]
    assert build_table(word_level(*texts), 10).whitespace.tolist() == [False] + [True] * 5 + [False] * 4


def test_a_token_of_no_bytes_is_named() -> None:
    with pytest.raises(ModelError, match=r"1 tokens of no bytes.*'' \(id 2\).*special tokens.*another tokenizer"):
        prefix_table(word_level("a", "", "ab"), 10)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"4 tokens and the model's vocabulary 3\. Give a model of at least as many"):
        prefix_table(word_level("a", "b", "ab"), 3)


def test_the_table_is_built_once_for_a_tokenizer_and_a_vocabulary(monkeypatch) -> None:
    built = []
    monkeypatch.setattr(table, "build_table", lambda *given: built.append(given[1]) or build_table(*given))
    tokenizer = word_piece()
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: prefix_table(tokenizer, 9), range(4)))
    assert built == [9]
    assert all((getattr(each, name) == getattr(tables[0], name)).all() for each in tables for name in table.ARRAYS)
    prefix_table(tokenizer, 10)
    prefix_table(word_level(*tokenizer.get_vocab(), special="<other>"), 10)
    assert built == [9, 10, 10]


@pytest.mark.parametrize("damage", ["cut", "empty", "start", "middle", "end"])
def test_a_damaged_table_is_made_anew(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_piece()
    prefix_table(tokenizer, 9)
    (path,) = (places.RUNS / table.TABLES).glob("*.table")
    whole = path.read_bytes()
    if damage in ("cut", "empty"):
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    else:
        place = {"start": 40, "middle": len(whole) // 2, "end": len(whole) - 1}[damage]
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert prefix_table(tokenizer, 9).row(3).tolist() == [1, 2, 3]
    assert "is damaged. It is made anew." in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(caplog: pytest.LogCaptureFixture) -> None:
    places.RUNS.write_text("no folder")
    assert prefix_table(word_piece(), 9).row(3).tolist() == [1, 2, 3]
    assert "The prefix table is not kept" in caplog.text


@needs_real_data
def test_the_table_of_llama_3() -> None:
    tokenizer, found = llama3()
    assert sum(getattr(found, name).nbytes for name in table.ARRAYS) <= 4e6
    sizes = found.sizes[found.ascii]
    assert (len(sizes), sizes.sum(), np.median(sizes), sizes.max()) == (97_846, 459_791, 5, 86)
    assert round(sizes.mean(), 2) == 4.70 and (sizes == 1).sum() == 128
    assert (found.whitespace & found.ascii).sum() == 426
    assert (found.sizes[128_000:] == 1).all() and not found.lengths[128_000:].any()  # <|reserved_special_token_...|>
    strawberry = tokenizer.convert_ids_to_tokens(found.row(tokenizer.convert_tokens_to_ids("Ġstrawberry")))
    assert strawberry == ["Ġ", "Ġs", "Ġst", "Ġstr", "Ġstra", "Ġstraw", "Ġstrawberry"]
