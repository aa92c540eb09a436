"""Files of rows: python -m pytest tests/test_table_corpora.py"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from nbutils.data.corpora import check_corpus, read_corpus
from nbutils.data.sources import CorpusRequest
from nbutils.foundation.errors import CorpusError, ParameterError

TEXTS = ["One, with a comma.", 'Two says "yes".', "Three\nover lines.", "Bjørn, naïve, 日本."]
WRITE = {
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "csv": lambda table, path: table.to_csv(path, index=False),
    "parquet": lambda table, path: table.to_parquet(path),
}


def write(folder: Path, kind: str, name: str, **columns: list[object]) -> Path:
    file = folder / f"{name}.{kind}"
    WRITE[kind](pandas.DataFrame(columns), file)
    return file


def read(kind: str, data_files: Path | str, **request: object) -> list[tuple[str, str]]:
    documents = read_corpus(CorpusRequest(kind, str(data_files), **request)).documents
    return [(document.name, document.text) for document in documents]


@pytest.mark.parametrize("kind", WRITE)
def test_a_row_is_a_document(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind, "b", body=TEXTS[2:], text=["x", "y"])
    write(tmp_path, kind, "a", number=[1, 2], body=TEXTS[:2])
    (tmp_path / "notes.md").write_text("left alone")
    expected = [
        (f"{name}.{kind}:{row}", text)
        for (name, row), text in zip((("a", 1), ("a", 2), ("b", 1), ("b", 2)), TEXTS, strict=True)
    ]
    assert read(kind, tmp_path, text_field="body") == expected
    assert read(kind, f"{tmp_path}/[b].{kind}", text_field="body") == expected[2:]
    assert read(kind, tmp_path, text_field="body", max_documents=3) == expected[:3]


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert read("jsonl", tmp_path) == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\none\nNA\n")
    assert read("csv", tmp_path) == [("a.csv:1", "one"), ("a.csv:2", "NA")]


def test_reading_stops_at_the_tokens_asked_for(tmp_path: Path) -> None:
    """4 bytes are a token; the text that reaches the limit is the last, and what comes after is not even looked at."""
    rows = [json.dumps({"text": "é" * 10}, ensure_ascii=False)] * 3 + ["not JSON"]  # 20 bytes, 5 tokens each
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert [len(read("jsonl", tmp_path, max_tokens=most)) for most in (1, 5, 6, 10, 11, 15)] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(CorpusError, match="line 4"):
        read("jsonl", tmp_path, max_tokens=16)


# ---- bad input


@pytest.mark.parametrize("kind", WRITE)
def test_a_field_that_is_not_there_is_told_before_reading(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind, "a", texts=TEXTS, number=[1, 2, 3, 4])
    with pytest.raises(CorpusError, match=r"no column for text_field 'text'\. Did you mean 'texts'"):
        check_corpus(CorpusRequest(kind, str(tmp_path)))
    with pytest.raises(CorpusError, match=r"text_field 'body'\. Valid names: number, texts"):
        check_corpus(CorpusRequest(kind, str(tmp_path), text_field="body"))


@pytest.mark.parametrize("kind", WRITE)
def test_rows_that_are_no_text_are_counted_or_left_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, kind, "a", text=["one", None, "three", None, "five"], number=[1, 2, 3, 4, 5])
    with pytest.raises(CorpusError, match=r"a.\w+:2 \(null\) is the first, and of the 3 rows .* 1 are none.*skip_non"):
        read(kind, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [text for _, text in read(kind, tmp_path, skip_non_text=True)] == ["one", "three", "five"]
    assert "2 rows without text were left out" in caplog.text
    with pytest.raises(
        CorpusError, match=r"a.\w+:1 \(a \w+, '1(\.0)?'\) is the first, and of the 4 rows .* 4 are none"
    ):
        read(kind, tmp_path, text_field="number")


def test_a_column_without_any_text_ends_the_search(tmp_path: Path) -> None:
    write(tmp_path, "parquet", "a", text=list(range(5000)))
    with pytest.raises(CorpusError, match=r"of the 1999 rows looked at after it 1999 are none either\. .* the rows\.$"):
        read("parquet", tmp_path, skip_non_text=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw', r"a\.jsonl is damaged: line 2 is not valid JSON .*cut off"),
        ("a.jsonl", b'{"text": "one"}\n["two"]', "not JSON Lines: line 2 is a list"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xe9"}', "not UTF-8 text: line 2 holds the byte 0xe9.*iconv"),
        ("a.csv", b'text\n"one', r"a\.csv is damaged: .*EOF inside string.*cut off"),
        ("a.csv", b"text,n\none,1\ntwo,2,3\n", "is damaged: .*Expected 2 fields in line 3, saw 3.*comma"),
        ("a.csv", b"text\none, and more\ntwo, and more\n", "rows have more cells than its header has names. Quote"),
        ("a.csv", b"text\n\xe9t\xe9\n", r"not UTF-8 text: it holds the byte 0xe9.*utf8\.csv"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.jsonl", b"\n", r"has no text: .*a\.jsonl is empty"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is damaged or no Parquet file"),
    ],
)
def test_damaged_files(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read(file[2:], tmp_path)


def test_a_parquet_file_that_was_cut_off_or_hurt(tmp_path: Path) -> None:
    file = write(tmp_path, "parquet", "a", text=[f"text number {number}" * 9 for number in range(2000)])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"a\.parquet is damaged .*copy it again"):
        check_corpus(CorpusRequest("parquet", str(tmp_path)))  # before a kernel: the footer is gone
    file.write_bytes(whole[:4] + b"\0" * 4000 + whole[4004:])
    with pytest.raises(CorpusError, match=r"a\.parquet is damaged .*copy it again"):
        read("parquet", tmp_path)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (CorpusRequest("jsonl"), CorpusError, r"data_files is empty.*data/\*\.jsonl"),
        (CorpusRequest("parquet", "nowhere/*.parquet"), CorpusError, "matches no file"),
        (CorpusRequest("jsonn"), CorpusError, r"Did you mean 'jsonl'\?.*named with its owner"),
        (CorpusRequest("csv", "a.csv", dataset_config_name="en"), ParameterError, "'en', but it is for Hub data sets"),
        (CorpusRequest("pydoc", fallback_datasets=("a/b",)), ParameterError, "fallback_datasets is .* for Hub data"),
    ],
)
def test_what_cannot_be_read_is_told(request_: CorpusRequest, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_corpus(request_)


def test_large_parquet_is_read_no_further_than_wanted(tmp_path: Path) -> None:
    """The second row group is broken; the first is enough."""
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {number}" for number in range(4000)]})
    pyarrow.parquet.write_table(table, file, row_group_size=2000)
    begin = pyarrow.parquet.read_metadata(file).row_group(1).column(0).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 400] = b"\0" * 400
    file.write_bytes(content)
    assert read("parquet", file, max_documents=2000)[-1] == ("a.parquet:2000", "row 1999")
    with pytest.raises(CorpusError, match="is damaged"):
        read("parquet", file)
