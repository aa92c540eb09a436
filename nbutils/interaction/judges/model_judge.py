"""A judge in memory: each grade is its expected value over the numbers that the model might write.

For every aspect the model is made to begin its reply with the aspect's name ("coherence:"), and is asked how probable
each allowed number is there (G-Eval, arXiv 2303.16634). No reply is sampled, so none fails to parse, and equal grades
are rare. A number may be several tokens ("10"): its probability is their product, and that of a number which another
one begins with ("1") counts only where the other does not follow. A model that would write something else there has no
opinion that its numbers could tell: below least_number_mass (JudgeLimits) for any aspect its reply is a failure, and
is counted as one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbutils.foundation import ModelError
from nbutils.interaction.judges.judged import Reply, ScoringJudge, Text
from nbutils.interaction.prompted_model import PromptedModel
from nbutils.interaction.prompts import Aspect, Rubric
from nbutils.interaction.replies import JudgeLimits, ReplyCache, reply_key

if TYPE_CHECKING:
    from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class ForcedReply:
    """The beginning of a reply on one aspect, and the tokens that each allowed number would be after it."""

    aspect: Aspect
    beginning: Tokens
    numbers: tuple[Tokens, ...]  # in the order of aspect.allowed

    @property
    def nodes(self) -> tuple[Tokens, ...]:
        """What numbers begin with: after each of these the model's next token matters; () first."""
        return tuple(sorted({number[:cut] for number in self.numbers for cut in range(len(number))}))

    def expected(self, log_probs: dict[Tokens, np.ndarray]) -> tuple[float, float]:
        """The expected grade and the probability of any allowed number, from the next token's log-probabilities after
        each node, (vocab,); NaN where they are not numbers."""
        logs = [sum(float(log_probs[number[:i]][number[i]]) for i in range(len(number))) for number in self.numbers]
        whole = np.exp(logs)
        alone = np.array([p - sum(whole[j] for j in self._going_on(i)) for i, p in enumerate(whole)]).clip(0)
        total = alone.sum()
        if not np.isfinite(total) or total <= 0:
            return float("nan"), float("nan")
        return float(alone @ np.array(self.aspect.allowed) / total), float(total)

    def _going_on(self, index: int) -> list[int]:
        """The numbers that go on where this one ends, those left out that go on where such a one ends."""
        longer = [j for j, each in enumerate(self.numbers) if j != index and _begins(each, self.numbers[index])]
        return [j for j in longer if not any(k != j and _begins(self.numbers[j], self.numbers[k]) for k in longer)]


