"""Cross entropy against sparse soft targets: the chunked head beside the same loss on full log-probabilities.

The padded form keeps every gold token's prefixes and weights in rows as long as the longest, and gathers them from
log_softmax of all logits: what public code for prefix smoothing does (github.com/harrison-f-stropkay/prefix).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbutils.benchmarks.heads import Problem, chunked
from nbutils.benchmarks.measuring import Step, extra_memory, interleaved
from nbutils.objectives import Objective, SmoothedTargets, SparseTargets, cosine_mixing, smoothing

MEAN_PREFIXES, MOST_PREFIXES = 4.5, 86  # tokens of a row in Llama 3's vocabulary, the gold token included
TIME_BAR = 1.1  # of the chunked cross entropy's time
MEMORY_BAR = 1 / 8  # of the padded form's extra peak memory


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


def compare(problem: Problem, rounds: int) -> pd.DataFrame:
    """Seconds, extra MiB and loss of each side of forward and backward: columns side, seconds, mib, value."""
    targets = random_targets(len(problem.weight))
    prefix = smoothing(targets)
    steps: dict[str, Step] = {
        "chunked cross entropy": chunked(problem, cosine_mixing(0.0)),
        "chunked": chunked(problem, prefix),
        "padded": padded(problem, prefix),
    }
    seconds = interleaved(steps, rounds)
    rows = [(name, seconds[name], extra_memory(step), float(step()[0])) for name, step in steps.items()]
    return pd.DataFrame(rows, columns=["side", "seconds", "mib", "value"])


def padded(problem: Problem, objective: Objective) -> Step:
    """The same loss from log_softmax of all logits and padded rows, (vocab, longest row)."""
    targets = objective.terms[-1].targets
    tokens, weights = _padded_rows(targets, problem.labels.device)

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


def verdicts(measured: pd.DataFrame) -> pd.DataFrame:
    """Time to the chunked cross entropy's and memory to the padded form's, against their bars."""
    table = measured.set_index("side")
    rows = []
    for resource, against, bar in (("seconds", "chunked cross entropy", TIME_BAR), ("mib", "padded", MEMORY_BAR)):
        ratio = table.loc["chunked", resource] / table.loc[against, resource]
        rows.append(("prefix smoothing", resource, against, ratio, bar, ratio <= bar))
    return pd.DataFrame(rows, columns=["case", "resource", "ratio to", "ratio", "bar", "within the bar"])


def results(measured: pd.DataFrame, judged: pd.DataFrame) -> Mapping[str, float]:
    """What result.json keeps: prefix_{side}_{seconds or mib}, prefix_{time or memory}_{ratio or bar}."""
    numbers = {}
    for row in measured.to_dict("records"):
        numbers |= {f"prefix_{row['side'].replace(' ', '_')}_{what}": row[what] for what in ("seconds", "mib")}
    for row in judged.to_dict("records"):
        name = {"seconds": "time", "mib": "memory"}[row["resource"]]
        numbers |= {f"prefix_{name}_{what}": row[what] for what in ("ratio", "bar")}
    return numbers
