"""`babylm`: the BabyLM challenge's text files as running text, one long string a split with spaces for line ends.

data_files is a folder that holds either `train_babylm.txt` and `val_babylm.txt` (and `test_babylm.txt`), or the
corpus as it is published: `train_10M/` (or `train_100M/`, in 2023 `babylm_10M/` and so on) with `bnc_spoken.train`,
`childes.train` ..., `dev/` and `test/`. A file is a document; joined, the documents of a split are the long string to
the last character. Without a validation file `split: contiguous` takes the end of the training text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nbutils.data.sources import KEEPS_GIVEN_SPLITS, SPLITS, CorpusRequest, Document, Located, Source, listed
from nbutils.data.text_corpora import join_lines, read_text
from nbutils.foundation import CorpusError, resolve

JOINED = {"train": "train_babylm.txt", "validation": "val_babylm.txt", "test": "test_babylm.txt"}
FOLDERS = {
    "train": re.compile(r"(?:train|babylm)(?:_\d+M)?"),
    "validation": re.compile(r"(?:babylm_)?(?:dev|val|validation)"),
    "test": re.compile(r"(?:babylm_)?test"),
}
SUFFIXES = {"train": (".train", ".txt"), "validation": (".dev", ".txt"), "test": (".test", ".txt")}


def _find(request: CorpusRequest) -> Located:
    if request.split not in KEEPS_GIVEN_SPLITS:
        raise CorpusError(
            f"dataset_name 'babylm' is running text, which split={request.split} cannot divide. Set split to "
            "contiguous, which keeps the corpus's own splits."
        )
    return Located(tuple(file for files in _files(request.data_files).values() for file in files))


def _read(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    files = _files(request.data_files)
    has_splits = "validation" in files
    return [_documents(files[split], split, split if has_splits else "") for split in files]


def _documents(files: list[Path], folder: str, split: str) -> Iterator[Document]:
    """The files' texts; each but the first begins with the space that stands for the line end before it."""
    for number, file in enumerate(files):
        text = join_lines(read_text(file).removesuffix("\n").removesuffix("\r"))
        yield Document(f"{folder}/{file.name}", f" {text}" if number else text, split)


def _files(data_files: str) -> dict[str, list[Path]]:
    """The files of each split that is there, sorted by name. Raises CorpusError without a training text."""
    folder = resolve(data_files)
    if not data_files or not folder.is_dir():
        raise CorpusError(
            "dataset_name 'babylm' needs data_files to be the folder of the corpus, with train_babylm.txt and "
            f"val_babylm.txt or with the published folders train_10M and dev; {data_files!r} is not a folder."
        )
    joined = {split: [folder / name] for split, name in JOINED.items() if (folder / name).is_file()}
    found = {split: files for split in SPLITS if (files := joined.get(split) or _published(folder, split))}
    if "train" not in found:
        raise CorpusError(
            f"{folder} holds no training text of BabyLM: neither train_babylm.txt nor a folder such as train_10M with "
            "files that end in .train. For other text files set dataset_name to text or big_text."
        )
    if "validation" not in found and "test" in found:
        raise CorpusError(
            f"{folder} holds a test text but none for validation. Add val_babylm.txt or the folder dev, or take the "
            "test text away: then the end of the training text validates."
        )
    return found


def _published(folder: Path, split: str) -> list[Path]:
    folders = sorted(each for each in folder.iterdir() if each.is_dir() and FOLDERS[split].fullmatch(each.name))
    if len(folders) > 1:
        raise CorpusError(
            f"{folder} holds several folders for {split}: {listed(each.name for each in folders)}. Take all but one "
            "of them out of it."
        )
    files = [file for each in folders for file in each.rglob("*") if file.suffix in SUFFIXES[split] and file.is_file()]
    return sorted(file for file in files if not file.name.upper().startswith(("README", "LICENSE")))


BABYLM = Source(
    _find,
    _read,
    "Probably seen in part: Simple English Wikipedia, Project Gutenberg and OpenSubtitles are in many pretraining "
    "corpora; the transcribed speech less often. A model from scratch has seen nothing.",
)
