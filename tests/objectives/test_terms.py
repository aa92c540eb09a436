"""Every registered term: its value and gradient against its textbook form, and how lines become an objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbutils.data.batches import IGNORE_INDEX, UNLABELLED
from nbutils.foundation.errors import ParameterError
from nbutils.models.teacher_target import TeacherStates
from nbutils.objectives.check import textbook_loss
from nbutils.objectives.head import chunked_head
from nbutils.objectives.prefixes.targets import SmoothedTargets
from nbutils.objectives.registry import objective_from, registered
from nbutils.objectives.term import Term, WeightedTerm
from nbutils.objectives.terms.sparse_target import SparseTargets

POSITIONS, VOCAB, WIDTH = 14, 23, 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_targets() -> SparseTargets:
    """Each token shares its mass with the one before it."""
    pairs = np.array([sorted({max(0, y - 1), y}) for y in range(1, VOCAB)])
    tokens = np.concatenate([[0], pairs.flatten()]).astype(np.int32)
    weights = np.concatenate([[1.0], np.tile([0.2, 0.8], VOCAB - 1)]).astype(np.float32)
    offsets = np.concatenate([[0, 1], 1 + 2 * np.arange(1, VOCAB)]).astype(np.int32)
    entropy = np.full(VOCAB, -(0.2 * np.log(0.2) + 0.8 * np.log(0.8)), np.float32)
    entropy[0] = 0
    zeros = np.zeros(VOCAB, np.float32)
    return SparseTargets(SmoothedTargets(offsets, tokens, weights, zeros, entropy, zeros + 0.8))


def example(name: str) -> Term:
    kind = registered()[name]
    return kind(some_targets()) if name == "prefix_smoothing" else kind()


def setting() -> tuple[list[torch.Tensor], torch.Tensor, TeacherStates]:
    leaves = [random(POSITIONS, WIDTH, seed=1), random(VOCAB, WIDTH, seed=2), random(VOCAB, WIDTH, seed=3)]
    labels = torch.randint(VOCAB, (2, POSITIONS // 2), generator=torch.Generator().manual_seed(4))
    labels[0, 2], labels[1, -1] = UNLABELLED, IGNORE_INDEX
    teacher = TeacherStates((random(POSITIONS, WIDTH, seed=5),), (random(VOCAB, WIDTH, seed=6),))
    return [leaf.requires_grad_() for leaf in leaves], labels, teacher


@pytest.mark.parametrize("name", registered())
def test_a_term_is_its_textbook_form_where_it_scores_and_nothing_elsewhere(name):
    term, (leaves, labels, teacher) = example(name), setting()
    weighted = [WeightedTerm(term, 0.7, term.units(labels).sum())]
    ours, sums = chunked_head(*leaves, labels.flatten(), weighted, teacher)
    hidden, weight, embeddings = leaves
    theirs = 0.7 * textbook_loss(term, hidden @ weight.t(), embeddings, labels, teacher)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(0.7 * sums[term.name] / weighted[0].count, theirs.detach(), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(ours, leaves, allow_unused=True)
    wanted = torch.autograd.grad(theirs, leaves, allow_unused=True)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            mine if mine is not None else torch.zeros(1).double(),
            right if right is not None else torch.zeros(1).double(),
            rtol=1e-9,
            atol=1e-11,
        )
    assert found[0][labels.flatten() == IGNORE_INDEX].abs().max() == 0


@pytest.mark.parametrize("name", registered())
def test_gradcheck(name):
    term, (leaves, labels, teacher) = example(name), setting()
    weighted = [WeightedTerm(term, 0.7, term.units(labels).sum())]

    class Once(torch.autograd.Function):
        """gradcheck walks backward often over one graph, the head allows it once: build the graph anew each time."""

        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return chunked_head(*leaves, labels.flatten(), weighted, teacher)[0]

        @staticmethod
        def backward(ctx, d_loss):
            leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
            with torch.enable_grad():
                loss, _ = chunked_head(*leaves, labels.flatten(), weighted, teacher)
            return torch.autograd.grad(loss, leaves, d_loss, materialize_grads=True)

    assert torch.autograd.gradcheck(Once.apply, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", registered())
def test_a_report_can_say_what_a_term_is(name):
    kind = registered()[name]
    assert kind.label and kind.formula and kind.source
    numbers = {field for field, kind_of in kind.__annotations__.items() if kind_of in ("int", "float")}
    assert {parameter for parameter, *_ in kind.bounds} == numbers


def test_lines_become_an_objective():
    objective = objective_from(["cross_entropy 0.9", "cosine 0.1 temperature=2 top_k=5 detach_embeddings=true"])
    assert [term.name for term in objective.terms] == ["ce", "cosine"] and objective.weights == (0.9, 0.1)
    cosine = objective.terms[1]
    assert (cosine.temperature, cosine.top_k, cosine.detach_embeddings) == (2.0, 5, True)
    assert objective_from(["cosine 1 detach_embeddings=True"]).terms[1].detach_embeddings is True
    alone = objective_from(["confidence_penalty 1"])
    assert [(term.name, weight) for term, weight in zip(alone.terms, alone.weights, strict=True)] == [
        ("ce", 0.0),
        ("confidence_penalty", 1.0),
    ]
    (said,) = alone.described()
    assert said["label"] == "confidence penalty" and said["weight"] == 1.0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("crossentropy 1", "there is no term 'crossentropy'. Did you mean 'cross_entropy'"),
        ("cosine", "has no weight"),
        ("cosine half", "is 'half', which is no number"),
        ("cosine -1", "lies between 0 and inf"),
        ("cosine 0", "no term has a weight"),
        ("cosine inf", "give a finite number"),
        (" ", "a line is empty"),
        ("cosine 1 detach_embeddings=maybe", "detach_embeddings of cosine is 'maybe'; give true or false"),
        ("cosine 1 top_k=2.7", "top_k of cosine is 2.7; give a whole number"),
        ("cosine 1 top_k=2 top_k=3", "gives a parameter twice"),
        ("cosine 1 temperatur=2", "no parameter 'temperatur'. Did you mean 'temperature'"),
        ("cosine 1 temperature=0", "temperature of cosine is 0; it lies between"),
        ("cosine 1 temperature", "is no parameter"),
        ("prefix_smoothing 1", "needs targets"),
        ("distillation 1", "needs a teacher"),
        ("nowhere/mine.py 1", "there is no file nowhere/mine.py"),
    ],
)
def test_a_line_that_cannot_be_says_why(line, told):
    with pytest.raises(ParameterError, match=told):
        objective_from([line])


def test_a_term_cannot_stand_twice():
    with pytest.raises(ParameterError, match="stands there twice"):
        objective_from(["cross_entropy 0.5", "cross_entropy 0.5"])
