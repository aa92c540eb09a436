"""Distillation: the divergence of the student's distribution from a teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbutils.objectives.head import IGNORE_INDEX, Chunk, Gradients, Term
from nbutils.objectives.teacher_target import TopTokens

DIVERGENCES = ("forward", "reverse", "jsd")
POSITIONS = ("all", "answers")
REDUCTIONS = ("token", "batchmean")


@dataclass(frozen=True)
class Distillation(Term):
    """L = T^2 D(t, p), t = softmax(u / T) of the teacher's logits u, p = softmax(z / T) of the student's z.

        forward   D = KL(t || p) = sum t log(t / p)             dz = T (p - t)
        reverse   D = KL(p || t)                                dz = T p (log(p / t) - D)
        jsd       D = b KL(t || m) + (1 - b) KL(p || m)         dz = T p (g - sum p g)
                  m = b t + (1 - b) p                           g = (1 - b) log(p / m)

    T^2 keeps the gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531); jsd: Agarwal et al. 2024 (GKD,
    arXiv 2306.13649). Every D is 0 where the student equals the teacher. Of a teacher known by its most probable
    tokens K alone, the mass of all others is one bin: D = sum_K t log(t / p) + r log(r / (1 - sum_K p)).

    `positions`: "all" real tokens, or "answers", those with a label. `reduction`: "token" divides by the positions
    scored; "batchmean" by the sequences, as `KLDivLoss("batchmean")` does on (batch, time, vocab): BabyLlama's, which
    weighs a block of 128 tokens 128 times as heavily.
    """

    temperature: float = 2.0
    divergence: str = "forward"
    beta: float = 0.5
    positions: str = "all"
    reduction: str = "token"
    name: str = "kl"
    uses_teacher = True

    def rows(self, labels: Tensor) -> Tensor:
        return labels >= 0 if self.positions == "answers" else labels != IGNORE_INDEX

    def units(self, labels: Tensor) -> Tensor:
        rows = self.rows(labels)
        return rows & (rows.cumsum(-1) == 1) if self.reduction == "batchmean" else rows

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        scale = None if gradients is None else (coefficients * self.temperature).unsqueeze(-1)  # (rows, 1)
        if isinstance(chunk.teacher, TopTokens):
            values = _forward_over_top(chunk, chunk.teacher, scale, gradients)
        elif self.divergence == "forward":
            values = _forward(chunk, self.temperature, scale, gradients)
        else:
            values = _in_log_space(chunk, self, scale, gradients)
        return self.temperature**2 * values


def _forward(chunk: Chunk, temperature: float, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL(t || p) = sum t (u - z) / T - lse(u / T) + lse(z / T) of each row (rows,), in few passes over the chunk."""
    z, u = chunk.logits, chunk.teacher_logits()
    p, t = chunk.probabilities(temperature), chunk.teacher_probabilities(temperature)
    gap = (_row_products(t, u) - _row_products(t, z)) / temperature
    values = gap - _log_sum(u, t, temperature) + _log_sum(z, p, temperature)
    if gradients is not None:
        gradients.add_product(p, scale)
        gradients.add_product(t, -scale)
    return values


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """sum_j left_j right_j of each row (rows,), with no matrix in between."""
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).flatten()


def _log_sum(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """log sum_j exp(z_j / T) (rows,), read off the most probable entry."""
    top, index = logits.max(-1, keepdim=True)
    return (top / temperature - probabilities.gather(-1, index).log()).squeeze(-1)


def _in_log_space(chunk: Chunk, term: Distillation, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL(p || t) or the generalised Jensen-Shannon divergence of each row (rows,)."""
    rows, buffers = len(chunk.labels), chunk.buffers
    p = chunk.probabilities(term.temperature)
    log_p = _log_softmax(chunk.logits, term.temperature, buffers.take("log probabilities", rows))
    log_t = _log_softmax(chunk.teacher_logits(), term.temperature, buffers.take("teacher log probabilities", rows))
    if term.divergence == "reverse":
        gap = log_p.sub_(log_t)  # log(p / t)
        values = _row_products(p, gap)
        mean, weight = values, 1.0
    else:
        beta, other = term.beta, 1 - term.beta
        t = chunk.teacher_probabilities(term.temperature)
        log_m = torch.lerp(p, t, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
        from_teacher = _row_products(t, log_t.sub_(log_m))
        gap = log_p.sub_(log_m)  # log(p / m)
        mean, weight = _row_products(p, gap), other
        values = beta * from_teacher + other * mean
    if gradients is not None:
        gradients.add_product(p, gap.sub_(mean.unsqueeze(-1)).mul_(weight * scale))
    return values


def _log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    return torch.log_softmax(torch.div(logits, temperature, out=out), -1, out=out)


def _forward_over_top(chunk: Chunk, teacher: TopTokens, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL over the teacher's k tokens and the bin of all others, of each row (rows,).

    dz = T (p - t') where t' spreads the bin's mass over its tokens as the student does.
    """
    temperature = teacher.temperature
    p = chunk.probabilities(temperature)
    log_t, log_rest = teacher.log_probabilities.to(p.dtype).split([teacher.columns.shape[-1], 1], -1)
    t, rest = log_t.exp(), log_rest.exp()  # (rows, k), (rows, 1)
    mine = p.gather(-1, teacher.columns)  # (rows, k)
    p.scatter_(-1, teacher.columns, 0)
    my_rest = p.sum(-1, keepdim=True)  # not 1 - sum: exact where the student is sure
    p.scatter_(-1, teacher.columns, mine)
    log_mine = chunk.logits.gather(-1, teacher.columns) / temperature
    log_mine = log_mine - _log_sum(chunk.logits, p, temperature).unsqueeze(-1)
    tiny = torch.finfo(p.dtype).tiny
    values = (t * (log_t - log_mine)).sum(-1) + (rest * (log_rest - my_rest.clamp_min(tiny).log())).squeeze(-1)
    if gradients is not None:
        spread = rest / my_rest.clamp_min(tiny)  # (rows, 1)
        gradients.add_product(p, scale * (1 - spread))
        gradients.logits.scatter_add_(-1, teacher.columns, scale * (mine * spread - t))
    return values
