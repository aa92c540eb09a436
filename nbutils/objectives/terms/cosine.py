"""Cosine distance between the expected embedding of the prediction and the gold token's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.models import TeacherTarget, add_matrix_product, matrix_product
from nbutils.objectives.chunk import Chunk, Gradients, unit
from nbutils.objectives.term import Term, register

GATHER_BYTES = 8 * 2**20  # embeddings gathered at once for top-k: some rows, never (positions, k, width)
VOCAB_BLOCK = 2048  # columns of E v at once: they stay in the cache, and no fourth matrix of a chunk is needed


@register("cosine")
@dataclass(frozen=True)
class ExpectedEmbeddingCosine(Term):
    """L = 1 - cos(mu, e_y), mu = p_T E, p_T = softmax(z / T): in [0, 2].

    dz = (1/T) p_T * (E v),  v = dL/dmu = -(e^ - c mu^) / |mu|. The softmax mean term p_T . (E v) = mu . v is 0,
    because cosine ignores scale; for the same reason top-k needs no renormalisation. E receives the mixture's gradient
    p_Tᵀ v and the gold row's -(mu^ - c e^) / |e|, and the head's where the model ties its matrices.

    top_k > 0 takes mu over the k most probable tokens; `detach_embeddings` keeps both gradients out of E.
    """

    temperature: float = 1.0
    top_k: int = 0
    detach_embeddings: bool = False
    name: str = "cosine"
    label = "cosine distance to the expected embedding"
    unit = ""
    formula = "L = 1 − cos(μ, e_y),  μ = Σₖ pₖ Eₖ,  p = softmax(z / T)"
    source = "cosine-distance objective"
    bounds = (("temperature", 1e-6, 1e6), ("top_k", 0, 10**9))
    uses_embeddings = True

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        embeddings = chunk.embeddings  # (vocab, width)
        probabilities = chunk.probabilities(self.temperature)  # (rows, vocab)
        top = None
        if 0 < self.top_k < probabilities.shape[-1]:
            probabilities, top = probabilities.topk(self.top_k, dim=-1, sorted=False)  # (rows, k) each
            mu = _mixture(probabilities, top, embeddings)  # (rows, width)
        else:
            mu = chunk.expected_embedding(self.temperature)
        gold = embeddings[chunk.labels].to(mu.dtype)  # (rows, width)
        mu_unit, mu_norm = unit(mu)
        gold_unit, gold_norm = unit(gold)
        cosine = (mu_unit * gold_unit).sum(-1, keepdim=True)  # (rows, 1)
        if gradients is not None:
            scale = coefficients.unsqueeze(-1)  # (rows, 1)
            v = -scale * (gold_unit - cosine * mu_unit) / mu_norm  # (rows, width)
            d_embeddings = None if self.detach_embeddings else gradients.embeddings
            _add_mixture_gradient(probabilities, top, chunk, v, self.temperature, gradients)
            if d_embeddings is not None:
                _add_embedding_gradient(probabilities, top, v, embeddings, d_embeddings)
                d_gold = -scale * (mu_unit - cosine * gold_unit) / gold_norm  # (rows, width)
                d_embeddings.index_add_(0, chunk.labels, d_gold)
        return 1 - cosine.squeeze(-1)

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        embeddings = embeddings.detach() if self.detach_embeddings else embeddings
        return expected_embedding_cosine(logits, embeddings, labels, self.temperature, self.top_k)


def _mixture(probabilities: Tensor, top: Tensor, embeddings: Tensor) -> Tensor:
    """sum_j p_j E_j over the columns `top` (rows, k) that `probabilities` (rows, k) belong to: (rows, width)."""
    weights = probabilities.to(embeddings.dtype)
    return F.embedding_bag(top, embeddings, per_sample_weights=weights, mode="sum").to(probabilities.dtype)


def _add_mixture_gradient(
    probabilities: Tensor, top: Tensor | None, chunk: Chunk, v: Tensor, temperature: float, gradients: Gradients
) -> None:
    """Add p_T * (E v) / T, the mixture's gradient, into dz: over all columns, or over the columns `top` (rows, k)."""
    if top is None:
        for some in _slices(probabilities.shape[-1], VOCAB_BLOCK):
            projections = matrix_product(v, chunk.embeddings[some].t())  # (rows, some)
            gradients.logits[:, some].addcmul_(probabilities[:, some], projections, value=1 / temperature)
        return
    projections = torch.empty_like(probabilities)  # (rows, k)
    for some in _gather_steps(top, chunk.embeddings):
        rows = F.embedding(top[some], chunk.embeddings).to(v.dtype)  # (some, k, width)
        projections[some] = rows.mul_(v[some].unsqueeze(1)).sum(-1)
    gradients.logits.scatter_add_(-1, top, probabilities * projections / temperature)


def _add_embedding_gradient(probabilities: Tensor, top: Tensor | None, v: Tensor, like: Tensor, total: Tensor) -> None:
    """Add p_Tᵀ v into `total` (vocab, width); products are made in the precision of `like`."""
    if top is None:
        add_matrix_product(total, probabilities.t(), v.to(like.dtype))
        return
    for some in _gather_steps(top, total):
        parts = probabilities[some].unsqueeze(-1) * v[some].unsqueeze(1)  # (some, k, width)
        total.index_add_(0, top[some].flatten(), parts.flatten(0, 1))


def _gather_steps(top: Tensor, embeddings: Tensor) -> list[slice]:
    """Slices of the rows of `top` (rows, k), each with as many embeddings as GATHER_BYTES hold."""
    rows, k = top.shape
    return _slices(rows, max(1, GATHER_BYTES // (k * embeddings.shape[1] * embeddings.element_size())))


def _slices(length: int, step: int) -> list[slice]:
    """Slices of at most `step` that cover `length`."""
    return [slice(start, start + step) for start in range(0, length, step)]


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
