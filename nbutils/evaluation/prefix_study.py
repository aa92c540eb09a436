"""What 05_prefix_smoothing asks beyond training: how much each setting smooths, what is measured, and un-smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from nbutils.data import token_bytes
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
)

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

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
