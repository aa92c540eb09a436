"""Small tokenizers of every kind, whose prefixes can be found by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nbutils.tokenization import train_byte_level_bpe, train_unigram

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
