"""The data card: what a reader must know of prepared data to believe a number measured on it.

It says nothing about the machine or the time, so equal data have equal cards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data.bytes_of_tokens import token_bytes
from nbutils.data.corpora import Document, corpus_versions, seen_by_base_model
from nbutils.data.documents import Duplicate
from nbutils.data.packing import Totals, unigram_cross_entropy
from nbutils.foundation import CorpusError

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 5  # duplicates shown
EXAMPLE_CHARACTERS = 400  # of the text shown before and after cleaning
SIZES = ("characters", "bytes", "tokens")  # of a document
UNITS = ("documents", "tokens", "blocks", "answer_tokens")  # of a split, in result.json


@dataclass(frozen=True)
class Duplicates:
    """How many copies were dropped, and the last of them."""

    exact: int
    near: int
    examples: list[Duplicate]

    @classmethod
    def of(cls, duplicates: Sequence[Duplicate]) -> Duplicates:
        """All that were dropped."""
        exact = sum(duplicate.exact for duplicate in duplicates)
        return cls(exact, len(duplicates) - exact, list(duplicates[-EXAMPLES:]))


@dataclass(frozen=True)
class Selection:
    """The documents that stay, with their splits, and how many there were after each stage on the way.

    `documents` is empty where they are streamed: no more than a few are ever held.
    """

    documents: list[Document]
    stages: list[dict[str, Any]]
    duplicates: Duplicates
    cleaning_example: dict[str, str]
    origin: dict[str, Any]
    fallback_taken: str


def document_table(documents: Sequence[Document], ids: Sequence[np.ndarray]) -> DataFrame:
    """One row a document: its number (what document_ids in the blocks refer to), name, split and sizes."""
    import pandas

    return pandas.DataFrame(
        {
            "document": np.arange(len(documents), dtype=np.int32),
            "name": [document.name for document in documents],
            "split": [document.split for document in documents],
            "characters": [len(document.text) for document in documents],
            "bytes": [len(document.text.encode()) for document in documents],
            "tokens": [len(row) for row in ids],
        }
    )


def split_sizes(table: DataFrame) -> dict[str, dict[str, int]]:
    """{split: documents, characters, bytes and tokens} of a document table."""
    sums = table.groupby("split")[list(SIZES)].sum()
    return {
        split: {"documents": int(count), **{name: int(sums.loc[split, name]) for name in SIZES}}
        for split, count in table["split"].value_counts().items()
    }


def near_copies(dedup: str) -> str:
    """What became of documents that are nearly alike: only dedup=near compares them."""
    return "dropped" if dedup == "near" else "not measured"


def token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids the tokenizer's tokens reach to: what counts of tokens are as long as."""
    return 1 + max(tokenizer.get_vocab().values())


