"""One round: prompts, samples of the student as it is, scores and corrections, and the examples these make.

Everything that is drawn is a function of the seed, the round and the student's weights. What a round was like goes to
rounds.csv, a few of its samples to round_samples.jsonl; the words it cost are counted there, too, and nowhere else.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nbutils.data import permutation
from nbutils.evaluation import distinct, repetition
from nbutils.foundation import atomic_write
from nbutils.interaction.continuations import as_text, text_after, tokens_after
from nbutils.interaction.correction import HUMAN
from nbutils.interaction.correctors import Corrector
from nbutils.interaction.examples import Example, pair_example, text_example
from nbutils.interaction.judges import Judge, Judged
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rewards import Rewarded, reward_examples
from nbutils.interaction.rollouts import Rollout, Sampling, cut_at_end, sample, without_end
from nbutils.interaction.settings import ON_POLICY, STORY, Interaction

if TYPE_CHECKING:
    from nbutils.data import Rows

ROUNDS, SAMPLES = "rounds.csv", "round_samples.jsonl"
SHOWN = 2  # samples of each round that are kept
RAW_CHARACTERS = 400
COLUMNS = (
    *("round", "step", "examples", "reward", "reward_sd", "scored", "failures", "uncorrected", "not_asked"),
    *("response_words", "repetition", "distinct_2", "kl", "kl_response", "kl_coefficient", "human_words"),
    *("student_words", "teacher_words", "sampling_seconds", "judging_seconds"),
)
WORDS = ("human_words", "student_words", "teacher_words")


@dataclass(frozen=True)
class Context:
    """A prompt and, where a person wrote on, what they wrote: token ids (time,), perhaps beyond a document's end."""

    prompt: np.ndarray
    completion: np.ndarray | None = None

    def response(self, end: int | None) -> np.ndarray:
        """What a person responded: the completion up to its first end token, which it may lack (time,)."""
        return cut_at_end(self.completion, end)


