"""Evaluation: sums per document over scored tokens, and the metrics that follow from them.

Every variant of every study is measured here, by the same code. Logits are never held for more than a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from nbutils.objectives import Accuracy, CosineProxy, CrossEntropy, ObjectiveModel, Term, UnigramCosine

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Evaluation:
    """Sums over the scored tokens of each document; every metric and interval follows from them.

    `per_document` has columns document, tokens, ce_sum (nats), correct, cosine_sum, cosine_centred_sum,
    cosine_unigram_sum, and <term>_loss_sum for each further term of the objective; `weights`, {term: weight}, are the
    objective's at the end of training.
    """

    per_document: pd.DataFrame
    weights: dict[str, float]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means over tokens, each under `prefix`_.

        loss (the objective), ce_loss (nats), perplexity, token_acc; cosine of mu and the gold embedding, the same
        centred, and the cosine that a unigram predictor would get.
        """
        totals = self.per_document.sum(skipna=False)  # a model that diverged has no perplexity, not a perfect one
        mean = {name: float(totals[name] / totals["tokens"]) for name in self.per_document.columns[2:]}
        loss = sum(weight * mean[_column(name)] for name, weight in self.weights.items())
        further = {f"{prefix}_{name}_loss": mean[_column(name)] for name in self.weights if name != "ce"}
        ce = mean["ce_sum"]
        return {
            f"{prefix}_loss": loss,
            f"{prefix}_ce_loss": ce,
            f"{prefix}_perplexity": math.inf if ce > 700 else math.exp(ce),
            f"{prefix}_token_acc": mean["correct"],
            f"{prefix}_cosine": mean["cosine_sum"],
            f"{prefix}_cosine_centred": mean["cosine_centred_sum"],
            f"{prefix}_cosine_unigram": mean["cosine_unigram_sum"],
            **further,
        }


def evaluate(model: ObjectiveModel, blocks: Dataset, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Evaluation:
    """Score every next token of `blocks` in evaluation mode.

    `shard` = (rank, ranks) scores every ranks-th batch only; add the shards' sums with `combine`. The first token of a
    block is context alone.
    """
    device = next(model.parameters()).device
    terms = dict(zip((t.name for t in model.objective.terms), model.objective.terms, strict=True))
    weights = dict(zip(terms, model.objective.weights, strict=True))
    weights = {name: weight for name, weight in weights.items() if weight or name == "ce"}
    frequencies, documents = _count(blocks, model.embeddings.weight.shape[0])
    measures: dict[str, Term] = {
        "ce": CrossEntropy(),
        "correct": Accuracy(),
        "cosine": CosineProxy(),
        "cosine_centred": CosineProxy(frequencies.to(device)),
        "cosine_unigram": UnigramCosine(frequencies.to(device)),
        **{f"{name}_loss": terms[name] for name in weights if name != "ce"},
    }
    sums = torch.zeros(len(measures) + 1, documents, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for i, (input_ids, document_ids) in enumerate(_batches(blocks, batch_size)):
        if i % shard[1] != shard[0]:
            continue
        tokens = torch.from_numpy(input_ids).to(device)  # (batch, time)
        values = model.values(tokens, tokens, measures)  # (batch, time - 1) each
        owners = torch.from_numpy(document_ids[:, 1:].reshape(-1)).long()
        sums[0].index_add_(0, owners, torch.ones(owners.shape, dtype=torch.float64))
        for row, value in zip(sums[1:], values.values(), strict=True):
            row.index_add_(0, owners, value.flatten().double().cpu())
    model.train(was_training)
    return _as_evaluation(sums, list(measures), weights)


def combine(evaluation: Evaluation, total) -> Evaluation:
    """The evaluation over all shards; `total` adds a tensor over the ranks (for instance accelerator.reduce)."""
    frame = evaluation.per_document
    sums = total(torch.from_numpy(frame.iloc[:, 1:].to_numpy(copy=True)))
    frame = frame.assign(**dict(zip(frame.columns[1:], sums.T.cpu().numpy(), strict=True)))
    return Evaluation(frame, evaluation.weights)


def _as_evaluation(sums: torch.Tensor, names: list[str], weights: dict[str, float]) -> Evaluation:
    columns = ["tokens", *(name if name == "correct" else f"{name}_sum" for name in names)]
    frame = pd.DataFrame(sums.T.numpy(), columns=columns)
    frame.insert(0, "document", np.arange(len(frame)))
    return Evaluation(frame, weights)


def _count(blocks: Dataset, vocab: int) -> tuple[torch.Tensor, int]:
    """Frequency of each token among those that are scored (vocab,), and the number of documents."""
    counts, documents = np.zeros(vocab), 0
    for input_ids, document_ids in _batches(blocks, 1024):
        counts += np.bincount(input_ids[:, 1:].ravel(), minlength=vocab)
        documents = max(documents, 1 + int(document_ids.max()))
    return torch.from_numpy(counts / counts.sum()), documents


def _column(term: str) -> str:
    return "ce_sum" if term == "ce" else f"{term}_loss_sum"


def _batches(blocks: Dataset, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, document_ids), each (batch, time), in order."""
    rows = blocks.with_format("numpy")
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield batch["input_ids"].astype(np.int64), batch["document_ids"]


def evaluate_splits(
    model: ObjectiveModel, blocks: dict[str, Dataset], batch_size: int
) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics of the validation (eval_) and test (test_) blocks, and the sums per document of both with their split.

    A split without blocks is left out.
    """
    metrics, frames = {}, []
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in blocks and len(blocks[split]):
            result = evaluate(model, blocks[split], batch_size)
            metrics |= result.metrics(prefix)
            frames.append(result.per_document[result.per_document["tokens"] > 0].assign(split=split))
    return metrics, pd.concat(frames, ignore_index=True)
