"""A judge on a server: one request for each completion, all aspects in one reply, read strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from nbutils.interaction.chat_client import Answer, ChatClient, ServerSettings
from nbutils.interaction.judges.judged import Reply, ScoringJudge, Text
from nbutils.interaction.prompts import Aspect, Rubric
from nbutils.interaction.replies import JudgeLimits, ReplyCache, reply_key

LONGEST_REPLY = 600  # characters; grades and their names need fewer
GRADE = r"(0|[1-9][0-9]{0,2})"
UNSEEN_SHARE = 0.01  # of the probability: a "1" this likely may be half of a "10" that the server does not list
ROUNDING = 1e-3  # by which a log-probability may lie above 0
LEAST_LOGPROB = -1e4  # nats; vLLM writes -9999 for none at all
Span = tuple[int, int]

TOKENS_OF_A_GRADE = 16  # of `instruction_following: 10` and its line break, with room to spare
ALTERNATIVES = 20  # tokens whose probabilities are asked for: the most that the protocol allows
LONGEST_TEXT = 100_000  # characters that are sent


class ServerJudge(ScoringJudge):
    """Grades by a model on a server, at temperature 0.

    Where the server tells log-probabilities, a grade is its expected value over the numbers that might have stood in
    its place. The cache knows the model by its name, not by the server's address.
    """

    def __init__(
        self, settings: ServerSettings, rubric: Rubric, limits: JudgeLimits, cache: ReplyCache, seed: int = 0
    ) -> None:
        super().__init__(f"server {settings.model}", rubric.aspects, limits, cache)
        self.settings, self.rubric, self.seed = settings, rubric, seed
        self._client = ChatClient(settings, limits, self.budget)

    def key(self, text: Text) -> str:
        asked = text.prompt, text.completion
        return reply_key("server", self.settings.model, self.rubric.digest, self.seed, *asked)

    def ask(self, texts: Sequence[Text], missing: frozenset[int]) -> Iterator[dict[int, Reply]]:
        indices = sorted(missing)
        for place, answer in self._client.answers([self._request(texts[index]) for index in indices]):
            yield {indices[place]: self._reply(answer)}

    def _request(self, text: Text) -> dict[str, object]:
        return {
            "messages": self.rubric.messages(text.prompt[-LONGEST_TEXT:], text.completion[:LONGEST_TEXT]),
            "temperature": 0,
            "max_tokens": TOKENS_OF_A_GRADE * len(self.graded),
            "seed": self.seed,
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
        }

    def _reply(self, answer: Answer) -> Reply:
        if answer.failure:
            return Reply(None, answer.failure, lasting=False, asked=answer.asked)
        if answer.text is None:
            return Reply(None, "a reply without a text")
        grades = expected_grades(answer.text, answer.tokens, self.graded)
        if grades is None:
            return Reply(None, answer.text)
        return Reply(tuple(a.scaled(grade) for a, grade in zip(self.graded, grades, strict=True)), answer.text)


def parse_grades(reply: str, aspects: Sequence[Aspect]) -> tuple[int, ...] | None:
    """The grades of `aspects`, in their order and range; None where the reply is not exactly that."""
    spans = _spans(reply, aspects)
    return None if spans is None else tuple(int(reply[slice(*span)]) for span in spans)


def expected_grades(reply: str, tokens: Any, aspects: Sequence[Aspect]) -> tuple[float, ...] | None:
    """As parse_grades, each grade its expected value over the tokens that might have stood in its place.

    tokens: as the chat protocol gives them, [{token, top_logprobs: [{token, logprob}]}]. A grade whose probabilities
    are not told, or not told well enough, is the one that was written, as is one that they do not list themselves.
    """
    spans = _spans(reply, aspects)
    if spans is None:
        return None
    placed = _placed(reply, tokens)
    grades = []
    for span, aspect in zip(spans, aspects, strict=True):
        written = int(reply[slice(*span)])
        expected = _expected(placed.get(span), written, aspect)
        grades.append(float(written) if expected is None else expected)
    return tuple(grades)


def _spans(reply: str, aspects: Sequence[Aspect]) -> list[Span] | None:
    """Where the grades stand in the reply."""
    if len(reply) > LONGEST_REPLY:
        return None
    found = next((match for form in _forms(tuple(aspects)) if (match := form.fullmatch(reply))), None)
    if found is None:
        return None
    in_range = (int(grade) in aspect.allowed for grade, aspect in zip(found.groups(), aspects, strict=True))
    return [found.span(group) for group in range(1, len(aspects) + 1)] if all(in_range) else None


@lru_cache(maxsize=32)
def _forms(aspects: tuple[Aspect, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    labels = [aspect.name.replace("_", "[ _-]") for aspect in aspects]
    named = r"\s*[,;\n]\s*".join(rf"{label}[ \t]*:[ \t]*{GRADE}" for label in labels)
    bare = r"(?:\s+|\s*[,;]\s*)".join([GRADE] * len(aspects))
    flags = re.ASCII | re.IGNORECASE
    return re.compile(rf"\s*{named}\s*", flags), re.compile(rf"\s*{bare}\s*", flags)


def _placed(reply: str, tokens: Any) -> dict[Span, Any]:
    """What is told of each token, by where its text stands in the reply without the white space around it."""
    if not isinstance(tokens, list):
        return {}
    placed, end = {}, 0
    for told in tokens:
        text = told.get("token") if isinstance(told, dict) else None
        if not isinstance(text, str) or not reply.startswith(text, end):
            break  # tokens that do not spell the reply say nothing about it
        start = end + len(text) - len(text.lstrip())
        placed[start, start + len(text.strip())] = told.get("top_logprobs")
        end += len(text)
    return placed


def _expected(alternatives: Any, written: int, aspect: Aspect) -> float | None:
    if not isinstance(alternatives, list):
        return None
    names = {str(grade): grade for grade in aspect.allowed}
    weights: dict[int, float] = {}
    for each in alternatives:
        text, logprob = (each.get("token"), each.get("logprob")) if isinstance(each, dict) else (None, None)
        if not isinstance(text, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            return None
        if text.strip() in names and logprob <= ROUNDING:  # NaN is not
            grade = names[text.strip()]
            weights[grade] = weights.get(grade, 0.0) + math.exp(min(0.0, max(logprob, LEAST_LOGPROB)))
    total = sum(weights.values())
    if not weights.get(written) or _may_go_on(weights, total, aspect):
        return None
    return sum(grade * weight for grade, weight in weights.items()) / total


def _may_go_on(weights: dict[int, float], total: float, aspect: Aspect) -> bool:
    """Whether a listed grade may be the beginning of one that is not listed, as 1 of 10 in some vocabularies."""
    unlisted = [str(grade) for grade in aspect.allowed if grade not in weights]
    likely = (str(grade) for grade, weight in weights.items() if weight > UNSEEN_SHARE * total)
    return any(longer != grade and longer.startswith(grade) for grade in likely for longer in unlisted)
