"""How near a teacher's cache is to the live teacher: the divergence, the student's gradient, the words on chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nbutils.data import collate
from nbutils.foundation import read_json, write_json
from nbutils.models import TeacherStates
from nbutils.objectives import WeightedTerm, chunked_head, relative_entropy

if TYPE_CHECKING:
    from datasets import Dataset

    from nbutils.data import PreparedData
    from nbutils.models import LiveTeacher, TeacherCache, TeacherTarget
    from nbutils.objectives import Distillation, ObjectiveModel

SPLIT = "train"  # what the student learns from
MEASURED = "exactness.json"  # in the cache's folder: what the first student found


def exactness_once(
    cache: TeacherCache, teacher: LiveTeacher, student: ObjectiveModel, data: PreparedData
) -> dict[str, float]:
    """`exactness`, measured with the first student that asks and kept in the cache's folder for all others.

    Only that student needs the live teacher.
    """
    path = cache.folder / MEASURED
    if not path.is_file():
        write_json(path, exactness(cache, teacher, student, data))
    return read_json(path)


def exactness(
    cache: TeacherCache, teacher: LiveTeacher, student: ObjectiveModel, data: PreparedData, examples: int = 8
) -> dict[str, float]:
    """What a student that reads `cache` gets in place of what the live `teacher` would give it, on training examples.

    teacher_cache_kl_error        |KL cached - KL live| / KL live, of the student's distillation term
    teacher_cache_gradient_error  |g cached - g live| / |g live| of that term's gradient to the student's hidden states,
                                  or to its output matrix, whichever is larger
    teacher_cache_context_kl      mean KL(live in the chunk's own context || cached) of chunks that start anywhere in
                                  the text, nats per token at the term's temperature; for running text alone
    teacher_cache_bytes_per_token, teacher_cache_seconds (of making it, once)
    """
    device = student.output.weight.device
    cache.to(device)
    teacher.to(device)
    rows = data.blocks[SPLIT]
    chosen = sorted(set(np.linspace(0, len(rows) - 1, min(examples, len(rows))).astype(int).tolist()))
    positions = cache.offsets[SPLIT][chosen].tolist()
    found = {
        **_differences(cache, teacher, student, positions, _examples(rows, chosen, device)),
        "teacher_cache_bytes_per_token": cache.bytes_per_token,
        "teacher_cache_seconds": cache.card["seconds"],
    }
    if data.card.get("task", "lm") == "lm" and len(rows) > 1:
        found["teacher_cache_context_kl"] = _context_divergence(
            cache, teacher, data, chosen, student.objective.teacher_term.temperature
        )
    return found


def _differences(
    cache: TeacherCache,
    teacher: LiveTeacher,
    student: ObjectiveModel,
    positions: list[int],
    batches: list[dict[str, Tensor]],
) -> dict[str, float]:
    """The relative errors of the divergence and of its gradient over batches of one example, at these positions."""
    term, was_training = student.objective.teacher_term, student.training
    values, d_hidden, d_weight = {}, {}, {}
    student.eval()
    for position, batch in zip(positions, batches, strict=True):
        with torch.no_grad():
            hidden, targets = student.targets(batch["input_ids"], batch["labels"])
            said = {"live": teacher.target(batch["input_ids"], {}), "cached": _cached(cache, position, batch)}
        for name, target in said.items():
            value, of_hidden, of_weight = _gradients(student, term, hidden, targets, target)
            values[name] = values.get(name, 0) + value
            d_hidden.setdefault(name, []).append(of_hidden)
            d_weight[name] = d_weight.get(name, 0) + of_weight
    student.train(was_training)
    errors = [
        _relative(torch.cat(d_hidden["cached"]), torch.cat(d_hidden["live"])),
        _relative(d_weight["cached"], d_weight["live"]),
    ]
    return {
        "teacher_cache_kl_error": _relative(values["cached"], values["live"]),
        "teacher_cache_gradient_error": max(errors),
    }


def _gradients(
    student: ObjectiveModel, term: Distillation, hidden: Tensor, targets: Tensor, target: TeacherTarget
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `term` over the positions of an example, and its gradients to `hidden` and to the output matrix."""
    leaves = [hidden.detach().requires_grad_(), student.output.weight.detach().requires_grad_()]
    one = torch.ones((), device=hidden.device)  # sums, so that long and short answers weigh as they do in training
    loss, _ = chunked_head(*leaves, None, targets, [WeightedTerm(term, 1.0, one)], target)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _context_divergence(
    cache: TeacherCache, teacher: LiveTeacher, data: PreparedData, chosen: list[int], temperature: float
) -> float:
    """Mean KL(live || cached) of chunks that start at offsets spread evenly over the blocks, in nats per token."""
    blocks = data.blocks[SPLIT].with_format("numpy", columns=["input_ids"])
    block_size, values = data.card["block_size"], []
    device = teacher.models[0].device
    for number, index in enumerate(chosen):
        first = min(index, len(blocks) - 2)
        offset = (2 * number + 1) * block_size // (2 * len(chosen))
        tokens = np.concatenate(list(blocks[first : first + 2]["input_ids"]))[offset : offset + block_size]
        batch = {name: value.to(device) for name, value in collate([{"input_ids": tokens}]).items()}
        with torch.no_grad():
            live = teacher.target(batch["input_ids"], {})
            said = _cached(cache, int(cache.offsets[SPLIT][first]) + offset, batch)
            values.append(_divergence(live, said, temperature, data.card["vocab_size"]))
    return torch.cat(values).mean().item()


def _divergence(live: TeacherStates, said: TeacherTarget, temperature: float, vocab: int) -> Tensor:
    """KL(live || said) of each position (positions,), over all tokens or over those that `said` knows and the rest."""
    p = _probabilities(live, temperature, vocab)
    if isinstance(said, TeacherStates):
        return relative_entropy(p, _probabilities(said, temperature, vocab))
    said = said.rows(torch.arange(len(p), device=p.device))
    seen = p.gather(-1, said.columns)
    others = p.scatter(-1, said.columns, 0).sum(-1, keepdim=True)
    return relative_entropy(torch.cat([seen, others], -1), said.log_probabilities.exp())


def _probabilities(states: TeacherStates, temperature: float, vocab: int) -> Tensor:
    """(positions, vocab), for one chunk of text."""
    hidden = states.hidden[0]
    logits = states.logits(torch.empty(len(hidden), vocab, device=hidden.device))
    return logits.div_(temperature).softmax(-1)


def _examples(rows: Dataset, chosen: list[int], device: torch.device) -> list[dict[str, Tensor]]:
    """Batches of one example: {input_ids, labels}, each (1, time)."""
    columns = [name for name in ("input_ids", "labels") if name in rows.column_names]
    rows = rows.with_format("numpy", columns=columns)
    return [{name: value.to(device) for name, value in collate([rows[index]]).items()} for index in chosen]


def _cached(cache: TeacherCache, position: int, batch: dict[str, Tensor]) -> TeacherTarget:
    """What the cache holds at the positions of a batch of one example."""
    input_ids = batch["input_ids"]
    row = {"input_ids": input_ids[0].cpu().numpy(), **cache.stored(SPLIT, position, input_ids.shape[1])}
    return cache.target(input_ids, {name: value.to(input_ids.device) for name, value in collate([row]).items()})


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
