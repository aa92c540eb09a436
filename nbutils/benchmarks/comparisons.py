"""What is compared, and its bars: the chunked head on cross entropy and mixtures, distillation, and sparse targets.

python -m nbutils batch params/benchmarks.yaml        # the sizes that the bars were set for
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbutils.benchmarks.measuring import LIMIT, OURS, Bar, extra_memory, measure
from nbutils.benchmarks.sides import (
    TEMPERATURE,
    Problem,
    chunked,
    matrix_products,
    padded,
    peers,
    textbook,
    torch_kl_div,
)
from nbutils.data import UNLABELLED
from nbutils.objectives import Objective, SmoothedTargets, cosine_mixing, distillation, smoothing

HEADS = {
    "cross entropy": cosine_mixing(0.0),
    "cosine mix": cosine_mixing(0.5),
    "cosine mix, top-k 256": cosine_mixing(0.5, top_k=256),
}
HEAD_BARS = [
    Bar("cross entropy", "seconds", 1.1, ("cross entropy", "textbook")),
    Bar("cross entropy", "mib", 0.45, ("cross entropy", "textbook")),
    Bar("cosine mix", "seconds", 0.85, ("cosine mix", "textbook")),
    Bar("cosine mix", "mib", 0.30, ("cosine mix", "textbook")),
    Bar("cosine mix, top-k 256", "seconds", 1.25, ("cross entropy", OURS)),
    Bar("cosine mix, top-k 256", "mib", 0.15, ("cosine mix, top-k 256", "textbook")),
]
DISTILLATION = {
    "KL": distillation("forward", 0.0, 1.0, TEMPERATURE),
    "CE + KL": distillation("forward", 0.5, 0.5, TEMPERATURE),
}
ANSWERS_BAR = Bar("KL of answers", "seconds", 0.35, ("KL of all tokens", OURS))
DISTILLATION_BARS = [
    *(Bar(case, resource, limit) for case in DISTILLATION for resource, limit in (("seconds", 1.0), ("mib", 0.5))),
    ANSWERS_BAR,
]
PREFIX_BARS = [
    Bar("prefix", "seconds", 1.1, ("prefix", "chunked cross entropy")),
    Bar("prefix", "mib", 1 / 8, ("prefix", "padded")),
]
ANSWERS = 0.25  # share of the tokens that are an answer's, where the rest are its prompt's
AGREES = 1e-3  # a relative difference above it is no rounding of float32
MEAN_PREFIXES, MOST_PREFIXES = 4.5, 86  # tokens of a row in Llama 3's vocabulary, the gold token included


def compare(problem: Problem, cases: Mapping[str, Objective], rounds: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every side of every case, a row each, and why the peers that are missing were skipped.

    Columns: those of `measure`, value, "value differs" and "gradients differ": relative distances from the textbook
    form, NaN for the bare matrix products.
    """
    steps, skipped = peers(problem, cases.items())
    for case, objective in cases.items():
        for side in (chunked, textbook, matrix_products, *([torch_kl_div] if problem.teacher else [])):
            steps[case, side.__name__] = side(problem, objective)
    measured = measure(steps, rounds)
    wanted = {case: steps[case, "textbook"]() for case in cases}
    distances = [
        (math.nan,) * 3 if side == LIMIT else _distances(step(), wanted[case]) for (case, side), step in steps.items()
    ]
    return measured.join(pd.DataFrame(distances, columns=["value", "value differs", "gradients differ"])), skipped


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


def growth(positions: Sequence[int], vocab: int, width: int) -> pd.DataFrame:
    """Extra peak memory by number of positions: columns positions, case, side ("textbook" or "chunked"), mib."""
    rows = []
    for number in positions:
        problem = Problem.random(number, vocab, width)
        for case, objective in HEADS.items():
            rows.append((number, case, OURS, extra_memory(chunked(problem, objective))))
        rows.append((number, "cross entropy", "textbook", extra_memory(textbook(problem, HEADS["cross entropy"]))))
    return pd.DataFrame(rows, columns=["positions", "case", "side", "mib"])


def answers_only(problem: Problem, rounds: int) -> pd.DataFrame:
    """`measure` of our head's KL over all tokens, none of them padding, and over the answers' alone; column tokens."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(problem.labels), generator=generator).to(problem.labels.device)
    everything = problem.labels.clamp_min(0)
    answers = everything.index_fill(0, order[int(ANSWERS * len(order)) :], UNLABELLED)
    steps, tokens = {}, []
    for case, labels, scored in (("all tokens", everything, "all"), ("answers", answers, "answers")):
        objective = distillation("forward", 0.0, 1.0, TEMPERATURE, positions=scored)
        steps[f"KL of {case}", OURS] = chunked(replace(problem, labels=labels), objective)
        tokens.append(int((labels >= 0).sum()))
    return measure(steps, rounds).assign(tokens=tokens)


def compare_prefixes(problem: Problem, rounds: int) -> pd.DataFrame:
    """`measure` of our head on sparse targets, on cross entropy, and of the padded form; column value, the loss."""
    prefix = smoothing(random_targets(len(problem.weight)))
    steps = {
        ("prefix", "chunked cross entropy"): chunked(problem, cosine_mixing(0.0)),
        ("prefix", OURS): chunked(problem, prefix),
        ("prefix", "padded"): padded(problem, prefix),
    }
    return measure(steps, rounds).assign(value=[float(step()[0]) for step in steps.values()])


def random_targets(vocab: int, seed: int = 0) -> SmoothedTargets:
    """Targets with as many entries a row as Llama 3's prefixes have, at random tokens with random weights."""
    generator = np.random.default_rng(seed)
    sizes = np.minimum(1 + generator.poisson(MEAN_PREFIXES - 1, vocab), min(MOST_PREFIXES, vocab))
    sizes[0] = min(MOST_PREFIXES, vocab)
    offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    step = generator.integers(1, max(2, vocab // MOST_PREFIXES), vocab)  # apart from one another, so none comes twice
    rank = np.arange(offsets[-1]) - offsets[:-1].repeat(sizes)  # from the first of the row
    owner = np.arange(vocab).repeat(sizes)
    back = sizes.repeat(sizes) - 1 - rank
    tokens = ((owner - back * step[owner]) % vocab).astype(np.int32)  # the gold token last
    raw = generator.exponential(size=len(tokens))
    weights = (raw / np.add.reduceat(raw, offsets[:-1])[owner]).astype(np.float32)
    gold = weights[offsets[1:] - 1]
    entropy = -np.add.reduceat(weights * np.log(weights), offsets[:-1]).astype(np.float32)
    return SmoothedTargets(offsets, tokens, weights, np.zeros(vocab, np.float32), entropy, gold)
