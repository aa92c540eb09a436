"""A judge on a server: one request for each completion, all aspects in one reply, read strictly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbutils.interaction.chat_client import Answer, ChatClient, ServerSettings
from nbutils.interaction.judges.judged import Reply, ScoringJudge, Text
from nbutils.interaction.judges.parsing import expected_grades
from nbutils.interaction.limits import JudgeLimits
from nbutils.interaction.prompts import Rubric
from nbutils.interaction.reply_cache import ReplyCache, reply_key

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
