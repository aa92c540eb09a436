"""What a student says to prompts it did not learn from, judged by the judge it learned from and by one it never met.

Every arm is asked the same, however it learned: beginnings of test blocks by the rubric `weekly`, and the story prompt
by the rubric `story`, in the lengths that held_out.py says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbutils.evaluation import distinct, repetition
from nbutils.foundation import ModelError
from nbutils.interaction.checks import RUBRICS, held_out
from nbutils.interaction.judges import Judged
from nbutils.interaction.judges.judged import agreement, length_correlation
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.prompted_model import release_models
from nbutils.interaction.rewards import Rewarded
from nbutils.interaction.rollouts import Rollout, Sampling, sample, story_prompt
from nbutils.interaction.settings import CONTEXTS, NO_JUDGE, STORY
from nbutils.interaction.training import InteractionConfig, judge_of, starting_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbutils.data import PreparedData

logger = logging.getLogger(__name__)
TEMPERATURE, TOP_P = 1.0, 0.8  # of the held-out samples, however an arm sampled while it learned
SEEDS = {CONTEXTS: 20_000, STORY: 20_001}  # of the held-out samples: the same prompts and draws for every arm
PREFIXES = {CONTEXTS: "", STORY: "story_"}  # of the numbers

Asked = dict[str, list[Rollout]]  # by kind of prompt


def judge_student(
    config: InteractionConfig,
    model: PreTrainedModel,
    data: PreparedData,
    second_judge: str = NO_JUDGE,
    number: int = 32,
    stories: int = 0,
    split: str = "test",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Numbers of `number` responses to contexts of `split` and of so many `stories`, and the responses with scores.

    test_judge_score and test_second_judge_score with their aspects, in [0, 1]; how often judges failed or were not
    asked, and how probable their numbers were (number_mass); the correlation of score and length; the judges' agreement
    (Spearman); variety, repetition and length. Of stories the same with `story_` before it: test_story_judge_score.
    kl_to_start in nats a token, of the contexts. What a judge gave no score has no part in its means. Words and seconds
    of this are no part of a judge's budget, and are not counted. Empty where there is nothing to ask, and of a student
    that diverged, which says nothing: the log tells of it. Frees the memory of judges and teachers before and after.
    """
    release_models()  # those of the training, which is over
    try:
        rollouts = {
            kind: held_out_samples(config, model, data, count, split, kind)
            for kind, count in ((CONTEXTS, number), (STORY, stories))
        }
    except ModelError as error:
        logger.warning("The student is not judged. %s", error)
        return {}, []
    rollouts = {kind: each for kind, each in rollouts.items() if each}
    judges = {"judge": config.judge, "second_judge": second_judge}
    judged = {role: _judged(config, model, data, name, rollouts) for role, name in judges.items() if name != NO_JUDGE}
    numbers, records = {}, []
    for kind, said in rollouts.items():
        told = {role: each[kind] for role, each in judged.items()}
        numbers |= _numbers(split, PREFIXES[kind], said, told)
        records += _records(kind, said, told)
    if CONTEXTS in rollouts:
        numbers["kl_to_start"] = _kl_to_start(config, model, data, rollouts[CONTEXTS])
    return {name: value for name, value in numbers.items() if np.isfinite(value)}, records


def held_out_samples(
    config: InteractionConfig, model: PreTrainedModel, data: PreparedData, number: int, split: str, kind: str = CONTEXTS
) -> list[Rollout]:
    """Responses to the beginnings of evenly spaced blocks of `split`, or to the story prompt; none where `number` is 0.

    None either where a model has no positions for a story, of which the log tells.
    """
    settings, end = _asked(config, model, data, kind).interaction, data.tokenizer.eos_token_id
    room = settings.response_tokens
    if kind == STORY:
        prompts = [story_prompt(data.tokenizer)] * number
    else:
        blocks = data.blocks[split].with_format("numpy")
        chosen = np.linspace(0, len(blocks) - 1, min(number, len(blocks))).astype(int)
        prompts = [blocks[int(i)]["input_ids"][: settings.prompt_tokens].astype(np.int64) for i in chosen]
        prompts = [each if end is None else np.insert(each, 0, end) for each in prompts]
    if not prompts:
        return []
    if room < 1:
        logger.warning("No stories are judged: the model's %s positions do not hold their prompt.", _positions(model))
        return []
    sampling = Sampling(room, temperature=TEMPERATURE, top_p=TOP_P, batch_size=config.per_device_eval_batch_size)
    return sample(model, data.tokenizer, prompts, sampling, SEEDS[kind])


