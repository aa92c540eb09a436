"""Whether an objective's chunked form is its textbook form, shown on random numbers: what a notebook prints."""

from __future__ import annotations

import torch
from torch import Tensor

from nbutils.models import TeacherStates, TeacherTarget
from nbutils.objectives.head import chunked_head
from nbutils.objectives.objective import Objective
from nbutils.objectives.term import Term, WeightedTerm

BATCH, TIME, VOCAB, WIDTH = 4, 16, 300, 16


def compare_with_textbook(objective: Objective, seed: int = 0) -> dict[str, float]:
    """Relative differences |chunked - textbook| / |textbook| of the loss and its gradients, in float64.

    Keys: loss, d hidden, d output matrix, d embeddings (left out where the objective does not touch E).
    """
    generator = torch.Generator().manual_seed(seed)
    positions = BATCH * TIME
    vocab = next((t.vocab for t in objective.terms if t.vocab), VOCAB)
    shapes = {"d hidden": (positions, WIDTH), "d output matrix": (vocab, WIDTH), "d embeddings": (vocab, WIDTH)}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = [random(*shape).requires_grad_() for shape in shapes.values()]
    labels = torch.randint(vocab, (BATCH, TIME), generator=generator)
    teacher = TeacherStates((random(positions, 2 * WIDTH),), (random(vocab, 2 * WIDTH),))
    pairs = list(zip(objective.terms, objective.weights, strict=True))
    terms = [WeightedTerm(term, weight, term.units(labels).sum()) for term, weight in pairs]
    chunked, _ = chunked_head(*leaves, labels.flatten(), terms, teacher)
    hidden, weight, embeddings = leaves
    logits = hidden @ weight.t()  # (positions, vocab)
    textbook = sum(w * textbook_loss(t, logits, embeddings, labels, teacher) for t, w in pairs if w)
    differences = {"loss": _relative(chunked, textbook)}
    found = torch.autograd.grad(chunked, leaves, allow_unused=True)
    wanted = torch.autograd.grad(textbook, leaves, allow_unused=True)
    for name, ours, theirs in zip(shapes, found, wanted, strict=True):
        if theirs is not None:
            differences[name] = _relative(ours, theirs)
    return differences


def textbook_loss(
    term: Term, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
) -> Tensor:
    """The textbook form of `term` over the positions it scores, divided by its units.

    Shapes: logits (batch x time, vocab), targets `labels` (batch, time), embeddings (vocab, width).
    """
    kept = term.rows(labels).flatten().nonzero().squeeze(-1)
    target = None if teacher is None else teacher.rows(kept)
    values = term.textbook(logits[kept], embeddings, labels.flatten()[kept], target)
    return values.sum() / term.units(labels).sum().clamp_min(1)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
