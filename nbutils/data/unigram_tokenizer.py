"""A Unigram tokenizer (Kudo 2018) as SentencePiece trains it, in the form the tokenizers library runs.

SentencePiece trains, because the tokenizers library's own trainer gives other pieces each time it is called. A fixed
number of threads adds up in one order, so equal texts give equal pieces on any machine.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nbutils.foundation import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
