"""Answers to the questions of a prepared split: generated in batches, measured, kept for comparisons."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nbutils.data import tokenize
from nbutils.evaluation.answer_measures import AnswerMeasures, measure_answers
from nbutils.evaluation.generation import continued, seeded
from nbutils.evaluation.perplexity import SPLITS
from nbutils.foundation import ModelError, ParameterError

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel

    from nbutils.data import PreparedData
    from nbutils.runs import RunFolder

logger = logging.getLogger(__name__)

SAMPLES = 5  # answers of each run that the report shows side by side


@dataclass(frozen=True)
class Generation:
    """How answers are sampled, by the names of the notebook's parameters; `answers` of each split, 0 for all."""

    max_new_tokens: int = 120
    generation_temperature: float = 0.7
    generation_top_k: int = 50
    generation_top_p: float = 0.95
    answers: int = 0
    seed: int = 0

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Generation:
        """The settings among a notebook's parameters; not its seed: variants are to differ in their model alone."""
        return cls(**{each.name: parameters[each.name] for each in fields(cls) if each.name != "seed"})


def questions_of(data: PreparedData, split: str, most: int = 0) -> DataFrame:
    """Documents of a split (document, question, answer, prompt), in their order; the first `most`, 0 for all."""
    documents = data.documents[data.documents["split"] == split]
    chosen = documents.head(most) if most else documents
    prompts = [data.card["prompt"].format(question=question) for question in chosen["question"]]
    return chosen[["document", "question", "answer"]].assign(prompt=prompts)


def answer_questions(
    model: PreTrainedModel, data: PreparedData, split: str, generation: Generation, batch_size: int
) -> AnswerMeasures:
    """The model's answers to the questions of a split, with their document, and what they score."""
    asked = questions_of(data, split, generation.answers)
    answers = generate_answers(
        model,
        data.tokenizer,
        list(asked["prompt"]),
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.generation_temperature,
        top_k=generation.generation_top_k,
        top_p=generation.generation_top_p,
        seed=generation.seed,
        batch_size=batch_size,
    )
    measured = measure_answers(list(asked["question"]), list(asked["answer"]), [answer.strip() for answer in answers])
    if len(measured.examples):
        measured.examples.insert(0, "document", asked["document"].to_numpy())
        measured.examples.insert(0, "split", split)
    return measured


def answers_of_run(
    model: PreTrainedModel,
    data: PreparedData,
    generation: Generation,
    batch_size: int,
    run: RunFolder,
    splits: Sequence[str] = tuple(SPLITS),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Answer the questions of `splits`; writes answers.parquet, answers.json (what each score is) and samples.jsonl.

    Returns the samples, and the scores for result.json: eval_bleu, test_bleu and so on.
    """
    import pandas

    measured = {s: answer_questions(model, data, s, generation, batch_size) for s in splits if s in data.blocks}
    answers = pandas.concat([each.examples for each in measured.values()], ignore_index=True)
    answers.to_parquet(run.path / "answers.parquet")
    signatures = {name: text for each in measured.values() for name, text in each.signatures.items()}
    run.write_json("answers.json", {"signatures": signatures, "generation": asdict(generation)})
    shown = answers[answers["split"] == "validation"].head(SAMPLES) if len(answers) else answers
    samples = shown.rename(columns={"question": "prompt", "answer": "completion"}).to_dict("records")
    run.write_lines("samples.jsonl", samples)
    return samples, {
        f"{SPLITS[s]}_{name}": value for s, each in measured.items() for name, value in each.numbers.items()
    }


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.7,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """The text the model adds to each prompt, up to its end token, in the prompts' order.

    The same model, prompts, settings, `seed` and `batch_size` give the same answers, and the global random state is
    left alone. top_k 0 and top_p 1 cut nothing off; top_k 1 always takes the most probable token. A prompt that leaves
    fewer than `max_new_tokens` of the model's positions gets an answer that fills them. A model that diverged has no
    distribution to sample from: it gives no answers ([]), and the log says so.

    Raises ParameterError for settings out of range, ModelError where a prompt fills all positions or has no token.
    """
    _check(max_new_tokens, temperature, top_k, top_p, batch_size)
    tokens = [ids.tolist() for ids in tokenize(prompts, tokenizer)]  # as the data were, special tokens as plain text
    rooms = [min(max_new_tokens, room) for room in _rooms(model, prompts, tokens)]
    settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with seeded(seed, model.device):
            for numbers in _batches([len(ids) for ids in tokens], rooms, batch_size):
                batch, room = [tokens[i] for i in numbers], rooms[numbers[0]]
                texts = _answered(model, tokenizer, batch, max_new_tokens=room, **settings)
                if texts is None:
                    logger.warning("The model's logits are not finite: it diverged, and it gives no answers.")
                    return []
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
    finally:
        model.train(was_training)
    return answers


def left_padded(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (number, longest) with padding on the left, so that all answers begin at one place, and their mask."""
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)  # what stands on padding is masked
    mask = torch.zeros_like(ids)
    for row, each in enumerate(tokens):
        ids[row, longest - len(each) :] = torch.tensor(each)
        mask[row, longest - len(each) :] = 1
    return ids.to(device), mask.to(device)


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]], **settings
) -> list[str] | None:
    prompts, mask = left_padded(tokens, model.device)
    end = tokenizer.eos_token_id
    added = continued(model, prompts, mask, eos_token_id=end, pad_token_id=end or 0, **settings)
    if added is None:
        return None
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in added]  # after its end, end tokens


def _batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts to answer together: near in length, and equal in room, else one would cut another short."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))  # the longest first: what needs most memory
    for _, group in groupby(order, key=lambda i: rooms[i]):
        numbers = list(group)
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def _rooms(model: PreTrainedModel, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Iterator[float]:
    """How many tokens fit behind each prompt: positions that are left, any number where the model has no limit."""
    positions = getattr(model.config, "max_position_embeddings", None) or float("inf")
    for number, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        if not ids:
            raise ModelError(f"Prompt {number} has no token to continue from. Give every prompt some text.")
        if len(ids) >= positions:
            raise ModelError(
                f"Prompt {number} ({prompt[:40]!r} ...) has {len(ids)} tokens and leaves no room for an answer in the "
                f"model's {positions} positions. Shorten it, or take a model with more positions."
            )
        yield positions - len(ids)


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float, batch_size: int) -> None:
    """Raises ParameterError, with the names the notebooks' parameters have."""
    wrong = {
        f"max_new_tokens is {max_new_tokens}. Set it to 1 or more.": max_new_tokens < 1,
        f"generation_temperature is {temperature:g}. Set it above 0; for the most probable token each time, set "
        "generation_top_k to 1.": not temperature > 0,
        f"generation_top_k is {top_k}. Set it to 1 or more, or to 0 to cut nothing off.": top_k < 0,
        f"generation_top_p is {top_p:g}. Set it above 0 and up to 1, which cuts nothing off.": not 0 < top_p <= 1,
        f"The batch size of generation is {batch_size}. Set it to 1 or more.": batch_size < 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise ParameterError(message)
