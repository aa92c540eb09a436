"""Cosine distance between the expected embedding of the prediction and the gold token's embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.objectives.head import Chunk, Gradients, Term, add_matrix_product, matrix_product

SMALLEST_NORM = 1e-8  # below it a vector has no direction: cosine 0 and no gradient (a padded vocabulary has such rows)
GATHER_BYTES = 8 * 2**20  # embeddings gathered at once for top-k: a few rows, never (positions, k, width)


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
        mu_unit, mu_norm = _unit(mu)
        gold_unit, gold_norm = _unit(gold)
        cosine = (mu_unit * gold_unit).sum(-1, keepdim=True)  # (rows, 1)
        if gradients is not None:
            scale = coefficients.unsqueeze(-1)  # (rows, 1)
            v = -scale * (gold_unit - cosine * mu_unit) / mu_norm  # (rows, width)
            d_embeddings = None if self.detach_embeddings else gradients.embeddings
            _add_mixture_gradient(probabilities, top, embeddings, v, self.temperature, gradients.logits, d_embeddings)
            if d_embeddings is not None:
                d_gold = -scale * (mu_unit - cosine * gold_unit) / gold_norm  # (rows, width)
                d_embeddings.index_add_(0, chunk.labels, d_gold)
        return 1 - cosine.squeeze(-1)


@dataclass(frozen=True, eq=False)
class CosineProxy(Term):
    """cos(mu, e_y) at T = 1 over the whole vocabulary: the study's proxy for semantic closeness, a measure in [-1, 1].

    A model can raise it by making frequent embeddings point one way. With token `frequencies` (vocab,), mu and e_y
    are centred on the mean embedding of the text, so that such a collapse gains nothing.
    """

    frequencies: Tensor | None = None
    name: str = "cosine_similarity"
    uses_embeddings = True

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        mu = chunk.expected_embedding()  # (rows, width)
        gold = chunk.embeddings[chunk.labels].to(mu.dtype)
        centre = 0 if self.frequencies is None else _mean_embedding(self.frequencies, chunk)  # probabilities sum to 1
        return (_unit(mu - centre)[0] * _unit(gold - centre)[0]).sum(-1)


@dataclass(frozen=True, eq=False)
class UnigramCosine(Term):
    """What `CosineProxy` gives a predictor that knows token `frequencies` (vocab,) and no context: a measure."""

    frequencies: Tensor
    name: str = "unigram_cosine"
    uses_embeddings = True

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        centre = _mean_embedding(self.frequencies, chunk)
        gold = chunk.embeddings[chunk.labels].to(centre.dtype)
        return (_unit(gold)[0] * _unit(centre)[0]).sum(-1)


def _mean_embedding(frequencies: Tensor, chunk: Chunk) -> Tensor:
    """sum_j f_j E_j, (width,)."""
    return matrix_product(frequencies.to(chunk.logits).unsqueeze(0), chunk.embeddings).squeeze(0)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norm = vectors.norm(dim=-1, keepdim=True)
    norm = norm.masked_fill(norm < SMALLEST_NORM, torch.inf)
    return vectors / norm, norm


def _mixture(probabilities: Tensor, top: Tensor, embeddings: Tensor) -> Tensor:
    """sum_j p_j E_j over the columns `top` (rows, k) that `probabilities` (rows, k) belong to: (rows, width)."""
    weights = probabilities.to(embeddings.dtype)
    return F.embedding_bag(top, embeddings, per_sample_weights=weights, mode="sum").to(probabilities.dtype)


def _add_mixture_gradient(
    probabilities: Tensor,
    top: Tensor | None,
    embeddings: Tensor,
    v: Tensor,
    temperature: float,
    d_logits: Tensor,
    d_embeddings: Tensor | None,
) -> None:
    """Add p_T * (E v) / T into d_logits (rows, vocab) and p_Tᵀ v into d_embeddings (vocab, width)."""
    if top is None:
        d_logits.addcmul_(probabilities, matrix_product(v, embeddings.t()), value=1 / temperature)
        if d_embeddings is not None:
            add_matrix_product(d_embeddings, probabilities.t(), v.to(embeddings.dtype))
        return
    rows, k = top.shape
    step = max(1, GATHER_BYTES // (k * embeddings.shape[1] * embeddings.element_size()))
    for some in torch.arange(rows, device=top.device).split(step):
        columns, p = top[some], probabilities[some]  # (some, k)
        projections = (embeddings[columns].to(v.dtype) @ v[some].unsqueeze(-1)).squeeze(-1)  # (some, k)
        d_logits[some] = d_logits[some].scatter_add(-1, columns, p * projections / temperature)
        if d_embeddings is not None:
            parts = p.unsqueeze(-1) * v[some].unsqueeze(1)  # (some, k, width)
            d_embeddings.index_add_(0, columns.flatten(), parts.flatten(0, 1))
