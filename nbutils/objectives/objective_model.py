"""A model's body and the chunked head in one module, with the teacher beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nbutils.data import IGNORE_INDEX, UNLABELLED
from nbutils.models import TeacherTarget, head_matrices
from nbutils.objectives.head import chunked_head, term_values
from nbutils.objectives.objective import Objective
from nbutils.objectives.term import Term, WeightedTerm


class Teacher(Protocol):
    """Who can say what one or several teachers predict for a batch."""

    def target(self, input_ids: Tensor, stored: Mapping[str, Tensor]) -> TeacherTarget:
        """For all positions of `input_ids` (batch, time), flat; `stored` holds what the batch brings from a cache."""


class ObjectiveModel(nn.Module):
    """A causal language model with an objective for its loss.

    Body and head run inside this one forward, so that what wraps the module (DDP) sees every gradient. `progress`, in
    [0, 1], is set by the trainer before each step. The teacher is no part of the module: it has nothing to be trained,
    saved or compared between ranks.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.progress = 0.0
        self.output, self.embeddings = head_matrices(model)
        self._teacher = (teacher,)  # in a tuple, or torch would register a module's parameters

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0]

    @property
    def learned(self) -> Objective:
        """What training minimises; evaluation measures `objective`."""
        return self.objective

    def forward(
        self, input_ids: Tensor, labels: Tensor, counts: Mapping[str, Tensor], **stored: Tensor
    ) -> dict[str, Tensor]:
        """Loss and raw term sums of a batch.

        Args: input_ids and unshifted labels, (batch, time); counts, {term name: what its sum is divided by in the whole
        step}; stored, what the batch brings from a teacher's cache.
        Returns: {"loss": scalar, name: detached sum, ...}.
        """
        hidden, targets = self.targets(input_ids, labels)
        weights = self.learned.weights_at(self.progress)
        terms = [WeightedTerm(t, w, counts[t.name]) for t, w in zip(self.learned.terms, weights, strict=True)]
        teacher = self.teacher_target({"input_ids": input_ids, **stored}, [t.term for t in terms if t.weight])
        loss, sums = chunked_head(hidden, self.output.weight, self.embeddings.weight, targets, terms, teacher)
        return {"loss": loss, **sums}

    def targets(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (batch x time, width) and the next tokens they predict (batch x time,)."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (batch, time, width)
        return hidden.flatten(0, 1), next_tokens(labels).flatten()

    def values(
        self,
        input_ids: Tensor,
        labels: Tensor,
        measures: Mapping[str, Term],
        stored: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Each measure at every position, (batch, time), without gradients."""
        with torch.no_grad():
            hidden, targets = self.targets(input_ids, labels)
            teacher = self.teacher_target({"input_ids": input_ids, **(stored or {})}, measures.values())
            matrices = self.output.weight, self.embeddings.weight
            values = term_values(hidden, *matrices, targets, measures, teacher)
        return {name: value.view(input_ids.shape) for name, value in values.items()}

    def teacher_target(self, batch: Mapping[str, Tensor], terms: Iterable[Term]) -> TeacherTarget | None:
        """What the teacher says at all positions of a batch, flat; None where no term asks."""
        if not any(term.uses_teacher for term in terms):
            return None
        with torch.no_grad():
            return self.teacher.target(batch["input_ids"], batch)


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts, (batch, time): `labels` moved by one.

    The last real token of a row predicts what the row does not hold: it is `UNLABELLED`, however the row was padded.
    """
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)
    return moved.where((moved != IGNORE_INDEX) | (labels == IGNORE_INDEX), UNLABELLED)
