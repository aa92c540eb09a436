"""The gradient audit: was the objective applied, and does it pull anywhere else than cross entropy?

At the start, in the middle and at the end of training, each term's gradient is taken on the same few blocks by the
textbook form on full logits, apart from the head that trains. From it follow the norm of each term's gradient, its
direction against cross entropy's, and `applied_error`: how far the trained path's gradient is from the weighted sum of
the textbook gradients. An objective that did nothing has a gradient parallel to cross entropy's; one that was not
applied has an error near 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nbutils.data import Rows, collate
from nbutils.objectives import ObjectiveModel, Term, next_tokens, textbook_loss

COLUMNS = (
    "step",
    "progress",
    "space",
    "term",
    "weight",
    "norm",
    "cosine_to_ce",
    "cosine_to_objective",
    "applied_error",
)

LARGEST_LOGITS = 2**27  # positions x vocabulary that are formed at once, some five times over: 512 MiB each


def audit_batch(rows: Rows, blocks: int, vocab: int) -> dict[str, Tensor]:
    """The first `blocks` of `rows` as a batch; fewer, or the end of one, where their full logits have no room.

    An end with labels: of a question and its answer the answer comes last.
    """
    batch = collate([rows[i] for i in range(min(blocks, len(rows)))])
    room = max(2, LARGEST_LOGITS // vocab)  # positions
    whole = max(1, room // batch["labels"].shape[1])
    batch = {name: tensor[:whole] for name, tensor in batch.items()}
    end = 1 + int((batch["labels"] >= 0).any(0).nonzero().max())
    return {name: tensor[:, max(0, end - room) : end] for name, tensor in batch.items()}


def audit_gradients(
    model: ObjectiveModel, batch: Mapping[str, Tensor], step: int, progress: float
) -> list[dict[str, Any]]:
    """Rows of audit.csv for a `batch` as it trains: each term and the whole objective, for logits and for parameters.

    In evaluation mode, so that it draws no random number; gradients that training has gathered are left as they are.
    """
    was_training = model.training
    model.eval()
    terms = model.objective.terms
    weights = dict(zip((term.name for term in terms), model.objective.weights_at(progress), strict=True))
    gradients = {term.name: _textbook_gradients(model, batch, term) for term in terms}
    applied = _trained_gradient(model, batch, progress)
    model.train(was_training)
    rows = []
    for space in ("logits", "parameters"):
        mine = {name: gradient[space] for name, gradient in gradients.items()}
        total = sum(weights[name] * gradient for name, gradient in mine.items())
        error = ((applied - total).norm() / total.norm()).item() if space == "parameters" else None
        for name, gradient in {**mine, "objective": total}.items():
            rows.append(
                {
                    "step": step,
                    "progress": progress,
                    "space": space,
                    "term": name,
                    "weight": weights.get(name, 1.0),
                    "norm": gradient.norm().item(),
                    "cosine_to_ce": _cosine(gradient, mine["ce"]),
                    "cosine_to_objective": _cosine(gradient, total),
                    "applied_error": error if name == "objective" else None,
                }
            )
    return rows


def _textbook_gradients(model: ObjectiveModel, batch: Mapping[str, Tensor], term: Term) -> dict[str, Tensor]:
    """Gradient of the term's mean over its units with respect to logits and to all parameters, flat."""
    hidden, _ = model.targets(batch["input_ids"], batch["labels"])
    logits = hidden @ model.output.weight.t()  # (positions, vocab)
    parameters = _trained_parameters(model)
    teacher = model.teacher_target(batch, [term])
    value = textbook_loss(term, logits, model.embeddings.weight, next_tokens(batch["labels"]), teacher)
    found = torch.autograd.grad(value, [logits, *parameters], allow_unused=True)
    return {"logits": found[0].flatten(), "parameters": _flat(found[1:], parameters)}


def _trained_gradient(model: ObjectiveModel, batch: Mapping[str, Tensor], progress: float) -> Tensor:
    """The same by the module that trains, with the weights of this moment."""
    before, model.progress = model.progress, progress
    targets = next_tokens(batch["labels"])
    counts = {term.name: term.units(targets).sum() for term in model.objective.terms}
    parameters = _trained_parameters(model)
    loss = model(**batch, counts=counts)["loss"]
    model.progress = before
    return _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


def _trained_parameters(model: ObjectiveModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat(gradients, parameters) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for g, p in pairs])


def _cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0).item()
