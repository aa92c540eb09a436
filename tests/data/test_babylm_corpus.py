"""BabyLM's files as running text: python -m pytest tests/test_babylm_corpus.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbutils.data.corpora import check_corpus, read_corpus
from nbutils.data.preparation import DataConfig, prepare_data
from nbutils.data.sources import CorpusRequest
from nbutils.data.tokenization import tokenize
from nbutils.foundation.errors import CorpusError

PUBLISHED = {  # the layout of the 2024 release, with a readme as in the archive
    "train_10M/childes.train": "*CHI:\tmore juice .\n*MOT:\tin a minute .\n",
    "train_10M/bnc_spoken.train": "Well I never\r\ndid .",
    "train_10M/README.txt": "not part of the text",
    "dev/bnc_spoken.dev": "Held out\n\n",
    "dev/childes.dev": "*CHI:\tgone !\n",
}
TRAIN = "Well I never did . *CHI:\tmore juice . *MOT:\tin a minute ."
DEV = "Held out  *CHI:\tgone !"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def request(folder: Path, split: str = "contiguous") -> CorpusRequest:
    return CorpusRequest("babylm", str(folder), split=split)


def texts(folder: Path) -> dict[str, str]:
    """The documents of each split, joined."""
    found: dict[str, str] = {}
    for document in read_corpus(request(folder)).documents:
        found[document.split] = found.get(document.split, "") + document.text
    return found


def test_the_published_folder_is_one_long_string_a_split(tmp_path: Path) -> None:
    write(tmp_path, PUBLISHED)
    assert texts(tmp_path) == {"train": TRAIN, "validation": DEV}
    names = [document.name for document in read_corpus(request(tmp_path)).documents]
    assert names == [
        "train/bnc_spoken.train",
        "train/childes.train",
        "validation/bnc_spoken.dev",
        "validation/childes.dev",
    ]
    write(tmp_path, {"test/childes.test": "*CHI:\tbye .\n"})
    assert texts(tmp_path) == {"train": TRAIN, "validation": DEV, "test": "*CHI:\tbye ."}


def test_the_names_of_2023_and_an_archive_unpacked_into_itself(tmp_path: Path) -> None:
    renamed = {
        name.replace("train_10M", "babylm_10M").replace("dev/", "babylm_dev/babylm_dev/"): text
        for name, text in PUBLISHED.items()
    }
    assert texts(write(tmp_path, renamed)) == {"train": TRAIN, "validation": DEV}


def test_the_joined_files_come_first(tmp_path: Path) -> None:
    write(tmp_path, PUBLISHED | {"train_babylm.txt": "one\ntwo", "val_babylm.txt": "three\n"})
    assert texts(tmp_path) == {"train": "one two", "validation": "three"}


def test_blocks_are_those_of_the_long_string_without_an_end_token(tmp_path: Path) -> None:
    words = " ".join(f"word{number % 17} and" for number in range(400))
    files = {"train_10M/a.train": words + "\n", "train_10M/b.train": words.title() + "\n", "dev/a.dev": words}
    folder = write(tmp_path / "corpus", files)
    settings = {"split": "contiguous", "clean": "none", "dedup": "off", "vocab_size": 300, "block_size": 16}
    data = prepare_data(DataConfig("babylm", str(folder), **settings), tmp_path / "run")
    assert data.card["splits"].keys() == {"train", "validation"}
    stream = np.array(data.blocks["train"]["input_ids"]).reshape(-1)
    (whole,) = tokenize([f"{words} {words.title()}"], data.tokenizer)
    assert (stream == whole[: len(stream)]).all() and len(whole) - len(stream) < 16
    assert data.card["splits"]["train"]["end_tokens"] == 0
    assert set(np.array(data.blocks["train"]["document_ids"]).reshape(-1)) == {0, 1}


def test_without_validation_files_the_end_of_the_text_validates(tmp_path: Path) -> None:
    write(tmp_path / "corpus", {"train_babylm.txt": "0123456789 " * 100})
    settings = {"split": "contiguous", "clean": "none", "tokenizer": "characters", "block_size": 10}
    data = prepare_data(DataConfig("babylm", str(tmp_path / "corpus"), **settings), tmp_path / "run")
    assert [row["characters"] for row in data.card["splits"].values()] == [990, 110]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "contiguous", r"no training text of BabyLM: neither train_babylm.txt nor a folder such as train_10M"),
        ({"dev/a.dev": "x"}, "contiguous", "no training text of BabyLM"),
        ({"a.txt": "a novel"}, "contiguous", "set dataset_name to text or big_text"),
        (PUBLISHED, "hash", r"running text, which split=hash cannot divide. Set split to contiguous"),
        (PUBLISHED | {"train_100M/a.train": "x"}, "contiguous", r"several folders for train: train_100M, train_10M"),
        ({"train_babylm.txt": "x", "test/a.test": "y"}, "contiguous", "a test text but none for validation"),
        ({"train_babylm.txt": "", "val_babylm.txt": ""}, "contiguous", r"has no text: .* are empty"),
    ],
)
def test_what_is_no_babylm_corpus_is_told_before_a_kernel_starts(
    files: dict[str, str], split: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    with pytest.raises(CorpusError, match=message):
        check_corpus(request(tmp_path, split))


def test_data_files_must_be_a_folder(tmp_path: Path) -> None:
    for given in ("", str(tmp_path / "no"), __file__):
        with pytest.raises(CorpusError, match="needs data_files to be the folder of the corpus"):
            check_corpus(CorpusRequest("babylm", given, split="contiguous"))
