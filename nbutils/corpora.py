"""Where documents come from. Each source is one entry of `SOURCES`: how to find its files, and how to read them.

To add a source, write two functions. One turns `data_files` into paths or raises a CorpusError; it runs before a kernel
starts, so it reads no file and imports nothing heavy. The other yields the Documents in those paths. Enter both in
`SOURCES`.

`pydoc`, the embedded corpus, is documentation that is already on the machine: the docstrings of the Python standard
library and of five pinned packages. The modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from nbutils.errors import CorpusError, did_you_mean
from nbutils.places import resolve

SPLITS = ("train", "validation", "test")

# This list and no other: a new requirement of the project must not change the embedded data.
PYDOC_PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "nltk")
# Some systems ship Python without its tests, so they cannot be part of a corpus that is the same everywhere.
PYDOC_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}

WIKITEXT_FILE = re.compile(r"(?:wiki\.)?(train|valid|validation|test)\.(?:txt|tokens|raw)")
WIKITEXT_TITLE = re.compile(r"\s?= (?P<title>[^=]|[^=].*[^=]) =\s*")  # ` = Title = `; sections have more `=`


@dataclass(frozen=True)
class Document:
    """One text. `split` is "" until documents are split, unless the corpus itself says where the text belongs."""

    name: str
    text: str
    split: str = ""


@dataclass(frozen=True)
class Source:
    """One kind of corpus: `find` turns `data_files` into paths or raises, `read` yields the documents in them."""

    find: Callable[[str], list[Path]]
    read: Callable[[list[Path]], Iterator[Document]]
    seen_by_base_model: str


def check_corpus(dataset_name: str, data_files: str = "") -> list[Path]:
    """The paths that `read_corpus` would read; reads none of them and imports nothing heavy.

    Raises CorpusError for an unknown name, a missing file, or a glob that matches nothing.
    """
    if dataset_name not in SOURCES:
        raise CorpusError(f"dataset_name {dataset_name!r} is not a known corpus. {did_you_mean(dataset_name, SOURCES)}")
    files = SOURCES[dataset_name].find(data_files)
    if data_files and not any(file.stat().st_size for file in files):
        raise _no_text(dataset_name, files)
    return files


def read_corpus(dataset_name: str, data_files: str = "", max_documents: int = 0) -> list[Document]:
    """The documents of a corpus, always in the same order.

    dataset_name: one of `SOURCES`. data_files: a file, a folder or a glob, relative to the repository's root.
    max_documents: read at most so many (of each split, where the corpus has its own); 0 reads all.
    Raises CorpusError where there is nothing to read, or a file is not UTF-8 text.
    """
    files = check_corpus(dataset_name, data_files)
    documents = list(_capped(SOURCES[dataset_name].read(files), max_documents))
    if not any(document.text.strip() for document in documents):
        raise _no_text(dataset_name, files)
    return documents


def _no_text(dataset_name: str, files: list[Path]) -> CorpusError:
    return CorpusError(
        f"The corpus {dataset_name!r} has no text: {_listed(files)} {'is' if len(files) == 1 else 'are'} empty. "
        "Point data_files at files that hold text."
    )


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


def corpus_versions(dataset_name: str) -> dict[str, str]:
    """Versions of what the embedded corpus is made of, builds (`+cpu`) left out; {} for the user's own files."""
    if dataset_name != "pydoc":
        return {}
    packages = {package: importlib.metadata.version(package).split("+")[0] for package in PYDOC_PACKAGES}
    return {"python": platform.python_version(), **packages}


def _capped(documents: Iterator[Document], most: int) -> Iterator[Document]:
    """At most `most` documents of each split. Stops reading as soon as no further document could be wanted."""
    seen: Counter[str] = Counter()
    for document in documents:
        seen[document.split] += 1
        if most and seen[document.split] > most:
            if not document.split:
                return
            continue
        yield document


def _listed(files: list[Path], most: int = 3) -> str:
    names = ", ".join(str(file) for file in files[:most])
    return names + (f" and {len(files) - most} more" if len(files) > most else "")


# ---- pydoc: docstrings, one module a document ------------------------------------------------------------------------


def _find_pydoc(data_files: str) -> list[Path]:
    """The standard library's folder, then that of each package: found without importing any of them."""
    if data_files:
        raise CorpusError(
            f"dataset_name 'pydoc' is embedded and reads no files, but data_files is {data_files!r}. "
            "Leave data_files empty, or set dataset_name to text, big_text or wikitext."
        )
    folders = [Path(sysconfig.get_path("stdlib"))]
    for package in PYDOC_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise CorpusError(
                f"The embedded corpus needs the package {package!r}, which is not installed. Run `make`, or: "
                "python -m pip install -r requirements.txt"
            )
        folders.append(Path(found.submodule_search_locations[0]))
    return folders


def _read_pydoc(folders: list[Path]) -> Iterator[Document]:
    """Modules in the order of a hash of their names: the first hundred are a fair sample of the whole."""
    modules = _module_files(*folders)
    for name in sorted(modules, key=lambda name: blake2b(name.encode(), digest_size=8).digest()):
        text = "\n\n".join(_docstrings(modules[name]))
        if text:
            yield Document(name, text)


