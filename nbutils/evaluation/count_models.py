"""What models of counts reach on the tokens that a training saw: the floors that a language model must fall below.

    floors(data, tokens_seen=307_200)      # {"unigram_eval_ce_loss": 6.3, "bigram_eval_ce_loss": 4.6, ...}

Counted is a share of the train rows that holds as many tokens as were seen (at most MOST_TOKENS), evenly spaced. Scored
are the tokens that a language model scores: all but the first of each row, of questions and answers the answers alone.

Interpolated Kneser-Ney with one discount D = n1 / (n1 + 2 n2) for each order, n1 and n2 the n-grams that occur once and
twice; lower orders count in how many contexts an n-gram stands, and the lowest is mixed with the even distribution:

    P(w | h) = max(c(hw) - D, 0) / c(h) + D N1+(h.) / c(h) P(w | h without its first token)

Source: S. Chen and J. Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, Computer Speech and
Language 13 (1999), 2.7 and equation 24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nbutils.data import PreparedData, Rows

MOST_TOKENS = 5_000_000  # counted; more take minutes and lower the floors little
ROWS_AT_ONCE = 2_000
UNIGRAM = "unigram"
ORDERS = {"bigram": 2, "trigram": 3}
SPLITS = {"validation": "eval_", "test": "test_"}


def floors(data: PreparedData, tokens_seen: float) -> dict[str, float]:
    """Cross entropy of unigram, bigram and trigram models on validation and test, nats per token, as results' names.

    The unigram's is the data card's, of all train tokens.
    """
    found = {
        f"unigram_{prefix}ce_loss": data.card["unigram_ce"][split]
        for split, prefix in SPLITS.items()
        if split in data.card["unigram_ce"]
    }
    held_out = {prefix: _tokens(data.blocks[split]) for split, prefix in SPLITS.items() if split in data.blocks}
    train = _tokens(data.blocks["train"], min(float(tokens_seen), MOST_TOKENS))
    for name, order in ORDERS.items():
        model = CountModel(train, order, len(data.tokenizer))
        for prefix, tokens in held_out.items():
            found[f"{name}_{prefix}ce_loss"] = model.cross_entropy(tokens)
    return found


def beside_floors(ce: float, floors: Mapping[str, float]) -> str:
    """Which models of counts a validation cross entropy, in nats per token, is below: a line for the notebook's end."""
    levels = {name: floors[f"{name}_eval_ce_loss"] for name in (UNIGRAM, *ORDERS) if f"{name}_eval_ce_loss" in floors}
    told = [
        f"{'below' if ce < level else 'NOT below'} the {name} model's {level:.3f}" for name, level in levels.items()
    ]
    return f"Validation cross entropy {ce:.3f} nats per token: {', '.join(told)} (counted from as many tokens)."


@dataclass(frozen=True)
class Tokens:
    """Rows one after the other: ids, each token's place in its row, and whether it is scored; (tokens,) each."""

    ids: np.ndarray
    places: np.ndarray
    scored: np.ndarray


def _tokens(rows: Rows, most: float = float("inf")) -> Tokens:
    """The tokens of `rows`, or of so many of them, evenly spaced, that hold about `most` tokens."""
    chosen = np.arange(len(rows))
    if np.isfinite(most) and len(rows):
        sample = rows[[*range(0, len(rows), max(1, len(rows) // 200))]]["input_ids"]
        count = min(len(rows), max(1, round(most / np.mean([*map(len, sample)]))))
        chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    ids, places, scored = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        batch = rows[chosen[start : start + ROWS_AT_ONCE].tolist()]
        for row, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True):
            ids.append(np.asarray(row, np.int64))
            places.append(np.arange(len(row)))
            scored.append((np.asarray(labels) >= 0) & (places[-1] > 0))
    return Tokens(*map(np.concatenate, (ids, places, scored)))


class CountModel:
    """Interpolated Kneser-Ney of one order, at least 2, counted from `train`."""

    def __init__(self, train: Tokens, order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        counted, counts = np.unique(self._grams(train, order), return_counts=True)
        self._levels = {order: _Level(counted, counts, vocab)}
        for length in range(order - 1, 0, -1):  # an n-gram counts once for each token that stands before it
            counted, counts = np.unique(counted % vocab**length, return_counts=True)
            self._levels[length] = _Level(counted, counts, vocab)

    def cross_entropy(self, tokens: Tokens) -> float:
        """Mean of -log P over the scored tokens, in nats."""
        return float(-np.log(self.probabilities(tokens)[tokens.scored]).mean())

    def probabilities(self, tokens: Tokens) -> np.ndarray:
        """P of each token after those before it in its row, (tokens,); where fewer stand there, of a lower order."""
        found = np.full(len(tokens.ids), 1 / self.vocab)
        for length in range(1, self.order + 1):
            long_enough = tokens.places >= length - 1
            found[long_enough] = self._levels[length].interpolated(self._grams(tokens, length), found[long_enough])
        return found

    def _grams(self, tokens: Tokens, length: int) -> np.ndarray:
        """The n-grams of this length that end at each token with enough before it, each as one number."""
        ends = np.flatnonzero(tokens.places >= length - 1)
        keys = np.zeros(len(ends), np.int64)
        for back in range(length - 1, -1, -1):
            keys = keys * self.vocab + tokens.ids[ends - back]
        return keys


class _Level:
    """The n-grams of one length: their counts, and of each context the sum and number of its n-grams."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocab: int) -> None:
        self._grams, self._counts, self._vocab = grams, counts, vocab
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self._discount = once / (once + 2 * twice) if once else 0.0
        self._contexts, first = np.unique(grams // vocab, return_index=True)
        self._sums = np.add.reduceat(counts, first) if len(counts) else counts
        self._kinds = np.diff(np.append(first, len(grams)))

    def interpolated(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P of the last token of each n-gram, given that of the lower order; of an unseen context that is all."""
        counts = _looked_up(self._grams, self._counts, grams)
        sums = _looked_up(self._contexts, self._sums, grams // self._vocab)
        kinds = _looked_up(self._contexts, self._kinds, grams // self._vocab)
        known = np.maximum(sums, 1)
        mixed = (np.maximum(counts - self._discount, 0) + self._discount * kinds * lower) / known
        return np.where(sums > 0, mixed, lower)


def _looked_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each key that is asked for, 0 where there is none; `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(asked))
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)
