"""An objective is a weighted sum of terms; ObjectiveModel puts a model's body and the chunked head in one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nbutils.errors import ModelError, ParameterError
from nbutils.objectives.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.cross_entropy import CrossEntropy
from nbutils.objectives.head import Term, WeightedTerm, chunked_head, term_values


@dataclass(frozen=True)
class Objective:
    """L = sum_i weight_i x term_i, with the weights of the end of training and the ramp that leads to them.

    Over the first `ramp` (a fraction of the steps) the weights go linearly from the first term alone to `weights`.
    """

    terms: tuple[Term, ...]
    weights: tuple[float, ...]
    ramp: float = 0.0

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


class ObjectiveModel(nn.Module):
    """A causal language model with an objective for its loss.

    Body and head run inside this one forward, so that what wraps the module (DDP) sees every gradient. `progress`, in
    [0, 1], is set by the trainer before each step.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.progress = 0.0
        self.output, self.embeddings = head_matrices(model)

    def forward(self, input_ids: Tensor, labels: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss and raw term sums of a batch.

        Args: input_ids and unshifted labels, (batch, time); counts, {term name: positions scored in the whole step}.
        Returns: {"loss": scalar, name: detached sum, ...}.
        """
        hidden, targets = self.targets(input_ids, labels)
        weights = self.objective.weights_at(self.progress)
        terms = [WeightedTerm(t, w, counts[t.name]) for t, w in zip(self.objective.terms, weights, strict=True)]
        loss, sums = chunked_head(hidden, self.output.weight, self.embeddings.weight, targets, terms)
        return {"loss": loss, **sums}

    def targets(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (batch x (time - 1), width) and the next tokens they predict (batch x (time - 1),)."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (batch, time, width)
        return hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def values(self, input_ids: Tensor, labels: Tensor, measures: Mapping[str, Term]) -> dict[str, Tensor]:
        """Each measure at every predicted position, (batch, time - 1), without gradients."""
        with torch.no_grad():
            hidden, targets = self.targets(input_ids, labels)
            values = term_values(hidden, self.output.weight, self.embeddings.weight, targets, measures)
        return {name: value.view(len(input_ids), -1) for name, value in values.items()}


def head_matrices(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The modules that hold W and E. Refuses models whose logits are more than h Wᵀ, which the head would drop."""
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(output, "bias", None) is not None:
        raise ModelError(
            f"{model.config.model_type}: its output layer has a bias, which the chunked head does not add."
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{model.config.model_type}: the setting {name} changes the logits after the output matrix; "
                "the chunked head does not apply it. Choose a model without it."
            )
    return output, embeddings
