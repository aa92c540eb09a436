"""Questions and answers made fit for training: cleaned, without copies, split by question, and written as examples.

An example is the prompt's tokens, the answer's and the end token. Its labels are the answer's tokens and the end
token; those of the prompt are UNLABELLED. There is no padding, so a pad token that is the end token can hide nothing.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.data.data_card import Selection, check_ascii, data_card, document_table, split_sizes, token_ids
from nbutils.data.documents import (
    Duplicate,
    clean_text,
    measure_leakage,
    require_splits,
    split_documents,
    text_position,
)
from nbutils.data.packing import Examples, pack_examples
from nbutils.data.question_corpus import PROMPT, pair_document, prompt_of
from nbutils.data.sources import SPLITS, Document
from nbutils.data.text_corpora import join_lines
from nbutils.data.tokenization import tokenize
from nbutils.foundation import CorpusError

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TRAIN_SHARE, VALIDATION_SHARE = 0.70, 0.15
LEAKAGE_WORDS = 8  # a question and its answer seldom have the 13 words that longer texts are checked by
EXAMPLES_SHOWN = 3  # of each split, on the card


@dataclass(frozen=True)
class EncodedPairs:
    """Tokens of each example: the prompt's and the answer's, int32 of shape (tokens,); without the end token."""

    prompts: list[np.ndarray]
    answers: list[np.ndarray]

    def joined(self) -> list[np.ndarray]:
        """Prompt and answer in one row."""
        return [np.concatenate(pair) for pair in zip(self.prompts, self.answers, strict=True)]


# ---- choosing --------------------------------------------------------------------------------------------------------


def question_key(question: str) -> str:
    """What near-identical questions share: the words, without case, punctuation, spacing or compatibility forms."""
    plain = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain.strip()


def answer_key(answer: str) -> str:
    """As `question_key`, but punctuation counts: 1.5 is not 15, and -3 is not 3."""
    return " ".join(unicodedata.normalize("NFKC", answer).casefold().split())


def clean_pairs(documents: Sequence[Document], clean: str, ascii_only: bool) -> list[Document]:
    """The pairs tidied as documents are; those without a question or an answer are left out. Raises CorpusError."""

    def tidy(text: str, tidied: Any) -> str:
        return tidied(text.encode("ascii", "ignore").decode() if ascii_only else text)

    cleaned = []
    for document in documents:
        one_line = {"standard": lambda text: " ".join(text.split()), "newlines": join_lines, "none": str}[clean]
        question = tidy(document.question, one_line)
        answer = tidy(document.answer, clean_text if clean == "standard" else one_line)
        if question.strip() and answer.strip():
            cleaned.append(pair_document(document.name, question, answer, document.split))
    if not cleaned:
        raise CorpusError(
            f"None of the {len(documents)} rows read has a question and an answer. Set question_field and answer_field "
            "to columns that hold them."
        )
    if empty := len(documents) - len(cleaned):
        logger.warning("%d of %d rows have no question or no answer and were left out", empty, len(documents))
    return cleaned


def remove_pair_copies(documents: Sequence[Document], dedup: str) -> tuple[list[Document], list[Duplicate]]:
    """The pairs without copies, the first of each stays; one question with two answers is no copy.

    dedup: "exact" compares question and answer as they are, "near" by `question_key` and `answer_key`.
    """
    if dedup == "off":
        return list(documents), []
    first: dict[tuple[str, str], Document] = {}
    duplicates = []
    for document in documents:
        exact = (document.question, document.answer)
        near = (question_key(document.question), answer_key(document.answer))
        kept = first.setdefault(exact if dedup == "exact" else near, document)
        if kept is not document:
            duplicates.append(Duplicate(document.name, kept.name, 1.0, (kept.question, kept.answer) == exact))
    return list(first.values()), duplicates


def split_questions(documents: Sequence[Document], split: str, counts: tuple[int, int, int]) -> list[Document]:
    """The pairs with their `split`; pairs whose questions have one key are never parted.

    hash: 70/15/15 by a hash of the key, the same on any machine. counts: exactly `counts` pairs of train, validation
    and test, in the order of that hash; where a question's pairs would be parted the further ones are left out. given:
    as the corpus says, `counts` being the most of each. Raises CorpusError.
    """
    if split == "given":
        return split_documents(documents, "given", *counts)
    if split == "hash":
        divided = [replace(document, split=_split_of(question_key(document.question))) for document in documents]
        return require_splits(divided, SPLITS, "split=hash")
    return require_splits(
        _split_by_counts(documents, dict(zip(SPLITS, counts, strict=True))), SPLITS[:2], "split=counts"
    )


def _split_of(key: str) -> str:
    position = text_position(key)
    if position < TRAIN_SHARE:
        return "train"
    return "validation" if position < TRAIN_SHARE + VALIDATION_SHARE else "test"


def _split_by_counts(documents: Sequence[Document], counts: dict[str, int]) -> list[Document]:
    keys = [question_key(document.question) for document in documents]
    order = sorted(range(len(documents)), key=lambda number: (text_position(keys[number]), keys[number], number))
    groups = [list(group) for _, group in groupby(order, key=lambda number: keys[number])]
    chosen: dict[int, str] = {}
    for split, wanted in counts.items():
        while wanted and groups:
            group = groups.pop(0)
            chosen |= dict.fromkeys(group[:wanted], split)
            wanted -= len(group[:wanted])
        if wanted:
            asked = " + ".join(str(count) for count in counts.values())
            raise CorpusError(
                f"split=counts asks for {asked} = {sum(counts.values())} examples, but {len(documents)} are left after "
                f"cleaning and duplicate removal, and equal questions stay together: {split} lacks {wanted}. Lower "
                "subset_train, subset_val or subset_test, or raise max_documents."
            )
    return [replace(documents[number], split=chosen[number]) for number in sorted(chosen)]


# ---- encoding --------------------------------------------------------------------------------------------------------


def encode_pairs(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> EncodedPairs:
    """The prompt's tokens are always those of the prompt alone, which is all a model sees when it answers.

    The answer's are the rest of the tokens of the whole text, or, where a tokenizer would join a letter of each into
    one token, those of the space and the answer alone.
    """
    prompts = tokenize([prompt_of(document.question) for document in documents], tokenizer)
    texts = tokenize([document.text for document in documents], tokenizer)
    alone = tokenize([f" {document.answer}" for document in documents], tokenizer)
    answers = [
        text[len(prompt) :] if np.array_equal(text[: len(prompt)], prompt) else answer
        for prompt, text, answer in zip(prompts, texts, alone, strict=True)
    ]
    return EncodedPairs(prompts, answers)


def fit_block(
    selection: Selection, encoded: EncodedPairs, block_size: int
) -> tuple[Selection, EncodedPairs, dict[str, int]]:
    """Without the examples of over `block_size` tokens, end token included; and how many and how long they were.

    Raises CorpusError where more than half would go.
    """
    lengths = [len(prompt) + len(answer) + 1 for prompt, answer in zip(encoded.prompts, encoded.answers, strict=True)]
    fits = [number for number, length in enumerate(lengths) if length <= block_size]
    too_long = len(lengths) - len(fits)
    if 2 * too_long > len(lengths):
        raise CorpusError(
            f"block_size {block_size} is too short: {too_long} of {len(lengths)} questions with their answers have "
            f"more tokens, the longest {max(lengths)}, the middle one {int(np.median(lengths))}. Raise block_size."
        )
    if too_long:
        logger.warning(
            "%d of %d questions with their answers are longer than block_size %d (the longest has %d tokens) and were "
            "left out",
            *(too_long, len(lengths), block_size, max(lengths)),
        )
    kept = [selection.documents[number] for number in fits]
    require_splits(kept, sorted({document.split for document in selection.documents}), f"block_size {block_size}")
    stage = {"stage": "fit the block", "documents": len(kept), "characters": sum(len(each.text) for each in kept)}
    selection = replace(selection, documents=kept, stages=[*selection.stages, stage])
    encoded = EncodedPairs([encoded.prompts[number] for number in fits], [encoded.answers[number] for number in fits])
    return selection, encoded, {"too_long": too_long, "longest_tokens": max(lengths)}


def pack_questions(
    selection: Selection, tokenizer: PreTrainedTokenizerBase, block_size: int, ascii_only: bool
) -> tuple[dict[str, Examples], DataFrame, dict[str, Any]]:
    """The examples of each split, the table of documents, and the data card. Raises CorpusError."""
    read = selection.stages[0]["documents"]
    empty = read - selection.stages[1]["documents"]
    encoded = encode_pairs(selection.documents, tokenizer)
    selection, encoded, dropped = fit_block(selection, encoded, block_size)
    documents, end = selection.documents, tokenizer.eos_token_id
    numbers = {split: [n for n, document in enumerate(documents) if document.split == split] for split in SPLITS}
    examples = {
        split: pack_examples([encoded.prompts[n] for n in each], [encoded.answers[n] for n in each], each, end)
        for split, each in numbers.items()
        if each
    }
    table = document_table(documents, encoded.joined())
    table["answer_tokens"] = [len(answer) for answer in encoded.answers]
    table["question"] = [document.question for document in documents]
    table["answer"] = [document.answer for document in documents]
    card = {"task": "qa", "prompt": PROMPT, "dropped": {"empty": empty, **dropped}, "leakage_words": LEAKAGE_WORDS}
    totals = {split: each.totals(token_ids(tokenizer)) for split, each in examples.items()}
    if ascii_only:
        check_ascii(totals, tokenizer)
    card |= data_card(selection, split_sizes(table), totals, tokenizer, block_size, leakage_of_pairs(documents))
    shown = table.groupby("split", sort=False).head(EXAMPLES_SHOWN)[["split", "name", "question", "answer"]]
    return examples, table, card | {"examples": shown.to_dict("records")}


def leakage_of_pairs(documents: Sequence[Document]) -> dict[str, dict[str, float]]:
    """As `measure_leakage`, in runs of LEAKAGE_WORDS of question and answer, and what of both is in train as a whole.

    `seen_answers` and `answer_share` count answers that some train answer equals, `seen_questions` and `question_share`
    questions; case and spacing do not count, in questions punctuation neither.
    """
    table = measure_leakage([replace(each, text=f"{each.question} {each.answer}") for each in documents], LEAKAGE_WORDS)
    for name, key in (("question", question_key), ("answer", answer_key)):
        train = {key(getattr(document, name)) for document in documents if document.split == "train"}
        for split, row in table.items():
            seen = sum(key(getattr(document, name)) in train for document in documents if document.split == split)
            row |= {f"seen_{name}s": seen, f"{name}_share": seen / row["documents"]}
    return table
