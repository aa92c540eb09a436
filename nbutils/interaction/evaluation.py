"""What a student says to prompts it did not learn from, judged by the judge it learned from and by one it never met."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbutils.errors import ModelError
from nbutils.interaction.judges import Judge, Judged
from nbutils.interaction.judges.quality import agreement, length_correlation
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rewards import Rewarded
from nbutils.interaction.rollouts import Rollout, Sampling, sample, story_prompt
from nbutils.interaction.settings import NO_JUDGE, STORY
from nbutils.interaction.training import InteractionConfig, judge_of, starting_model
from nbutils.sample_measures import distinct, repetition

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbutils.preparation import PreparedData

logger = logging.getLogger(__name__)
TEMPERATURE, TOP_P = 1.0, 0.8  # of the held-out samples, however an arm sampled while it learned
SEED = 20_000  # of the held-out samples: the same prompts and draws for every arm


def judge_student(
    config: InteractionConfig,
    model: PreTrainedModel,
    data: PreparedData,
    second_judge: str = NO_JUDGE,
    number: int = 32,
    split: str = "test",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Numbers of `number` responses to prompts of `split`, and the responses themselves with their scores.

    test_judge_score and test_second_judge_score with their aspects, in [0, 1]; how often judges failed; the correlation
    of score and length; the judges' agreement (Spearman); variety, repetition and length; kl_to_start in nats a token.
    A judge that failed on a response has no part in its means. Empty where `number` is 0, and of a student that
    diverged, which says nothing: the log tells of it.
    """
    if not number:
        return {}, []
    try:
        rollouts = held_out_samples(config, model, data, number, split)
    except ModelError as error:
        logger.warning("The student is not judged. %s", error)
        return {}, []
    texts = [each.text for each in rollouts]
    numbers = {
        f"{split}_distinct_1": distinct(texts, 1),
        f"{split}_distinct_2": distinct(texts, 2),
        f"{split}_repetition": float(np.mean([repetition(text) for text in texts])),
        f"{split}_response_words": float(np.mean([each.words for each in rollouts])),
        "kl_to_start": _kl_to_start(config, model, data, rollouts),
    }
    asked = {"judge": config.judge, "second_judge": second_judge}
    judges = {role: judge_of(config, data, name) for role, name in asked.items()}
    judged = {role: _scores(judge, rollouts) for role, judge in judges.items() if judge}
    for role, each in judged.items():
        numbers |= _numbers(f"{split}_{role}", each)
    if "judge" in judged:
        numbers["judge_length_correlation"] = length_correlation(judged["judge"], texts)
    if len(judged) == 2:
        numbers |= dict(zip(("judges_agreement", "judges_agreement_samples"), agreement(*judged.values()), strict=True))
    return {name: value for name, value in numbers.items() if np.isfinite(value)}, _records(rollouts, judged)


def held_out_samples(
    config: InteractionConfig, model: PreTrainedModel, data: PreparedData, number: int, split: str
) -> list[Rollout]:
    """Responses to the beginnings of evenly spaced blocks of `split`, or to the story prompt."""
    settings, end = config.interaction, data.tokenizer.eos_token_id
    if settings.prompts == STORY:
        prompts = [story_prompt(data.tokenizer)] * number
    else:
        blocks = data.blocks[split].with_format("numpy")
        chosen = np.linspace(0, len(blocks) - 1, min(number, len(blocks))).astype(int)
        prompts = [blocks[int(i)]["input_ids"][: settings.prompt_tokens].astype(np.int64) for i in chosen]
        prompts = [each if end is None else np.insert(each, 0, end) for each in prompts]
    size = config.per_device_eval_batch_size
    sampling = Sampling(settings.response_tokens, TEMPERATURE, TOP_P, size)
    return sample(model, data.tokenizer, prompts, sampling, SEED)


def _kl_to_start(
    config: InteractionConfig, model: PreTrainedModel, data: PreparedData, rollouts: Sequence[Rollout]
) -> float:
    torch.manual_seed(config.seed)  # where the start is random, it is the same one
    start = starting_model(config, data).to(model.device).eval()
    plain = replace(config.interaction, method="text")  # no value head
    rewarded = Rewarded(PolicyModel(model, plain, start), plain, config.per_device_eval_batch_size, rollouts, None)
    return rewarded.divergence([])["kl"]


def _scores(judge: Judge, rollouts: Sequence[Rollout]) -> Judged:
    return judge.score([each.prompt_text for each in rollouts], [each.text for each in rollouts])


def _numbers(name: str, judged: Judged) -> dict[str, float]:
    """Means over the responses that were scored, and how many were not."""
    ok = np.asarray(judged.ok, bool)
    if not ok.any():
        return {f"{name}_failures": float(len(ok))}
    aspects = {f"{name}_{aspect}": float(values[ok].mean()) for aspect, values in judged.aspects.items()}
    return {f"{name}_score": float(judged.scores[ok].mean()), f"{name}_failures": float((~ok).sum()), **aspects}


def _records(rollouts: Sequence[Rollout], judged: dict[str, Judged]) -> list[dict[str, Any]]:
    scores = {
        role: [float(score) if ok else None for score, ok in zip(each.scores, each.ok, strict=True)]
        for role, each in judged.items()
    }
    return [
        {"prompt": each.prompt_text, "completion": each.text, **{role: values[i] for role, values in scores.items()}}
        for i, each in enumerate(rollouts)
    ]
