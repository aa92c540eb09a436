"""A spelling probe of the tokenizer's own words: does a model know which letters stand behind a token?

Three tasks, each a question with a few choices, so that models of any size can be scored:

    spelling_count        How many times does the letter r occur in strawberry?                1, 2 (or 3, see below)
    spelling_first_index  At which position is the first r in strawberry, counting from 1?     1, 2, 3 (or 4)
    spelling_character    What is letter 3 of strawberry?                                      four letters of the word

A word stands after a space and is one token wherever the vocabulary has enough such words. Items come in groups, in
which a model that does not know the word scores exactly chance, 1 / choices: of a count or an index, a group has one
word for each answer, all of one length, asked for the same letter; of a character, it has one word and the same four
letters, each the answer once. So neither the letter, nor the length, nor the position tells the answer. The number of
choices follows from the vocabulary: the most that give `ENOUGH` items.

These are the counting and the position questions of CharBench (O. Uzan and Y. Pinter, arXiv 2508.02591) with choices in
place of free answers, and over the tokenizer's words in place of a dictionary's. The numbers of the two do not compare.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data import token_bytes
from nbutils.evaluation.harness.settings import SPELLING_SHOTS
from nbutils.foundation import ParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]
Group = list[Item]

ITEMS = 600  # of each task, where the vocabulary has words for them
ENOUGH = 60  # items that a task has with the wider choice, or the narrower is taken
FEWEST = 12  # below this nothing can be said
SHORTEST, LONGEST = 4, 14  # letters of a word
WORDS_ENOUGH = 200  # words after a space; with fewer, any token of letters is one
CHOICES = 4  # letters that a character is chosen from
HELD_OUT = 8  # one word in so many serves as an example alone


def write_spelling(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, items: int = 0) -> None:
    """Write <task>/validation.jsonl and train.jsonl (for examples) of the three tasks into `folder`.

    Each line is {question, choices, gold, word}. The same tokenizer, seed and number of items give the same files.
    items: of each task, 0 for ITEMS; whole groups, so a few less. Raises ParameterError where the vocabulary has too
    few words.
    """
    words = own_words(tokenizer)
    for task, make in MAKERS.items():
        generator = random.Random(f"{task} {seed}")
        drawn = generator.sample(words, len(words))
        held_out = max(1, len(words) // HELD_OUT)
        scored = make(drawn[held_out:], min(items or ITEMS, ITEMS), generator)
        if len(scored) < min(items or FEWEST, FEWEST):
            raise ParameterError(
                f"The tokenizer's vocabulary has {len(words)} words of {SHORTEST} to {LONGEST} letters, which make "
                f"{len(scored)} items of {task}: too few. Take spelling out of tasks, or raise vocab_size."
            )
        write = {"validation": scored, "train": make(drawn[:held_out], SPELLING_SHOTS, generator) or scored[:0]}
        for split, rows in write.items():
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def own_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that are tokens: lower-case ASCII letters after a space; with few of them, any token of ASCII letters."""
    texts = [text.decode("ascii") for text in token_bytes(tokenizer) if text.isascii()]
    spaced = {text[1:] for text in texts if text.startswith(" ") and _is_word(text[1:]) and text.islower()}
    if len(spaced) >= WORDS_ENOUGH:
        return sorted(spaced)
    return sorted({text.strip().lower() for text in texts if _is_word(text.strip())})


def _is_word(text: str) -> bool:
    return text.isalpha() and SHORTEST <= len(text) <= LONGEST


def _counts(words: list[str], items: int, generator: random.Random) -> list[Item]:
    def answers(word: str) -> Iterator[tuple[str, int]]:
        for letter in sorted(set(word)):
            yield letter, word.count(letter)

    return _matched(
        words, answers, (3, 2), items, generator, "How many times does the letter {letter} occur in {word}?"
    )


def _first_indices(words: list[str], items: int, generator: random.Random) -> list[Item]:
    def answers(word: str) -> Iterator[tuple[str, int]]:
        for letter in sorted(set(word)):
            yield letter, word.index(letter) + 1

    question = "At which position is the first {letter} in {word}, counting from 1?"
    return _matched(words, answers, (4, 3), items, generator, question)


def _matched(
    words: list[str],
    answers: Callable[[str], Iterable[tuple[str, int]]],
    widths: tuple[int, int],
    items: int,
    generator: random.Random,
    question: str,
) -> list[Item]:
    """Groups of words of one length asked for one letter, one for each answer 1..width; the widest that gives ENOUGH.

    answers: the letters of a word with the answer to each. No word is in two groups.
    """
    classes: dict[tuple[str, int], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for word in words:
        for letter, answer in answers(word):
            classes[letter, len(word)][answer].append(word)
    for width in widths:
        possible = range(1, width + 1)
        choices = [str(answer) for answer in possible]
        groups: list[Group] = []
        used: set[str] = set()
        for letter, row in _in_turns(classes, possible, generator):
            if not used & set(row) and (len(groups) + 1) * width <= items:
                used |= set(row)
                asked = [question.format(letter=letter, word=word) for word in row]
                groups.append(
                    [
                        {"question": text, "choices": choices, "gold": place, "word": word}
                        for place, (text, word) in enumerate(zip(asked, row, strict=True))
                    ]
                )
        if len(groups) * width >= min(ENOUGH, items - items % width):
            break
    return [item for group in groups for item in group]


def _in_turns(
    classes: dict[tuple[str, int], dict[int, list[str]]], possible: range, generator: random.Random
) -> list[tuple[str, tuple[str, ...]]]:
    """(letter, one word for each answer) of every class, in a drawn order."""
    found = [
        (letter, row)
        for (letter, _), by_answer in sorted(classes.items())
        for row in zip(*(by_answer.get(answer, []) for answer in possible), strict=False)
    ]
    return generator.sample(found, len(found))


def _characters(words: list[str], items: int, generator: random.Random) -> list[Item]:
    """Groups of one word with four letters that it has once, each asked for by its place."""
    found: list[Item] = []
    for word in words:
        once = [letter for letter in word if word.count(letter) == 1]
        if len(once) < CHOICES or len(found) + CHOICES > items:
            continue
        choices = generator.sample(once, CHOICES)
        for gold, letter in enumerate(choices):
            question = f"What is letter {word.index(letter) + 1} of {word}?"
            found.append({"question": question, "choices": choices, "gold": gold, "word": word})
    return found


MAKERS: dict[str, Callable[[list[str], int, random.Random], list[Item]]] = {
    "spelling_count": _counts,
    "spelling_first_index": _first_indices,
    "spelling_character": _characters,
}
