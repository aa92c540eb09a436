"""Prefix sets and their targets, for people to look at, and what smoothing costs by arithmetic alone."""

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


def effective_smoothing(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """1 - the mean gold mass of a corpus: the share of the target that is not on the gold token.

    counts: (vocab,) how often each token is the gold token in the corpus.
    """
    return 1 - _mean(targets.gold_mass, counts)


def predicted_cost(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """The most, in nats per token, by which gold cross entropy can rise for no other reason than the target.

    A model that has learnt its targets to perfection says p(y) = sum_t q_t(y) P(t) >= q_y(y) P(y) where the text has
    P, so the cross entropy of the gold tokens is at most E[-log q_y(y)] above that of P. It is a ceiling: prefixes of
    likely longer tokens get mass back. Infinite where a gold token of the corpus has no mass.

    counts: (vocab,) how often each token is the gold token in the corpus.
    """
    seen = counts > 0
    with np.errstate(divide="ignore"):
        return _mean(-np.log(targets.gold_mass[seen].astype(np.float64)), counts[seen])


def mean_target_entropy(targets: SmoothedTargets, counts: np.ndarray) -> float:
    """The mean entropy of a corpus's targets, nats per token: what cross entropy with them cannot fall below."""
    return _mean(targets.entropy, counts)


def _mean(values: np.ndarray, counts: np.ndarray) -> float:
    return float(np.average(values.astype(np.float64), weights=counts))
