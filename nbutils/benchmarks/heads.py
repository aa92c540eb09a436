"""The chunked head against the textbook form and other projects' heads: time and extra peak memory, side by side.

    python -m nbutils batch params/benchmarks.yaml        # GPT-2's sizes, as the bars were set

How time and memory are taken: nbutils.benchmarks.measuring. The whole training step: nbutils.benchmarks.throughput.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbutils.benchmarks.measuring import Step, extra_memory, interleaved
from nbutils.objectives import Objective, WeightedTerm, chunked_head, cosine_mixing

LOGIT_SPREAD = 3.0  # standard deviation of the logits, as trained models have; a flat softmax would be no fair input


@dataclass(frozen=True)
class Problem:
    """Random hidden states (positions, width), one tied matrix W = E (vocab, width), labels (positions,)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @classmethod
    def random(cls, positions: int, vocab: int, width: int, seed: int = 0) -> Problem:
        """A problem on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(positions, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator) * LOGIT_SPREAD / width**0.5
        labels = torch.randint(vocab, (positions,), generator=generator)
        return cls(hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device))

    def step(self, loss: Callable[[], Tensor]) -> Step:
        """Forward and backward of `loss`, with the gradients of hidden and weight."""

        def run() -> tuple[Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))

        return run


@dataclass(frozen=True)
class Case:
    """An objective and its bars: our share of the time, and of the textbook form's extra peak memory, at most.

    `time_against` names what the time bar is a share of: "textbook", or the case whose chunked head it is.
    """

    name: str
    objective: Objective
    time_bar: float
    memory_bar: float
    time_against: str = "textbook"


CASES = (
    Case("cross entropy", cosine_mixing(0.0), time_bar=1.1, memory_bar=0.45),
    Case("cosine mix", cosine_mixing(0.5), time_bar=0.85, memory_bar=0.30),
    Case("cosine mix, top-k 256", cosine_mixing(0.5, top_k=256), 1.25, 0.15, time_against="cross entropy"),
)


def chunked(problem: Problem, objective: Objective) -> Step:
    """Our head."""
    count = torch.tensor(len(problem.labels), device=problem.labels.device)
    terms = [WeightedTerm(t, w, count) for t, w in zip(objective.terms, objective.weights, strict=True)]
    p = problem
    return p.step(lambda: chunked_head(p.hidden, p.weight, p.weight, p.labels, terms)[0])


def textbook(problem: Problem, objective: Objective) -> Step:
    """`reference.py` on full logits, differentiated by autograd."""

    def loss() -> Tensor:
        logits = problem.hidden @ problem.weight.t()
        parts = zip(objective.terms, objective.weights, strict=True)
        return sum(w * t.textbook(logits, problem.weight, problem.labels).mean() for t, w in parts if w)

    return problem.step(loss)


def matrix_products(problem: Problem, objective: Objective) -> Step:
    """Nothing but the large matrix products that the objective needs: the physical limit of any exact head.

    Three for cross entropy (logits, d hidden, d W), three more for a dense mixture; top-k needs no more.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    dense = any(w and getattr(t, "top_k", 1) == 0 for t, w in zip(objective.terms, objective.weights, strict=True))

    def run() -> tuple[Tensor, ...]:
        for _ in range(1 + dense):
            logits = hidden @ weight.t()
            results = logits @ weight, logits.t() @ hidden
        return results

    return run


