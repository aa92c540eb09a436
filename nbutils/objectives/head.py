"""The chunked head: hidden states to a weighted sum of terms, without ever holding logits of all positions.

A causal model's last hidden states h (positions, width) meet the output matrix W (vocab, width) here. The positions
that any term needs are walked in chunks; each chunk's logits z = h Wᵀ are formed once, every term adds its value and
its closed form gradient dz, and the chunk is dropped. Only dh (positions, width), dW and dE (vocab, width) outlive a
chunk, so memory does not grow with positions x vocab. Peak: 3 x chunk x vocab + the gradients of W and E; distillation
needs no more, since a teacher's logits become scratch memory once they are used.

The arithmetic is that of the textbook form; what is saved is memory traffic. On a CPU a new buffer of a chunk's size
costs more than a pass over it (the system maps it page by page), so one set of buffers serves every chunk.

    loss = sum_i weight_i * (sum of term i over its own rows) / count_i

with counts taken by the caller over all accumulation steps and ranks, so that accumulation is exact. Gradients stay
unnormalised in float32 until backward: float16 loss scaling arrives there, later than the forward pass.

Idea: Hsu et al. 2024, Liger Kernel (arXiv 2410.10989), extended to soft targets and to a gradient into the embeddings.
`reference.py` has the textbook form of every term. Check with: python -m pytest tests/test_objectives.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nbutils.models.products import add_matrix_product, chunk_rows, matrix_product, product_precision
from nbutils.models.teacher_target import TeacherTarget


class Buffers:
    """Memory of (rows, vocab): as many buffers as one chunk needs at once, overwritten by the next chunk."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kind = {"size": (rows, vocab), "dtype": dtype, "device": device}
        self._all: dict[int, Tensor] = {}  # by address, which a view of the first rows shares
        self._free: list[Tensor] = []

    def take(self, rows: int) -> Tensor:
        """The first `rows` of a free buffer, (rows, vocab); what it holds is left of an earlier use."""
        if not self._free:
            buffer = torch.empty(**self._kind)
            self._all[buffer.data_ptr()] = buffer
            self._free.append(buffer)
        return self._free.pop()[:rows]

    def release(self, buffer: Tensor) -> None:
        """Give back what `take` gave."""
        self._free.append(self._all[buffer.data_ptr()])

    def release_all(self) -> None:
        """Give back everything: a chunk is done."""
        self._free = list(self._all.values())


