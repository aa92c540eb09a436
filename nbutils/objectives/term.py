"""What a term of an objective is, what a measure is (a term without a gradient), and how a term is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nbutils.models import TeacherTarget
from nbutils.objectives.chunk import Chunk, Gradients

REGISTERED: dict[str, type[Term]] = {}


class Term:
    """One part of an objective. A subclass is a frozen dataclass whose fields are its parameters and `name`.

    `name` begins its columns in metrics.csv. `label`, `formula` and `source` are what a report says of it; `bounds`
    has the least and the largest value of each parameter that is a number. `check.py` compares `add` with `textbook`.
    """

    name: str
    label: ClassVar[str] = ""
    unit: ClassVar[str] = "nats"
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    bounds: ClassVar[tuple[tuple[str, float, float], ...]] = ()
    uses_embeddings = False
    uses_teacher = False
    vocab = 0  # of a term that fits one vocabulary alone
    own_rows = False  # whether it scores other rows than cross entropy does, so that its sum has a count of its own

    def textbook(
        self, logits: Tensor, embeddings: Tensor, labels: Tensor, teacher: TeacherTarget | None = None
    ) -> Tensor:
        """The textbook form on full logits (positions, vocab), one value per position; autograd gives its gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no textbook form. Write `textbook` beside its `add`.")

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


class Measure(Term):
    """A term that has a value for every row and no gradient. A subclass gives `value`."""

    def add(self, chunk: Chunk, coefficients: Tensor | None = None, gradients: Gradients | None = None) -> Tensor:
        if gradients is not None:
            raise TypeError(
                f"{type(self).__name__} has no gradient; it is a measure for evaluation, not a training term."
            )
        return self.value(chunk)

    def value(self, chunk: Chunk) -> Tensor:
        """One number per row of the chunk, (rows,)."""
        raise NotImplementedError


def register(name: str) -> Callable[[type[Term]], type[Term]]:
    """Make a term known by `name`: what a line in a notebook's `terms` calls it."""

    def remember(kind: type[Term]) -> type[Term]:
        REGISTERED[name] = kind
        return kind

    return remember
