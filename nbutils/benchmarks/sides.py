"""The sides of a comparison, forward and backward: our head, textbook form, bare matrix products, other projects.

pip install --no-deps -r requirements-benchmarks.txt  # the other projects; those that are absent are skipped
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.benchmarks.measuring import Step
from nbutils.data import IGNORE_INDEX
from nbutils.models import TeacherStates
from nbutils.objectives import Objective, SparseTargets, WeightedTerm, chunked_head, textbook_loss

LOGIT_SPREAD = 3.0  # standard deviation of the logits, as trained models have; a flat softmax would be no fair input
TEMPERATURE = 2.0  # of all distillation
LIGER_ROWS = 128  # of a chunk, beside Liger's own choice of 1024: less memory, and faster at the bars' sizes on a CPU


@dataclass(frozen=True)
class Problem:
    """Random hidden states, one tied matrix W = E, labels, and where `teacher_width` is above 0 those of a teacher.

    Shapes: hidden (positions, width), weight (vocab, width), labels (positions,), teacher_hidden (positions, teacher
    width), teacher_weight (vocab, teacher width).
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(
        cls, positions: int, vocab: int, width: int, teacher_width: int = 0, masked: float = 0.0, seed: int = 0
    ) -> Problem:
        """A problem on the GPU where there is one. `masked`: the share of positions that are padding."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int, spread: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * spread).to(device)

        hidden, teacher_hidden = random(positions, width), random(positions, teacher_width)
        weight = random(vocab, width, LOGIT_SPREAD / width**0.5)
        teacher_weight = random(vocab, teacher_width, LOGIT_SPREAD / max(1, teacher_width) ** 0.5)
        labels = torch.randint(vocab, (positions,), generator=generator)
        labels[torch.randperm(positions, generator=generator)[: int(masked * positions)]] = IGNORE_INDEX
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels.to(device), teacher_hidden, teacher_weight)

    @property
    def teacher(self) -> TeacherStates | None:
        has_teacher = self.teacher_hidden.shape[1] > 0
        return TeacherStates((self.teacher_hidden,), (self.teacher_weight,)) if has_teacher else None

    @property
    def kept(self) -> Tensor | slice:
        """Where there is a label: an index of positions; of all of them a slice, which copies nothing."""
        kept = self.labels >= 0
        return slice(None) if kept.all() else kept

    def step(self, loss: Callable[[], Tensor]) -> Step:
        """Forward and backward of `loss`: its value, and the gradients of hidden and weight."""

        def run() -> tuple[Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))

        return run


def chunked(problem: Problem, objective: Objective) -> Step:
    """Our head."""
    p = problem
    pairs = zip(objective.terms, objective.weights, strict=True)
    terms = [WeightedTerm(term, weight, term.units(p.labels).sum()) for term, weight in pairs]
    return p.step(lambda: chunked_head(p.hidden, p.weight, p.weight, p.labels, terms, p.teacher)[0])


def textbook(problem: Problem, objective: Objective) -> Step:
    """Each term's textbook form on full logits, differentiated by autograd."""
    p, everywhere = problem, isinstance(problem.kept, slice)

    def loss() -> Tensor:
        logits = p.hidden @ p.weight.t()
        pairs = [(t, w) for t, w in zip(objective.terms, objective.weights, strict=True) if w]
        if everywhere:  # textbook_loss would copy the logits
            return sum(w * t.textbook(logits, p.weight, p.labels).mean() for t, w in pairs)
        return sum(w * textbook_loss(t, logits, p.weight, p.labels[None], p.teacher) for t, w in pairs)

    return p.step(loss)


def torch_kl_div(problem: Problem, objective: Objective) -> Step:
    """PyTorch's own functions on the logits of the positions that count, without chunks."""
    ce_weight, kl_weight = objective.weights
    kept = problem.kept

    def loss() -> Tensor:
        logits = problem.hidden[kept] @ problem.weight.t()
        with torch.no_grad():
            teacher = (problem.teacher_hidden[kept] @ problem.teacher_weight.t()).div_(TEMPERATURE).softmax(-1)
        value = F.kl_div((logits / TEMPERATURE).log_softmax(-1), teacher, reduction="batchmean")
        value = kl_weight * TEMPERATURE**2 * value
        return value + ce_weight * F.cross_entropy(logits, problem.labels[kept]) if ce_weight else value

    return problem.step(loss)


def matrix_products(problem: Problem, objective: Objective) -> Step:
    """Nothing but the large matrix products that the objective needs: the physical limit of any exact head.

    Three for cross entropy (logits, d hidden, d W), three more for a dense mixture, one for a teacher's logits.
    """
    hidden, weight = problem.hidden.detach()[problem.kept], problem.weight.detach()
    teacher_hidden = problem.teacher_hidden[problem.kept]
    dense = any(w and getattr(t, "top_k", 1) == 0 for t, w in zip(objective.terms, objective.weights, strict=True))

    def run() -> tuple[Tensor, ...]:
        if problem.teacher:
            teacher_hidden @ problem.teacher_weight.t()
        for _ in range(1 + dense):
            logits = hidden @ weight.t()
            results = logits @ weight, logits.t() @ hidden
        return results

    return run


