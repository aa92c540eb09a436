"""What a judge says, what all judges share (budget, cache, nothing imputed), and how far one can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from nbutils.foundation import shortened, visible
from nbutils.interaction.prompts import Aspect
from nbutils.interaction.replies import LITTLE_MASS, Budget, JudgeLimits, ReplyCache

FEWEST = 3  # texts: with two, every rank correlation is 1 or -1

RAW_CHARACTERS = 400
NOT_ASKED = "not asked: the budget is spent"
EMPTY = "not asked: an empty completion has the lowest grade"
UNGRADED = "not asked: an empty completion, and no other text has a grade"


@dataclass(frozen=True)
class Judged:
    """Scores of completions, in their order.

    scores: float64 (number,) in [0, 1], the mean of the aspects, NaN where not ok; ok: bool (number,); raw: what the
    judge said, or why there is no score, at most RAW_CHARACTERS, control characters spelled out; aspects: float64
    (number,) in [0, 1] of each, NaN where not ok; words: teacher words spent, one for each aspect of each completion
    that was asked, be its reply new, kept from an earlier time, or of no use; not_asked: how many have no score since
    nobody was asked, the budget being spent or the server out of order, which is no failure of the judge's.
    number_mass: float64 (number,) in [0, 1], the probability that the judge writes an allowed number at all, mean over
    the aspects, NaN where it is not known. empty: bool (number,), completions without a word, which have the lowest
    grades without anybody being asked. They have none where the judge graded nothing else, or its budget was spent
    before: they would be all there is.
    """

    scores: np.ndarray
    ok: np.ndarray
    raw: tuple[str, ...]
    aspects: dict[str, np.ndarray]
    words: int
    not_asked: int = 0
    number_mass: np.ndarray | None = None
    empty: np.ndarray | None = None

    @property
    def by_judge(self) -> np.ndarray:
        """Which have a score that the judge itself gave, bool (number,): what tells of the judge."""
        return self.ok if self.empty is None else self.ok & ~self.empty

    @property
    def failures(self) -> int:
        """How many the judge was asked about and has given no score."""
        return int((~self.ok).sum()) - self.not_asked


class Judge(Protocol):
    """Scores completions of prompts. `aspects` are the names of what it grades, in order."""

    name: str
    budget: Budget

    @property
    def aspects(self) -> tuple[str, ...]: ...

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> Judged: ...


@dataclass(frozen=True)
class Text:
    """A completion to score. Equal texts are asked about once."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Reply:
    """Of one completion: the aspects in [0, 1], None where there are none; the judge's words or the reason.

    lasting: a reply that would be the same another time, and is kept; a server out of order is not. number_masses: of
    each aspect the probability of any allowed number, in [0, 1], None where it is not known.
    """

    values: tuple[float, ...] | None
    raw: str
    lasting: bool = True
    asked: bool = True
    number_masses: tuple[float, ...] | None = None

    @property
    def number_mass(self) -> float:
        """The mean over the aspects, NaN where it is not known."""
        return float("nan") if self.number_masses is None else float(np.mean(self.number_masses))

    def bounded(self, least: float) -> Reply:
        """This reply; one without grades where a number was less probable than `least` for any aspect."""
        if self.values is None or self.number_masses is None or min(self.number_masses) >= least:
            return self
        return replace(self, values=None, raw=f"it would write something else: {self.raw}")


