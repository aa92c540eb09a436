"""A student that learns from preferences and rewards: model and loss in one module, as DDP wants it.

Columns of a batch, (batch, time) unless said otherwise; those that belong to a prediction stand at the position that
makes it:

    input_ids, labels              a sequence, and the tokens cross entropy scores
    response                       1 where a token of the response is predicted
    rejected_ids, rejected         of pairs: the other sequence, and where its response is predicted
    weights (batch, 2)             of pairs: of cross entropy and of the preference
    old_log_probs, advantages      of rewards; with a value head old_values and returns beside
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from nbutils.data import IGNORE_INDEX
from nbutils.interaction.losses import mean_log_probs, ppo_loss, rloo_loss, simpo_loss, token_log_probs, value_loss
from nbutils.interaction.settings import DISTILL, ON_POLICY, PAIRED, Interaction
from nbutils.models import TeacherStates
from nbutils.objectives import (
    Distillation,
    Objective,
    ObjectiveModel,
    Teacher,
    distillation,
    next_tokens,
    smoothing,
    term_values,
)

CROSS_ENTROPY, PREFERENCE, POLICY, VALUE, TAUGHT = "ce", "simpo", "policy", "value", "kl"  # what losses are called
DIVERGENCE = Distillation(temperature=1.0, divergence="reverse")  # KL(student || start)
MEANS = ("clip_fraction", "approximate_kl")  # logged beside them
LOSSES = {
    **dict.fromkeys(("text", "sft"), (CROSS_ENTROPY,)),
    **dict.fromkeys(PAIRED, (CROSS_ENTROPY, PREFERENCE)),
    DISTILL: (CROSS_ENTROPY, TAUGHT),
    "ppo": (POLICY, VALUE),
    "rloo": (POLICY,),
}


class PolicyModel(ObjectiveModel):
    """A causal language model whose loss is that of an interaction's method; evaluated by cross entropy like any.

    teacher: whose distribution it learns from, where it is distilled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Interaction,
        start: PreTrainedModel | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(model, smoothing(None), teacher)
        self.settings = settings
        self._learned = distilled(settings) if settings.method == DISTILL else self.objective
        self.value_head = nn.Linear(model.config.hidden_size, 1) if settings.method == "ppo" else None
        if self.value_head is not None:  # it begins by expecting nothing of anybody
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._start = ((start or copy.deepcopy(model)).requires_grad_(False).eval(),)  # in a tuple: no part of this

    @property
    def start(self) -> PreTrainedModel:
        """The model as it was before anything was learned, frozen: what the KL is measured from."""
        return self._start[0]

    @property
    def learned(self) -> Objective:
        """What is minimised where a method learns from text: its cross entropy, perhaps with a teacher's divergence."""
        return self._learned

    def release_teacher(self) -> None:
        """Let go of the teacher's weights: nothing but training asks it."""
        self._teacher = (None,)

    def forward(
        self, input_ids: Tensor, labels: Tensor, counts: Mapping[str, Tensor], **columns: Tensor
    ) -> dict[str, Tensor]:
        """{"loss": scalar, name: detached sum, ...} of a batch; `counts` as `units` gives them, of the whole step."""
        method = self.settings.method
        if method in PAIRED:
            return self._preferences(input_ids, labels, counts, columns)
        if method in ON_POLICY:
            return self._rewards(input_ids, counts, columns)
        return super().forward(input_ids, labels, counts)

    def units(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each loss of a batch is divided by: scored tokens, pairs, tokens of responses or responses."""
        method, tokens = self.settings.method, (batch["labels"][:, 1:] >= 0).sum(1)
        if method in PAIRED:
            cross_entropy, preference = (batch["weights"] > 0).unbind(1)
            return {CROSS_ENTROPY: (tokens * cross_entropy).sum(), PREFERENCE: (preference & _pairs(batch)).sum()}
        if method in ON_POLICY:
            response = batch["response"] > 0
            count = response.any(1).sum() if method == "rloo" else response.sum()
            return dict.fromkeys((*LOSSES[method], *MEANS[: 2 * (method == "ppo")]), count)
        targets = next_tokens(batch["labels"])
        return {term.name: term.units(targets).sum() for term in self.learned.terms}

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Real tokens of a batch that something is learned from, a scalar.

        Of a pair both sequences; where cross entropy alone has a weight, the preferred one; of rows without any, none.
        """
        tokens = (batch["labels"] != IGNORE_INDEX).sum(1)
        if self.settings.method not in PAIRED:
            return tokens.sum()
        cross_entropy, preference = (batch["weights"] > 0).unbind(1)
        preference = preference & _pairs(batch)
        places = torch.arange(1, batch["rejected"].shape[1] + 1, device=tokens.device)
        rejected = ((batch["rejected"] > 0) * places).amax(1) + 1  # the last token follows the last place
        return (tokens * (cross_entropy | preference) + rejected * preference).sum()

    def log_probs(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(log p of each next token, hidden states), (batch, time) and (batch, time, width); the last is 0."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        following = functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)  # (batch, time)
        values = token_log_probs(hidden.flatten(0, 1), self.output.weight, following.flatten())
        return values.view(input_ids.shape), hidden

    def from_start(self, input_ids: Tensor, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(log q of each next token by the frozen start, KL of the student's distribution from its), (batch, time).

        hidden (batch, time, width): the student's. The KL is exact, sum_v p (log p - log q) in nats where `mask` is not
        0 and else 0: however a text was sampled, it is no estimate. The logits live a chunk at a time; no gradients.
        """
        output = self.start.get_output_embeddings().weight
        with torch.no_grad():
            start = self.start.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
            following = functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
            log_probs = token_log_probs(start, output, following.flatten())
        places = following.masked_fill(mask == 0, IGNORE_INDEX).flatten()
        own, teacher = self.output.weight, TeacherStates((start,), (output,))
        values = term_values(hidden.flatten(0, 1), own, own, places, {"kl": DIVERGENCE}, teacher)["kl"]
        return log_probs.view(input_ids.shape), values.view(input_ids.shape)

    def values_of(self, hidden: Tensor) -> Tensor:
        """What the value head expects of each position, (batch, time)."""
        return self.value_head(hidden).squeeze(-1)

    def _preferences(
        self, input_ids: Tensor, labels: Tensor, counts: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        both = _stacked(input_ids, columns["rejected_ids"])
        log_probs, _ = self.log_probs(both)  # (2 batch, time)
        response = _stacked(columns["response"], columns["rejected"])
        scored = functional.pad(labels[:, 1:] >= 0, (0, log_probs.shape[1] - labels.shape[1] + 1))
        of_cross_entropy, of_preference = columns["weights"].unbind(1)
        ce = -(log_probs[: len(labels)].where(scored, 0).sum(1) * (of_cross_entropy > 0))
        loss = (ce * of_cross_entropy).sum() / counts[CROSS_ENTROPY].clamp_min(1)
        sums = {CROSS_ENTROPY: ce.detach().sum(), PREFERENCE: log_probs.new_zeros(())}
        real = (
            (of_preference > 0) & _pairs({"response": columns["response"], "rejected": columns["rejected"]})
        ).repeat(2)
        if real.any():
            chosen, rejected = mean_log_probs(log_probs[real], response[real]).chunk(2)
            preference = simpo_loss(chosen, rejected, self.settings.beta, self.settings.gamma)
            loss = loss + (preference * of_preference[real[: len(labels)]]).sum() / counts[PREFERENCE].clamp_min(1)
            sums[PREFERENCE] = preference.detach().sum()
        return {"loss": loss, **sums}

    def _rewards(
        self, input_ids: Tensor, counts: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        mask, settings = columns["response"] > 0, self.settings
        log_probs, hidden = self.log_probs(input_ids)
        count = counts[POLICY].clamp_min(1)
        if settings.method == "rloo":
            loss = rloo_loss(log_probs, mask, columns["advantages"][:, 0])
            return {"loss": loss / count, POLICY: loss.detach()}
        policy = ppo_loss(log_probs, columns["old_log_probs"], columns["advantages"], mask, settings.clip)
        values = self.values_of(hidden)
        value = value_loss(values, columns["old_values"], columns["returns"], mask, settings.value_clip)
        loss = (policy.loss + settings.value_weight * value) / count
        tokens = mask.sum()
        means = (policy.clip_fraction * tokens, policy.approximate_kl * tokens)
        return {
            "loss": loss,
            POLICY: policy.loss.detach(),
            VALUE: value.detach(),
            **dict(zip(MEANS, means, strict=True)),
        }


def distilled(settings: Interaction) -> Objective:
    """(1 - kd_weight) cross entropy + kd_weight T^2 KL(teacher || student), both over the tokens that are scored.

    Raises ParameterError where a value cannot be.
    """
    share = settings.kd_weight
    return distillation("forward", 1 - share, share, settings.kd_temperature, positions="answers")


def _pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Which rows have two responses, (batch,)."""
    return (batch["response"] > 0).any(1) & (batch["rejected"] > 0).any(1)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """(2 batch, time), zeros on the right of the shorter."""
    time = max(first.shape[1], second.shape[1])
    return torch.cat([functional.pad(each, (0, time - each.shape[1])) for each in (first, second)])
