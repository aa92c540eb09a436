"""A control for prefix smoothing: each proper prefix replaced by a random token that is no prefix.

As many tokens, as long and with the same weights, so that all that differs is that they are no prefixes.
"""

from __future__ import annotations

import numpy as np

from nbutils.foundation import ModelError
from nbutils.objectives.prefixes.table import PrefixTable

ROUNDS = 20  # of drawing; what is left then has few tokens to choose from and is given them by search


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