def _asked(config: InteractionConfig, model: PreTrainedModel, data: PreparedData, kind: str) -> InteractionConfig:
    """The configuration by which every arm is asked; judges have no budget: an arm is judged whole.

    A story has no more tokens than the model's positions leave it, which is the length that a judge of rules expects.
    """
    settings = held_out(config.interaction, kind, data.card["block_size"])
    if kind == STORY:
        left = _positions(model) - len(story_prompt(data.tokenizer))
        settings = replace(settings, response_tokens=min(settings.response_tokens, left))
    limits = replace(config.judge_limits, most_words=0, most_seconds=0.0)
    return replace(config, rubric=RUBRICS[kind], interaction=settings, judge_limits=limits)


def _positions(model: PreTrainedModel) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def _kl_to_start(
    config: InteractionConfig, model: PreTrainedModel, data: PreparedData, rollouts: Sequence[Rollout]
) -> float:
    torch.manual_seed(config.seed)  # where the start is random, it is the same one
    start = starting_model(config, data).to(model.device).eval()
    plain = replace(config.interaction, method="text")  # no value head
    rewarded = Rewarded(PolicyModel(model, plain, start), plain, config.per_device_eval_batch_size, rollouts, None)
    return rewarded.divergence([])["kl"]


def _judged(
    config: InteractionConfig, model: PreTrainedModel, data: PreparedData, name: str, rollouts: Asked
) -> dict[str, Judged]:
    """What one judge says of each kind; its model is in memory once, and out of it before the next judge is asked."""
    judges = {kind: judge_of(_asked(config, model, data, kind), data, name) for kind in rollouts}
    judged = {
        kind: judges[kind].score([each.prompt_text for each in said], [each.text for each in said])
        for kind, said in rollouts.items()
    }
    del judges
    release_models()
    return judged


def _numbers(split: str, prefix: str, rollouts: Sequence[Rollout], judged: dict[str, Judged]) -> dict[str, float]:
    """Of the responses of one kind, by all judges."""
    texts = [each.text for each in rollouts]
    numbers = {
        f"{split}_{prefix}distinct_1": distinct(texts, 1),
        f"{split}_{prefix}distinct_2": distinct(texts, 2),
        f"{split}_{prefix}repetition": float(np.mean([repetition(text) for text in texts])),
        f"{split}_{prefix}response_words": float(np.mean([each.words for each in rollouts])),
    }
    for role, each in judged.items():
        numbers |= _numbers_of_judge(f"{split}_{prefix}{role}", each)
    if "judge" in judged:
        numbers[f"{prefix}judge_length_correlation"] = length_correlation(judged["judge"], texts)
    if len(judged) == 2:
        names = f"{prefix}judges_agreement", f"{prefix}judges_agreement_samples"
        numbers |= dict(zip(names, agreement(*judged.values()), strict=True))
    return numbers


def _numbers_of_judge(name: str, judged: Judged) -> dict[str, float]:
    """Means over the responses that were scored, how many were not, and how probable numbers were at all."""
    ok = np.asarray(judged.ok, bool)
    numbers = {f"{name}_failures": float(judged.failures), f"{name}_not_asked": float(judged.not_asked)}
    if judged.number_mass is not None and np.isfinite(judged.number_mass).any():
        numbers[f"{name}_number_mass"] = float(np.nanmean(judged.number_mass))
    if not ok.any():
        return numbers
    aspects = {f"{name}_{aspect}": float(values[ok].mean()) for aspect, values in judged.aspects.items()}
    return numbers | {f"{name}_score": float(judged.scores[ok].mean()), **aspects}


def _records(kind: str, rollouts: Sequence[Rollout], judged: dict[str, Judged]) -> list[dict[str, Any]]:
    scores = {
        role: [float(score) if ok else None for score, ok in zip(each.scores, each.ok, strict=True)]
        for role, each in judged.items()
    }
    return [
        {"prompts": kind, "prompt": each.prompt_text, "completion": each.text}
        | {role: values[i] for role, values in scores.items()}
        for i, each in enumerate(rollouts)
    ]
