"""The chunked head's distillation against the textbook forms and other projects' chunked losses, and teacher caches.

    pip install --no-deps -r requirements-benchmarks.txt  # the other projects; those that are absent are skipped
    python -m nbutils batch params/benchmarks.yaml        # the sizes that the bars were set for

How time and memory are taken: nbutils.benchmarks.measuring.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.benchmarks.heads import LOGIT_SPREAD
from nbutils.benchmarks.measuring import Step, extra_memory, interleaved
from nbutils.data import IGNORE_INDEX, UNLABELLED
from nbutils.models import TeacherStates
from nbutils.objectives import Objective, WeightedTerm, chunked_head, textbook_loss
from nbutils.objectives import distillation as objective_of

TEMPERATURE = 2.0
MASKED = 0.25  # share of the positions that nobody scores: padding
ANSWERS = 0.25  # share of the tokens that are an answer's, where the rest are its prompt's
LIGER_ROWS = 128  # of a chunk, beside Liger's own choice of 1024: less memory, and faster at the bars' sizes on a CPU
AGREES = 1e-3  # a relative difference above it is no rounding of float32


@dataclass(frozen=True)
class Problem:
    """Random last hidden states and output matrices of a student and its teacher, and labels, some ignored.

    Shapes: hidden (positions, width), weight (vocab, width), teacher_hidden (positions, teacher width),
    teacher_weight (vocab, teacher width), labels (positions,).
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def random(cls, positions: int, vocab: int, width: int, teacher_width: int, seed: int = 0) -> Problem:
        """A problem on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, spread: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * spread).to(device)

        hidden, teacher_hidden = random(positions, width), random(positions, teacher_width)
        weight = random(vocab, width, spread=LOGIT_SPREAD / width**0.5)
        teacher_weight = random(vocab, teacher_width, spread=LOGIT_SPREAD / teacher_width**0.5)
        labels = torch.randint(vocab, (positions,), generator=generator)
        labels[torch.randperm(positions, generator=generator)[: int(MASKED * positions)]] = IGNORE_INDEX
        return cls(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels.to(device))

    @property
    def teacher(self) -> TeacherStates:
        return TeacherStates((self.teacher_hidden,), (self.teacher_weight,))

    def step(self, loss: Callable[[], Tensor]) -> Step:
        """Forward and backward of `loss`, with the gradients of hidden and weight."""

        def run() -> tuple[Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))

        return run


CASES = {
    "KL": objective_of("forward", 0.0, 1.0, TEMPERATURE),
    "CE + KL": objective_of("forward", 0.5, 0.5, TEMPERATURE),
}
TIME_BAR, MEMORY_BAR = 1.0, 0.5  # our share of the fastest and of the smallest of all others, at most
ANSWERS_BAR = 0.35  # share of the time for all tokens that those of answers take


def chunked(problem: Problem, objective: Objective) -> Step:
    """Our head."""
    p = problem
    pairs = zip(objective.terms, objective.weights, strict=True)
    terms = [WeightedTerm(term, weight, term.units(p.labels).sum()) for term, weight in pairs]
    return p.step(lambda: chunked_head(p.hidden, p.weight, None, p.labels, terms, p.teacher)[0])


def textbook(problem: Problem, objective: Objective) -> Step:
    """`reference.py` on full logits, differentiated by autograd."""
    p = problem

    def loss() -> Tensor:
        logits = p.hidden @ p.weight.t()
        pairs = zip(objective.terms, objective.weights, strict=True)
        return sum(w * textbook_loss(t, logits, p.weight, p.labels[None], p.teacher) for t, w in pairs if w)

    return problem.step(loss)


def torch_kl_div(problem: Problem, objective: Objective) -> Step:
    """PyTorch's own functions on the logits of the positions that count, without chunks."""
    ce_weight, kl_weight = objective.weights
    kept = problem.labels != IGNORE_INDEX

    def loss() -> Tensor:
        logits = problem.hidden[kept] @ problem.weight.t()
        with torch.no_grad():
            teacher = (problem.teacher_hidden[kept] @ problem.teacher_weight.t()).div_(TEMPERATURE).softmax(-1)
        value = F.kl_div((logits / TEMPERATURE).log_softmax(-1), teacher, reduction="batchmean")
        value = kl_weight * TEMPERATURE**2 * value
        return value + ce_weight * F.cross_entropy(logits, problem.labels[kept]) if ce_weight else value

    return problem.step(loss)


def matrix_products(problem: Problem, objective: Objective) -> Step:
    """Nothing but the four large matrix products of the positions that count: the limit of any exact head."""
    kept = problem.labels != IGNORE_INDEX
    hidden, weight = problem.hidden.detach()[kept], problem.weight.detach()
    teacher_hidden = problem.teacher_hidden[kept]

    def run() -> tuple[Tensor, ...]:
        teacher_hidden @ problem.teacher_weight.t()
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden

    return run


Loss = Callable[[Problem], Tensor]


def _liger(objective: Objective, **settings: int) -> Loss:
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


def _torchtune(objective: Objective) -> Loss:
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


