"""Data sets of the Hugging Face Hub by name, streamed: some documents of a terabyte do not download it.

The Hub is asked first, once, for the commit; every row then comes from that commit. Where the Hub cannot be reached the
data set's files in the local Hub cache (`hf download --repo-type dataset NAME`) are streamed in its place. `datasets`
itself reads no such cache offline, and refuses one that holds a part of the repository; so the files of the wanted
configuration are found here, by the repository's own card, and handed to it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data.sources import (
    KEEPS_GIVEN_SPLITS,
    SPLITS,
    CorpusRequest,
    Document,
    Located,
    Source,
    UnreachableCorpusError,
    listed,
)
from nbutils.data.table_corpora import Rows, check_columns, documents_of_rows, nearest_name
from nbutils.data.text_corpora import articles, find_wikitext_folder, read_wikitext_folder
from nbutils.foundation import HUB_SECONDS, CorpusError

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

WIKITEXT = "Salesforce/wikitext"
OLD_NAMES = {WIKITEXT: "wikitext"}  # what the local cache may call it
GONE = {
    name: (
        f"The data set {name!r} can no longer be had: the host of its files, the-eye.eu, took them down. "
        "Public-domain books are in incredible45/Gutenberg-BookCorpus-Cleaned-Data-English (text_field context); "
        "books of your own are read with dataset_name text."
    )
    for name in ("bookcorpusopen", "defunct-datasets/bookcorpusopen")
}
SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"} | {name: name for name in SPLITS}
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
PAGE = "https://huggingface.co/datasets/"


def is_hub_name(dataset_name: str) -> bool:
    """Hub data sets are named owner/name; no embedded or local corpus has a slash."""
    return "/" in dataset_name or dataset_name in GONE


def refuse_gone(dataset_name: str) -> None:
    """Raises CorpusError for data sets that are known to be gone, with an alternative."""
    if dataset_name in GONE:
        raise CorpusError(GONE[dataset_name])


# ---- where it lies ---------------------------------------------------------------------------------------------------


def find_hub(request: CorpusRequest, hub_name: str = "") -> Located:
    """The data set at a commit of the Hub, or in the local Hub cache. Downloads none of its rows.

    Configuration, split and field are checked as far as the data set's card tells them. Raises CorpusError, of the kind
    UnreachableCorpusError where a fallback may serve.
    """
    name = hub_name or request.dataset_name
    refuse_gone(name)
    if request.data_files:
        raise CorpusError(
            f"dataset_name {name!r} is a Hub data set, but data_files is {request.data_files!r}. Leave data_files "
            "empty, or set dataset_name to text, jsonl, csv or parquet to read your files."
        )
    try:
        revision, card = _ask_hub(name, request.dataset_revision)
        config, folder = _config_name(request.dataset_config_name, card, name), None
    except UnreachableCorpusError:
        folder = _cached_folder(name, request.dataset_revision)
        card = _cached_card(folder) if folder else {}
        config = _config_name(request.dataset_config_name, card, name)
        if folder is None or not _cached_files(folder, config, card):
            raise
        revision = folder.name
        logger.warning("%s is read from the local cache, %s", name, folder)
    _check_known(request, _facts(card, "dataset_info", config), _facts(card, "configs", config), name)
    return Located(hub_name=name, config=config, revision=revision, folder=folder)


def _ask_hub(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The commit, and the card's metadata."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().dataset_info(name, revision=revision or None, timeout=HUB_SECONDS)
        if info.gated:
            HfApi().auth_check(name, repo_type="dataset")
    except errors.HFValidationError as error:
        raise CorpusError(f"dataset_name {name!r} is no Hub name ({error}). Write it as on {PAGE}owner/name") from None
    except errors.GatedRepoError:
        raise UnreachableCorpusError(
            f"The data set {name!r} is gated: its owner grants access. Ask for it at {PAGE}{name}, log in with "
            "`hf auth login`, and run again; or name data sets in fallback_datasets.",
            "is gated",
        ) from None
    except errors.RepositoryNotFoundError:
        raise CorpusError(
            f"The Hub has no data set {name!r}, or it is private. Check the name at {PAGE}{name}; for a private one "
            "log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise CorpusError(
            f"The data set {name!r} has no revision {revision!r}. Leave dataset_revision empty for the newest, or take "
            f"a commit from {PAGE}{name}/commits/main"
        ) from None
    except Exception as error:  # whatever the Hub's HTTP client raises, the cause and the cure are the same
        raise UnreachableCorpusError(
            f"The data set {name!r} cannot be had: the Hub cannot be reached ({_first_line(error)}). "
            f"{_offline_cure(name)}",
            "cannot be reached",
        ) from error
    return info.sha, info.card_data.to_dict() if info.card_data else {}


def _offline_cure(name: str) -> str:
    return (
        f"Where there is a network, `hf download --repo-type dataset {name}` (a part of it with --include) fills the "
        "local cache, HF_HOME; or name data sets in fallback_datasets, or set dataset_name to pydoc or to files of "
        "your own."
    )


def _cached_folder(name: str, revision: str) -> Path | None:
    """The data set's snapshot in the local Hub cache, None where there is none. It may hold a part of the files."""
    from huggingface_hub import errors, snapshot_download

    for known_as in filter(None, (name, OLD_NAMES.get(name))):
        try:
            settings = {"repo_type": "dataset", "revision": revision or None, "local_files_only": True}
            return Path(snapshot_download(known_as, **settings))
        except errors.IncompleteSnapshotError as error:
            return Path(error.snapshot_path)
        except errors.LocalEntryNotFoundError:
            continue
    return None