def check_ascii(totals: dict[str, Totals], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CorpusError where blocks that should be ASCII hold a token with any other byte."""
    texts = token_bytes(tokenizer)
    beyond = np.array([number for number, text in enumerate(texts) if not text.isascii()], np.int64)
    for split, each in totals.items():
        if not (found := each.counts[beyond]).any():
            continue
        most = int(beyond[found.argmax()])
        raise CorpusError(
            f"Non-ASCII is left in an ASCII set: ascii_only is true, but the {split} split has {found.sum():,} tokens "
            f"with bytes outside ASCII, most often {texts[most]!r} (token {most}, {found.max():,} times). The texts "
            "were not cleaned, or the tokenizer adds such characters: take another tokenizer, or set ascii_only to "
            "false."
        )


def data_card(
    selection: Selection,
    sizes: dict[str, dict[str, int]],
    totals: dict[str, Totals],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    leakage: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The card of packed documents, ready for JSON; sizes: `split_sizes`, totals: of the rows of each split.

    `splits` counts documents, characters, bytes, tokens and blocks; `leakage` is measure_leakage's table; `unigram_ce`
    is in nats per token; `fingerprint` covers every block and the vocabulary, and not how they are stored.
    `dataset_name` is the corpus that was read; where it is a fallback, `fallback_taken` says so in a sentence, for
    every reader of the numbers.
    """
    dataset_name = selection.origin["dataset_name"]
    return {
        "dataset_name": dataset_name,
        "corpus": selection.origin,
        "fallback_taken": selection.fallback_taken,
        "corpus_versions": corpus_versions(dataset_name),
        "stages": selection.stages,
        "duplicates": asdict(selection.duplicates),
        "cleaning_example": selection.cleaning_example,
        "splits": {split: _split_counts(sizes[split], each, tokenizer) for split, each in totals.items()},
        "leakage": leakage,
        "vocab_size": len(tokenizer),
        "block_size": block_size,
        "end_token_id": tokenizer.eos_token_id,
        "unigram_ce": {
            split: unigram_cross_entropy(totals["train"], each) for split, each in totals.items() if split != "train"
        },
        "seen_by_base_model": seen_by_base_model(dataset_name),
        "fingerprint": _fingerprint(totals, tokenizer),
    }


def headline(card: dict[str, Any]) -> dict[str, float]:
    """The card's numbers by the names of result.json, where `eval` is the validation split.

    `fallback_taken` is there, as 1, where the corpus is not the one that was asked for; the card says which it is.
    """
    numbers = {"vocab_size": card["vocab_size"], "block_size": card["block_size"]}
    numbers |= {"fallback_taken": 1} if card["fallback_taken"] else {}
    for split, short in (("train", "train"), ("validation", "eval"), ("test", "test")):
        counts, leakage = card["splits"].get(split, {}), card["leakage"].get(split, {})
        numbers |= {f"{short}_{unit}": counts[unit] for unit in UNITS if unit in counts}
        shares = ("ngram_share", "document_share", "question_share", "answer_share")  # the last two of questions only
        numbers |= {f"{short}_leaked_{share}": leakage[share] for share in shares if share in leakage}
        if split in card["unigram_ce"]:
            numbers[f"unigram_{short}_ce_loss"] = card["unigram_ce"][split]
    return numbers


def copies_dropped(card: dict[str, Any]) -> str:
    """A sentence on the copies that went; near ones are compared with dedup=near alone."""
    found = card["duplicates"]
    measured = card.get("near_copies") != "not measured"
    near = f"{found['near']:,} near ones" if measured else "near copies were not measured"
    return f"Dropped: {found['exact']:,} exact copies; {near}."


def left_out(card: dict[str, Any]) -> str:
    """A sentence on what stands in no block: ends of splits, or pairs that lack an answer or have too many tokens."""
    if card["task"] == "lm":
        tokens = sum(counts["dropped_tokens"] for counts in card["splits"].values())
        return f"{tokens:,} tokens at the ends of the splits fill no block and are left out."
    dropped = card["dropped"]
    return (
        f"Left out: {dropped['empty']:,} rows without a question or an answer, {dropped['too_long']:,} of more tokens "
        f"than a block has (the longest of all has {dropped['longest_tokens']:,})."
    )


def _split_counts(sizes: dict[str, int], totals: Totals, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """`tokens` are those of the texts; with the end tokens and without the dropped ones they fill the blocks.

    Of questions and answers each example is a block, and `answer_tokens`, end tokens included, are those with a label.
    """
    packed = int(totals.counts.sum()) + totals.dropped_tokens
    unknown = tokenizer.unk_token_id
    has_unknown = unknown not in (None, tokenizer.eos_token_id)  # GPT-2 gives both one name, and can encode any text
    return {
        **sizes,
        "end_tokens": packed - sizes["tokens"],
        "dropped_tokens": totals.dropped_tokens,
        "unknown_tokens": int(totals.counts[unknown]) if has_unknown else 0,
        "blocks": totals.shape[0],
        **({"answer_tokens": int(totals.scored.sum())} if len(totals.shape) == 1 else {}),
    }


def _fingerprint(totals: dict[str, Totals], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every block, the document and the label of every token, and the vocabulary."""
    digest = hashlib.sha256()
    for split, each in totals.items():
        digest.update(f"{split} {each.shape} {each.digest} ".encode())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest.update(json.dumps([vocabulary, tokenizer.eos_token_id]).encode())
    return digest.hexdigest()
