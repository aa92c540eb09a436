"""What a smoothed model says of the text once its smoothing is taken out again, per split of prepared data.

A model that learnt its soft targets perfectly predicts p = A P: each gold token's mass spread as its target says. Its
cross entropy on the text is then worse than that of P by the target's doing alone, and one-hot scoring cannot tell that
from harm. A is known, so P comes back (prefixes/inverse.py). Noise of the model makes some of it negative, so the
likelihood is that of P' = (1 - d) P + d p with P clipped at 0 and renormalised, and d chosen on validation.

d = 1 is the model as it is: whatever is un-smoothed this way loses nothing but what the choice of d costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers import LogitsProcessor

from nbutils.data import token_lengths
from nbutils.evaluation.generation import sample_continuations
from nbutils.evaluation.perplexity import SPLITS, batches_to_score
from nbutils.evaluation.sample_measures import measure_samples
from nbutils.objectives import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbutils.data import PreparedData, Rows
    from nbutils.objectives import ObjectiveModel, Unsmoothing

LEAST_MIXING = 1e-6  # of p in P': a gold token whose P is 0 has a finite cross entropy all the same


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