def _module_files(standard_library: Path, *packages: Path) -> dict[str, Path]:
    """Dotted module name -> source file, tests left out."""
    modules: dict[str, Path] = {}
    folders = [standard_library / name for name in sys.stdlib_module_names]
    for folder in [*folders, *packages]:
        for file in [folder.with_suffix(".py"), *folder.rglob("*.py")]:
            parts = file.relative_to(folder.parent).with_suffix("").parts
            if file.is_file() and not PYDOC_SKIPPED_FOLDERS.intersection(parts):
                modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source are not our user's business
        try:
            pending: list[ast.AST] = [ast.parse(file.read_bytes())]
        except SyntaxError:  # source for another Python version, as torch ships some
            return []
    found = []
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        pending.extend(reversed(children))
    # Tokenizers refuse lone surrogates, which a docstring may hold as an escape.
    return [docstring.encode("utf-8", "replace").decode() for docstring in found if docstring]


# ---- text, big_text: the user's own files ----------------------------------------------------------------------------


def _find_text(data_files: str) -> list[Path]:
    """Files by name, by glob, or all `*.txt` files in a folder; sorted."""
    if not data_files:
        raise CorpusError(
            "data_files is empty. Set it to the text to read: a file, a folder or a glob such as data/*.txt"
        )
    path = resolve(data_files)
    if path.is_file():
        return [path]
    pattern = path / "**" / "*.txt" if path.is_dir() else path
    files = Path(path.anchor).glob(str(pattern.relative_to(path.anchor)))
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise CorpusError(
            f"data_files {data_files!r} matches no file (looked for {pattern}). "
            "Relative paths start at the repository's root; quote a glob on the command line."
        )
    return files


def _read_text(files: list[Path]) -> Iterator[Document]:
    parents = [file.parent for file in files]
    shared = next(
        folder for folder in (parents[0], *parents[0].parents) if all(p.is_relative_to(folder) for p in parents)
    )
    for file in files:
        yield Document(file.relative_to(shared).as_posix(), read_text(file))


def _find_big_text(data_files: str) -> list[Path]:
    files = _find_text(data_files)
    if len(files) > 1:
        raise CorpusError(
            f"dataset_name 'big_text' reads one file as one document, but {data_files!r} matches {len(files)}: "
            f"{_listed(files)}. Name one of them, or set dataset_name to text."
        )
    return files


# ---- wikitext: train, valid and test files, lines regrouped into articles --------------------------------------------


def _find_wikitext(data_files: str) -> list[Path]:
    """The train, validation and test file of a folder, in this order."""
    folder = resolve(data_files)
    if not data_files or not folder.is_dir():
        raise CorpusError(
            f"dataset_name 'wikitext' needs data_files to be a folder with train.txt, valid.txt and test.txt; "
            f"{data_files!r} is not a folder."
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
    return [found[split] for split in SPLITS]


def _read_wikitext(files: list[Path]) -> Iterator[Document]:
    """One article a document. The articles of a split, joined, are its file to the last character."""
    for split, file in zip(SPLITS, files, strict=True):
        lines = re.findall(r"[^\n]*\n|[^\n]+", read_text(file))  # str.splitlines knows more line ends than these files
        titles = [number for number in range(len(lines)) if _is_title(lines, number)]
        if not titles:
            raise CorpusError(
                f"{file} has no ` = Title = ` line between blank lines: it is not WikiText. "
                "Set dataset_name to text or big_text."
            )
        for number, (title, end) in enumerate(zip(titles, [*titles[1:], len(lines)], strict=True)):
            begin = title if number else 0  # what stands before the first title belongs to the first article
            name = f"{split}/{number} {WIKITEXT_TITLE.fullmatch(lines[title])['title']}"
            yield Document(name, "".join(lines[begin:end]), split)


def _is_title(lines: list[str], number: int) -> bool:
    """Exactly one `=` each side and blank lines around: ` = Played , W = ` in a table's legend is no title."""
    return (
        WIKITEXT_TITLE.fullmatch(lines[number]) is not None
        and (number == 0 or not lines[number - 1].strip())
        and (number + 1 == len(lines) or not lines[number + 1].strip())
    )


_YOURS = (
    "Unknown: these are your files. If the text was public before the base model was trained, take it as seen; "
    "a model from scratch has seen nothing."
)

SOURCES: dict[str, Source] = {
    "pydoc": Source(
        _find_pydoc,
        _read_pydoc,
        "Almost certainly seen by any pretrained model: the documentation of widely used packages is in web and code "
        "corpora many times over. Judge pretrained models on it by differences between arms only.",
    ),
    "text": Source(_find_text, _read_text, _YOURS),
    "big_text": Source(_find_big_text, _read_text, _YOURS),
    "wikitext": Source(
        _find_wikitext,
        _read_wikitext,
        "Probably seen: Wikipedia is in almost every pretraining corpus. GPT-2's WebText left its pages out, but pages "
        "that quote them are in it.",
    ),
}
