"""The target distribution of every gold token, as sparse rows.

Lengths are counted in bytes, which for ASCII text are its characters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nbutils.objectives.prefixes.random_control import random_tokens
from nbutils.objectives.prefixes.settings import BUT_WHITESPACE, MIXED_FORMS, NO_SMOOTHING, RANDOM, UNIFORM, Smoothing
from nbutils.objectives.prefixes.table import PrefixTable


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
