"""Which tokens of a vocabulary are prefixes of which, as text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefixTable:
    """For each token the tokens whose bytes are a prefix of its bytes, in compressed rows.

    offsets: (vocab + 1,) int32; row y is tokens[offsets[y] : offsets[y + 1]].
    tokens: (entries,) int32; in a row the shortest first, y itself last. All others are strictly shorter than y: of
        two tokens with one text neither is in the other's row, and both are in the row of a longer token.
    lengths: (vocab,) int32, bytes of each token; 0 for special tokens and ids without a token, whose row is
        themselves alone and which are in no other row.
    whitespace: (vocab,) bool, tokens of whitespace alone.
    ascii: (vocab,) bool, tokens of ASCII bytes alone.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    whitespace: np.ndarray
    ascii: np.ndarray

    def row(self, token: int) -> np.ndarray:
        """The tokens whose bytes are a prefix of `token`'s, shortest first, itself last."""
        return self.tokens[self.offsets[token] : self.offsets[token + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """How many tokens each row has, itself included, (vocab,)."""
        return np.diff(self.offsets)
