"""Judges without a model: deterministic, free, and blind to meaning. They look at completions alone.

"rule" grades four aspects, "rule_plain" three others, so that one can check a student that learned from the other.
Each lies in [0, 1]; a completion without a word gets 0 on all. Words are what stands between white space.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from nbutils.evaluation import repetition
from nbutils.interaction.judges.judged import Reply, ScoringJudge, Text
from nbutils.interaction.prompts import Aspect
from nbutils.interaction.replies import JudgeLimits

RULE, RULE_PLAIN = "rule", "rule_plain"
LONGEST_TEXT = 100_000  # characters that are looked at
ASKED_WORDS = 60  # about 90 tokens
WINDOW = 50  # words of the moving type-token ratio, as Covington and McFall advise for short texts
BRACKETS = {")": "(", "]": "[", "}": "{", "”": "“"}
LETTERS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
VOWELS = re.compile(r"[aeiouyàâäéèêëîïôöùûü]+")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
ENDED = re.compile(r"[.!?][\"'”’)\]]*$")
BEGUN = re.compile(r"^[\"'“‘(\[]*[A-Z0-9]")

Measure = Callable[[str], float]


def readability(text: str) -> float:
    """Reading ease over 100, cut to [0, 1]: 206.835 - 1.015 words / sentences - 84.6 syllables / words.

    Sources: R. Flesch, A New Readability Yardstick (1948). A syllable is counted for each group of vowels, a silent e
    at the end left out, at least one a word. Text that no full stop ends is one sentence.
    """
    words = LETTERS.findall(text.lower())
    if not words:
        return 0.0
    syllables = sum(_syllables(word) for word in words)
    ease = 206.835 - 1.015 * len(words) / len(sentences(text)) - 84.6 * syllables / len(words)
    return min(1.0, max(0.0, ease / 100))


def non_repetition(text: str) -> float:
    """1 less the share of four-word sequences that stood in the text before."""
    return 1 - repetition(text)


def length_measure(asked_words: int) -> Measure:
    """How near the number of words is to `asked_words`: the smaller of the two over the larger."""

    def length(text: str) -> float:
        words = len(text.split())
        return min(words, asked_words) / max(words, asked_words)

    return length


def known_words_measure(known_words: frozenset[str]) -> Measure:
    """The share of words, by their letters in lower case, that are in `known_words`; 0 where there are no letters."""

    def known(text: str) -> float:
        words = LETTERS.findall(text.lower())
        return sum(word in known_words for word in words) / len(words) if words else 0.0

    return known


def completeness(text: str) -> float:
    """The share of sentences that begin with a capital or a digit and end with a full stop, ! or ?.

    The first sentence goes on with the prompt's, and may begin with a small letter.
    """
    each = sentences(text)
    whole = [bool(ENDED.search(part) and (number == 0 or BEGUN.search(part))) for number, part in enumerate(each)]
    return sum(whole) / len(each)


def balance(text: str) -> float:
    """The share of quotes and brackets that have their partner, brackets in the right order; 1 where there are none."""
    open_ones: list[str] = []
    marks = partnered = 0
    for mark in text:
        if mark in BRACKETS.values():
            open_ones.append(mark)
            marks += 1
        elif mark in BRACKETS:
            marks += 1
            if open_ones and open_ones[-1] == BRACKETS[mark]:
                open_ones.pop()
                partnered += 2
    straight = text.count('"')
    marks, partnered = marks + straight, partnered + straight - straight % 2
    return partnered / marks if marks else 1.0


def variety(text: str) -> float:
    """Different words over words, the mean over all windows of WINDOW words: text length does not change it.

    Source: M. A. Covington and J. D. McFall, Cutting the Gordian Knot: The Moving-Average Type-Token Ratio (2010).
    """
    words = text.lower().split()
    window = min(WINDOW, len(words))
    counts = Counter(words[:window])
    total = len(counts)
    for place in range(window, len(words)):
        leaving = words[place - window]
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        counts[words[place]] += 1
        total += len(counts)
    return total / (window * (len(words) - window + 1))


class RuleJudge(ScoringJudge):
    """The mean of measures, a number in [0, 1] each."""

    def __init__(self, name: str, measures: dict[str, Measure], limits: JudgeLimits) -> None:
        super().__init__(name, [Aspect(each, 0, 1) for each in measures], limits)
        self._measures = measures

    def ask(self, texts: Sequence[Text], missing: frozenset[int]) -> Iterator[dict[int, Reply]]:
        for index in sorted(missing):
            if not self.budget.seconds_left():
                return
            text = texts[index].completion[:LONGEST_TEXT]
            values = {name: measure(text) if text.split() else 0.0 for name, measure in self._measures.items()}
            raw = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            yield {index: Reply(tuple(values.values()), raw)}


def rule_judge(limits: JudgeLimits, known_words: frozenset[str] | None = None, asked_words: int = 0) -> RuleJudge:
    """ "rule": readability, repetition (1 is none), length, known_words; that last one where words are given.

    asked_words: 0 for ASKED_WORDS.
    """
    measures: dict[str, Measure] = {
        "readability": readability,
        "repetition": non_repetition,
        "length": length_measure(asked_words or ASKED_WORDS),
    }
    if known_words:
        measures["known_words"] = known_words_measure(known_words)
    return RuleJudge(RULE, measures, limits)


def plain_rule_judge(limits: JudgeLimits) -> RuleJudge:
    """ "rule_plain": completeness of sentences, balance of quotes and brackets, variety of words."""
    measures = {"completeness": completeness, "balance": balance, "variety": variety}
    return RuleJudge(RULE_PLAIN, measures, limits)


def known_words_of(texts: Iterable[str], fewest: int = 2) -> frozenset[str]:
    """The words of `texts` that stand there at least `fewest` times, in lower case: what a student may know."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(LETTERS.findall(text.lower()))
    return frozenset(word for word, count in counts.items() if count >= fewest)


def sentences(text: str) -> list[str]:
    """The sentences of a text with at least a word; what no full stop ends is one too."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def _syllables(word: str) -> int:
    groups = len(VOWELS.findall(word))
    silent = word.endswith("e") and not word.endswith("le") and groups > 1
    return max(1, groups - silent)
