"""The textbook form of every term on full logits: what readers check the chunked head against, and tests compare with.

Shapes: logits (positions, vocab), labels (positions,) with no ignored entries, embeddings (vocab, width). Each returns
one value per position and is differentiable by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_k q_k log softmax(z)_k against full rows `targets` (positions, vocab)."""
    return -(targets * logits.log_softmax(-1)).sum(-1)


def expected_embedding_cosine(
    logits: Tensor, embeddings: Tensor, labels: Tensor, temperature: float = 1.0, top_k: int = 0
) -> Tensor:
    """1 - cos(sum_j p_j E_j, E_y), p = softmax(z / T), over the k most probable tokens where top_k > 0."""
    probabilities = (logits / temperature).softmax(-1)
    if top_k > 0:
        probabilities, top = probabilities.topk(min(top_k, logits.shape[-1]), dim=-1)
        mu = (probabilities.unsqueeze(-1) * embeddings[top]).sum(-2)
    else:
        mu = probabilities @ embeddings
    return 1 - F.cosine_similarity(mu, embeddings[labels], dim=-1)


def distillation(
    logits: Tensor, teacher_logits: Tensor, temperature: float, divergence: str = "forward", beta: float = 0.5
) -> Tensor:
    """T^2 D(t, p) with t = softmax(u / T), p = softmax(z / T); D as in `distillation.py`, in probability space."""
    p, t = (logits / temperature).softmax(-1), (teacher_logits / temperature).softmax(-1)
    m = beta * t + (1 - beta) * p
    if divergence == "forward":
        value = relative_entropy(t, p)
    elif divergence == "reverse":
        value = relative_entropy(p, t)
    else:
        value = beta * relative_entropy(t, m) + (1 - beta) * relative_entropy(p, m)
    return temperature**2 * value


def distillation_over_top(logits: Tensor, columns: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """T^2 KL(t || p) over the k tokens `columns` (positions, k) and one bin of all others, (positions, k + 1)."""
    p = (logits / temperature).softmax(-1)
    seen = p.gather(-1, columns)
    others = p.scatter(-1, columns, 0).sum(-1, keepdim=True)
    return temperature**2 * relative_entropy(log_probabilities.exp(), torch.cat([seen, others], -1))


def relative_entropy(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) = sum one log(one / other), where 0 log 0 = 0: (positions,)."""
    return (torch.special.xlogy(one, one) - torch.special.xlogy(one, other)).sum(-1)
