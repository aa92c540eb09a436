"""Plain text files: `text`, `big_text`, `wikitext` and `babylm`.

WikiText's lines are regrouped into articles; its Hub data set has the same lines, so that `articles` serves it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, tee
from pathlib import Path

from nbutils.data.sources import (
    KEEPS_GIVEN_SPLITS,
    SPLITS,
    YOURS,
    CorpusRequest,
    Document,
    Located,
    Source,
    find_files,
    listed,
    short_names,
)
from nbutils.foundation import CorpusError, resolve

JOINED = {"train": "train_babylm.txt", "validation": "val_babylm.txt", "test": "test_babylm.txt"}
FOLDERS = {
    "train": re.compile(r"(?:train|babylm)(?:_\d+M)?"),
    "validation": re.compile(r"(?:babylm_)?(?:dev|val|validation)"),
    "test": re.compile(r"(?:babylm_)?test"),
}
SUFFIXES = {"train": (".train", ".txt"), "validation": (".dev", ".txt"), "test": (".test", ".txt")}

WIKITEXT_FILE = re.compile(r"(?:wiki\.)?(train|valid|validation|test)\.(?:txt|tokens|raw)")
WIKITEXT_TITLE = re.compile(r"\s?= (?P<title>[^=]|[^=].*[^=]) =\s*")  # ` = Title = `; sections have more `=`


def read_text(path: Path) -> str:
    """The whole file as it stands, line ends included; a UTF-8 byte order mark is dropped. Raises CorpusError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions.") from None
    if b"\0" in content:
        raise CorpusError(
            f"{path} holds null bytes: it is a binary file or UTF-16 text. Leave it out of data_files, or convert it: "
            f"iconv -f UTF-16 -t UTF-8 '{path.name}' > utf8.txt"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}. "
            f"If it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 '{path.name}' > utf8.txt"
        ) from None


def join_lines(text: str) -> str:
    """A space for each line end, every other character as it is."""
    return re.sub(r"\r\n|\r|\n", " ", text)


# ---- text: one file a document; big_text: all files one document -----------------------------------------------------


def _find_text(request: CorpusRequest) -> Located:
    return Located(find_files(request.data_files, ".txt"))


def _read_joined(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    """All files as one document, in the order of their names; one that ends in mid-line gets the line end it lacks."""
    name = short_names(located.files)[0] if len(located.files) == 1 else f"{len(located.files)} files joined"
    texts = [read_text(file) for file in located.files]
    joined = "".join(text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]) + texts[-1]
    return [iter([Document(name, joined)])]


def _read_files(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    named = zip(short_names(located.files), located.files, strict=True)
    return [(Document(name, read_text(file)) for name, file in named)]


# ---- wikitext: train, valid and test files, lines regrouped into articles --------------------------------------------


def find_wikitext_folder(request: CorpusRequest) -> Located:
    """The train, validation and test file of a folder, in this order. Raises CorpusError."""
    folder = resolve(request.data_files)
    if not folder.is_dir():
        raise CorpusError(
            f"dataset_name 'wikitext' needs data_files to be a folder with train.txt, valid.txt and test.txt, or empty "
            f"for the Hub's data set; {request.data_files!r} is not a folder."
        )
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if match := WIKITEXT_FILE.fullmatch(file.name):
            split = "validation" if match[1].startswith("valid") else match[1]
            if split in found:
                raise CorpusError(f"{found[split]} and {file.name} both claim the {split} split. Remove one of them.")
            found[split] = file
    if missing := [split for split in SPLITS if split not in found]:
        raise CorpusError(
            f"{folder} has no file for {', '.join(missing)}. WikiText-style folders hold train.txt, valid.txt and "
            "test.txt (or wiki.train.tokens, wiki.train.raw and so on)."
        )
    return Located(tuple(found[split] for split in SPLITS))


def read_wikitext_folder(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    """One stream of articles for each split."""
    return [articles(_lines(file), split, str(file)) for split, file in zip(SPLITS, located.files, strict=True)]


def articles(lines: Iterable[str], split: str, where: str) -> Iterator[Document]:
    """One article a document; joined, they are the lines to the last character.

    What stands before the first title belongs to the first article. Raises CorpusError, at the end of the lines, where
    none of them is a title.
    """
    number, title, article = 0, "", []
    before, here, after = tee(lines, 3)
    following = chain(after, [""])
    next(following, None)
    for previous, line, upcoming in zip(chain([""], before), here, following, strict=False):
        if _is_title(previous, line, upcoming):
            if title:
                yield Document(f"{split}/{number} {title}", "".join(article), split)
                number, article = number + 1, []
            title = WIKITEXT_TITLE.fullmatch(line)["title"]
        article.append(line)
    if not title:
        raise CorpusError(
            f"{where} has no ` = Title = ` line between blank lines: it is not WikiText. "
            "Set dataset_name to text or big_text."
        )
    yield Document(f"{split}/{number} {title}", "".join(article), split)


def _lines(file: Path) -> Iterator[str]:
    yield from re.findall(r"[^\n]*\n|[^\n]+", read_text(file))  # str.splitlines knows more line ends than these files


def _is_title(previous: str, line: str, upcoming: str) -> bool:
    """Exactly one `=` each side and blank lines around: ` = Played , W = ` in a table's legend is no title."""
    return not previous.strip() and not upcoming.strip() and WIKITEXT_TITLE.fullmatch(line) is not None


TEXT = Source(_find_text, _read_files, YOURS)
BIG_TEXT = Source(_find_text, _read_joined, YOURS)


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


BABYLM = Source(
    _find,
    _read,
    "Probably seen in part: Simple English Wikipedia, Project Gutenberg and OpenSubtitles are in many pretraining "
    "corpora; the transcribed speech less often. A model from scratch has seen nothing.",
)


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
