"""Which tokens of a vocabulary are prefixes of which, as text; found from the tokens' bytes, never by decoding.

Decoding one token at a time would strip spaces and lose partial characters.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbutils.data import token_bytes
from nbutils.foundation import ModelError, atomic_write, exclusively, places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TABLES = "prefix_tables"
FORMAT = 1  # of the cached file; raised when the same tokenizer would give another table
NAMED = 5  # tokens in an error message
DIGEST = hashlib.sha256().digest_size


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


ARRAYS = tuple(field.name for field in fields(PrefixTable))


def prefix_table(tokenizer: PreTrainedTokenizerBase, vocab: int) -> PrefixTable:
    """The table of `tokenizer` for a model of `vocab` tokens; ids past the tokenizer's are rows of themselves alone.

    Kept in runs/prefix_tables by the tokenizer's fingerprint and read from there the next time; a damaged file is made
    anew. Several processes may call it at once: one builds, the others wait. Raises ModelError where the tokenizer has
    more tokens than `vocab`, or a token of no bytes that is not special.
    """
    folder = places.RUNS / TABLES
    key = tokenizer_fingerprint(tokenizer, vocab)[:16]
    path = folder / f"{key}.table"
    try:
        if (table := _read(path)) is not None:
            return table
        with exclusively(folder / ".locks" / key):
            if (table := _read(path)) is None:
                table = build_table(tokenizer, vocab)
                _write(path, table)
            return table
    except OSError as error:
        logger.warning(
            "The prefix table is not kept, %s cannot be written (%s).", places.relative(folder), error.strerror
        )
        return build_table(tokenizer, vocab)


def build_table(tokenizer: PreTrainedTokenizerBase, vocab: int) -> PrefixTable:
    """The same without the cache: one walk through the tokens in the order of their bytes."""
    texts = _texts(tokenizer, vocab)
    rows = dict(_walk(texts))
    rows = [rows.get(token, [token]) for token in range(vocab)]
    return PrefixTable(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32),
        tokens=np.fromiter((token for row in rows for token in row), np.int32),
        lengths=np.array([len(text) for text in texts], np.int32),
        whitespace=np.array([_is_whitespace(text) for text in texts]),
        ascii=np.array([bool(text) and text.isascii() for text in texts]),
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens that stand for no text, also of those no role is given to (Llama 3's reserved ones)."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, vocab: int) -> str:
    """A hash of all that decides the table: the tokens, which of them are special, how bytes are read, and `vocab`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    reading = [state.get("decoder"), state.get("pre_tokenizer")]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    content = [FORMAT, vocab, reading, vocabulary, sorted(special_ids(tokenizer))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _texts(tokenizer: PreTrainedTokenizerBase, vocab: int) -> list[bytes]:
    """The bytes of each of `vocab` tokens; empty for special tokens and ids without a token."""
    special = special_ids(tokenizer)
    texts = token_bytes(tokenizer)
    if len(texts) > vocab:
        raise ModelError(
            f"The tokenizer has {len(texts)} tokens and the model's vocabulary {vocab}. Give a model of at least as "
            "many tokens, or the tokenizer that belongs to it."
        )
    empty = {
        number: token for token, number in tokenizer.get_vocab().items() if number not in special and not texts[number]
    }
    if empty:
        named = ", ".join(f"{token!r} (id {number})" for number, token in sorted(empty.items())[:NAMED])
        others = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
        raise ModelError(
            f"The tokenizer has {len(empty)} tokens of no bytes, which would be a prefix of every other: {named}"
            f"{others}. Declare them as special tokens of the tokenizer, or give another tokenizer."
        )
    texts = [b"" if number in special else text for number, text in enumerate(texts)]
    return texts + [b""] * (vocab - len(texts))


def _walk(texts: list[bytes]) -> Iterator[tuple[int, list[int]]]:
    """(token, its row) of all tokens with bytes.

    Sorted by their bytes, tokens come in the order in which a walk through their trie, root first, would meet them: a
    token's prefixes are those on the way to it, and nothing that was left is met again.
    """
    way: list[tuple[bytes, list[int]]] = []  # the texts from the root to here, each with all tokens up to it
    for token in sorted((token for token, text in enumerate(texts) if text), key=texts.__getitem__):
        text = texts[token]
        while way and not text.startswith(way[-1][0]):
            way.pop()
        twin = way and way[-1][0] == text
        shorter = (way[-2][1] if len(way) > 1 else []) if twin else (way[-1][1] if way else [])
        row = [*shorter, token]
        yield token, row
        if twin:
            way[-1] = text, [*way[-1][1], token]
        else:
            way.append((text, row))


def _is_whitespace(text: bytes) -> bool:
    if text.isascii():
        return text.isspace()  # a str takes four control characters for spaces, too
    try:
        return text.decode().isspace()
    except UnicodeDecodeError:  # part of a character
        return False


def _read(path: Path) -> PrefixTable | None:
    """The table in `path`; None where there is none or it is damaged."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = stored[:DIGEST], stored[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        logger.warning("%s is damaged. It is made anew.", places.relative(path))
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return PrefixTable(*(arrays[name] for name in ARRAYS))


def _write(path: Path, table: PrefixTable) -> None:
    """A .npz file with its SHA-256 in front, so that damage anywhere in it is seen."""
    memory = io.BytesIO()
    np.savez(memory, **{name: getattr(table, name) for name in ARRAYS})
    content = memory.getvalue()
    atomic_write(path, hashlib.sha256(content).digest() + content)
