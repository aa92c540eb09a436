"""What a source of documents is: it gets a CorpusRequest, says where that corpus lies, and yields its Documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbutils.foundation import CorpusError, Unreachable, resolve

SPLITS = ("train", "validation", "test")
KEEPS_GIVEN_SPLITS = ("given", "contiguous")  # ways of splitting that use the splits a corpus comes with
TASKS = ("lm", "qa")
LISTED = 3  # files or names that a message shows

YOURS = (
    "Unknown: these are your files. If the text was public before the base model was trained, take it as seen; "
    "a model from scratch has seen nothing."
)


class UnreachableCorpusError(CorpusError, Unreachable):
    """The corpus exists as far as can be known, but cannot be had from here: what a fallback is for.

    `reason` ends a sentence that begins with the corpus's name.
    """

    def __init__(self, message: str, reason: str = "cannot be reached") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Document:
    """One text. `split` is "" until documents are split, unless the corpus itself says where the text belongs.

    `question` and `answer` are what a text of task qa is made of, "" in task lm.
    """

    name: str
    text: str
    split: str = ""
    question: str = ""
    answer: str = ""


@dataclass(frozen=True)
class CorpusRequest:
    """The parameters of the data preparation notebook that choose a corpus; the notebook explains each."""

    dataset_name: str
    data_files: str = ""
    dataset_config_name: str = ""
    dataset_revision: str = ""
    text_field: str = "text"
    skip_non_text: bool = False
    fallback_datasets: tuple[str, ...] = ()
    max_documents: int = 0
    max_tokens: int = 0
    split: str = "hash"
    task: str = "lm"
    question_field: str = "question"
    answer_field: str = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read of a row."""
        return (self.question_field, self.answer_field) if self.task == "qa" else (self.text_field,)

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> CorpusRequest:
        """The request in a run's parameters, which may hold many more."""
        given = {each.name: params[each.name] for each in fields(cls) if each.name in params}
        return cls(**{**given, "fallback_datasets": tuple(given.get("fallback_datasets", ()))})


@dataclass(frozen=True)
class Located:
    """Where a corpus lies: files and folders of this machine, or a Hub data set at a commit.

    `folder` is the data set's snapshot in the local Hub cache, where it is read from there.
    """

    files: tuple[Path, ...] = ()
    hub_name: str = ""
    config: str = ""
    revision: str = ""
    folder: Path | None = None


@dataclass(frozen=True)
class Source:
    """One kind of corpus. `find` raises a CorpusError or says where it lies; `read` gives one stream for each split."""

    find: Callable[[CorpusRequest], Located]
    read: Callable[[CorpusRequest, Located], Iterable[Iterator[Document]]]
    seen_by_base_model: str
    has_questions: bool = False  # whether it can be read as questions and answers too


def find_files(data_files: str, suffix: str) -> tuple[Path, ...]:
    """Files by name, by glob, or all that end in `suffix` in a folder; sorted. Raises CorpusError where none match."""
    if not data_files:
        raise CorpusError(
            f"data_files is empty. Set it to what to read: a file, a folder or a glob such as data/*{suffix}"
        )
    path = resolve(data_files)
    if path.is_file():
        return (path,)
    pattern = path / "**" / f"*{suffix}" if path.is_dir() else path
    files = Path(path.anchor).glob(str(pattern.relative_to(path.anchor)))
    files = tuple(sorted(file for file in files if file.is_file()))
    if not files:
        raise CorpusError(
            f"data_files {data_files!r} matches no file (looked for {pattern}). "
            "Relative paths start at the repository's root; quote a glob on the command line."
        )
    return files


def short_names(files: tuple[Path, ...]) -> list[str]:
    """The files' paths from the folder they share: names of documents that hold on any machine."""
    parents = [file.parent for file in files]
    shared = next(
        folder for folder in (parents[0], *parents[0].parents) if all(p.is_relative_to(folder) for p in parents)
    )
    return [file.relative_to(shared).as_posix() for file in files]


def listed(names: Iterable[object], most: int = LISTED) -> str:
    """The first of `names`, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
