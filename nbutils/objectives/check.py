"""Whether an objective's chunked form is its textbook form, shown on random numbers: what a notebook prints."""

from __future__ import annotations

import torch
from torch import Tensor

from nbutils.objectives import reference
from nbutils.objectives.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.cross_entropy import CrossEntropy
from nbutils.objectives.head import Term, WeightedTerm, chunked_head
from nbutils.objectives.objective import Objective

POSITIONS, VOCAB, WIDTH = 64, 300, 16


def compare_with_textbook(objective: Objective, seed: int = 0) -> dict[str, float]:
    """Relative differences |chunked - textbook| / |textbook| of the loss and its gradients, in float64.

    Keys: loss, d hidden, d output matrix, d embeddings (left out where the objective does not touch E).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"d hidden": (POSITIONS, WIDTH), "d output matrix": (VOCAB, WIDTH), "d embeddings": (VOCAB, WIDTH)}
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes.values()]
    labels = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    count = torch.tensor(POSITIONS)
    terms = [WeightedTerm(t, w, count) for t, w in zip(objective.terms, objective.weights, strict=True)]
    chunked, _ = chunked_head(*leaves, labels, terms)
    hidden, weight, embeddings = leaves
    logits = hidden @ weight.t()  # (positions, vocab)
    textbook = sum(t.weight * textbook_values(t.term, logits, embeddings, labels).mean() for t in terms if t.weight)
    differences = {"loss": _relative(chunked, textbook)}
    found = torch.autograd.grad(chunked, leaves, allow_unused=True)
    wanted = torch.autograd.grad(textbook, leaves, allow_unused=True)
    for name, ours, theirs in zip(shapes, found, wanted, strict=True):
        if theirs is not None:
            differences[name] = _relative(ours, theirs)
    return differences


def textbook_values(term: Term, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The textbook form of `term` at every position, (positions,); shapes as in `reference`."""
    if isinstance(term, ExpectedEmbeddingCosine):
        embeddings = embeddings.detach() if term.detach_embeddings else embeddings
        return reference.expected_embedding_cosine(logits, embeddings, labels, term.temperature, term.top_k)
    if isinstance(term, CrossEntropy):
        return reference.cross_entropy(logits, labels)
    raise TypeError(f"{type(term).__name__} has no textbook form here; add it to reference.py and to this function.")


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
