"""From a corpus to token blocks on disk: the one path that every run's data takes, and the data card that describes it.

A data-prep run folder holds `data/`:

    blocks/{train,validation,test}/   Arrow: input_ids and document_ids, lists of block_size int32 (see packing.py);
                                      in task qa rows of any length up to it, with labels (qa_preparation.py)
    documents.parquet                 document (what document_ids refer to), name, split, characters, bytes, tokens;
                                      in task qa also answer_tokens, question, answer
    tokenizer/                        save_pretrained
    card.json                         the data card

The same configuration and corpus give the same fingerprint on any machine.
"""

from __future__ import annotations

import errno
import logging
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils import places
from nbutils.corpora import SPLITS, CorpusRequest, Document, check_corpus, read_corpus
from nbutils.datacard import Selection, data_card, document_table
from nbutils.documents import (
    CLEAN,
    DEDUP,
    SPLIT,
    clean_documents,
    measure_leakage,
    remove_duplicates,
    split_documents,
)
from nbutils.errors import CorpusError, ParameterError, did_you_mean
from nbutils.files import read_json, write_json
from nbutils.packing import Blocks, Examples, load_blocks, pack, save_blocks
from nbutils.qa_preparation import clean_pairs, pack_questions, remove_pair_copies, split_questions
from nbutils.sources import TASKS
from nbutils.tokenization import check_tokenizer, load_tokenizer, make_tokenizer, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EXAMPLE_CHARACTERS = 400  # of the text that the card shows before and after cleaning


