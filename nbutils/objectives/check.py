"""Whether an objective's chunked form is its textbook form, shown on random numbers: what a notebook prints."""

from __future__ import annotations

import torch
from torch import Tensor

from nbutils.models.teacher_target import TeacherStates, TeacherTarget, TopTokens
from nbutils.objectives import reference
from nbutils.objectives.head import Term, WeightedTerm, chunked_head
from nbutils.objectives.objective import Objective
from nbutils.objectives.terms.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.terms.cross_entropy import CrossEntropy
from nbutils.objectives.terms.distillation import Distillation
from nbutils.objectives.terms.sparse_target import SmoothedCrossEntropy

BATCH, TIME, VOCAB, WIDTH = 4, 16, 300, 16


def compare_with_textbook(objective: Objective, seed: int = 0) -> dict[str, float]:
    """Relative differences |chunked - textbook| / |textbook| of the loss and its gradients, in float64.

    Keys: loss, d hidden, d output matrix, d embeddings (left out where the objective does not touch E).
    """
    generator = torch.Generator().manual_seed(seed)
    positions = BATCH * TIME
    vocab = next((t.targets.vocab for t in objective.terms if isinstance(t, SmoothedCrossEntropy)), VOCAB)
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
    values = textbook_values(term, logits[kept], embeddings, labels.flatten()[kept], target)
    return values.sum() / term.units(labels).sum().clamp_min(1)


def textbook_values(
    term: Term, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
) -> Tensor:
    """The textbook form of `term` at every position, (positions,); shapes as in `reference`."""
    if isinstance(term, ExpectedEmbeddingCosine):
        embeddings = embeddings.detach() if term.detach_embeddings else embeddings
        return reference.expected_embedding_cosine(logits, embeddings, labels, term.temperature, term.top_k)
    if isinstance(term, CrossEntropy):
        return reference.cross_entropy(logits, labels)
    if isinstance(term, SmoothedCrossEntropy):
        return reference.soft_cross_entropy(logits, term.targets.dense(labels, logits.dtype))
    if isinstance(term, Distillation) and isinstance(teacher, TopTokens):
        log_probabilities = teacher.log_probabilities.to(logits.dtype)
        return reference.distillation_over_top(logits, teacher.columns, log_probabilities, term.temperature)
    if isinstance(term, Distillation):
        teacher_logits = teacher.in_precision(logits.dtype).logits(torch.empty_like(logits))
        return reference.distillation(logits, teacher_logits, term.temperature, term.divergence, term.beta)
    raise TypeError(f"{type(term).__name__} has no textbook form here; add it to reference.py and to this function.")


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