class ModelJudge(ScoringJudge):
    """Grades by a causal model in memory. The same texts in the same call give the same scores."""

    def __init__(self, model: PromptedModel, rubric: Rubric, limits: JudgeLimits, cache: ReplyCache) -> None:
        super().__init__(model.name, rubric.aspects, limits, cache)
        self.model, self.rubric = model, rubric

    def key(self, text: Text) -> str:
        return reply_key("model", self.model.identity, self.rubric.digest, text.prompt, text.completion)

    def ask(self, texts: Sequence[Text], missing: frozenset[int]) -> Iterator[dict[int, Reply]]:
        """Batches are the same whatever the cache holds: the last bits of a score depend on its batch."""
        tokens = [self.model.fitted(self._rendered, text.prompt, text.completion, self._room) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: (-len(tokens[i]), i))  # alike in length, little padding
        for start in range(0, len(order), self.limits.batch_size):
            batch = order[start : start + self.limits.batch_size]
            if missing.isdisjoint(batch):
                continue
            if not self.budget.seconds_left():
                return
            yield dict(zip(batch, self._graded([tokens[i] for i in batch]), strict=True))

    def _rendered(self, prompt: str, completion: str) -> str:
        if self.model.chats:
            return self.model.chat(self.rubric.messages(prompt, completion))
        return self.rubric.plain_text(prompt, completion)

    @property
    def _room(self) -> int:
        longest = max(len(each.beginning) + max(map(len, each.numbers)) for each in self.forced)
        return self.model.positions - longest

    @cached_property
    def forced(self) -> tuple[ForcedReply, ...]:
        """The beginnings of replies. Raises ModelError where numbers are not told apart by the model's tokens."""
        return tuple(self._forced(aspect) for aspect in self.graded)

    def _forced(self, aspect: Aspect) -> ForcedReply:
        lines = [self._line(f"{aspect.name}: {number}") for number in aspect.allowed]
        shared = 0
        while all(len(line) > shared + 1 for line in lines) and len({line[shared] for line in lines}) == 1:
            shared += 1
        numbers = tuple(line[shared:] for line in lines)
        if shared == 0 or len(set(numbers)) < len(numbers):
            raise ModelError(
                f"The tokenizer of {self.model.name!r} writes different numbers alike, so it cannot grade. Take "
                "another judge."
            )
        return ForcedReply(aspect, lines[0][:shared], numbers)

    def _line(self, text: str) -> Tokens:
        """The tokens of a text that begins a line: what comes before it has ended with a line break."""
        broken, line = self.model.ids("\n", front=False), self.model.ids("\n" + text, front=False)
        return tuple(line[len(broken) :] if line[: len(broken)] == broken else self.model.ids(text, front=False))

    def _graded(self, batch: Sequence[Sequence[int]]) -> list[Reply]:
        values, words, masses = [], [], []
        for forced, log_probs in zip(self.forced, self._log_probs(batch), strict=True):
            found = [
                forced.expected({node: each[row] for node, each in log_probs.items()}) for row in range(len(batch))
            ]
            values.append([forced.aspect.scaled(grade) for grade, _ in found])
            words.append([f"{forced.aspect.name}: {grade:.2f} (any number: {p:.2g})" for grade, p in found])
            masses.append([p for _, p in found])
        of_texts = zip(*(zip(*each, strict=True) for each in (values, words, masses)), strict=True)
        return [_reply(*each) for each in of_texts]

    def _log_probs(self, batch: Sequence[Sequence[int]]) -> Iterator[dict[Tokens, np.ndarray]]:
        """For every aspect {node: log-probabilities of the next token (batch, vocab), float64}.

        The texts are read once, with padding on the left; what is forced is read after them from a copy of the keys
        and values, the same tokens in all rows.
        """
        import torch

        from nbutils.evaluation import left_padded

        model = self.model.model
        ids, mask = left_padded(batch, model.device)
        lengths = mask.sum(1, keepdim=True)
        settings = {"use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            read = model(input_ids=ids, attention_mask=mask, position_ids=positions, **settings).past_key_values
            for forced in self.forced:
                found = {}
                for node in forced.nodes:
                    tokens = torch.tensor([forced.beginning + node] * len(batch), device=model.device)
                    places = torch.arange(tokens.shape[1], device=model.device)
                    logits = model(
                        input_ids=tokens,
                        attention_mask=torch.cat([mask, torch.ones_like(tokens)], 1),
                        position_ids=lengths + places,
                        past_key_values=copy.deepcopy(read),
                        **settings,
                    ).logits[:, -1]
                    found[node] = _log_softmax(logits)
                yield found


def _reply(grades: Sequence[float], words: Sequence[str], masses: Sequence[float]) -> Reply:
    """Of one text, by aspect."""
    told = ", ".join(words)
    if not np.isfinite(grades).all():
        return Reply(None, f"no numbers: {told}")
    return Reply(tuple(grades), told, number_masses=tuple(min(1.0, mass) for mass in masses))


def _log_softmax(logits: Tensor) -> np.ndarray:
    return logits.double().log_softmax(-1).cpu().numpy()


def _begins(longer: Tokens, shorter: Tokens) -> bool:
    return len(longer) > len(shorter) and longer[: len(shorter)] == shorter