@dataclass(frozen=True)
class DataConfig:
    """The parameters of the data preparation notebook, which explains each; its defaults are these."""

    dataset_name: str = "pydoc"
    data_files: str = ""
    dataset_config_name: str = ""
    dataset_revision: str = ""
    text_field: str = "text"
    task: str = "lm"
    question_field: str = "question"
    answer_field: str = "answer"
    skip_non_text: bool = False
    fallback_datasets: Sequence[str] = ()
    max_documents: int = 400
    max_tokens: int = 0
    clean: str = "standard"
    ascii_only: bool = False
    minimum_characters: int = 128
    dedup: str = "near"
    split: str = "hash"
    subset_train: int = 0
    subset_val: int = 0
    subset_test: int = 0
    tokenizer: str = "train"
    vocab_size: int = 1024
    block_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "fallback_datasets", tuple(self.fallback_datasets))  # a plan gives a list

    def parameters(self) -> dict[str, Any]:
        """The values as the notebook and JSON have them."""
        return asdict(self) | {"fallback_datasets": list(self.fallback_datasets)}


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, opened; blocks are memory-mapped. `folder` is the run folder that has `data/`."""

    folder: Path
    card: dict[str, Any]
    documents: DataFrame
    blocks: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase


# ---- public ----------------------------------------------------------------------------------------------------------


def check_config(config: DataConfig) -> None:
    """What can be known before a kernel starts, in well under a second (5 s where the Hub must be asked).

    Raises ParameterError, CorpusError or ModelError, each with cause and cure.
    """
    for name, valid in (("task", TASKS), ("clean", CLEAN), ("dedup", DEDUP), ("split", SPLIT)):
        if (given := getattr(config, name)) not in valid:
            raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, valid)}")
    smallest = {"max_documents": 0, "max_tokens": 0, "minimum_characters": 0, "block_size": 2}
    smallest |= {"subset_train": 0, "subset_val": 0, "subset_test": 0}
    for name, least in smallest.items():
        if (given := getattr(config, name)) < least:
            raise ParameterError(f"{name} is {given}, but must be at least {least}.")
    subsets = (config.subset_train, config.subset_val, config.subset_test)
    if config.split == "counts" and 0 in subsets[:2]:
        raise ParameterError("split=counts needs subset_train and subset_val of at least 1: numbers of documents.")
    if config.split not in ("counts", "given") and any(subsets):
        raise ParameterError(
            f"subset_train, subset_val and subset_test are numbers of documents for split=counts and limits for "
            f"split=given, but split is {config.split!r}. Set split to one of the two, or leave them 0."
        )
    if config.task == "qa" and config.split == "contiguous":
        raise ParameterError(
            "split=contiguous is for running text, not for task qa. Set split to hash, counts or given."
        )
    if config.task == "qa" and config.question_field == config.answer_field:
        raise ParameterError(
            f"question_field and answer_field are both {config.answer_field!r}. Name the column of each."
        )
    check_corpus(CorpusRequest.of(asdict(config)))
    check_tokenizer(config.tokenizer, config.vocab_size)


def prepare_data(config: DataConfig, folder: Path) -> PreparedData:
    """Reads, cleans, splits, tokenises and packs a corpus into `folder`/data, and opens the result.

    `data` appears when it is complete. Where it is there already with the same content it is left as it is, otherwise
    replaced. Raises ParameterError, CorpusError or ModelError.
    """
    check_config(config)
    selection = select_documents(config)
    train_texts = [document.text for document in selection.documents if document.split == "train"]
    tokenizer = make_tokenizer(config.tokenizer, train_texts, config.vocab_size)
    if config.task == "qa":
        blocks, table, card = pack_questions(selection, tokenizer, config.block_size)
    else:
        blocks, table, card = _pack_documents(selection, tokenizer, config)
    logger.info("%d tokens of a vocabulary of %d", table["tokens"].sum(), len(tokenizer))
    card = {"config": config.parameters(), **card}
    folder = places.resolve(folder)
    aside = folder / f".data-{uuid.uuid4().hex}"
    try:
        _write(aside, blocks, table, tokenizer, card)
        if _read_card(folder / "data") != card:
            _publish(aside, folder / "data")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise CorpusError(_disk_full(folder, blocks)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load_data(folder)


def load_data(folder: str | Path) -> PreparedData:
    """Opens the data of a data-prep run folder. Raises CorpusError where there is none."""
    import pandas

    folder = places.resolve(folder)
    card = _read_card(folder / "data")
    if card is None:
        raise CorpusError(
            f"{places.relative(folder)} holds no prepared data (data/card.json is missing or damaged). "
            "Run 01_data_prep first and give its run folder, or leave data_folder empty for a small corpus."
        )
    try:
        documents = pandas.read_parquet(folder / "data" / "documents.parquet")
        blocks = {split: load_blocks(folder / "data" / "blocks" / split) for split in card["splits"]}
    except FileNotFoundError as error:
        raise CorpusError(
            f"The prepared data in {places.relative(folder)} is incomplete ({error}). Run 01_data_prep again."
        ) from None
    return PreparedData(folder, card, documents, blocks, load_tokenizer(folder / "data" / "tokenizer"))


def small_data() -> Path:
    """The run folder of a small embedded corpus, prepared on the first call; for notebooks opened on their own.

    Safe in several processes at once: each prepares aside, the first to finish is used.
    """
    return _prepared_once(DataConfig(), "data-small", "corpus of {} documents")


def small_questions() -> Path:
    """As `small_data`, a small set of embedded questions and answers."""
    return _prepared_once(DataConfig(task="qa"), "questions-small", "set of {} questions and answers")


def _prepared_once(config: DataConfig, name: str, what: str) -> Path:
    folder = places.RUNS / "interactive" / name
    if _is_prepared(folder, config):
        return folder
    print(f"Preparing a small {what.format(config.max_documents)} once, in {places.relative(folder)} ...")
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        prepare_data(config, aside)
        try:
            aside.rename(folder)  # of several processes one succeeds, the others find its data there
        except OSError:
            if not _is_prepared(folder, config):  # what stands there is of an older version of the defaults
                _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def select_documents(config: DataConfig) -> Selection:
    """The documents that `config` selects: read, cleaned, without duplicates and split, in this order."""
    stages: list[dict[str, Any]] = []

    def record(stage: str, documents: Sequence[Document]) -> None:
        characters = sum(len(document.text) for document in documents)
        stages.append({"stage": stage, "documents": len(documents), "characters": characters})
        logger.info("%s: %d documents, %d characters", stage, len(documents), characters)

    corpus = read_corpus(CorpusRequest.of(asdict(config)))
    read = corpus.documents
    record("read", read)
    counts = (config.subset_train, config.subset_val, config.subset_test)
    if config.task == "qa":
        cleaned = clean_pairs(read, config.clean, config.ascii_only)
        unique, duplicates = remove_pair_copies(cleaned, config.dedup)
        documents = split_questions(unique, config.split, counts)
    else:
        cleaned = clean_documents(read, config.clean, config.ascii_only, config.minimum_characters)
        unique, duplicates = remove_duplicates(cleaned, config.dedup)
        documents = split_documents(unique, config.split, *counts)
    record("cleaned", cleaned)
    record("without duplicates", unique)
    record("split", documents)
    before = next(document for document in read if document.name == cleaned[0].name)
    example = {
        "name": before.name,
        "before": before.text[:EXAMPLE_CHARACTERS],
        "after": cleaned[0].text[:EXAMPLE_CHARACTERS],
    }
    return Selection(documents, stages, duplicates, example, corpus.origin, corpus.fallback_taken)


def _pack_documents(
    selection: Selection, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[dict[str, Blocks], DataFrame, dict[str, Any]]:
    documents = selection.documents
    ids = tokenize([document.text for document in documents], tokenizer)
    end_token_id = None if config.split == "contiguous" else tokenizer.eos_token_id
    blocks = {}
    for split in SPLITS:
        if numbers := [number for number, document in enumerate(documents) if document.split == split]:
            blocks[split] = pack([ids[number] for number in numbers], numbers, config.block_size, end_token_id, split)
    table = document_table(documents, ids)
    leakage = measure_leakage(documents)
    return blocks, table, {"task": "lm", **data_card(selection, table, blocks, tokenizer, config.block_size, leakage)}


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    blocks: dict[str, Blocks] | dict[str, Examples],
    table: DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    card: dict[str, Any],
) -> None:
    for split, packed in blocks.items():
        save_blocks(packed, folder / "blocks" / split)
    table.to_parquet(folder / "documents.parquet", index=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "card.json", card)


def _disk_full(folder: Path, blocks: dict[str, Blocks] | dict[str, Examples]) -> str:
    needed = sum(column.nbytes for packed in blocks.values() for column in packed.columns.values()) / 2**20
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / 2**20
    return (
        f"The disk is full: {places.relative(folder)} needs about {needed:,.0f} MiB for token blocks, {free:,.0f} MiB "
        "are free. What stood there before is as it was. Free space (old runs, HF_HOME), give a run_folder on a larger "
        "disk, or lower max_documents or max_tokens."
    )


def _read_card(data: Path) -> dict[str, Any] | None:
    """The card of a data folder, None where it is missing or torn."""
    try:
        return read_json(data / "card.json")
    except (OSError, ValueError):
        return None


def _is_prepared(folder: Path, config: DataConfig) -> bool:
    card = _read_card(folder / "data")
    return card is not None and card.get("config") == config.parameters()


def _publish(aside: Path, target: Path) -> None:
    """Puts the finished folder in its place; what stood there goes only when the new one is whole."""
    old = aside.with_name(f"{aside.name}-old")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