def _cached_card(folder: Path) -> dict[str, Any]:
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    return DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}


# ---- what its card tells ---------------------------------------------------------------------------------------------


def _config_name(given: str, card: dict[str, Any], name: str) -> str:
    """The configuration to read, "" where the data set has no names for them. Raises CorpusError."""
    configs = {each["config_name"]: each for each in card.get("configs") or []}
    if not configs or given in configs:
        return given
    if given:
        raise CorpusError(
            f"The data set {name} has no configuration for dataset_config_name {given!r}. "
            f"{nearest_name(given, configs)}"
        )
    default = [each for each, facts in configs.items() if facts.get("default") or each == "default"] or list(configs)
    if len(default) > 1:
        raise CorpusError(
            f"The data set {name} has {len(configs)} configurations and none is the default. Set dataset_config_name. "
            f"{nearest_name('', configs)}"
        )
    return default[0]


def _facts(card: dict[str, Any], key: str, config: str) -> dict[str, Any]:
    """What the card says of one configuration under `key`, {} where nothing."""
    entries = card.get(key) or []
    entries = [entries] if isinstance(entries, dict) else entries
    return next((each for each in entries if each.get("config_name", "default") == (config or "default")), {})


def _check_known(request: CorpusRequest, info: dict[str, Any], config: dict[str, Any], name: str) -> None:
    """Raises CorpusError where the card itself shows that the field or the splits are not there."""
    if columns := [feature["name"] for feature in info.get("features") or []]:
        check_columns(request, columns, f"The data set {name}")
    data_files = config.get("data_files")
    if isinstance(data_files, list) and all(isinstance(each, dict) for each in data_files):
        wanted_splits([each["split"] for each in data_files], request, name)


