"""The bytes each token of a vocabulary stands for: what bits per byte are counted in.

Works for byte-level BPE (GPT-2, Llama 3), SentencePiece with its space mark and byte tokens (Llama 2), WordPiece with
##, and tokens that are their own text. Text is never decoded, which would lose partial characters.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARK = "▁"  # SentencePiece's
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CONTINUATION = "##"  # WordPiece's


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of every token by id; empty for special tokens and for ids that no token has."""
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    read = _reader(tokenizer)
    texts = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        if number not in special:
            texts[number] = read(token)
    return texts


def token_lengths(tokenizer: PreTrainedTokenizerBase, vocab: int) -> np.ndarray:
    """Bytes of every token, (vocab,); a padded vocabulary's further tokens have none."""
    lengths = np.zeros(vocab)
    counted = [len(text) for text in token_bytes(tokenizer)][:vocab]
    lengths[: len(counted)] = counted
    return lengths


def _reader(tokenizer: PreTrainedTokenizerBase):
    """How a token of this tokenizer is read as bytes; what its own decoder would do, without joining characters."""
    parts = _components(json.loads(tokenizer.backend_tokenizer.to_str()))
    if "ByteLevel" in parts:
        return lambda token: bytes(_byte_alphabet()[c] for c in token) if _is_byte_level(token) else token.encode()
    if "WordPiece" in parts:
        return lambda token: (
            token.removeprefix(CONTINUATION).encode() if token.startswith(CONTINUATION) else b" " + token.encode()
        )
    if parts & {"Metaspace", "ByteFallback"} or SPACE_MARK in "".join(list(tokenizer.get_vocab())[:5000]):
        return _sentencepiece_bytes
    return str.encode


def _components(state: dict) -> set[str]:
    """The kinds of the decoder's and pre-tokenizer's parts, however nested."""
    found: set[str] = set()
    for part in (state.get("decoder"), state.get("pre_tokenizer")):
        stack = [part] if part else []
        while stack:
            node = stack.pop()
            found.add(node["type"])
            stack += node.get("decoders", []) + node.get("pretokenizers", [])
    return found


def _sentencepiece_bytes(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()


def _is_byte_level(token: str) -> bool:
    return all(character in _byte_alphabet() for character in token)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the rest follow from code point 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
