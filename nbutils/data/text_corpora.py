"""`text`, `big_text` and `wikitext`: plain text files of the user's own.

WikiText's lines are regrouped into articles; its Hub data set has the same lines, so that `articles` serves it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, tee
from pathlib import Path

from nbutils.data.sources import SPLITS, YOURS, CorpusRequest, Document, Located, Source, find_files, short_names
from nbutils.foundation import CorpusError, resolve

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
