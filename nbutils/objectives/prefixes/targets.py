"""The target distribution of every gold token, as sparse rows; and the control with random tokens.

Lengths are counted in bytes, which for ASCII text are its characters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nbutils.foundation import ModelError
from nbutils.objectives.prefixes.settings import BUT_WHITESPACE, MIXED_FORMS, NO_SMOOTHING, RANDOM, UNIFORM, Smoothing
from nbutils.objectives.prefixes.table import PrefixTable

ROUNDS = 20  # of drawing; what is left then has few tokens to choose from and is given them by search


@dataclass(frozen=True)
class SmoothedTargets:
    """For each gold token y a distribution q_y over the vocabulary: q_y(v) = weight of v in row y + background[y].

    offsets: (vocab + 1,) int32; row y is tokens[offsets[y] : offsets[y + 1]] with the weights there.
    tokens: (entries,) int32, distinct in a row, y itself last; all others are strictly shorter than y.
    weights: (entries,) float32; a token without an entry has weight 0.
    background: (vocab,) float32, the probability every token of the vocabulary has beside its weight; 0 but for the
        uniform control, whose rows hold y alone with the weight q_y(y) - background[y].
    entropy: (vocab,) float32, H(q_y) in nats.
    gold_mass: (vocab,) float32, q_y(y).
    """

    offsets: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    background: np.ndarray
    entropy: np.ndarray
    gold_mass: np.ndarray

    def row(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `token`'s row and their probabilities q_y(v); with a background all others have that."""
        entries = slice(self.offsets[token], self.offsets[token + 1])
        return self.tokens[entries], self.weights[entries] + self.background[token]


def smoothed_targets(table: PrefixTable, smoothing: Smoothing, seed: int = 0) -> SmoothedTargets:
    """The targets of `smoothing` for every token of `table`; `seed` decides the random control's tokens alone.

    Raises ParameterError where a setting cannot be, ModelError where the vocabulary has too few tokens for the random
    control.
    """
    smoothing.check()
    if smoothing.over == BUT_WHITESPACE:
        table = _without_whitespace(table)
    rows = np.repeat(np.arange(len(table.lengths)), table.sizes)  # the gold token of each entry
    weights = _weights(table, rows, smoothing)
    gold_mass = weights[table.offsets[1:] - 1]
    if smoothing.over == UNIFORM:
        return _uniform(gold_mass)
    entropy = 0.0 - np.add.reduceat(_x_log_x(weights), table.offsets[:-1])  # 0 of a one-hot target, not -0
    tokens = random_tokens(table, rows, seed) if smoothing.over == RANDOM else table.tokens
    background = np.zeros(len(gold_mass))
    return SmoothedTargets(table.offsets, tokens, *_float32(weights, background, entropy, gold_mass))


def _weights(table: PrefixTable, rows: np.ndarray, smoothing: Smoothing) -> np.ndarray:
    """The probability of each entry over the prefixes, (entries,) float64."""
    starts, gold = table.offsets[:-1], table.offsets[1:] - 1  # the first entry of each row, and its last
    mixed = smoothing.form in MIXED_FORMS
    if smoothing.form == NO_SMOOTHING:
        scores = np.full(len(rows), -np.inf)
        scores[gold] = 0
    else:
        scores = _scores(table, rows, smoothing)
    if mixed:
        scores[gold] = -np.inf
    exponentials = np.exp(scores)
    totals = np.add.reduceat(exponentials, starts)
    if not mixed:
        return exponentials / totals[rows]
    alone = totals == 0
    share = np.where(alone, 0, smoothing.eps)  # without a proper prefix nothing is taken from the gold token
    weights = exponentials * (share / np.where(alone, 1, totals))[rows]
    weights[gold] = 1 - share
    return weights


def _scores(table: PrefixTable, rows: np.ndarray, smoothing: Smoothing) -> np.ndarray:
    """What the softmax is taken of, less a number for each row so that its highest is 0 and none overflows."""
    lengths = table.lengths[table.tokens]
    if smoothing.form == "mixed_uniform":
        return np.zeros(len(rows))
    highest = table.offsets[1:] - 1
    if smoothing.form in MIXED_FORMS:  # over proper prefixes, of which the longest stands before the gold token
        highest = np.maximum(highest - 1, table.offsets[:-1])
    scores = (lengths - lengths[highest][rows]).astype(np.float64)
    if smoothing.form in ("normalised", "mixed_normalised"):
        scores /= np.maximum(table.lengths, 1)[rows]
    with np.errstate(over="ignore"):  # a tiny tau: -inf, of which the exponential is 0
        return scores / smoothing.tau


