"""Distillation: the divergence of the student's distribution from a teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbutils.data import IGNORE_INDEX
from nbutils.models import TeacherTarget, TopTokens
from nbutils.objectives.chunk import Chunk, Gradients, tempered_softmax
from nbutils.objectives.term import Term, register


@register("distillation")
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
    label = "distillation"
    formula = "L = T² D(t, p),  t = softmax(u / T) of the teacher's logits u,  p = softmax(z / T)"
    source = "Hinton et al. 2015, arXiv 1503.02531"
    bounds = (("temperature", 1e-6, 1e6), ("beta", 1e-6, 1 - 1e-6))
    uses_teacher = True
    own_rows = True

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

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        if isinstance(teacher, TopTokens):
            log_probabilities = teacher.log_probabilities.to(logits.dtype)
            return distillation_over_top(logits, teacher.columns, log_probabilities, self.temperature)
        teacher_logits = teacher.in_precision(logits.dtype).logits(torch.empty_like(logits))
        return distillation(logits, teacher_logits, self.temperature, self.divergence, self.beta)


def _forward(chunk: Chunk, temperature: float, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL(t || p) = sum t (u - z) / T + lse(z / T) - lse(u / T) of each row (rows,), in few passes over the chunk.

    Differences are taken before sums: the value is exact to float32 where student and teacher nearly agree.
    """
    rows, buffers = len(chunk.labels), chunk.buffers
    z, u = chunk.logits, chunk.teacher_logits()
    t = tempered_softmax(u, temperature, buffers.take(rows))
    teacher_top, teacher_log_top = u.amax(-1), t.amax(-1).log()
    scratch = _memory_of_teacher(chunk, gradients)  # u itself in training
    gap = torch.sub(u, z, out=scratch).mul_(t).sum(-1)
    p = tempered_softmax(z, temperature, scratch)
    # lse(z / T) = max z / T - log max p
    log_sums = (chunk.largest_logit().squeeze(-1) - teacher_top) / temperature - (p.amax(-1).log() - teacher_log_top)
    if gradients is None:
        buffers.release(t)
    else:
        gradients.add_buffer(t.sub_(p).mul_(-scale))
    buffers.release(scratch)
    return gap / temperature + log_sums


def _memory_of_teacher(chunk: Chunk, gradients: Gradients | None) -> Tensor:
    """Scratch memory: that of the teacher's logits in training, where no other term needs them."""
    return chunk.buffers.take(len(chunk.labels)) if gradients is None else chunk.give_up_teacher_logits()


def _in_log_space(chunk: Chunk, term: Distillation, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL(p || t) or the generalised Jensen-Shannon divergence of each row (rows,)."""
    rows, buffers = len(chunk.labels), chunk.buffers
    u = chunk.teacher_logits()
    log_t = _log_softmax(u, term.temperature, _memory_of_teacher(chunk, gradients))
    log_p = _log_softmax(chunk.logits, term.temperature, buffers.take(rows))
    p = torch.exp(log_p, out=buffers.take(rows))
    spent = [log_t, p]
    if term.divergence == "reverse":
        gap = log_p.sub_(log_t)  # log(p / t)
        values = mean = torch.mul(p, gap, out=log_t).sum(-1)
        weight = 1.0
    else:
        m = torch.exp(log_t, out=buffers.take(rows))
        m = torch.lerp(p, m, term.beta, out=m)
        log_m = m.clamp_min_(torch.finfo(m.dtype).tiny).log_()
        gap = log_p.sub_(log_m)  # log(p / m)
        from_teacher = torch.sub(log_t, log_m, out=log_m).mul_(log_t.exp_()).sum(-1)
        mean, weight = torch.mul(p, gap, out=log_t).sum(-1), 1 - term.beta
        values = term.beta * from_teacher + weight * mean
        spent.append(m)
    if gradients is None:
        spent.append(gap)
    else:
        gradients.add_buffer(gap.sub_(mean.unsqueeze(-1)).mul_(p).mul_(weight * scale))
    for buffer in spent:
        buffers.release(buffer)
    return values


def _log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    return torch.log_softmax(torch.div(logits, temperature, out=out), -1, out=out)


def _forward_over_top(chunk: Chunk, teacher: TopTokens, scale: Tensor | None, gradients: Gradients | None) -> Tensor:
    """KL over the teacher's k tokens and the bin of all others, of each row (rows,).

    dz = T (p - t') where t' spreads the bin's mass over its tokens as the student does.
    """
    temperature, columns = teacher.temperature, teacher.columns
    p = tempered_softmax(chunk.logits, temperature, chunk.buffers.take(len(chunk.labels)))
    log_sum = chunk.largest_logit() / temperature - p.amax(-1, keepdim=True).log()  # lse(z / T), (rows, 1)
    log_t, log_rest = teacher.log_probabilities.to(p.dtype).split([columns.shape[-1], 1], -1)
    t, rest = log_t.exp(), log_rest.exp()  # (rows, k), (rows, 1)
    mine = p.gather(-1, columns)  # (rows, k)
    log_mine = chunk.logits.gather(-1, columns) / temperature - log_sum
    my_rest = p.scatter_(-1, columns, 0).sum(-1, keepdim=True)  # not 1 - sum: exact where the student is sure
    tiny = torch.finfo(p.dtype).tiny
    values = (t * (log_t - log_mine)).sum(-1) + (rest * (log_rest - my_rest.clamp_min(tiny).log())).squeeze(-1)
    if gradients is None:
        chunk.buffers.release(p)
    else:
        spread = rest / my_rest.clamp_min(tiny)  # (rows, 1)
        gradients.add_buffer(p.mul_(scale * (1 - spread)).scatter_(-1, columns, scale * (mine - t)))
    return values


def distillation(
    logits: Tensor, teacher_logits: Tensor, temperature: float, divergence: str = "forward", beta: float = 0.5
) -> Tensor:
    """T^2 D(t, p) with t = softmax(u / T), p = softmax(z / T); D as in `Distillation`, in probability space."""
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