def _trl(objective: Objective) -> Loss:
    """TRL's divergence of every token, beta 0 the forward KL; masked rows are weighed 0 and T^2 is given here."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(p: Problem) -> Tensor:
        sides = p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None
        values, _ = function.apply(*sides, 0.0, TEMPERATURE)
        kept = p.labels != IGNORE_INDEX
        return TEMPERATURE**2 * (values * kept).sum() / kept.sum()

    return loss


_PEERS: dict[str, dict[str, Callable[[Objective], Loss]]] = {
    "KL": {
        "Liger JSD beta 0": _liger,
        f"Liger JSD beta 0, {LIGER_ROWS} rows": partial(_liger, chunk_size=LIGER_ROWS),
        "torchtune chunked forward KL": _torchtune,
        "TRL chunked divergence": _trl,
    },
    "CE + KL": {  # the others have no cross entropy in the same pass
        "Liger JSD beta 0": _liger,
        f"Liger JSD beta 0, {LIGER_ROWS} rows": partial(_liger, chunk_size=LIGER_ROWS),
    },
}


def peers(problem: Problem) -> tuple[dict[tuple[str, str], Step], dict[str, str]]:
    """Steps of the projects that can be imported, by (case, side), and why the others are skipped."""
    steps: dict[tuple[str, str], Step] = {}
    skipped: dict[str, str] = {}
    for case, makers in _PEERS.items():
        for name, make in makers.items():
            try:
                loss = make(CASES[case])
                loss(problem)
            except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
                skipped[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            else:
                steps[case, name] = problem.step(partial(loss, problem))
    return steps, skipped


def compare(problem: Problem, rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every side of every case, a row each, and the peers that were skipped.

    Columns: case, side, seconds, mib (extra at the peak), value, "value differs" and "gradients differ": relative
    distances from the textbook form, NaN for the bare matrix products.
    """
    others, skipped = peers(problem)
    steps = dict(others)
    for case, objective in CASES.items():
        for side in (chunked, textbook, torch_kl_div, matrix_products):
            steps[case, side.__name__] = side(problem, objective)
    seconds = interleaved(steps, rounds)
    wanted = {case: steps[case, "textbook"]() for case in CASES}
    rows = []
    for (case, side), step in steps.items():
        mib = extra_memory(step)
        distances = (float("nan"),) * 3 if side == "matrix_products" else _distances(step(), wanted[case])
        rows.append((case, side, seconds[case, side], mib, *distances))
    columns = ["case", "side", "seconds", "mib", "value", "value differs", "gradients differ"]
    return pd.DataFrame(rows, columns=columns), skipped


def _distances(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """The value, its relative distance from the wanted one, and the larger one of the two gradients."""
    value, *gradients = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
    return found[0].item(), value, max(gradients)


def disagreements(measured: pd.DataFrame) -> list[str]:
    """What a side of `compare` computes otherwise than the textbook form, a sentence each."""
    return [
        f"{row['side']} ({row['case']}): its {what} is not the textbook form's, {row[column]:.1%} away."
        for row in measured.to_dict("records")
        for what, column in (("value", "value differs"), ("gradient", "gradients differ"))
        if row[column] > AGREES
    ]


def answers_only(problem: Problem, rounds: int) -> pd.DataFrame:
    """Seconds and MiB of our head's KL over all tokens, none of them padding, and over the answers' alone.

    Index: "all tokens", "answers"; columns: tokens, seconds, mib.
    """
    positions = len(problem.labels)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randperm(positions, generator=generator)[int(ANSWERS * positions) :].to(problem.labels.device)
    everything = problem.labels.clamp_min(0)
    labels = {"all tokens": everything, "answers": everything.index_fill(0, prompts, UNLABELLED)}
    scored = {"all tokens": "all", "answers": "answers"}
    steps = {
        name: chunked(
            Problem(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, labels[name]),
            objective_of("forward", 0.0, 1.0, TEMPERATURE, positions=scored[name]),
        )
        for name in labels
    }
    seconds = interleaved(steps, rounds)
    rows = {name: (int((labels[name] >= 0).sum()), seconds[name], extra_memory(step)) for name, step in steps.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["tokens", "seconds", "mib"])


def verdicts(measured: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """One row per bar: case, resource, ours, the best of the others and its name, ratio, bar, "within the bar"."""
    rows = []
    for case, table in measured.groupby("case", sort=False):
        table = table.set_index("side")
        others = table.drop(index=["chunked", "matrix_products"])
        for resource, bar in (("seconds", TIME_BAR), ("mib", MEMORY_BAR)):
            best = others[resource].idxmin()
            rows.append((case, resource, table.loc["chunked", resource], others.loc[best, resource], best, bar))
    seconds = answers["seconds"]
    rows.append(
        ("KL of answers", "seconds", seconds["answers"], seconds["all tokens"], "KL of all tokens", ANSWERS_BAR)
    )
    table = pd.DataFrame(rows, columns=["case", "resource", "ours", "theirs", "whose", "bar"])
    table["ratio"] = table["ours"] / table["theirs"]
    table["within the bar"] = table["ratio"] <= table["bar"]
    return table


def results(measured: pd.DataFrame, judged: pd.DataFrame) -> Mapping[str, float]:
    """What result.json keeps: {case}_{side}_{seconds or mib} and {case}_{time or memory}_{ratio or bar}, in slugs."""
    numbers: dict[str, float] = {}
    for row in measured.to_dict("records"):
        for resource in ("seconds", "mib"):
            numbers[_slug(f"{row['case']} {row['side']} {resource}")] = row[resource]
    for row in judged.to_dict("records"):
        name = {"seconds": "time", "mib": "memory"}.get(row["resource"], row["resource"])
        numbers |= {_slug(f"{row['case']} {name} {what}"): row[what] for what in ("ratio", "bar")}
    return numbers


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
