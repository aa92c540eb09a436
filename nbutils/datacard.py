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

from nbutils.corpora import Document, corpus_versions, seen_by_base_model
from nbutils.documents import Duplicate
from nbutils.packing import Blocks, Examples, unigram_cross_entropy

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 5  # duplicates shown
UNITS = ("documents", "tokens", "blocks", "answer_tokens")  # of a split, in result.json


@dataclass(frozen=True)
class Selection:
    """The documents that stay, with their splits, and how many there were after each stage on the way."""

    documents: list[Document]
    stages: list[dict[str, Any]]
    duplicates: list[Duplicate]
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


def data_card(
    selection: Selection,
    table: DataFrame,
    blocks: dict[str, Blocks] | dict[str, Examples],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    leakage: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The card of packed documents, ready for JSON.

    `splits` counts documents, characters, bytes, tokens and blocks; `leakage` is measure_leakage's table; `unigram_ce`
    is in nats per token; `fingerprint` covers every block and the vocabulary. `dataset_name` is the corpus that was
    read; where it is a fallback, `fallback_taken` says so in a sentence, for every reader of the numbers.
    """
    dataset_name = selection.origin["dataset_name"]
    exact = sum(duplicate.exact for duplicate in selection.duplicates)
    return {
        "dataset_name": dataset_name,
        "corpus": selection.origin,
        "fallback_taken": selection.fallback_taken,
        "corpus_versions": corpus_versions(dataset_name),
        "stages": selection.stages,
        "duplicates": {
            "exact": exact,
            "near": len(selection.duplicates) - exact,
            "examples": [asdict(duplicate) for duplicate in selection.duplicates[-EXAMPLES:]],
        },
        "cleaning_example": selection.cleaning_example,
        "splits": {split: _split_counts(table, split, blocks[split], tokenizer) for split in blocks},
        "leakage": leakage,
        "vocab_size": len(tokenizer),
        "block_size": block_size,
        "end_token_id": tokenizer.eos_token_id,
        "unigram_ce": {
            split: unigram_cross_entropy(blocks["train"], blocks[split], len(tokenizer))
            for split in blocks
            if split != "train"
        },
        "seen_by_base_model": seen_by_base_model(dataset_name),
        "fingerprint": _fingerprint(blocks, tokenizer),
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


def _split_counts(
    table: DataFrame, split: str, blocks: Blocks | Examples, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """`tokens` are those of the texts; with the end tokens and without the dropped ones they fill the blocks.

    Of questions and answers each example is a block, and `answer_tokens`, end tokens included, are those with a label.
    """
    rows = table[table["split"] == split]
    counts = {name: int(rows[name].sum()) for name in ("characters", "bytes", "tokens")}
    packed = blocks.input_ids.size + blocks.dropped_tokens
    unknown = tokenizer.unk_token_id
    has_unknown = unknown not in (None, tokenizer.eos_token_id)  # GPT-2 gives both one name, and can encode any text
    return {
        "documents": len(rows),
        **counts,
        "end_tokens": packed - counts["tokens"],
        "dropped_tokens": blocks.dropped_tokens,
        "unknown_tokens": int((blocks.input_ids == unknown).sum()) if has_unknown else 0,
        "blocks": blocks.shape[0],
        **({"answer_tokens": len(blocks.scored)} if isinstance(blocks, Examples) else {}),
    }


def _fingerprint(blocks: dict[str, Blocks] | dict[str, Examples], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every block, the document and the label of every token, and the vocabulary."""
    digest = hashlib.sha256()
    for split, packed in blocks.items():
        digest.update(f"{split} {packed.shape}".encode())
        arrays = list(packed.columns.values()) + ([packed.lengths] if isinstance(packed, Examples) else [])
        for array in arrays:
            digest.update(array.astype("<i4").tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest.update(json.dumps([vocabulary, tokenizer.eos_token_id]).encode())
    return digest.hexdigest()
