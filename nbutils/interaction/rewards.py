"""Scores of a round's samples become advantages of tokens: by a value head (PPO), or the other samples (RLOO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nbutils.foundation import ParameterError
from nbutils.interaction.examples import Example, response_mask, reward_example
from nbutils.interaction.judges import Judged
from nbutils.interaction.losses import kl_estimate
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rollouts import Rollout
from nbutils.interaction.settings import LARGEST_ERROR, ON_POLICY, Interaction

SMALLEST_VARIANCE = 1e-8  # added when advantages are divided by their deviation


@dataclass
class Rewarded:
    """A round's samples with what the student and its frozen start think of them.

    precision: in which they think. It has to be that of the training, or a policy that has not moved would have moved.
    """

    policy: PolicyModel
    settings: Interaction
    batch_size: int
    rollouts: Sequence[Rollout]
    judged: Judged | None
    precision: Callable[[], AbstractContextManager] = nullcontext

    @cached_property
    def thoughts(self) -> dict[str, Tensor]:
        """log_probs, start_log_probs, kl, mask and, with a value head, values: (rollouts, time), on the CPU."""
        parts = [self._of_batch(batch) for batch in self._batches()]
        time = max(part["mask"].shape[1] for part in parts)
        padded = [{n: torch.nn.functional.pad(t, (0, time - t.shape[1])) for n, t in part.items()} for part in parts]
        return {name: torch.cat([part[name] for part in padded]) for name in parts[0]}

    @torch.no_grad()
    def _of_batch(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        rows = [np.concatenate([each.prompt, each.response]) for each in rollouts]
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros(tokens.shape, np.float32)
        for index, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
            tokens[index, : len(row)] = row
            mask[index, : len(row)] = response_mask(len(rollout.prompt), len(row))
        self.policy.model.eval()
        ids = torch.from_numpy(tokens).to(self.policy.model.device)
        with self.precision():
            log_probs, hidden = self.policy.log_probs(ids)
            start_log_probs, kl = self.policy.from_start(ids, hidden, torch.from_numpy(mask).to(ids.device))
            told = {"log_probs": log_probs, "start_log_probs": start_log_probs, "kl": kl}
            if self.policy.value_head is not None:
                told["values"] = self.policy.values_of(hidden)
        return {name: tensor.float().cpu() for name, tensor in told.items()} | {"mask": torch.from_numpy(mask)}

    def _batches(self) -> Iterator[Sequence[Rollout]]:
        for start in range(0, len(self.rollouts), self.batch_size):
            yield self.rollouts[start : start + self.batch_size]

    def divergence(self, earlier: Sequence[dict[str, str]]) -> dict[str, float]:
        """kl (nats a token), kl_response (nats a response) from the frozen start, and the coefficient of this round.

        The KL is that of the whole distributions at each place of a response: no estimate, which would be biased where
        top_p is below 1. What a reward pays for is that of the sampled tokens. The coefficient follows from those of
        `earlier` rounds, the rows of rounds.csv.
        """
        divergence = self.thoughts["kl"].sum(1)  # (rollouts,)
        tokens = self.thoughts["mask"].sum().clamp_min(1)
        found = {"kl": float(divergence.sum() / tokens), "kl_response": float(divergence.mean())}
        if self.settings.method not in ON_POLICY:
            return found
        coefficient = self.settings.kl_coefficient
        if earlier and self.settings.method == "ppo":
            last = earlier[-1]
            adaptive = AdaptiveKL(float(last["kl_coefficient"]), self.settings.kl_target, self.settings.kl_horizon)
            adaptive.update(float(last["kl_response"]), len(self.rollouts))
            coefficient = adaptive.coefficient
        return found | {"kl_coefficient": coefficient}

    def rewards(self) -> Tensor:
        """(s + w words / most words) / (1 + w) of each sample, (rollouts,); 0 where there is no score.

        The length bonus w is that of Once Upon a Time (arXiv 2509.15714).
        """
        bonus = self.settings.length_weight
        words = np.minimum(1.0, np.array([each.words for each in self.rollouts]) / self.settings.response_tokens)
        scores = np.where(self.judged.ok, self.judged.scores, 0.0)
        return torch.from_numpy((scores + bonus * words) / (1 + bonus)).float()


def reward_examples(rewarded: Rewarded, kl_coefficient: float) -> list[Example]:
    """An example of each sample that was scored; none where nothing was.

    With leave-one-out a sample whose prompt has no other scored one teaches nothing: it is left out, too.
    """
    kept = torch.from_numpy(np.array(rewarded.judged.ok, bool))
    kept &= rewarded.thoughts["mask"].bool().any(1)
    if rewarded.settings.method == "rloo":
        of_prompt = kept.view(-1, rewarded.settings.samples_per_prompt)
        kept = (of_prompt & (of_prompt.sum(1, keepdim=True) > 1)).flatten()
    if not kept.any():
        return []
    thoughts = rewarded.thoughts
    if rewarded.settings.method == "rloo":
        columns = _leave_one_out(rewarded, kept, kl_coefficient)
    else:
        columns = _with_values({name: each[kept] for name, each in thoughts.items()}, rewarded, kept, kl_coefficient)
    examples = []
    for row, index in enumerate(torch.nonzero(kept).flatten().tolist()):
        rollout = rewarded.rollouts[index]
        time = len(rollout.prompt) + len(rollout.response)
        cut = {name: each[row, :time].numpy() for name, each in columns.items()}
        examples.append(reward_example(rollout.prompt, rollout.response, **cut))
    return examples


def _with_values(
    thoughts: dict[str, Tensor], rewarded: Rewarded, kept: Tensor, coefficient: float
) -> dict[str, Tensor]:
    """Generalised advantages, whitened over the round's tokens, and the returns the value head learns."""
    settings, mask = rewarded.settings, thoughts["mask"]
    scores = rewarded.rewards()[kept]
    rewards = shaped_rewards(scores, thoughts["log_probs"], thoughts["start_log_probs"], mask, coefficient)
    advantages, returns = generalised_advantages(rewards, thoughts["values"], mask, settings.discount, settings.trace)
    columns = {"advantages": whiten(advantages, mask), "returns": returns}
    return columns | {"old_log_probs": thoughts["log_probs"], "old_values": thoughts["values"]}


