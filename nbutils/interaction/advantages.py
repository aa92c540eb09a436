"""From scores of responses to advantages of tokens: what the policy losses weigh log-probabilities with.

Nothing here has gradients. Masks as in nbutils/interaction/losses.py: 1 on a response's tokens, its first end token
included, and these stand side by side. Rewards, values and advantages are in units of the score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nbutils.foundation import ParameterError
from nbutils.interaction.losses import kl_estimate
from nbutils.interaction.settings import LARGEST_ERROR

SMALLEST_VARIANCE = 1e-8  # added when advantages are divided by their deviation


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