def wanted_splits(found: list[str], request: CorpusRequest, name: str) -> dict[str, str]:
    """{split here: split of the data set} to read: all three where the way of splitting keeps them, else train alone.

    WikiText is read whole, as its folder is. Raises CorpusError where a split is missing.
    """
    known = {SPLIT_NAMES[split]: split for split in found if split in SPLIT_NAMES}
    given = {split: known[split] for split in SPLITS if split in known}
    whole = name == WIKITEXT or request.split in KEEPS_GIVEN_SPLITS
    if whole and {"train", "validation"} <= given.keys():
        return given
    if request.split == "given":
        raise CorpusError(
            f"split=given needs a train and a validation split, but the data set {name} has {listed(found)}. "
            "Set split to hash or counts: both divide its train split."
        )
    if "train" not in given and len(found) > 1:
        raise CorpusError(
            f"The data set {name} has no train split, but {listed(found)}. Choose a configuration that has one."
        )
    return {"": given.get("train", found[0])}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_hub(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    """One stream for each split. Raises CorpusError where the data set cannot be opened, or lacks split or field."""
    name = located.hub_name
    try:
        opened = _open(located)
    except Exception as error:  # `datasets` raises its own, the Hub's and the file systems' errors
        raise _stopped(name, error) from error
    streams = []
    for split, theirs in wanted_splits(list(opened), request, name).items():
        rows = _rows(opened[theirs], theirs, request, name)
        if name == WIKITEXT:
            lines = (document.text or " \n" for document in documents_of_rows(rows, request))
            streams.append(articles(lines, split, f"{name} {located.config}"))
        else:
            streams.append(documents_of_rows(rows, request, split))
    return streams


def _open(located: Located) -> dict[str, IterableDataset]:
    from datasets import load_dataset

    if located.folder is None:
        return load_dataset(located.hub_name, located.config or None, revision=located.revision, streaming=True)
    files = _cached_files(located.folder, located.config, _cached_card(located.folder))
    builders = {BUILDERS.get(_suffix(file)) for each in files.values() for file in each}
    if len(builders) != 1 or None in builders:
        kinds = {_suffix(file) for each in files.values() for file in each}
        raise CorpusError(
            f"The cached files of {located.hub_name} are of the kinds {listed(sorted(kinds))}; from the local cache "
            f"{', '.join(BUILDERS)} can be read, one kind at a time. Give files of your own in data_files."
        )
    return load_dataset(builders.pop(), data_files=files, streaming=True)


def _suffix(file: str) -> str:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix not in (".gz", ".zst", ".xz", ".bz2")]
    return suffixes[-1] if suffixes else ""


def _cached_files(folder: Path, config: str, card: dict[str, Any]) -> dict[str, list[str]]:
    """{split: files} of a configuration that lie in a snapshot, by the card's patterns or else by the files' names."""
    from datasets.data_files import DataFilesList, get_data_patterns, sanitize_patterns

    facts = _facts(card, "configs", config)
    base = str(folder / facts.get("data_dir", ""))
    try:
        patterns = sanitize_patterns(facts["data_files"]) if "data_files" in facts else get_data_patterns(base)
    except FileNotFoundError:  # nothing there but the card
        return {}
    found = {}
    for split, each in patterns.items():
        try:
            found[str(split)] = list(DataFilesList.from_patterns(each, base_path=base))
        except FileNotFoundError:  # a part of the repository is enough
            logger.info("%s: no file of the split %s in the local cache", folder, split)
    return found


def _rows(dataset: IterableDataset, split: str, request: CorpusRequest, name: str) -> Rows:
    try:
        columns = dataset.column_names or list(next(iter(dataset), dict.fromkeys(request.columns)))
        check_columns(request, columns, f"The data set {name}")
        for number, row in enumerate(dataset.select_columns(list(request.columns))):
            yield f"{split}/{number}", tuple(row[column] for column in request.columns)
    except CorpusError:
        raise
    except Exception as error:  # of the Hub, the file system, or a damaged file: all end the stream
        raise _stopped(name, error) from error


def _stopped(name: str, error: Exception) -> CorpusError:
    if isinstance(error, CorpusError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CorpusError(
            f"The disk is full while reading {name} ({error.filename or 'the Hub cache'}). Free space, or set HF_HOME "
            "to a folder on a larger disk."
        )
    return CorpusError(
        f"The data set {name} cannot be read ({_first_line(error)}). If the connection was lost, run again; if a file "
        f"in the local cache is damaged, remove it with `hf cache rm dataset/{name}` and run again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- sources ---------------------------------------------------------------------------------------------------------


def _find_wikitext(request: CorpusRequest) -> Located:
    return find_wikitext_folder(request) if request.data_files else find_hub(request, WIKITEXT)


def _read_wikitext(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    return read_hub(request, located) if located.hub_name else read_wikitext_folder(request, located)


HUB = Source(
    find_hub,
    read_hub,
    "Unknown for a Hub data set: compare the date on its page with the base model's. Web text, books and papers that "
    "were public by then are in most pretraining corpora.",
    has_questions=True,
)
WIKITEXT_SOURCE = Source(
    _find_wikitext,
    _read_wikitext,
    "Probably seen: Wikipedia is in almost every pretraining corpus. GPT-2's WebText left its pages out, but pages "
    "that quote them are in it.",
)
