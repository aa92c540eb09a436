"""How correcting teachers come by their texts: from people, from a model in memory, from a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from nbutils.foundation import ModelError, ParameterError
from nbutils.interaction.chat_client import ChatClient, ServerSettings
from nbutils.interaction.continuations import text_after
from nbutils.interaction.judges.judged import NOT_ASKED, as_raw
from nbutils.interaction.prompted_model import PromptedModel
from nbutils.interaction.prompts import CorrectionPrompt
from nbutils.interaction.replies import Budget, JudgeLimits, ReplyCache, reply_key

MAX_TOKENS = 256  # of a correction, where the caller gives no number
LONGEST_TEXT = 100_000  # characters that a server is sent


@dataclass(frozen=True)
class Corrections:
    """Texts in the order of the completions, to follow the prompt as they stand; "" where not ok.

    ok: bool (number,); ended: bool (number,), whether the teacher ended the text by itself, before it had to, which of
    people's texts only the caller knows: False; raw: what the teacher said or why there is no text, at most 400
    characters, control characters spelled out; words: of the texts that the teacher wrote, be they new or kept from an
    earlier time; not_asked: how many have no text since nobody was asked, the budget being spent or the server out of
    order.
    """

    texts: tuple[str, ...]
    ok: np.ndarray
    ended: np.ndarray
    raw: tuple[str, ...]
    words: int
    not_asked: int = 0


class Corrector(Protocol):
    """Corrects completions of prompts; `references` are how the prompts truly go on."""

    name: str
    budget: Budget

    def correct(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[str],
        round: int,
        max_tokens: int = MAX_TOKENS,
    ) -> Corrections: ...


@dataclass(frozen=True)
class Draft:
    """What is to be corrected; `seed` decides what is drawn for it."""

    prompt: str
    completion: str
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Text:
    """A teacher's text, None where there is none; its words or the reason; whether it ended by itself."""

    text: str | None
    raw: str
    lasting: bool = True
    ended: bool = False


@dataclass(frozen=True)
class Drawn:
    """How texts are sampled."""

    temperature: float = 1.0
    top_p: float = 0.8
    seed: int = 0

    def check(self) -> Drawn:
        """Itself; raises ParameterError where a value cannot be."""
        if not 0 < self.temperature < float("inf"):
            raise ParameterError(f"The temperature of corrections is {self.temperature}. Give a number above 0.")
        if not 0 < self.top_p <= 1:
            raise ParameterError(f"The top_p of corrections is {self.top_p}. It lies above 0 and is at most 1.")
        return self

    def seeds(self, round: int, number: int) -> list[int]:
        """A seed for each text of a round."""
        return [int(each) for each in np.random.SeedSequence((self.seed, round, 11)).generate_state(number)]


class HumanCorrector:
    """The true continuations; where there is none, the text is not ok."""

    def __init__(self, limits: JudgeLimits) -> None:
        self.name = "human"
        self.budget = Budget(limits, "The correcting teacher human")

    def correct(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[str],
        round: int,
        max_tokens: int = MAX_TOKENS,
    ) -> Corrections:
        return _corrections([Text(text if text.strip() else None, text) for text in references], words=0)