@dataclass
class Chunk:
    """Logits of some positions, and what several terms may share of them.

    Shapes: logits (rows, vocab) in float32 or wider, labels (rows,), embeddings (vocab, width) in the precision of
    matrix products.
    Rows that a term does not score may carry any valid label. What (rows, vocab) tensors it hands out are overwritten
    by the next chunk.
    """

    logits: Tensor
    labels: Tensor
    embeddings: Tensor | None
    buffers: Buffers
    teacher: TeacherTarget | None = None
    _probabilities: dict[float, Tensor] = field(default_factory=dict)
    _expected_embeddings: dict[float, Tensor] = field(default_factory=dict)
    _largest_logit: Tensor | None = None
    _teacher_logits: Tensor | None = None

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(z / T), (rows, vocab), formed once per temperature."""
        if temperature not in self._probabilities:
            result = self.buffers.take(len(self.labels))
            self._probabilities[temperature] = tempered_softmax(self.logits, temperature, result)
        return self._probabilities[temperature]

    def expected_embedding(self, temperature: float = 1.0) -> Tensor:
        """mu = softmax(z / T) E, (rows, width), formed once per temperature."""
        if temperature not in self._expected_embeddings:
            mu = matrix_product(self.probabilities(temperature), self.embeddings)
            self._expected_embeddings[temperature] = mu
        return self._expected_embeddings[temperature]

    def largest_logit(self) -> Tensor:
        """max z, (rows, 1), formed once."""
        if self._largest_logit is None:
            self._largest_logit = self.logits.amax(-1, keepdim=True)
        return self._largest_logit

    def teacher_logits(self) -> Tensor:
        """The teacher's logits over the student's vocabulary, (rows, vocab), formed once."""
        if self._teacher_logits is None:
            self._teacher_logits = self.teacher.logits(self.buffers.take(len(self.labels)))
        return self._teacher_logits

    def give_up_teacher_logits(self) -> Tensor:
        """The teacher's logits in memory that is now the caller's; who asks for them later has them formed again."""
        logits, self._teacher_logits = self.teacher_logits(), None
        return logits

    def log_probabilities(self, columns: Tensor) -> Tensor:
        """log softmax(z) at `columns` (rows, k), taken from the most probable entry: precise where that is near 1."""
        log_top = self.probabilities().amax(-1, keepdim=True).log()  # (rows, 1)
        return self.logits.gather(-1, columns) - self.largest_logit() + log_top  # (rows, k)


class Gradients:
    """What terms add to: dz of the present chunk (rows, vocab), and dE (vocab, width) over all chunks.

    A first addend is kept or written where it will stay; only what is neither product nor sum needs zeros first.
    """

    def __init__(self, buffers: Buffers, rows: int, embeddings: Tensor | None) -> None:
        self.embeddings = embeddings
        self._buffers, self._rows = buffers, rows
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """dz so far, (rows, vocab), to be added to in place."""
        if self._logits is None:
            self._logits = self._buffers.take(self._rows).zero_()
        return self._logits

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """dz += left * right, each (rows, vocab) or (rows, 1)."""
        if self._logits is None:
            self._logits = torch.mul(left, right, out=self._buffers.take(self._rows))
        else:
            self._logits.addcmul_(left, right)

    def add_buffer(self, addend: Tensor) -> None:
        """dz += addend, a buffer (rows, vocab) that the caller has no more use for."""
        if self._logits is None:
            self._logits = addend
        else:
            self._logits += addend
            self._buffers.release(addend)


class Term:
    """One part of an objective. A subclass is a frozen dataclass that names itself and gives `add`."""

    name: str
    uses_embeddings = False
    uses_teacher = False
    own_rows = False  # whether it scores other rows than cross entropy does, so that its sum has a count of its own

    def further_measures(self) -> dict[str, Term]:
        """What evaluation reports beside the term itself, by name."""
        return {}

    def rows(self, labels: Tensor) -> Tensor:
        """Which positions this term scores, a mask of the shape of `labels`."""
        return labels >= 0

    def units(self, labels: Tensor) -> Tensor:
        """What the sum is divided by, 1 for each unit, in the places of targets `labels` (batch, time): positions."""
        return self.rows(labels)

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        """Value of each row (rows,); with `gradients`, also adds coefficient x gradient of each row into them.

        `coefficients` (rows,) hold the term's weight, and 0 on rows that it does not score.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WeightedTerm:
    """A term, its weight in the loss, and the count its sum is divided by (a scalar tensor)."""

    term: Term
    weight: float
    count: Tensor


def tempered_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """softmax(z / T) in the memory of `out`, which may be that of `logits`."""
    return torch.softmax(logits if temperature == 1.0 else torch.div(logits, temperature, out=out), -1, out=out)


