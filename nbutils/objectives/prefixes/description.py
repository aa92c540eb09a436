"""Prefix sets and their targets, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data import token_bytes
from nbutils.objectives.prefixes.table import PrefixTable
from nbutils.objectives.prefixes.targets import SmoothedTargets

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


def describe(
    targets: SmoothedTargets, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> list[dict[str, Any]]:
    """The target distribution of each word: {gold, tokens, weights}, shortest token first, the gold token last.

    A word of several tokens is shown by the longest of them. With uniform smoothing the row is the gold token alone,
    and `each_other` is the probability of every other token of the vocabulary. Parts of characters show as U+FFFD.
    """
    texts = token_bytes(tokenizer)
    examples = []
    for word in words:
        gold = _token_of(word, tokenizer, texts)
        tokens, weights = targets.row(gold)
        shown = {
            "gold": _text(texts[gold]),
            "tokens": [_text(texts[token]) for token in tokens],
            "weights": [float(weight) for weight in weights],
        }
        background = float(targets.background[gold])
        examples.append({**shown, "each_other": background} if background else shown)
    return examples


def count_distribution(table: PrefixTable, counts: np.ndarray) -> pd.DataFrame:
    """How many tokens the prefix sets have, the gold token included.

    counts: (vocab,) how often each token is the gold token in a corpus. Rows: sizes that occur; columns: tokens,
    share_of_vocabulary, share_of_corpus.
    """
    import pandas as pd

    text = table.lengths > 0
    tokens = np.bincount(table.sizes[text])
    gold = np.bincount(table.sizes[text], weights=counts[text])
    shares = {
        "tokens": tokens,
        "share_of_vocabulary": tokens / max(tokens.sum(), 1),
        "share_of_corpus": gold / max(gold.sum(), 1),
    }
    frame = pd.DataFrame(shares).rename_axis("set_size")
    return frame[frame["tokens"] > 0]


def _token_of(word: str, tokenizer: PreTrainedTokenizerBase, texts: list[bytes]) -> int:
    """The id of the token whose text is `word`, or of the longest token it is made of."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    whole = [number for number in ids if texts[number] == word.encode()]
    return whole[0] if whole else max(ids, key=lambda number: len(texts[number]))


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