class WritingCorrector:
    """A teacher that writes; subclasses say in `write` how. Drafts go to it `batch_size` at a time, in their order."""

    def __init__(
        self, name: str, prompt: CorrectionPrompt, cache: ReplyCache, limits: JudgeLimits, drawn: Drawn
    ) -> None:
        self.name, self.prompt, self.cache, self.limits, self.drawn = name, prompt, cache, limits, drawn
        self.budget = Budget(limits, f"The correcting teacher {name}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def identity(self) -> Sequence[str]:
        """What tells this teacher from any other."""
        raise NotImplementedError

    def write(self, drafts: Sequence[Draft], missing: frozenset[int]) -> Iterator[tuple[int, Text]]:
        """Texts for `drafts` by index, at least for those `missing`."""
        raise NotImplementedError

    def correct(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[str],
        round: int,
        max_tokens: int = MAX_TOKENS,
    ) -> Corrections:
        """Correct each completion, in at most `max_tokens` of the teacher's tokens.

        The same seed, round, texts and batch size give the same corrections. A text is asked for only where the words
        left would pay for `max_tokens` of them. Raises ValueError where there are not as many of all.
        """
        seeds = self.drawn.seeds(round, len(prompts))
        given = zip(prompts, completions, references, seeds, strict=True)
        drafts = [Draft(prompt, completion, seed, max_tokens) for prompt, completion, _, seed in given]
        texts: list[Text] = []
        words = 0
        for start in range(0, len(drafts), self.limits.batch_size):
            batch = drafts[start : start + self.limits.batch_size]
            paid = self.budget.affordable(len(batch), max_tokens)
            new = self._batch(batch[:paid], round) + [Text(None, NOT_ASKED)] * (len(batch) - paid)
            spent = sum(len(each.text.split()) for each in new if each.text is not None)
            self.budget.words += spent
            words += spent
            texts += new
        self._tell_of_failures(texts)
        return _corrections(texts, words)

    def _batch(self, drafts: Sequence[Draft], round: int) -> list[Text]:
        drawn = self.drawn.temperature, self.drawn.top_p, round
        keys = [reply_key("correction of one document", *self.identity, *drawn, *astuple(each)) for each in drafts]
        kept = self.cache.get(keys)
        known = {i: text for i, key in enumerate(keys) if (text := _read(kept.get(key))) is not None}
        missing = frozenset(range(len(drafts))) - known.keys()
        if missing:
            with self.budget.clock():
                new = {i: text for i, text in self.write(drafts, missing) if i in missing}
            self.cache.put({keys[i]: _kept(text) for i, text in new.items() if text.lasting})
            known |= new
        return [known.get(i, Text(None, NOT_ASKED)) for i in range(len(drafts))]

    def _tell_of_failures(self, texts: Sequence[Text]) -> None:
        failed = [each for each in texts if each.text is None and each.raw != NOT_ASKED]
        if failed:
            counts, first = f"{len(failed)} of {len(texts)} texts", as_raw(failed[0].raw)
            self.budget.tell_once("failures", f"corrected all but {counts}, which are left out. The first: {first!r}")


class ModelCorrector(WritingCorrector):
    """A causal model in memory."""

    def __init__(self, model: PromptedModel, *settings) -> None:
        super().__init__(model.name, *settings)
        self.model = model

    @property
    def identity(self) -> Sequence[str]:
        return self.model.identity, self.prompt.digest if self.model.chats else ""

    def write(self, drafts: Sequence[Draft], missing: frozenset[int]) -> Iterator[tuple[int, Text]]:
        """All of the batch: what is drawn for one depends on the others."""
        if not self.budget.seconds_left():
            return
        room = self.model.positions - drafts[0].max_tokens
        if room < 1:
            raise ModelError(
                f"The correcting teacher {self.name!r} has {self.model.positions} positions, no room for a prompt and "
                f"{drafts[0].max_tokens} tokens. Shorten the responses, or take another teacher."
            )
        prompts = [self.model.fitted(self._rendered, each.prompt, each.completion, room) for each in drafts]
        written = self._sampled([ids or self._end for ids in prompts], drafts[0])
        for index, draft in enumerate(drafts):
            if written is None:
                yield index, Text(None, "the model's logits are not finite")
                continue
            said, ended = written[index]
            text = _joined(draft.prompt, said) if self.model.chats else said
            yield index, Text(text if text.strip() else None, said, ended=ended)

    @property
    def _end(self) -> list[int]:
        return [self.model.tokenizer.eos_token_id]

    def _rendered(self, prompt: str, completion: str) -> str:
        return self.model.chat(self.prompt.messages(prompt, completion)) if self.model.chats else prompt

    def _sampled(self, prompts: Sequence[Sequence[int]], first: Draft) -> list[tuple[str, bool]] | None:
        """(text, whether it ended by itself) of each; None where the model gives no distribution."""
        from nbutils.evaluation import continued, left_padded, seeded

        model = self.model.model
        ids, mask = left_padded(prompts, model.device)
        own = model.generation_config.eos_token_id
        ends = {*self._end, *(own if isinstance(own, list) else [own])}  # instruct models may have several
        if not self.model.chats:
            ends.add(self.model.tokenizer.bos_token_id)  # some base models learned that texts begin, not that they end
        ends -= {None}
        settings = {"do_sample": True, "temperature": self.drawn.temperature, "top_p": self.drawn.top_p, "top_k": 0}
        settings |= {"max_new_tokens": first.max_tokens, "eos_token_id": sorted(ends), "pad_token_id": self._end[0]}
        with seeded(first.seed, model.device):
            added = continued(model, ids, mask, **settings)
        if added is None:
            return None
        written = zip(prompts, added.tolist(), strict=True)
        return [(text_after(self.model.tokenizer, prompt, new), not ends.isdisjoint(new)) for prompt, new in written]


class ServerCorrector(WritingCorrector):
    """A model on a server."""

    def __init__(self, server: ServerSettings, *settings) -> None:
        super().__init__(f"server {server.model}", *settings)
        self.server = server
        self._client = ChatClient(server, self.limits, self.budget)

    @property
    def identity(self) -> Sequence[str]:
        return "server", self.server.model, self.prompt.digest

    def write(self, drafts: Sequence[Draft], missing: frozenset[int]) -> Iterator[tuple[int, Text]]:
        indices = sorted(missing)
        for place, answer in self._client.answers([self._request(drafts[index]) for index in indices]):
            draft = drafts[indices[place]]
            if answer.failure:
                yield indices[place], Text(None, answer.failure if answer.asked else NOT_ASKED, lasting=False)
            elif answer.text is None or not answer.text.strip():
                yield indices[place], Text(None, "a reply without a text")
            else:
                text, rest = _first_words(answer.text.strip(), draft.max_tokens)
                yield indices[place], Text(_joined(draft.prompt, text), text, ended=answer.ended and not rest)

    def _request(self, draft: Draft) -> dict[str, object]:
        return {
            "messages": self.prompt.messages(draft.prompt[-LONGEST_TEXT:], draft.completion[:LONGEST_TEXT]),
            "temperature": self.drawn.temperature,
            "top_p": self.drawn.top_p,
            "max_tokens": draft.max_tokens,
            "seed": draft.seed,
            "continue_final_message": True,
            "add_generation_prompt": False,
        }


def _kept(text: Text) -> dict[str, object]:
    return {"text": text.text, "raw": as_raw(text.raw), "ended": text.ended}


def _read(kept: object) -> Text | None:
    match kept:
        case {"text": str() | None as text, "raw": str(raw), "ended": bool(ended)}:
            return Text(text, raw, ended=ended)
    return None


def _first_words(text: str, most: int) -> tuple[str, str]:
    """Text and rest: a server that does not keep to so many tokens has written more words than they could hold."""
    words = text.split(None, most)
    rest = words[most] if len(words) > most else ""
    return text[: len(text) - len(rest)].rstrip(), rest


def _joined(prompt: str, text: str) -> str:
    """An instruct model's text as it follows the prompt: apart by one space, where the prompt does not end in one."""
    text = text.strip()
    return text if not prompt or prompt[-1].isspace() else f" {text}"


def _corrections(texts: Sequence[Text], words: int) -> Corrections:
    ok, ended = (np.array(each, bool) for each in ([t.text is not None for t in texts], [t.ended for t in texts]))
    not_asked = sum(each.text is None and each.raw == NOT_ASKED for each in texts)
    written, raw = tuple(each.text or "" for each in texts), tuple(as_raw(each.raw) for each in texts)
    return Corrections(written, ok, ended, raw, words, not_asked)