@dataclass
class RoundMaker:
    """Makes a round's examples with `policy` as it is. `story`: the written prompt's tokens, where there is one.

    precision: that of the training, in which the student samples and its log-probabilities are taken.
    """

    settings: Interaction
    policy: PolicyModel
    tokenizer: PreTrainedTokenizerBase
    blocks: Rows
    run_folder: Path
    judge: Judge | None
    corrector: Corrector | None
    seed: int
    batch_size: int
    story: np.ndarray | None = None
    precision: Callable[[], AbstractContextManager] = nullcontext
    row: dict[str, Any] = field(default_factory=dict)  # of rounds.csv, of the round at work

    def make(self, number: int, step: int) -> list[Example]:
        """The examples of round `number`, counted from 0, after `step` optimiser steps."""
        rows = read_rounds(self.run_folder)[:number]
        self.row = dict.fromkeys(COLUMNS, float("nan")) | {"round": number + 1, "step": step}
        self.row |= dict.fromkeys(("failures", "uncorrected", "not_asked"), 0)
        self.row |= {name: int(rows[-1][name]) if rows else 0 for name in WORDS}
        contexts = self._contexts(number)
        if not self.settings.draws_samples:
            self._spend("human", [self._text(token) for each in contexts for token in (each.prompt, each.completion)])
            examples = [text_example(each.prompt, each.completion) for each in contexts]
        else:
            examples = self._with_samples(contexts, number, rows)
        self.row["examples"] = len(examples) // self.settings.turns
        write_rounds(self.run_folder, [*rows, self.row])
        return examples

    def _contexts(self, number: int) -> list[Context]:
        """The prompts of a round: blocks one after the other in an order of the seed, each once before any again."""
        settings = self.settings
        if settings.prompts == STORY:
            return [Context(self.story)] * settings.prompts_per_round
        every = permutation(len(self.blocks), self.seed, 0)
        first = number * settings.prompts_per_round
        chosen = (int(every[i % len(every)]) for i in range(first, first + settings.prompts_per_round))
        return [self.context(self.blocks[index]["input_ids"]) for index in chosen]

    def context(self, tokens: np.ndarray) -> Context:
        """The beginning of a block as a prompt behind an end token, and how it goes on."""
        settings, end = self.settings, self.tokenizer.eos_token_id
        tokens = np.asarray(tokens, np.int64)
        cut = settings.prompt_tokens
        prompt = tokens[:cut] if end is None else np.insert(tokens[:cut], 0, end)
        return Context(prompt, tokens[cut : cut + settings.response_tokens])

    def _with_samples(self, contexts: Sequence[Context], number: int, rows: Sequence[dict[str, str]]) -> list[Example]:
        settings = self.settings
        start = time.perf_counter()
        drawn = settings.temperature, settings.top_p, self.batch_size, settings.min_response_tokens
        sampling = Sampling(settings.response_tokens, *drawn)
        prompts = [each.prompt for each in contexts for _ in range(settings.samples_per_prompt)]
        with self.precision():
            rollouts = sample(self.policy.model, self.tokenizer, prompts, sampling, _seed_of(self.seed, number))
        self.row["sampling_seconds"] = time.perf_counter() - start
        read = contexts if settings.prompts != STORY else contexts[: number == 0]  # the story prompt once in all
        self._spend("human", [self._text(each.prompt) for each in read])
        self._spend("student", [each.text for each in rollouts])
        judged = self._judge(rollouts)
        texts = [each.text for each in rollouts]
        self.row["response_words"] = float(np.mean([each.words for each in rollouts]))
        self.row["repetition"] = float(np.mean([repetition(text) for text in texts]))
        self.row["distinct_2"] = distinct(texts, 2)
        corrections: list[np.ndarray | None] = [None] * len(rollouts)
        if settings.needs_teacher:
            corrections = self._corrections(contexts, rollouts, number)
        rewarded = Rewarded(self.policy, settings, self.batch_size, rollouts, judged, self.precision)
        self.row |= rewarded.divergence(rows)
        self._keep_samples(number, rollouts, corrections, judged)
        if settings.method in ON_POLICY:
            return reward_examples(rewarded, self.row["kl_coefficient"])
        if settings.method == "simpo_judge":
            return self._ranked(rollouts, judged)
        return self._corrected(contexts, rollouts, corrections)

    def _judge(self, rollouts: Sequence[Rollout]) -> Judged | None:
        """The judge's scores. They cost words where they are learned from."""
        if self.judge is None:
            return None
        start = time.perf_counter()
        judged = self.judge.score([each.prompt_text for each in rollouts], [each.text for each in rollouts])
        self.row["judging_seconds"] = time.perf_counter() - start
        known = judged.scores[judged.ok]
        self.row |= {"scored": int(judged.by_judge.sum()), "failures": judged.failures}
        self.row["not_asked"] += judged.not_asked
        if len(known):
            self.row |= {"reward": float(known.mean()), "reward_sd": float(known.std())}
        if self.settings.needs_judge:
            self.row["teacher_words"] += judged.words
        return judged

    def _corrections(
        self, contexts: Sequence[Context], rollouts: Sequence[Rollout], number: int
    ) -> list[np.ndarray | None]:
        """The teacher's texts as tokens that follow the prompts, what people wrote as it stands; None where none is."""
        end = self.tokenizer.eos_token_id
        people = [each.response(end) for each in contexts]
        continued = zip(contexts, people, strict=True)
        references = [text_after(self.tokenizer, each.prompt, response) for each, response in continued]
        prompts, completions = [each.prompt_text for each in rollouts], [each.text for each in rollouts]
        made = self.corrector.correct(prompts, completions, references, number, self.settings.response_tokens)
        self.row["teacher_words"] += made.words
        if self.corrector.name == HUMAN and self.settings.method != "three_way":  # which counts them with its pairs
            self._spend("human", references)
        if self.corrector.name == HUMAN:
            tokens = [without_end(each, end) for each in people]
            ended = [len(text) < len(each) for text, each in zip(tokens, people, strict=True)]
        else:
            follow = zip(rollouts, made.texts, strict=True)
            tokens, ended = [tokens_after(self.tokenizer, each.prompt, text) for each, text in follow], made.ended
        corrections: list[np.ndarray | None] = []
        for each, text, ok, rollout, whole in zip(tokens, made.texts, made.ok, rollouts, ended, strict=True):
            corrections.append(self._cut(each if ok and text.strip() else each[:0], rollout, bool(whole)))
        self.row["uncorrected"] = sum(each is None for each in corrections) - made.not_asked
        self.row["not_asked"] += made.not_asked
        return corrections

    def _cut(self, correction: np.ndarray, rollout: Rollout, ended: bool) -> np.ndarray | None:
        """No more tokens than the student used; None where that is none.

        An end token follows where the teacher `ended` by itself, nothing was cut and there is room for it: a student
        that learned to end where it was cut would say less in each round.
        """
        end = self.tokenizer.eos_token_id
        most = len(without_end(rollout.response, end))
        kept = correction[:most].astype(np.int64)
        whole = ended and len(correction) <= min(most, self.settings.response_tokens - 1) and end is not None
        return (np.append(kept, end) if whole else kept) if len(kept) else None

    def _corrected(
        self, contexts: Sequence[Context], rollouts: Sequence[Rollout], corrections: Sequence[np.ndarray | None]
    ) -> list[Example]:
        """Corrections to imitate, or to prefer to the samples; human text to prefer to both."""
        examples = []
        end = self.tokenizer.eos_token_id
        for context, rollout, correction in zip(contexts, rollouts, corrections, strict=True):
            if correction is None:
                continue
            better, worse = correction, rollout.response
            if self.settings.method == "sft":
                examples.append(text_example(context.prompt, better))
                continue
            pairs = [(better, worse)]
            if self.settings.method == "three_way":
                human = context.response(end)
                self._spend("human", [self._text(human)])
                pairs = [(human, better), (better, worse), (human, worse)]
            apart = [pair for pair in pairs if not np.array_equal(*(without_end(each, end) for each in pair))]
            chosen = [apart[i % len(apart)] for i in range(len(pairs) if apart else 0)]  # each prompt as many
            examples += [_pair(context.prompt, *pair, end) for pair in chosen]
        return examples

    def _ranked(self, rollouts: Sequence[Rollout], judged: Judged) -> list[Example]:
        """The best and the worst of each prompt's samples, where their scores are further apart than the margin."""
        several = self.settings.samples_per_prompt
        examples = []
        for first in range(0, len(rollouts), several):
            known = [i for i in range(first, first + several) if judged.ok[i]]
            if len(known) < 2:
                continue
            best, worst = max(known, key=lambda i: judged.scores[i]), min(known, key=lambda i: judged.scores[i])
            if judged.scores[best] - judged.scores[worst] > self.settings.score_margin:
                examples.append(pair_example(rollouts[best].prompt, rollouts[best].response, rollouts[worst].response))
        return examples

    def _text(self, tokens: np.ndarray) -> str:
        return as_text(self.tokenizer, tokens)

    def _spend(self, whose: str, texts: Sequence[str]) -> None:
        self.row[f"{whose}_words"] += sum(len(text.split()) for text in texts)

    def _keep_samples(
        self,
        number: int,
        rollouts: Sequence[Rollout],
        corrections: Sequence[np.ndarray | None],
        judged: Judged | None,
    ) -> None:
        path = self.run_folder / SAMPLES
        earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in earlier if json.loads(line)["round"] <= number]
        for index, rollout in enumerate(rollouts[:SHOWN]):
            known = judged is not None and bool(judged.ok[index])
            record = {"round": number + 1, "prompt": rollout.prompt_text, "completion": rollout.text}
            correction = corrections[index]
            said = None if correction is None else text_after(self.tokenizer, rollout.prompt, correction)
            record["correction"] = said
            record["score"] = float(judged.scores[index]) if known else None
            record["raw"] = judged.raw[index][:RAW_CHARACTERS] if judged is not None else ""
            kept.append(json.dumps(record, ensure_ascii=False))
        atomic_write(path, "".join(f"{line}\n" for line in kept))


def _pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, end: int | None) -> Example:
    """A pair whose preference looks at end tokens only where both have one.

    The other one may have been cut, and a student would learn from where texts were cut to end its own later or
    sooner. Cross entropy learns the end of the chosen one all the same.
    """
    ends = len(chosen) > len(without_end(chosen, end))
    example = pair_example(prompt, chosen, rejected if ends else without_end(rejected, end))
    if ends and len(rejected) == len(without_end(rejected, end)):
        example["response"][len(prompt) + len(chosen) - 2] = 0  # the place that predicts the end
    return example


def read_rounds(run_folder: Path) -> list[dict[str, str]]:
    """The rows of rounds.csv, none where there is no such file."""
    path = run_folder / ROUNDS
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rounds(run_folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rounds.csv anew."""
    lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in rows)]
    atomic_write(run_folder / ROUNDS, "\n".join(lines) + "\n")


def _seed_of(seed: int, number: int) -> int:
    """A seed of a round's samples alone."""
    return int(np.random.SeedSequence((seed, number, 7)).generate_state(1)[0])