def _leave_one_out(rewarded: Rewarded, kept: Tensor, coefficient: float) -> dict[str, Tensor]:
    """Each response's reward less its KL, against the other responses to its prompt; the same at all positions."""
    thoughts, several = rewarded.thoughts, rewarded.settings.samples_per_prompt
    penalty = ((thoughts["log_probs"] - thoughts["start_log_probs"]) * thoughts["mask"]).sum(1)
    rewards = rewarded.rewards() - coefficient * penalty
    advantages = leave_one_out(rewards.view(-1, several), kept.view(-1, several)).flatten()[kept]
    return {"advantages": advantages.unsqueeze(1).expand(-1, thoughts["mask"].shape[1]).contiguous()}


@torch.no_grad()
def shaped_rewards(
    scores: Tensor, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """The reward of each token, (batch, time), 0 outside the mask.

    Every real token pays kl_coefficient (log p - log q) to the frozen reference q; the last one has the score (batch,)
    beside. Raises ValueError where a score is not finite: responses whose judging failed must have been left out.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2.
    """
    if not scores.isfinite().all():
        raise ValueError("A score is not a finite number. Leave out the responses that were not judged (ok False).")
    mask = mask.bool()
    rewards = (-kl_coefficient * kl_estimate(log_probs, reference_log_probs)).where(mask, 0)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # one real token from here to the end: this one
    return rewards + last * scores.to(rewards.dtype).unsqueeze(1)


@torch.no_grad()
def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, (batch, time), 0 outside the mask.

        delta_t = r_t + discount V_{t+1} - V_t;  A_t = delta_t + discount trace A_{t+1};  R_t = A_t + V_t

    A response ends at its last real token: what comes then is worth 0. Source: Schulman et al. 2016 (arXiv
    1506.02438), equations 11, 12 and 16.
    """
    mask = mask.bool()
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    deltas = rewards - values
    deltas[:, :-1] += discount * values[:, 1:]
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for time in reversed(range(deltas.shape[1])):
        following = (deltas[:, time] + discount * trace * following).where(mask[:, time], 0)
        advantages[:, time] = following
    return advantages, advantages + values


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (batch, time) with mean 0 and variance 1 over the real tokens alone, 0 outside the mask.

    The variance is the unbiased one. A single real token has none: it becomes 0.
    """
    mask = mask.bool()
    count = mask.sum()
    centred = values.where(mask, 0)
    centred = (centred - centred.sum() / count.clamp_min(1)).where(mask, 0)
    variance = centred.square().sum() / (count - 1).clamp_min(1)
    return centred * torch.rsqrt(variance + SMALLEST_VARIANCE)


@torch.no_grad()
def leave_one_out(scores: Tensor, ok: Tensor) -> Tensor:
    """Each sample's score less the mean of the prompt's other scored samples, (prompts, samples).

    Samples with `ok` False take no part: their advantage is 0, as is that of all samples of a prompt with fewer than
    two scored ones. Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740), equation 6.
    """
    ok = ok.bool()
    known = scores.where(ok, 0)
    count = ok.sum(1, keepdim=True)
    others = (known.sum(1, keepdim=True) - known) / (count - 1).clamp_min(1)
    return (known - others).where(ok & (count >= 2), 0)


@dataclass
class AdaptiveKL:
    """The weight of the KL penalty, led towards a KL of `target` (nats a response, if that is what `update` is given).

        error = clip(kl / target - 1, -0.2, 0.2);  coefficient *= 1 + error samples / horizon

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. Raises ParameterError where a value cannot be.
    """

    coefficient: float
    target: float
    horizon: int  # samples after which an error of 1 would have doubled the coefficient, were it not clipped

    def __post_init__(self) -> None:
        for name, value in (("KL target", self.target), ("KL horizon", self.horizon)):
            if not 0 < value < math.inf:
                raise ParameterError(f"The {name} is {value}; the KL is divided by it, so give a number above 0.")
        if not 0 <= self.coefficient < math.inf:
            raise ParameterError(
                f"The KL coefficient is {self.coefficient}; it is the weight of a penalty, so give 0 or a number above."
            )

    def update(self, kl: float, samples: int) -> float:
        """The new coefficient, after `samples` responses whose KL was `kl`. Raises ValueError where that is NaN."""
        if math.isnan(kl):
            raise ValueError("The KL to the reference is not a number: the model's logits are not finite.")
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, kl / self.target - 1))
        self.coefficient *= 1 + error * samples / self.horizon
        return self.coefficient