class ScoringJudge:
    """A judge that is given its texts by `score`; subclasses say in `ask` how the replies come about."""

    def __init__(
        self, name: str, graded: Sequence[Aspect], limits: JudgeLimits, cache: ReplyCache | None = None
    ) -> None:
        self.name, self.graded, self.limits, self.cache = name, tuple(graded), limits, cache
        self.budget = Budget(limits, f"The judge {name}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def aspects(self) -> tuple[str, ...]:
        """The names of what is graded, in order."""
        return tuple(aspect.name for aspect in self.graded)

    def ask(self, texts: Sequence[Text], missing: frozenset[int]) -> Iterator[dict[int, Reply]]:
        """Replies to `texts` by their index, at least to those `missing` from the cache, as they come."""
        raise NotImplementedError

    def key(self, text: Text) -> str:
        """What the reply to `text` is kept by."""
        raise NotImplementedError

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> Judged:
        """Score each completion of its prompt. Raises ValueError where there are not as many of both."""
        texts = [Text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        wordy = [index for index, text in enumerate(texts) if text.completion.split()]
        paid = wordy[: self.budget.affordable(len(wordy), len(self.graded))]
        replies = self._replies(list(dict.fromkeys(texts[index] for index in paid)))
        told = [Reply(None, NOT_ASKED, asked=False)] * len(texts)
        for index in paid:
            told[index] = replies.get(texts[index], told[index])
        is_graded = not wordy or any(told[index].values is not None for index in paid)
        lowest = Reply((0.0,) * len(self.graded), EMPTY, asked=False)
        first_unpaid = wordy[len(paid)] if len(paid) < len(wordy) else len(texts)
        for index in {*range(first_unpaid)} - {*wordy}:
            told[index] = lowest if is_graded else Reply(None, UNGRADED, asked=False)
        words = len(self.graded) * sum(reply.asked for reply in told)
        self.budget.words += words
        self._tell_of_failures(told)
        self._tell_of_little_mass(told)
        return judged(self.aspects, told, words)

    def _replies(self, texts: Sequence[Text]) -> dict[Text, Reply]:
        """What is kept are the grades, whatever their mass: the same reply may be read under another bound."""
        keys = [self.key(text) for text in texts] if self.cache else []
        kept = self.cache.get(keys) if self.cache else {}
        known = {i: reply for i, key in enumerate(keys) if (reply := self._read(kept.get(key))) is not None}
        missing = frozenset(range(len(texts))) - known.keys()
        if missing:
            with self.budget.clock():
                for answered in self.ask(texts, missing):
                    new = {i: reply for i, reply in answered.items() if i not in known}
                    if self.cache:
                        self.cache.put({keys[i]: _kept(reply) for i, reply in new.items() if reply.lasting})
                    known |= new
        return {texts[i]: reply.bounded(self.limits.least_number_mass) for i, reply in known.items()}

    def _read(self, kept: object) -> Reply | None:
        """A reply from the cache, None where the row is not one of this judge's."""
        match kept:
            case {"values": values, "raw": str(raw), "number_mass": masses}:
                if all(each is None or _are_shares(each, len(self.graded)) for each in (values, masses)):
                    return Reply(values and tuple(map(float, values)), raw, number_masses=masses and tuple(masses))
        return None

    def _tell_of_failures(self, told: Sequence[Reply]) -> None:
        failed = [reply for reply in told if reply.asked and reply.values is None]
        if failed:
            first = shortened(as_raw(failed[0].raw), 120)
            counts = f"{len(failed)} of {len(told)} texts"
            self.budget.tell_once("failures", f"gave no score to {counts}, which are left out. The first: {first!r}")

    def _tell_of_little_mass(self, told: Sequence[Reply]) -> None:
        masses = [reply.number_mass for reply in told if reply.values is not None and reply.number_masses is not None]
        if masses and np.mean(masses) < LITTLE_MASS:
            share = f"{100 * np.mean(masses):.2g} %"
            self.budget.tell_once("mass", f"writes a number {share} of the time: its grades say little")


def judged(names: Sequence[str], replies: Sequence[Reply], words: int) -> Judged:
    """The replies as arrays."""
    table = np.full((len(replies), len(names)), np.nan)
    for row, reply in zip(table, replies, strict=True):
        if reply.values is not None:
            row[:] = reply.values
    aspects = {name: table[:, column] for column, name in enumerate(names)}
    ok = np.array([reply.values is not None for reply in replies], bool)
    not_asked = sum(reply.values is None and not reply.asked for reply in replies)
    mass = np.array([reply.number_mass for reply in replies], float)
    raw = tuple(as_raw(reply.raw) for reply in replies)
    empty = np.array([reply.values is not None and not reply.asked for reply in replies], bool)
    return Judged(table.mean(1), ok, raw, aspects, words, not_asked, mass, empty)


def as_raw(text: str) -> str:
    """A judge's words to be shown: cut, what hides or reorders spelled out."""
    return shortened(visible(text[: RAW_CHARACTERS + 1]), RAW_CHARACTERS - 2)


def _kept(reply: Reply) -> Mapping[str, object]:
    return {"values": reply.values, "raw": as_raw(reply.raw), "number_mass": reply.number_masses}


def _are_shares(values: object, number: int) -> bool:
    known = isinstance(values, list) and len(values) == number
    return known and all(isinstance(value, float | int) and 0 <= value <= 1 for value in values)


class Agreement(NamedTuple):
    """The rank correlation of two judges, in [-1, 1], and the texts that both of them graded."""

    correlation: float
    texts: int


def length_correlation(judged: Judged, completions: Sequence[str]) -> float:
    """Spearman's correlation of score and words, of the completions that the judge graded; NaN where it has none."""
    words = np.array([len(text.split()) for text in completions], float)
    return _rank_correlation(judged.scores[judged.by_judge], words[judged.by_judge])


def agreement(first: Judged, second: Judged) -> Agreement:
    """Spearman's correlation of two judges' scores of the same texts; NaN where it has none."""
    both = first.by_judge & second.by_judge
    return Agreement(_rank_correlation(first.scores[both], second.scores[both]), int(both.sum()))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if len(first) < FEWEST:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all the same, which rank nothing: NaN says so
        return float(spearmanr(first, second).statistic)
