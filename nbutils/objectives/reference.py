"""The textbook form of every term on full logits: what readers check the chunked head against, and tests compare with.

Shapes: logits (positions, vocab), labels (positions,) with no ignored entries, embeddings (vocab, width). Each returns
one value per position and is differentiable by autograd.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


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
