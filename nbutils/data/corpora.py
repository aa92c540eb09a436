"""Where documents come from: the table of sources, the limits, and the fallbacks.

    pydoc                 embedded: docstrings on this machine (pydoc_corpus.py)
    text, big_text        your text files (text_corpora.py)
    babylm                the BabyLM challenge's text files as running text (babylm_corpus.py)
    jsonl, csv, parquet   your files of rows (table_corpora.py)
    wikitext              a folder of WikiText files, or without data_files the Hub's WikiText
    owner/name            a data set of the Hugging Face Hub (hub_corpora.py)

Those with `has_questions` can be read as questions and answers too (task qa).

To add a source, write a `Source` (sources.py): `find` says where the corpus lies or raises a CorpusError; it runs
before a kernel starts and reads no more than what names the columns. `read` gives a stream of Documents for each split.
Enter it in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nbutils.data.hub_corpora import HUB, WIKITEXT, WIKITEXT_SOURCE, is_hub_name, refuse_gone
from nbutils.data.pydoc_corpus import PYDOC, pydoc_versions
from nbutils.data.sources import SPLITS, CorpusRequest, Document, Located, Source, UnreachableCorpusError, listed
from nbutils.data.table_corpora import CSV, JSONL, PARQUET
from nbutils.data.text_corpora import BABYLM, BIG_TEXT, TEXT
from nbutils.foundation import CorpusError, ParameterError, did_you_mean

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusRequest",
    "Document",
    "check_corpus",
    "locate_corpus",
    "read_corpus",
    "stream_corpus",
]

BYTES_PER_TOKEN = 4  # GPT-2's tokenizer on English prose takes 4.2 to 4.7

SOURCES: dict[str, Source] = {
    "pydoc": PYDOC,
    "text": TEXT,
    "big_text": BIG_TEXT,
    "babylm": BABYLM,
    "jsonl": JSONL,
    "csv": CSV,
    "parquet": PARQUET,
    "wikitext": WIKITEXT_SOURCE,
    WIKITEXT: WIKITEXT_SOURCE,
}


@dataclass(frozen=True)
class CorpusStream:
    """As `Corpus`, its documents yet to be read, one after the other and once.

    Reading raises CorpusError where there is nothing to read, or it cannot be read.
    """

    documents: Iterator[Document]
    origin: dict[str, Any]
    fallback_taken: str


@dataclass(frozen=True)
class Corpus:
    """The documents read, where they came from, and one sentence on the fallback that was taken, "" where none was."""

    documents: list[Document]
    origin: dict[str, Any]
    fallback_taken: str


def check_corpus(request: CorpusRequest) -> None:
    """Raises CorpusError or ParameterError where it can be told, before reading, that the corpus cannot be read.

    All fallbacks are checked for what can be known without the network.
    """
    candidates = _candidates(request)
    on_hub = is_hub_name(request.dataset_name) or (request.dataset_name == "wikitext" and not request.data_files)
    for name in ("dataset_config_name", "dataset_revision", "fallback_datasets"):
        if (given := getattr(request, name)) and not on_hub:
            raise ParameterError(
                f"{name} is {given!r}, but it is for Hub data sets and dataset_name is {request.dataset_name!r}. "
                f"Leave {name} empty, or set dataset_name to a Hub name such as HuggingFaceFW/finepdfs."
            )
    for candidate in candidates:
        refuse_gone(candidate.dataset_name)
        if not _source(candidate.dataset_name).has_questions and request.task == "qa":
            with_questions = ", ".join(name for name, source in SOURCES.items() if source.has_questions)
            raise CorpusError(
                f"dataset_name {candidate.dataset_name!r} is running text without questions and answers. For task qa "
                f"take {with_questions} or a Hub data set; or set task to lm."
            )
    taken, located, _ = locate_corpus(request)
    if located.files and not any(file.stat().st_size for file in located.files):
        raise _no_text(taken, located)


def locate_corpus(request: CorpusRequest) -> tuple[CorpusRequest, Located, str]:
    """What will be read: the request itself or the first fallback that can be reached, where it lies, and a sentence.

    Raises CorpusError; where nothing can be reached, that of the first, with the names of the fallbacks.
    """
    missed: list[tuple[str, UnreachableCorpusError]] = []
    for candidate in _candidates(request):
        try:
            located = _source(candidate.dataset_name).find(candidate)
        except UnreachableCorpusError as error:
            missed.append((_title(candidate), error))
            continue
        told = " and ".join(f"{title} {error.reason}" for title, error in missed)
        return candidate, located, f"{told}: {_title(candidate)} was read in its place." if told else ""
    tried = f" Of fallback_datasets, none can be had either: {', '.join(title for title, _ in missed[1:])}."
    raise UnreachableCorpusError(f"{missed[0][1]}{tried if missed[1:] else ''}", missed[0][1].reason)


def read_corpus(request: CorpusRequest) -> Corpus:
    """The documents of a corpus, always in the same order, within max_documents and max_tokens.

    Both limits hold for each split where the corpus keeps its own; 0 is no limit. A token is taken to be 4 bytes of
    UTF-8, whatever the tokenizer, so that every tokenizer gets the same documents; the document that reaches the limit
    is the last one. Raises CorpusError where there is nothing to read, or it cannot be read.
    """
    stream = stream_corpus(request)
    return Corpus(list(stream.documents), stream.origin, stream.fallback_taken)


def stream_corpus(request: CorpusRequest) -> CorpusStream:
    """What `read_corpus` reads, for corpora that do not fit memory."""
    taken, located, fallback = locate_corpus(request)
    origin = {
        "dataset_name": taken.dataset_name,
        "dataset_config_name": located.config,
        **({"text_field": taken.text_field} if taken.task == "lm" else _question_fields(taken)),
        "revision": located.revision,
        "files": len(located.files),
    }
    return CorpusStream(_documents(taken, located), origin, fallback)


def _documents(taken: CorpusRequest, located: Located) -> Iterator[Document]:
    has_text = taken.task == "qa"
    for stream in _source(taken.dataset_name).read(taken, located):
        for document in _limited(stream, taken.max_documents, taken.max_tokens):
            has_text = has_text or bool(document.text.strip())
            yield document
    if not has_text:
        raise _no_text(taken, located)


def _question_fields(request: CorpusRequest) -> dict[str, str]:
    return {"question_field": request.question_field, "answer_field": request.answer_field}


def _no_text(request: CorpusRequest, located: Located) -> CorpusError:
    where = listed(located.files) if located.files else located.hub_name
    cure = "Point data_files at files that hold text." if located.files else "Set text_field to a column with text."
    verb = "are" if len(located.files) > 1 else "is"
    return CorpusError(f"The corpus {request.dataset_name!r} has no text: {where} {verb} empty. {cure}")


def corpus_versions(dataset_name: str) -> dict[str, str]:
    """Versions of what the embedded corpus is made of; {} for files and Hub data sets."""
    return pydoc_versions() if dataset_name == "pydoc" else {}


def seen_by_base_model(dataset_name: str) -> str:
    """What can be said of whether a pretrained model has read this corpus before."""
    return _source(dataset_name).seen_by_base_model


def _source(dataset_name: str) -> Source:
    if dataset_name in SOURCES:
        return SOURCES[dataset_name]
    if is_hub_name(dataset_name):
        return HUB
    raise CorpusError(
        f"dataset_name {dataset_name!r} is not a known corpus. {did_you_mean(dataset_name, SOURCES)} "
        "A Hub data set is named with its owner, as in HuggingFaceFW/finepdfs."
    )


def _candidates(request: CorpusRequest) -> list[CorpusRequest]:
    """The request, then its fallbacks: name, name:field or name:config:field; in task qa name or
    name:config:question:answer. Raises ParameterError for any other entry."""
    candidates = [request]
    for entry in request.fallback_datasets:
        name, *rest = entry.split(":")
        if request.task == "qa":
            form, known = "name or name:configuration:question_field:answer_field", len(rest) in (0, 3)
            config, question, answer = rest if len(rest) == 3 else ("", "question", "answer")
            other = {"dataset_config_name": config, "question_field": question, "answer_field": answer}
        else:
            form, known = "name, name:field or name:configuration:field", len(rest) < 3
            config, field = rest[0] if len(rest) == 2 else "", rest[-1] if rest else "text"
            other = {"dataset_config_name": config, "text_field": field}
        if not known or not name or not all(rest):
            example = "HuggingFaceFW/finepdfs:eng_Latn:text" if request.task == "lm" else "owner/name:default:ask:reply"
            raise ParameterError(f"fallback_datasets holds {entry!r}. Write {form}, as in {example}")
        candidates.append(replace(request, dataset_name=name, data_files="", dataset_revision="", **other))
    return candidates


def _title(request: CorpusRequest) -> str:
    return f"{request.dataset_name} {request.dataset_config_name}".rstrip()


def _limited(documents: Iterator[Document], max_documents: int, max_tokens: int) -> Iterator[Document]:
    """Stops reading as soon as a limit is reached."""
    size = 0
    for number, document in enumerate(documents, 1):
        yield document
        size += len(document.text.encode())
        if number == max_documents or 0 < max_tokens * BYTES_PER_TOKEN <= size:
            return