def padded(problem: Problem, objective: Objective) -> Step:
    """A sparse target's loss from log_softmax of all logits, gathered by rows as long as the longest.

    What public code for prefix smoothing does (github.com/harrison-f-stropkay/prefix).
    """
    tokens, weights = _padded_rows(objective.terms[-1].targets, problem.labels.device)

    def loss() -> Tensor:
        log_probabilities = (problem.hidden @ problem.weight.t()).log_softmax(-1)  # (positions, vocab)
        gathered = log_probabilities.gather(-1, tokens[problem.labels])  # (positions, longest)
        return -(weights[problem.labels] * gathered).sum(-1).mean()

    return problem.step(loss)


def _padded_rows(targets: SparseTargets, device: torch.device) -> tuple[Tensor, Tensor]:
    row, token, weight = targets.entries(torch.arange(targets.vocab))
    place = torch.arange(len(row)) - torch.searchsorted(row, row)
    shape = targets.vocab, int(place.max()) + 1
    tokens, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    return tokens.index_put((row, place), token).to(device), weights.index_put((row, place), weight.float()).to(device)


Loss = Callable[[Problem], Tensor]


def _torch_cross_entropy(objective: Objective, **settings: int) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(**settings)  # without options it forms all logits
    return lambda p: F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=options)


def _liger_cross_entropy(objective: Objective) -> Loss:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda p: loss(p.weight, p.hidden, p.labels)


def _apple_cross_entropy(objective: Objective) -> Loss:
    implementation = "cce" if torch.cuda.is_available() else "torch_compile"
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda p: loss(p.hidden, p.weight, p.labels, impl=implementation)


def _liger_divergence(objective: Objective, **settings: int) -> Loss:
    """Liger's generalised Jensen-Shannon loss, whose beta 0 is the forward KL; it knows no T^2, so its weight does."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    ce_weight, kl_weight = objective.weights
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=ce_weight,
        weight_soft_loss=kl_weight * TEMPERATURE**2,
        beta=0.0,
        ignore_index=IGNORE_INDEX,
        temperature=TEMPERATURE,
        compiled=torch.cuda.is_available(),
        **settings,
    )
    return lambda p: loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels)


def _torchtune_divergence(objective: Objective) -> Loss:
    """torchtune's loss on a list of chunks of logits; it has neither T nor T^2, both are given here.

    From its file alone, which needs only torch: the package wants a version of torchao that current torch outgrew.
    """
    found = importlib.util.find_spec("torchtune")
    if found is None:
        raise ModuleNotFoundError("No module named 'torchtune'")
    path = Path(found.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kl = module.ForwardKLWithChunkedOutputLoss()

    def loss(p: Problem) -> Tensor:
        logits = [chunk @ p.weight.t() / TEMPERATURE for chunk in p.hidden[None].chunk(kl.num_output_chunks, 1)]
        with torch.no_grad():
            chunks = p.teacher_hidden[None].chunk(kl.num_output_chunks, 1)
            teacher = [chunk @ p.teacher_weight.t() / TEMPERATURE for chunk in chunks]
        return TEMPERATURE**2 * kl(logits, teacher, p.labels[None])

    return loss


def _trl_divergence(objective: Objective) -> Loss:
    """TRL's divergence of every token, beta 0 the forward KL; masked rows are weighed 0 and T^2 is given here."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(p: Problem) -> Tensor:
        values, _ = function.apply(p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, 0.0, TEMPERATURE)
        kept = p.labels != IGNORE_INDEX
        return TEMPERATURE**2 * (values * kept).sum() / kept.sum()

    return loss


_LIGER_DIVERGENCES = {
    "Liger JSD beta 0": _liger_divergence,
    f"Liger JSD beta 0, {LIGER_ROWS} rows": partial(_liger_divergence, chunk_size=LIGER_ROWS),
}
PEERS: dict[str, dict[str, Callable[[Objective], Loss]]] = {  # by case; others have no cross entropy beside their KL
    "cross entropy": {
        "torch linear_cross_entropy": _torch_cross_entropy,
        "torch linear_cross_entropy, 256 rows": partial(_torch_cross_entropy, batch_chunk_size=256),
        "Liger fused linear cross entropy": _liger_cross_entropy,
        "Apple cut cross entropy": _apple_cross_entropy,
    },
    "KL": _LIGER_DIVERGENCES
    | {"torchtune chunked forward KL": _torchtune_divergence, "TRL chunked divergence": _trl_divergence},
    "CE + KL": _LIGER_DIVERGENCES,
}


def peers(
    problem: Problem, cases: Iterable[tuple[str, Objective]]
) -> tuple[dict[tuple[str, str], Step], dict[str, str]]:
    """Steps of the projects that can be imported and run here, by (case, side), and why the others are skipped."""
    steps: dict[tuple[str, str], Step] = {}
    skipped: dict[str, str] = {}
    for case, objective in cases:
        for name, make in PEERS.get(case, {}).items():
            try:
                loss = make(objective)
                loss(problem)
            except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
                skipped[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            else:
                steps[case, name] = problem.step(partial(loss, problem))
    return steps, skipped
