"""Small tokenizers of every kind, whose prefixes can be found by hand, and how their rows and targets are read."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from real_data import REAL_DATA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nbutils.data.tokenization import load_tokenizer, train_byte_level_bpe, train_unigram
from nbutils.objectives.prefixes import PrefixTable, SmoothedTargets
from nbutils.objectives.prefixes.table import build_table

LLAMA3_VOCAB = 128_256
PADDED = 3  # ids that no token has
TEXTS = [
    "A straw is no strawberry, though straws and strawberries both are in the strawman's straw hat.\n\n    personally",
    "Grüße über Grüße, größer als Größe: 日本と日本人。\tThe persons, the personal and the personality there.",
] * 3


def word_level(*words: str, special: str = "<end>") -> PreTrainedTokenizerBase:
    """Tokens that are their own text: `special` has id 0, the words follow."""
    vocabulary = {word: number for number, word in enumerate([special, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=special))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special)


def word_piece() -> PreTrainedTokenizerBase:
    """Pieces that begin a word, and pieces with ## that go on with one."""
    pieces = ["[UNK]", "p", "play", "playing", "##p", "##play", "##playing", "plate", "##i"]
    raw = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def sentence_piece() -> PreTrainedTokenizerBase:
    """Pieces with the space mark and bytes, some of which stand for the same text as a piece."""
    pieces = ["<unk>", "▁", "▁s", "▁straw", "s", "st", "straw", "<0x20>", "<0x73>"]
    pieces += ["<0xC3>", "ü", "▁ü", "<0xBC>", "<0xE3>", "\u3000"]
    raw = Tokenizer(models.Unigram([(piece, -1.0 - n) for n, piece in enumerate(pieces)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerBase:
    return train_byte_level_bpe(TEXTS, 400)


def unigram() -> PreTrainedTokenizerBase:
    return train_unigram(TEXTS, 420)


def words() -> PreTrainedTokenizerBase:
    return word_level("s", "st", "straw", " ", "  ", " s", " strawberry", "t", "ü", "üb", "ab", "strawberry")


KINDS = {
    "byte-level": byte_level,
    "unigram": unigram,
    "SentencePiece": sentence_piece,
    "WordPiece": word_piece,
    "own text": words,
}


@lru_cache(maxsize=1)
def llama3() -> tuple[PreTrainedTokenizerBase, PrefixTable]:
    """Llama 3's tokenizer, which is real data, and its table."""
    tokenizer = load_tokenizer(f"{REAL_DATA}/tokenizers/llama3")
    return tokenizer, build_table(tokenizer, LLAMA3_VOCAB)


def rows_by_name(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The names of each token's prefixes and of itself, by its own."""
    found = build_table(tokenizer, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return {name: [names[v] for v in found.row(gold)] for gold, name in enumerate(names)}


def dense_target(targets: SmoothedTargets, gold: int) -> np.ndarray:
    """q_y(v) for every v, (vocab,) float64."""
    entries = slice(targets.offsets[gold], targets.offsets[gold + 1])
    dense = np.full(len(targets.gold_mass), targets.background[gold], np.float64)
    np.add.at(dense, targets.tokens[entries], targets.weights[entries].astype(np.float64))
    return dense
