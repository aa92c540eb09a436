"""Losses of a student that learns from a judge, as functions of tensors alone; gradients come from autograd.

    log_probs = token_log_probs(hidden, weight, labels)              one log-probability a token, in flat memory
    loss = simpo_loss(mean_log_probs(a, mask_a), mean_log_probs(b, mask_b), beta=2.0, gamma=1.0).mean()

Log-probabilities are in nats, float32 or wider. Masks are 1 on the response's tokens, its first end token included, 0
on the prompt, on padding and after the end token; what stands outside a mask, be it NaN, changes neither a value nor a
gradient. Sums are not divided by counts: the caller divides by those of the whole optimiser step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nbutils.models import add_matrix_product, matrix_product, product_precision
from nbutils.objectives import CrossEntropy, Gradients, walk


class PolicyLoss(NamedTuple):
    """What `ppo_loss` found; the last two are detached means over the real tokens."""

    loss: Tensor  # sum over the real tokens
    clip_fraction: Tensor  # share of tokens that the clip left without a gradient, in [0, 1]
    approximate_kl: Tensor  # nats a token, of the policy that sampled from the one that is trained


def token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int = 0) -> Tensor:
    """log softmax(h Wᵀ)[label] of each position, (positions,), with gradients to hidden and weight.

    hidden (positions, width), already shifted against labels (positions,); weight (vocab, width). Negative labels
    (IGNORE_INDEX) give 0 and no gradient. The logits live a chunk at a time, `chunk_tokens` positions (0: as many as
    the chunked head takes); backward forms them again, so that memory does not grow with positions x vocab:

        L_i = z_y - lse(z);  dz = g_i (onehot(y) - softmax(z)),  dh = dz W,  dW = sum dzᵀ h
    """
    hidden = product_precision(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogProbs.apply(hidden, weight, labels, chunk_tokens)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_tokens):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_tokens = chunk_tokens
        values = torch.zeros(labels.shape, dtype=_wide(hidden), device=hidden.device)
        for indices, chunk in walk(*_walked(hidden, weight, labels), rows=chunk_tokens):
            values[indices] = -CrossEntropy().add(chunk)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_values):
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, dtype=_wide(hidden), device=hidden.device)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, dtype=d_hidden.dtype, device=hidden.device)
        narrow_weight = weight.to(hidden.dtype)
        for indices, chunk in walk(*_walked(hidden, weight, labels), rows=ctx.chunk_tokens):
            gradients = Gradients(chunk.buffers, len(indices), None)
            CrossEntropy().add(chunk, -d_values[indices], gradients)
            d_hidden[indices] = matrix_product(gradients.logits, narrow_weight)
            if d_weight is not None:
                add_matrix_product(d_weight, gradients.logits.t(), hidden[indices])
        return d_hidden.to(hidden.dtype), None if d_weight is None else d_weight.to(weight.dtype), None, None


def _walked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
    """The arguments of `walk`: no embeddings, and the labelled positions alone."""
    return hidden, weight.to(hidden.dtype), None, labels, (labels >= 0).nonzero().squeeze(-1)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def mean_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """The mean over each row's real tokens, (batch,); log_probs and mask (batch, time).

    Raises ValueError where a row has no real token: it has no mean, and 0 would be the best there is.
    """
    counts = mask.bool().sum(1)
    if not counts.all():
        raise ValueError("A response without tokens has no mean log-probability; leave such pairs out before.")
    return _real(log_probs, mask).sum(1) / counts


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), (batch,), of mean log-probabilities (batch,).

    gamma is the margin itself, not the ratio gamma / beta that some settings give. No reference model takes part.
    Source: Meng, Xia, Chen 2024, SimPO (arXiv 2405.14734), equation 6.
    """
    return -functional.logsigmoid(beta * (chosen - rejected) - gamma)


def ppo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """-min(r A, clamp(r, 1 - clip, 1 + clip) A) summed over the real tokens; r = exp(log_probs - old_log_probs).

    All tensors (batch, time); old_log_probs and advantages are constants. The approximate KL is the mean of r - 1 -
    log r, never negative. Sources: Schulman et al. 2017, PPO (arXiv 1707.06347), equation 7; J. Schulman,
    Approximating KL Divergence (2020), the estimator k3.
    """
    log_ratio = _real(log_probs - old_log_probs.detach(), mask)
    advantages = _real(advantages.detach(), mask)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        tokens = mask.bool().sum().clamp_min(1)
        fraction = (clipped > plain).sum() / tokens
        kl = (ratio - 1 - log_ratio).sum() / tokens
    return PolicyLoss(torch.maximum(plain, clipped).sum(), fraction, kl)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (V' - R)^2) summed over the real tokens, V' = V within `clip` of old_values.

    All tensors (batch, time); old_values and returns are constants. Source: the code of OpenAI's PPO, described by
    Huang et al. 2022, The 37 Implementation Details of PPO, number 9.
    """
    values, old_values, returns = (_real(each, mask) for each in (values, old_values.detach(), returns.detach()))
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()).sum() / 2


def rloo_loss(log_probs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """-A sum_t log_probs, summed over the sequences; log_probs and mask (batch, time), advantages (batch,) constant.

    A whole response is one action. Source: Ahmadian et al. 2024, Back to Basics (arXiv 2402.14740), equations 5 and 6.
    """
    return -(advantages.detach() * _real(log_probs, mask).sum(1)).sum()


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log p - log q of each sampled token in nats, in the shape given: an unbiased estimate of KL(policy, reference).

    Its variance is high and its sign either. Source: J. Schulman, Approximating KL Divergence (2020), estimator k1.
    """
    return log_probs - reference_log_probs


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with 0 outside the mask, whatever stood there; no gradient leaves by those places."""
    return values.where(mask.bool(), 0)