def walk(
    hidden: Tensor,
    weight: Tensor,
    embeddings: Tensor | None,
    labels: Tensor,
    positions: Tensor,
    teacher: TeacherTarget | None = None,
    rows: int = 0,
) -> Iterator[tuple[Tensor, Chunk]]:
    """Yield (indices, Chunk) over `positions`; logits are (rows, vocab) in float32 or wider.

    Arguments: hidden (positions, width), weight and embeddings (vocab, width), labels (positions,); rows, positions a
    chunk holds at most, 0 for as many as `chunk_rows` says.
    """
    rows = rows or chunk_rows(len(weight), len(positions), hidden.device.type)
    teacher = None if teacher is None else teacher.in_precision(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    buffers = Buffers(min(rows, len(positions)), len(weight), wide, hidden.device)
    for indices in positions.split(rows):
        buffers.release_all()
        logits = matrix_product(hidden[indices], weight.t(), buffers.take(len(indices)))
        target = None if teacher is None else teacher.rows(indices)
        yield indices, Chunk(logits, labels[indices].clamp_min(0), embeddings, buffers, target)


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    embeddings: Tensor | None,
    labels: Tensor,
    terms: Sequence[WeightedTerm],
    teacher: TeacherTarget | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of `terms` and each term's raw sum over the rows it scores.

    Args:
        hidden: (positions, width), already shifted against `labels` (positions,): token ids, `UNLABELLED` or
            `IGNORE_INDEX`.
        weight: the output matrix W, (vocab, width).
        embeddings: the input matrix E, (vocab, width), for terms that use it; may be `weight` itself (tied).
        teacher: what the teacher says at every position, for terms that use it; no gradient reaches it.
    Returns: loss, a scalar with gradients to hidden, weight and embeddings; {name: detached sum}.
    """
    hidden = product_precision(hidden)
    active = [term for term in terms if term.weight != 0]
    teacher = teacher if any(term.term.uses_teacher for term in active) else None
    if not any(term.term.uses_embeddings for term in active):
        embeddings = None
    with torch.autocast(hidden.device.type, enabled=False):
        loss, sums = _ChunkedHead.apply(hidden, weight, embeddings, labels, active, embeddings is weight, teacher)
    return loss, {term.term.name: value for term, value in zip(active, sums, strict=True)}


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, embeddings, labels, terms, tied, teacher):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        masks = [term.term.rows(labels) for term in terms]
        needed = torch.stack(masks).any(0).nonzero().squeeze(-1) if masks else labels.new_empty(0)
        reference = _largest([term.count for term in terms], hidden)
        scales = [term.weight * reference / term.count.clamp_min(1) for term in terms]
        sums = torch.zeros(len(terms), dtype=wide, device=hidden.device)
        # The teacher's logits first: what then needs memory finds theirs.
        order = sorted(range(len(terms)), key=lambda i: not terms[i].term.uses_teacher)
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device)
        d_embeddings = None if embeddings is None else d_weight if tied else torch.zeros_like(d_weight)
        narrow_weight = weight.to(hidden.dtype)
        narrow_embeddings = narrow_weight if tied else None if embeddings is None else embeddings.to(hidden.dtype)
        for indices, chunk in walk(hidden, narrow_weight, narrow_embeddings, labels, needed, teacher):
            gradients = Gradients(chunk.buffers, len(indices), d_embeddings)
            for i in order:
                mask = masks[i][indices]
                values = terms[i].term.add(chunk, mask * scales[i].to(wide), gradients)
                sums[i] += values.where(mask, 0).sum()
            d_hidden[indices] = matrix_product(gradients.logits, narrow_weight)
            add_matrix_product(d_weight, gradients.logits.t(), hidden[indices])
        ctx.save_for_backward(d_hidden, d_weight, None if tied else d_embeddings, reference)
        ctx.dtypes = hidden.dtype, weight.dtype
        loss = sum((s * scale for s, scale in zip(sums, scales, strict=True)), sums.new_zeros(())) / reference
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        d_hidden, d_weight, d_embeddings, reference = ctx.saved_tensors
        scale = d_loss / reference
        hidden_dtype, weight_dtype = ctx.dtypes
        # In place: a second copy of dW is what the head exists to save. Autograd itself refuses a second backward.
        d_embeddings = None if d_embeddings is None else d_embeddings.mul_(scale).to(weight_dtype)
        return (
            d_hidden.mul_(scale).to(hidden_dtype),
            d_weight.mul_(scale).to(weight_dtype),
            d_embeddings,
            *(None,) * 4,
        )


def _largest(counts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The largest count, at least 1: the one divisor left to backward, so that no stored gradient is tiny."""
    wide = torch.promote_types(like.dtype, torch.float32)
    one = torch.ones((), dtype=wide, device=like.device)
    return torch.stack([one, *(count.to(one) for count in counts)]).max()


def term_values(
    hidden: Tensor,
    weight: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    measures: Mapping[str, Term],
    teacher: TeacherTarget | None = None,
) -> dict[str, Tensor]:
    """Each measure's value at every position (positions,), 0 where it is not scored; no gradients.

    Shapes as in `chunked_head`. What evaluation calls, in the same chunks.
    """
    hidden = product_precision(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        masks = {name: term.rows(labels) for name, term in measures.items()}
        needed = torch.stack(list(masks.values())).any(0).nonzero().squeeze(-1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = {name: torch.zeros(labels.shape, dtype=wide, device=hidden.device) for name in measures}
        narrow = weight.to(hidden.dtype), embeddings.to(hidden.dtype)
        for indices, chunk in walk(hidden, *narrow, labels, needed, teacher):
            for name, term in measures.items():
                values[name][indices] = term.add(chunk).where(masks[name][indices], 0)
    return values
