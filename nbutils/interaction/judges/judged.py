"""What a judge says, and what all judges share: the budget, the cache, and that nothing is imputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nbutils.interaction.limits import Budget, JudgeLimits
from nbutils.interaction.prompts import Aspect
from nbutils.interaction.reply_cache import ReplyCache
from nbutils.plaintext import shortened, visible

RAW_CHARACTERS = 400
NOT_ASKED = "not asked: the budget is spent"


@dataclass(frozen=True)
class Judged:
    """Scores of completions, in their order.

    scores: float64 (number,) in [0, 1], the mean of the aspects, NaN where not ok; ok: bool (number,); raw: what the
    judge said, or why there is no score, at most RAW_CHARACTERS, control characters spelled out; aspects: float64
    (number,) in [0, 1] of each, NaN where not ok; words: teacher words spent, one for each aspect of each completion
    that was asked, be its reply new, kept from an earlier time, or of no use.
    """

    scores: np.ndarray
    ok: np.ndarray
    raw: tuple[str, ...]
    aspects: dict[str, np.ndarray]
    words: int


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

    lasting: a reply that would be the same another time, and is kept; a server out of order is not.
    """

    values: tuple[float, ...] | None
    raw: str
    lasting: bool = True
    asked: bool = True


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
        affordable = self.budget.affordable(len(texts), len(self.graded))
        replies = self._replies(list(dict.fromkeys(texts[:affordable])))
        told = [replies.get(text, Reply(None, NOT_ASKED, asked=False)) for text in texts[:affordable]]
        told += [Reply(None, NOT_ASKED, asked=False)] * (len(texts) - affordable)
        words = len(self.graded) * sum(reply.asked for reply in told)
        self.budget.words += words
        self._tell_of_failures(told)
        return judged(self.aspects, told, words)

    def _replies(self, texts: Sequence[Text]) -> dict[Text, Reply]:
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
        return {texts[i]: reply for i, reply in known.items()}

    def _read(self, kept: object) -> Reply | None:
        """A reply from the cache, None where the row is not one of this judge's."""
        match kept:
            case {"values": None, "raw": str(raw)}:
                return Reply(None, raw)
            case {"values": list(values), "raw": str(raw)} if len(values) == len(self.graded):
                if all(isinstance(value, float | int) and 0 <= value <= 1 for value in values):
                    return Reply(tuple(map(float, values)), raw)
        return None

    def _tell_of_failures(self, told: Sequence[Reply]) -> None:
        failed = [reply for reply in told if reply.asked and reply.values is None]
        if failed:
            first = shortened(as_raw(failed[0].raw), 120)
            counts = f"{len(failed)} of {len(told)} texts"
            self.budget.tell_once("failures", f"gave no score to {counts}, which are left out. The first: {first!r}")


def judged(names: Sequence[str], replies: Sequence[Reply], words: int) -> Judged:
    """The replies as arrays."""
    table = np.full((len(replies), len(names)), np.nan)
    for row, reply in zip(table, replies, strict=True):
        if reply.values is not None:
            row[:] = reply.values
    aspects = {name: table[:, column] for column, name in enumerate(names)}
    ok = np.array([reply.values is not None for reply in replies], bool)
    return Judged(table.mean(1), ok, tuple(as_raw(reply.raw) for reply in replies), aspects, words)


def as_raw(text: str) -> str:
    """A judge's words to be shown: cut, what hides or reorders spelled out."""
    return shortened(visible(text[: RAW_CHARACTERS + 1]), RAW_CHARACTERS - 2)


def _kept(reply: Reply) -> Mapping[str, object]:
    return {"values": None if reply.values is None else list(reply.values), "raw": as_raw(reply.raw)}
