"""From a corpus to token blocks on disk: the one path that every run's data takes, and the data card that describes it.

A data-prep run folder holds `data/`:

    blocks/{train,validation,test}/   rows of input_ids and document_ids, block_size of each, as Arrow (packing.py)
                                      or MDS shards (mds_blocks.py); in task qa of any length up to it, and with labels
    documents.parquet                 document (what document_ids refer to), name, split, characters, bytes, tokens;
                                      in task qa also answer_tokens, question, answer
    tokenizer/                        save_pretrained
    card.json                         the data card

The same configuration and corpus give the same fingerprint on any machine, however the blocks are stored and whether
the documents were held in memory or streamed (streamed_preparation.py).
"""

from __future__ import annotations

import errno
import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data.corpora import SPLITS, CorpusRequest, Document, read_corpus
from nbutils.data.data_card import (
    EXAMPLE_CHARACTERS,
    Duplicates,
    Selection,
    check_ascii,
    data_card,
    document_table,
    near_copies,
    split_sizes,
    token_ids,
)
from nbutils.data.documents import clean_documents, measure_leakage, remove_duplicates, split_documents
from nbutils.data.packing import Blocks, load_blocks, pack, save_blocks
from nbutils.data.question_preparation import clean_pairs, pack_questions, remove_pair_copies, split_questions
from nbutils.data.settings import DataConfig, check_config
from nbutils.data.streamed_preparation import prepare_streamed
from nbutils.data.tokenization import load_tokenizer, make_tokenizer, tokenize
from nbutils.foundation import CorpusError, exclusively, places, read_json, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

    from nbutils.data.mds_blocks import MdsBlocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, opened; blocks are read where they lie. `folder` is the run folder that has `data/`."""

    folder: Path
    card: dict[str, Any]
    documents: DataFrame
    blocks: dict[str, Dataset | MdsBlocks]
    tokenizer: PreTrainedTokenizerBase


# ---- public ----------------------------------------------------------------------------------------------------------


def prepare_data(config: DataConfig, folder: Path) -> PreparedData:
    """Reads, cleans, splits, tokenises and packs a corpus into `folder`/data, and opens the result.

    `data` appears when it is complete. Where it is there already with the same content it is left as it is, otherwise
    replaced. Raises ParameterError, CorpusError or ModelError.
    """
    check_config(config)
    folder = places.resolve(folder)
    with _aside(config, folder) as aside:
        card = {"config": config.parameters(), **(_streamed if config.streamed else _held)(config, aside)}
        write_json(aside / "card.json", card)
        if _read_card(folder / "data") != card:
            _publish(aside, folder / "data")
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
        blocks = {
            split: load_blocks(folder / "data" / "blocks" / split, card["block_size"] if card["task"] == "lm" else None)
            for split in card["splits"]
        }
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
        documents = split_documents(unique, config.split, *counts, config.held_out_share)
    record("cleaned", cleaned)
    record("without duplicates", unique)
    record("split", documents)
    before = next(document for document in read if document.name == cleaned[0].name)
    example = {
        "name": before.name,
        "before": before.text[:EXAMPLE_CHARACTERS],
        "after": cleaned[0].text[:EXAMPLE_CHARACTERS],
    }
    return Selection(documents, stages, Duplicates.of(duplicates), example, corpus.origin, corpus.fallback_taken)


def _held(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Everything but the card, written to `folder`, of documents that are all in memory; and what the card says."""
    selection = select_documents(config)
    train_texts = [document.text for document in selection.documents if document.split == "train"]
    tokenizer = make_tokenizer(config.tokenizer, train_texts, config.vocab_size)
    if config.task == "qa":
        blocks, table, card = pack_questions(selection, tokenizer, config.block_size, config.ascii_only)
    else:
        blocks, table, card = _pack_documents(selection, tokenizer, config)
    logger.info("%d tokens of a vocabulary of %d", table["tokens"].sum(), len(tokenizer))
    size = sum(column.nbytes for packed in blocks.values() for column in packed.columns.values())
    with _disk_errors(folder.parent, f"needs about {size / 2**20:,.0f} MiB for token blocks"):
        for split, packed in blocks.items():
            save_blocks(packed, folder / "blocks" / split, config.storage)
        table.to_parquet(folder / "documents.parquet", index=False)
        tokenizer.save_pretrained(folder / "tokenizer")
    return card


def _streamed(config: DataConfig, folder: Path) -> dict[str, Any]:
    """As `_held`, of documents that are read once and never held."""
    needs = "needs more room for token blocks, 8 bytes a token"
    with _disk_errors(folder.parent, needs):
        return prepare_streamed(config, folder)


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
    totals = {split: each.totals(token_ids(tokenizer)) for split, each in blocks.items()}
    if config.ascii_only:
        check_ascii(totals, tokenizer)
    card = data_card(selection, split_sizes(table), totals, tokenizer, config.block_size, measure_leakage(documents))
    return blocks, table, {"task": "lm", "near_copies": near_copies(config.dedup), **card}


# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _aside(config: DataConfig, folder: Path) -> Iterator[Path]:
    """An empty folder to prepare in, gone at the end.

    A stream may be killed hours after it began: its folder has one name, so that the next run removes what was left.
    """
    if not config.streamed:
        aside = folder / f".data-{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return
    with exclusively(folder / ".data-streamed.lock"):
        aside = folder / ".data-streamed"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _disk_errors(folder: Path, needs: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CorpusError(_disk_full(folder, needs)) from error


def _disk_full(folder: Path, needs: str) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"The disk is full: {places.relative(folder)} {needs}, {free:,.0f} MiB are free. What stood there before is as "
        "it was. Free space (old runs, HF_HOME), give a run_folder on a larger disk, or lower max_documents or "
        "max_tokens."
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
