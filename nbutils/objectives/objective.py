"""An objective is a weighted sum of terms: those of the studies, and the module that trains a model on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nbutils.data import IGNORE_INDEX, UNLABELLED
from nbutils.foundation import ParameterError
from nbutils.models import NO_DIVERGENCE, TeacherTarget, check_distillation, head_matrices
from nbutils.objectives.head import chunked_head, term_values
from nbutils.objectives.term import Term, WeightedTerm
from nbutils.objectives.terms.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.terms.cross_entropy import CrossEntropy
from nbutils.objectives.terms.distillation import Distillation
from nbutils.objectives.terms.sparse_target import SmoothedCrossEntropy, SparseTargets

if TYPE_CHECKING:
    from nbutils.objectives.prefixes import SmoothedTargets


@dataclass(frozen=True)
class Objective:
    """L = sum_i weight_i x term_i, with the weights of the end of training and the ramp that leads to them.

    Over the first `ramp` (a fraction of the steps) the weights go linearly from the first term alone to `weights`.
    """

    terms: tuple[Term, ...]
    weights: tuple[float, ...]
    ramp: float = 0.0

    @property
    def in_embedding_space(self) -> bool:
        """Whether a term looks at embeddings, of whatever weight: then the proxies are measured."""
        return any(term.uses_embeddings for term in self.terms)

    @property
    def teacher_term(self) -> Term | None:
        """The term that asks a teacher, None where there is none."""
        return next((term for term in self.terms if term.uses_teacher), None)

    def described(self) -> list[dict[str, Any]]:
        """What a report says of each term that has a weight: label, formula, source, unit, weight, parameters."""
        return [
            {
                **{key: getattr(term, key) for key in ("name", "label", "formula", "source", "unit")},
                "weight": weight,
                "parameters": {
                    each.name: value
                    for each in fields(term)
                    if each.name != "name" and isinstance(value := getattr(term, each.name), int | float | str)
                },
            }
            for term, weight in zip(self.terms, self.weights, strict=True)
            if weight
        ]

    def weights_at(self, progress: float) -> tuple[float, ...]:
        """The weights when `progress`, in [0, 1], of the training is done."""
        share = min(1.0, progress / self.ramp) if self.ramp > 0 else 1.0
        start = (1.0, *(0.0 for _ in self.weights[1:]))
        return tuple((1 - share) * a + share * b for a, b in zip(start, self.weights, strict=True))


def cosine_mixing(
    alpha: float,
    temperature: float = 1.0,
    top_k: int = 0,
    ramp: float = 0.0,
    detach_embeddings: bool = False,
) -> Objective:
    """(1 - alpha) cross entropy + alpha (1 - cos(mu, e_y)); alpha 0 is plain cross entropy at its plain cost.

    Raises ParameterError where alpha or ramp lies outside [0, 1], temperature is not above 0 or top_k is negative.
    """
    if not 0 <= alpha <= 1:
        raise ParameterError(f"alpha is {alpha}; it is the weight of the cosine term and lies in [0, 1].")
    if not 0 <= ramp <= 1:
        raise ParameterError(f"alpha_ramp is {ramp}; it is a fraction of the training steps and lies in [0, 1].")
    if temperature <= 0:
        raise ParameterError(f"temperature is {temperature}; logits are divided by it, so give a number above 0.")
    if top_k < 0:
        raise ParameterError(f"cos_topk is {top_k}; give a number of tokens, or 0 for the whole vocabulary.")
    cosine = ExpectedEmbeddingCosine(temperature, top_k, detach_embeddings)
    return Objective((CrossEntropy(), cosine), (1 - alpha, alpha), ramp)


def distillation(
    divergence: str = "forward",
    ce_weight: float = 0.5,
    kl_weight: float = 0.5,
    temperature: float = 2.0,
    beta: float = 0.5,
    positions: str = "all",
    reduction: str = "token",
) -> Objective:
    """ce_weight x cross entropy + kl_weight x T^2 D(teacher, student); divergence "none" is cross entropy alone.

    Raises ParameterError, naming the notebook's parameter, where a value cannot be.
    """
    check_distillation(divergence, ce_weight, kl_weight, temperature, beta, positions, reduction)
    if divergence == NO_DIVERGENCE:
        return Objective((CrossEntropy(),), (1.0,))
    term = Distillation(temperature, divergence, beta, positions, reduction)
    return Objective((CrossEntropy(), term), (ce_weight, kl_weight))


def smoothing(targets: SmoothedTargets | None) -> Objective:
    """Cross entropy against the soft `targets` of each gold token; None is plain cross entropy, the control.

    Plain cross entropy has weight 0 beside them: it is not trained on, and every evaluation has it.
    """
    if targets is None:
        return Objective((CrossEntropy(),), (1.0,))
    return Objective((CrossEntropy(), SmoothedCrossEntropy(SparseTargets(targets))), (0.0, 1.0))


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