def _uniform(gold_mass: np.ndarray) -> SmoothedTargets:
    """The rest of each gold mass (vocab,) on all other tokens evenly."""
    vocab = len(gold_mass)
    background = (1 - gold_mass) / (vocab - 1)
    entropy = 0.0 - _x_log_x(gold_mass) - (vocab - 1) * _x_log_x(background)
    tokens = np.arange(vocab, dtype=np.int32)
    offsets = np.arange(vocab + 1, dtype=np.int32)
    return SmoothedTargets(offsets, tokens, *_float32(gold_mass - background, background, entropy, gold_mass))


def _without_whitespace(table: PrefixTable) -> PrefixTable:
    """The table without tokens of whitespace alone, in whose own rows nothing else is left."""
    rows = np.repeat(np.arange(len(table.lengths)), table.sizes)
    kept = (table.tokens == rows) | ~(table.whitespace[table.tokens] | table.whitespace[rows])
    sizes = np.bincount(rows[kept], minlength=len(table.lengths))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return replace(table, offsets=offsets, tokens=table.tokens[kept])


def _x_log_x(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.where(values > 0, values, 1))


def _float32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array.astype(np.float32) for array in arrays)


def random_tokens(table: PrefixTable, rows: np.ndarray, seed: int) -> np.ndarray:
    """The tokens of `table` with each proper prefix replaced, (entries,) int32; `rows` is each entry's gold token.

    In its place comes a token of the same number of bytes, of ASCII for a gold token of ASCII, in no case a prefix of
    the gold token and once in a row at most; where none is left, another that is shorter than the gold token. Special
    tokens are never drawn. Raises ModelError where a row has no such token.
    """
    vocab = len(table.lengths)
    generator = np.random.default_rng(seed)
    pools = _Pools(table)
    tokens = table.tokens.copy()
    taken = np.sort(rows * np.int64(vocab) + tokens)
    open_entries = np.flatnonzero(tokens != rows)
    first, last = pools.bounds(table.lengths[tokens], table.ascii[rows])
    for _ in range(ROUNDS):
        drawn = pools.draw(generator, first[open_entries], last[open_entries])
        keys = rows[open_entries] * np.int64(vocab) + drawn
        nearest = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
        good = np.zeros(len(keys), bool)
        good[np.unique(keys, return_index=True)[1]] = True
        good &= taken[nearest] != keys
        tokens[open_entries[good]] = drawn[good]
        taken = np.sort(np.concatenate([taken, keys[good]]))
        open_entries = open_entries[~good]
    for entry in open_entries:
        tokens[entry] = _found(table, pools, generator, rows[entry], tokens, entry)
    return tokens


class _Pools:
    """The tokens with bytes by length: first all of ASCII, then all."""

    def __init__(self, table: PrefixTable) -> None:
        by_length = np.argsort(table.lengths, kind="stable")
        texts = by_length[table.lengths[by_length] > 0]
        ascii_texts = texts[table.ascii[texts]]
        self.tokens = np.concatenate([ascii_texts, texts])
        self.ascii_lengths = table.lengths[ascii_texts]
        self.lengths = table.lengths[texts]

    def bounds(self, lengths: np.ndarray, ascii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `tokens` those of each length begin and end, among ASCII ones or all."""
        both = []
        for side in ("left", "right"):
            among_ascii = np.searchsorted(self.ascii_lengths, lengths, side)
            among_all = len(self.ascii_lengths) + np.searchsorted(self.lengths, lengths, side)
            both.append(np.where(ascii, among_ascii, among_all))
        return both[0], both[1]

    def draw(self, generator: np.random.Generator, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """One of tokens[first:last] for each pair."""
        return self.tokens[first + (generator.random(len(first)) * (last - first)).astype(np.int64)]


def _found(
    table: PrefixTable, pools: _Pools, generator: np.random.Generator, gold: int, tokens: np.ndarray, entry: int
) -> int:
    """A token for `entry` of the row of `gold`: as long if there is one, else shorter than the gold token."""
    here = slice(table.offsets[gold], table.offsets[gold + 1])
    taken = np.concatenate([table.tokens[here], tokens[here]])
    length, below, ascii = table.lengths[tokens[entry]], table.lengths[gold] - 1, table.ascii[gold]
    for shortest, longest, among_ascii in ((length, length, ascii), (1, below, ascii), (1, below, False)):
        first, _ = pools.bounds(shortest, among_ascii)
        _, last = pools.bounds(longest, among_ascii)
        enough = min(last - first, len(taken) + 1)  # so many that one of them is not taken, if any is not
        drawn = pools.tokens[first + generator.choice(last - first, enough, replace=False)]
        left = drawn[~np.isin(drawn, taken)]
        if len(left):
            return int(left[0])
    raise ModelError(
        f"Token {gold} has {len(table.row(gold)) - 1} proper prefixes, and the vocabulary has too few other tokens "
        "that are shorter than it to take their place. Set smoothed_over to uniform, or give a larger tokenizer."
    )