def peers(problem: Problem) -> tuple[dict[str, Step], dict[str, str]]:
    """Cross entropy by other projects' heads that can be imported: their steps, and why the others are skipped."""
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name, make in _PEERS.items():
        try:
            loss = make()
            loss(hidden, weight, labels)
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:  # absent, or refuses this machine
            skipped[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        else:
            steps[name] = problem.step(lambda loss=loss: loss(hidden, weight, labels))
    return steps, skipped


def _torch_peer(**settings: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions(**settings)  # without options it forms all logits
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def _liger_peer() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def _apple_peer() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    implementation = "cce" if torch.cuda.is_available() else "torch_compile"
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: loss(hidden, weight, labels, impl=implementation)


_PEERS = {
    "torch linear_cross_entropy": _torch_peer,
    "torch linear_cross_entropy, 256 rows": lambda: _torch_peer(batch_chunk_size=256),
    "Liger fused linear cross entropy": _liger_peer,
    "Apple cut cross entropy": _apple_peer,
}


def compare(problem: Problem, cases: Sequence[Case], rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Seconds and extra MiB of every side, a row each (case, side, seconds, mib), and the peers that were skipped.

    Every side of every case runs once a round, in turns, after a first round that is not counted.
    """
    others, skipped = peers(problem)
    steps = {("cross entropy", name): step for name, step in others.items()}
    for case in cases:
        for side in (textbook, chunked, matrix_products):
            steps[case.name, side.__name__] = side(problem, case.objective)
    seconds = interleaved(steps, rounds)
    rows = [(*key, seconds[key], extra_memory(step)) for key, step in steps.items()]
    return pd.DataFrame(rows, columns=["case", "side", "seconds", "mib"]), skipped


def growth(positions: Sequence[int], vocab: int, width: int) -> pd.DataFrame:
    """Extra peak memory by number of positions: columns positions, case, side ("textbook" or "chunked"), mib."""
    rows = []
    for number in positions:
        problem = Problem.random(number, vocab, width)
        for case in CASES:
            rows.append((number, case.name, "chunked", extra_memory(chunked(problem, case.objective))))
        rows.append((number, CASES[0].name, "textbook", extra_memory(textbook(problem, CASES[0].objective))))
    return pd.DataFrame(rows, columns=["positions", "case", "side", "mib"])


def results(measured: pd.DataFrame, grown: pd.DataFrame, cases: Sequence[Case]) -> dict[str, float]:
    """What result.json keeps of `compare` and `growth`, by name.

    {case}_{time or memory}_{ratio or bar}, {case}_{side}_{seconds or mib}, {case}_{side}_mib_at_{positions},
    bars_missed; every name in lower case with underscores.
    """
    judged = verdicts(measured, cases)
    numbers: dict[str, float] = {"bars_missed": int((~judged["within the bar"]).sum())}
    for row in measured.to_dict("records"):
        for resource in ("seconds", "mib"):
            numbers[_slug(f"{row['case']} {row['side']} {resource}")] = row[resource]
    for row in judged.to_dict("records"):
        name = {"seconds": "time", "mib": "memory"}[row["resource"]]
        numbers |= {_slug(f"{row['case']} {name} {what}"): row[what] for what in ("ratio", "bar")}
    for row in grown.to_dict("records"):
        numbers[_slug(f"{row['case']} {row['side']} mib at {row['positions']}")] = row["mib"]
    return numbers


def step_results(whole: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """What result.json keeps of whole training steps: {case}_{side}_step_{quantity}; `whole` by the case's name."""
    return {
        _slug(f"{case} {side} step {quantity}"): float(value)
        for case, table in whole.items()
        for (side, quantity), value in table.stack().items()
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def verdicts(measured: pd.DataFrame, cases: Sequence[Case]) -> pd.DataFrame:
    """One row per case and resource: textbook, ours, ratio, bar, and whether the ratio is within the bar."""
    table = measured.set_index(["case", "side"])
    rows = []
    for case in cases:
        base = (case.name, "textbook") if case.time_against == "textbook" else (case.time_against, "chunked")
        for resource, against, bar in (("seconds", base, case.time_bar), ("mib", base, case.memory_bar)):
            against = against if resource == "seconds" else (case.name, "textbook")
            ours = table.loc[(case.name, "chunked"), resource]
            textbook_value = table.loc[(case.name, "textbook"), resource]
            ratio = ours / table.loc[against, resource]
            rows.append((case.name, resource, textbook_value, ours, " ".join(against[::-1]), ratio, bar, ratio <= bar))
    names = ["case", "resource", "textbook", "ours", "ratio to", "ratio", "bar", "within the bar"]
    return pd.DataFrame(rows, columns=names)
