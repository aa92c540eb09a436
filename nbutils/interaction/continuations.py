"""Texts and tokens of what goes on where a prompt ends, perhaps in the middle of a word.

Tokenizers of SentencePiece's kind put a space before whatever they are given, and drop it where they decode the
beginning of a text: a continuation that is encoded or decoded alone gains or loses one. Here both happen in context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nbutils.data import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINELS = ("\n", ".")  # what seldom merges with what follows; some tokenizers make a space of the first


def as_text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    """The text of `tokens` (time,), an empty line between the documents that an end token parts."""
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in np.split(tokens, _ends(tokenizer, tokens))]
    return "\n\n".join(text for text in texts if text)


def text_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` (time,) add to the text of `prompt` (time,); both of one document, or the last one's of `prompt`.

    Where the text of the prompt changes with them, as that of half a character does, their text alone.
    """
    document = _last_document(tokenizer, prompt)
    before = tokenizer.decode(document, skip_special_tokens=True)
    whole = tokenizer.decode([*document, *tokens], skip_special_tokens=True)
    alone = tokenizer.decode(tokens, skip_special_tokens=True)
    return whole[len(before) :] if before and whole.startswith(before) else alone


def tokens_after(tokenizer: PreTrainedTokenizerBase, prompt: np.ndarray, text: str) -> np.ndarray:
    """The tokens of `text` where it goes on after `prompt` (time,), int32 (tokens,); special tokens are spelled out.

    Decoded behind the prompt they give `text` again wherever the tokenizer can write it.
    """
    encodings = list(_encodings(tokenizer, text))
    faithful = (each for each in encodings if text_after(tokenizer, prompt, each) == text)
    return next(faithful, encodings[-1] if len(_last_document(tokenizer, prompt)) else encodings[0])


def _encodings(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[np.ndarray]:
    """The tokens of `text` alone, then those behind each sentinel that stands apart from them."""
    yield tokenize([text], tokenizer)[0]
    for sentinel in SENTINELS:
        before, whole = tokenize([sentinel, sentinel + text], tokenizer)
        if len(before) and np.array_equal(whole[: len(before)], before):
            yield whole[len(before) :]


def _last_document(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[int]:
    ends = _ends(tokenizer, np.asarray(tokens))
    return list(tokens[ends[-1] + 1 :] if len(ends) else tokens)


def _ends(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> np.ndarray:
    end = tokenizer.eos_token_id
    return np.flatnonzero(tokens == end) if end is not None else np.zeros(0, np.int64)
