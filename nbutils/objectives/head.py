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
Each term brings its textbook form. Check with: python -m pytest tests/objectives/test_objectives.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nbutils.models import TeacherTarget, add_matrix_product, chunk_rows, matrix_product, product_precision
from nbutils.objectives.chunk import Buffers, Chunk, Gradients
from nbutils.objectives.term import Term, WeightedTerm


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
