"""What prefix smoothing asks beyond training: how much a setting smooths, and what is left when that is undone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers import LogitsProcessor

from nbutils.data import token_bytes, token_lengths
from nbutils.evaluation.generation import sample_continuations
from nbutils.evaluation.perplexity import SPLITS, batches_to_score
from nbutils.evaluation.sample_measures import measure_samples
from nbutils.objectives import (
    PREFIXES,
    SOFTMAX_FORMS,
    PrefixMass,
    PrefixTable,
    SmoothedTargets,
    Smoothing,
    SparseTargets,
    Unsmoothing,
    effective_smoothing,
    equals_cross_entropy,
    leaves_no_gold_mass,
    mean_target_entropy,
    predicted_cost,
    smoothed_targets,
    walk,
)

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nbutils.data import PreparedData, Rows
    from nbutils.objectives import ObjectiveModel, Unsmoothing

LEAST_MIXING = 1e-6  # of p in P': a gold token whose P is 0 has a finite cross entropy all the same

# Models of one-hot targets are un-smoothed as if they had learnt this.
CONTROL_SMOOTHING = Smoothing("normalised", tau=0.2)
TAUS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
COUNTED_BLOCKS = 20_000  # of train: token frequencies are known well enough from 40 million tokens


def token_counts(blocks: Dataset, vocab: int) -> np.ndarray:
    """How often each token is predicted in the first `COUNTED_BLOCKS` blocks, as frequencies (vocab,)."""
    from nbutils.evaluation.perplexity import token_frequencies

    some = blocks.select(range(min(len(blocks), COUNTED_BLOCKS)))
    return token_frequencies(some, vocab)[0].numpy()


def smoothing_sweep(table: PrefixTable, counts: np.ndarray, over: str = PREFIXES) -> pd.DataFrame:
    """Effective smoothing of each form (columns) at each tau (rows)."""
    import pandas as pd

    found = pd.DataFrame(index=pd.Index(TAUS, name="tau"), columns=list(SOFTMAX_FORMS), dtype=float)
    for tau, form in product(TAUS, SOFTMAX_FORMS):
        found.loc[tau, form] = effective_smoothing(smoothed_targets(table, Smoothing(form, tau, over=over)), counts)
    return found


def smoothing_facts(smoothing: Smoothing, targets: SmoothedTargets, counts: np.ndarray) -> dict[str, float]:
    """effective_smoothing, target_entropy (nats per token), equals_cross_entropy (0 or 1)."""
    return {
        "effective_smoothing": effective_smoothing(targets, counts),
        "target_entropy": mean_target_entropy(targets, counts),
        "equals_cross_entropy": float(equals_cross_entropy(smoothing)),
    }


def predicted_costs(targets: SmoothedTargets, blocks: Mapping[str, Dataset], splits: Sequence[str]) -> dict[str, float]:
    """eval_predicted_cost and test_predicted_cost: over the very tokens that a split's cross entropy is taken over."""
    from nbutils.evaluation.perplexity import SPLITS, token_frequencies

    vocab = len(targets.gold_mass)
    counts = {split: token_frequencies(blocks[split], vocab)[0].numpy() for split in splits if len(blocks[split])}
    return {f"{SPLITS[split]}_predicted_cost": predicted_cost(targets, each) for split, each in counts.items()}


def unsmoothing_of(smoothing: Smoothing, targets: SmoothedTargets, table: PrefixTable) -> Unsmoothing | None:
    """What takes the smoothing out again; None where its target leaves gold tokens no mass.

    A control trained on plain cross entropy gets the same treatment, that of `CONTROL_SMOOTHING`: what choosing d on
    validation can gain, both sides gain. So does a target that equals cross entropy, its A/A null.
    """
    if leaves_no_gold_mass(smoothing):
        return None
    if equals_cross_entropy(smoothing):
        targets = smoothed_targets(table, CONTROL_SMOOTHING)
    return Unsmoothing(targets, table.lengths)


def mass_at_word_starts(table: PrefixTable, tokenizer: PreTrainedTokenizerBase) -> PrefixMass:
    """The probability of strict prefixes where the gold token begins a word: a space and more, with a proper prefix."""
    texts = token_bytes(tokenizer)
    begins = np.zeros(len(table.lengths), bool)
    begins[: len(texts)] = [text.startswith(b" ") for text in texts]
    scored = begins & (table.sizes > 1) & ~table.whitespace
    every_prefix = smoothed_targets(table, Smoothing(SOFTMAX_FORMS[0]))
    return PrefixMass(SparseTargets(every_prefix), torch.from_numpy(scored))


