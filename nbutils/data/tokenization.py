"""Tokenizers: of a published model, trained here (BPE or Unigram), or single characters; and text made token ids.

Two kinds are trained: byte-level BPE (GPT-2's) and Unigram (SentencePiece's).

Every tokenizer that leaves here has an end token (`tokenizer.eos_token_id`), which stands after each document, and a
pad token, which is the end token where the published tokenizer has none (GPT-2, Llama 3).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbutils.foundation import ModelError, locate, unusable

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN_TOKEN = "<|unknown|>"
# With these as pieces of their own, a text that spells out "<0x0A>" or "<|unknown|>" is never taken for that token.
SPELLING = "".join(sorted({*"<0x123456789ABCDEF>", *UNKNOWN_TOKEN}))
SMALLEST_UNIGRAM_VOCABULARY = len(BYTES) + len(SPELLING) + 3  # the space mark, the unknown and the end token
THREADS = 4  # part of the result: each thread adds up its own share
NEVER = -10_000.0  # log-probability of what only the fallback may choose; a path of pieces is far more probable
# SentencePiece passes over long lines, and over those with a tab, which it uses itself.
SENTENCE = re.compile(r"[^\n\t]{1,2000}(?=\s|$)|[^\n\t]{1,2000}")
SENTENCE_BYTES = 8192

END_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all 256 bytes and the end token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TEXTS_AT_ONCE = 256
CURE = (
    "Check the name on the Hugging Face Hub; without a network, set tokenizer to a folder written by save_pretrained, "
    "to train, unigram or characters."
)


def check_tokenizer(tokenizer: str, vocab_size: int) -> None:
    """What can be known before a kernel starts. Raises ModelError with cause and cure.

    tokenizer: "train", "unigram", "characters", a folder, or a name on the Hugging Face Hub (asked for at most 5 s,
    and not at all where the tokenizer lies in the local cache).
    """
    if tokenizer == "train":
        if vocab_size < SMALLEST_VOCABULARY:
            raise ModelError(
                f"vocab_size {vocab_size} is too small for a byte-level tokenizer: 256 bytes and the end token make "
                f"{SMALLEST_VOCABULARY}. Raise vocab_size, or set tokenizer to characters."
            )
    elif tokenizer == "unigram":
        if vocab_size < SMALLEST_UNIGRAM_VOCABULARY:
            raise ModelError(
                f"vocab_size {vocab_size} is too small for a Unigram tokenizer: 256 bytes, the characters that spell "
                f"them and the special tokens make {SMALLEST_UNIGRAM_VOCABULARY}. Raise vocab_size, or set tokenizer "
                "to characters."
            )
    elif tokenizer != "characters":
        locate(tokenizer, TOKENIZER_FILES, "tokenizer", CURE)


def make_tokenizer(tokenizer: str, train_texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer that `tokenizer` names (as in `check_tokenizer`), made from `train_texts` where it is our own."""
    check_tokenizer(tokenizer, vocab_size)
    if tokenizer == "train":
        return train_byte_level_bpe(train_texts, vocab_size)
    if tokenizer == "unigram":
        return train_unigram(train_texts, vocab_size)
    if tokenizer == "characters":
        return character_tokenizer(train_texts)
    return load_tokenizer(tokenizer)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A published tokenizer by folder or Hub name; no code from outside is run. Raises ModelError."""
    from transformers import AutoTokenizer

    place = locate(str(name), TOKENIZER_FILES, "tokenizer", CURE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.name, **place.settings)
    except Exception as error:  # the Rust reader raises bare Exceptions, the Hub's client its own kinds
        raise ModelError(unusable(str(name), "tokenizer", error, CURE)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer {str(name)!r} names no end token, which must stand between documents. "
            'Add "eos_token" to its tokenizer_config.json, or use another tokenizer.'
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """GPT-2's kind of tokenizer: 256 bytes, merges learned from `texts`, the end token last.

    Any text is encoded without loss. Texts too small for `vocab_size` merges give a smaller vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _published(tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN)


def train_unigram(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """SentencePiece's kind of tokenizer: the unknown token, 256 bytes, pieces learned from `texts`, the end token last.

    Any text is encoded without loss, what the pieces lack as its bytes; but SentencePiece's own space mark, U+2581, is
    read as a space. Texts too small for `vocab_size` pieces give a smaller vocabulary. Raises ModelError.
    """
    tokenizer = train_unigram_model(texts, vocab_size - 1)
    return _published(tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN, unk_token=UNKNOWN_TOKEN)


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """One token a character, sorted, then the unknown token (a character that `texts` lack) and the end token."""
    from tokenizers import Tokenizer, decoders, models

    characters = sorted(set().union(*texts))
    vocabulary = {token: number for number, token in enumerate([*characters, UNKNOWN_TOKEN, END_TOKEN])}
    # BPE without merges is a character tokenizer, and six times as fast as splitting by a regular expression.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN_TOKEN))
    tokenizer.decoder = decoders.Fuse()
    return _published(tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN, unk_token=UNKNOWN_TOKEN)


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The token ids of each text: int32 of shape (tokens,), nothing added.

    Special tokens written out in a text ("<|endoftext|>" in a page about GPT-2) are encoded as the plain text they are.
    """
    ids: list[np.ndarray] = []
    with _parallel():
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            batch = tokenizer(
                list(texts[begin : begin + TEXTS_AT_ONCE]),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids.extend(np.array(row, np.int32) for row in batch["input_ids"])
    return ids


def _published(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special_tokens)


@contextmanager
def _parallel() -> Iterator[None]:
    """All cores for tokenising, none after: processes forked later (data loaders) would hang or warn."""
    name = "TOKENIZERS_PARALLELISM"
    wanted = os.environ.get(name)
    os.environ[name] = wanted or "true"
    try:
        yield
    finally:
        os.environ[name] = wanted or "false"


def train_unigram_model(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: the unknown token, the 256 bytes, then pieces.

    The most probable piece comes first. Nothing is normalised and no space is put before a text. Raises
    ModelError where `vocab_size` has no room for the characters of `texts`, or these hold nothing to learn from.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [(piece, score) for piece, score in _train(texts, vocab_size) if piece not in BYTES]
    fallback = [(token, NEVER) for token in [UNKNOWN_TOKEN, *BYTES]]
    tokenizer = Tokenizer(models.Unigram(fallback + pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int) -> list[tuple[str, float]]:
    """SentencePiece's pieces and log-probabilities, its special and byte tokens left out."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus has fewer pieces
            byte_fallback=True,
            required_chars=SPELLING,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=SENTENCE_BYTES,
            bos_id=-1,
            eos_id=-1,
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"A Unigram tokenizer of vocab_size {vocab_size + 1} cannot be trained on the train split "
            f"({' '.join(str(error).split())[-200:]}). Raise vocab_size, give more text, or set tokenizer to train."
        ) from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = [number for number in range(len(trained)) if not (trained.is_unknown(number) or trained.is_byte(number))]
    return [(trained.id_to_piece(number), trained.get_score(number)) for number in numbers]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The lines of `texts`, long ones in pieces that end before a space where there is one."""
    for text in texts:
        for match in SENTENCE.finditer(text):
            yield match.group()