def gold_probabilities(model: ObjectiveModel, blocks: Rows, inverse: Unsmoothing, batch_size: int) -> pd.DataFrame:
    """A row for each scored token of `blocks`: document, token, p, its un-smoothed P, and what was cut off.

    `p` and `unsmoothed` are the gold token's; `below_zero` says that its P came out negative; `negative_mass` is all
    the negative probability of its position.
    """
    found: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for batch, _, owners in batches_to_score(model, blocks, batch_size):
            hidden, labels = model.targets(batch["input_ids"], batch["labels"])
            positions = (labels >= 0).nonzero().squeeze(-1)
            for indices, chunk in walk(hidden, model.output.weight, None, labels, positions):
                gold = chunk.labels.unsqueeze(-1)  # (rows, 1)
                p = chunk.probabilities()
                result = inverse.invert(p)
                columns = {
                    "document": owners.flatten()[indices.cpu()],
                    "token": chunk.labels,
                    "p": p.gather(-1, gold).squeeze(-1).double(),
                    "unsmoothed": result.probabilities.gather(-1, gold).squeeze(-1).double(),
                    "below_zero": result.below_zero.gather(-1, gold).squeeze(-1),
                    "negative_mass": result.negative_mass.double(),
                }
                found.append({name: values.cpu().numpy() for name, values in columns.items()})
    names = list(found[0])
    return pd.DataFrame({name: np.concatenate([each[name] for each in found]) for name in names})


def choose_mixing(gold: pd.DataFrame) -> float:
    """The d in (0, 1] with the lowest mean -log((1 - d) P + d p) over the tokens of `gold`, which is convex in d."""
    best = minimize_scalar(lambda d: _nats(gold, d).mean(), bounds=(LEAST_MIXING, 1.0), method="bounded")
    return float(min((best.x, 1.0), key=lambda d: _nats(gold, d).mean()))  # the bounded search never tries the end


def evaluate_unsmoothed(
    model: ObjectiveModel,
    data: PreparedData,
    inverse: Unsmoothing,
    batch_size: int,
    splits: Sequence[str] = tuple(SPLITS),
) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics of validation (eval_) and test (test_), and sums per document with their split.

    unsmoothed_ce in nats per token, unsmoothed_bits_per_byte, clipped_gold (the share of gold tokens whose P is below
    0), clipped_mass (the mean negative probability of a position), and unsmoothing_d, chosen on validation. The frame
    has columns document, unsmoothed_ce_sum and split.
    """
    lengths = token_lengths(data.tokenizer, model.output.weight.shape[0])
    gold = {
        split: gold_probabilities(model, data.blocks[split], inverse, batch_size)
        for split in SPLITS
        if (split in splits or split == "validation") and len(data.blocks.get(split, ()))
    }
    mixing = choose_mixing(gold["validation"])
    metrics, documents = {"unsmoothing_d": mixing}, []
    for split in (each for each in gold if each in splits):
        frame, prefix = gold[split], SPLITS[split]
        nats = _nats(frame, mixing)
        total_bytes = lengths[frame["token"]].sum()
        metrics[f"{prefix}_unsmoothed_ce"] = float(nats.mean())
        metrics[f"{prefix}_unsmoothed_bits_per_byte"] = float(nats.sum() / math.log(2) / total_bytes)
        metrics[f"{prefix}_clipped_gold"] = float(frame["below_zero"].mean())
        metrics[f"{prefix}_clipped_mass"] = float(frame["negative_mass"].mean())
        sums = nats.groupby(frame["document"]).sum().rename("unsmoothed_ce_sum").reset_index()
        documents.append(sums.assign(split=split))
    return metrics, pd.concat(documents, ignore_index=True)


class UnsmoothedLogits(LogitsProcessor):
    """log P' in the place of a smoothed model's logits (rows, vocab), to sample from."""

    def __init__(self, inverse: Unsmoothing, mixing: float) -> None:
        self.inverse, self.mixing = inverse, mixing

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = scores.double().softmax(-1)
        mixed = torch.lerp(self.inverse.invert(p).probabilities, p, self.mixing)
        return mixed.log().to(scores.dtype)


def unsmoothed_samples(
    model: PreTrainedModel, data: PreparedData, inverse: Unsmoothing, mixing: float, number: int
) -> list[dict]:
    """The samples of `sample_continuations` from P' instead of p, measured, each with sampler "un-smoothed"."""
    processor = UnsmoothedLogits(inverse, mixing)
    texts, _ = measure_samples(
        sample_continuations(model, data.tokenizer, data.blocks["validation"], number, processor=processor)
    )
    return [text | {"sampler": "un-smoothed"} for text in texts]


def _nats(gold: pd.DataFrame, mixing: float) -> pd.Series:
    """-log P' of each token."""
    return -np.log((1 - mixing) * gold["unsmoothed"] + mixing * gold["p"])
