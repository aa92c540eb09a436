"""Evaluation: sums per document over scored tokens, and the metrics that follow from them.

Every variant of every study is measured here, by the same code. Logits are never held for more than a chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from nbutils.objectives import (
    Accuracy,
    Confidence,
    CosineProxy,
    CrossEntropy,
    Entropy,
    ObjectiveModel,
    Term,
    UnigramCosine,
)
from nbutils.token_bytes import token_lengths

if TYPE_CHECKING:
    from datasets import Dataset

    from nbutils.preparation import PreparedData

CALIBRATION_BINS = 15  # Guo et al. 2017
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)  # tried for the control's proxy
TUNING_BLOCKS = 128  # of validation are enough to choose among them
SPLITS = {"validation": "eval", "test": "test"}  # and what their metrics begin with


@dataclass(frozen=True)
class Evaluation:
    """Sums over the scored tokens of each document; every metric and interval follows from them.

    `per_document` has columns document, tokens and a sum for each measure: ce_sum (nats), correct, cosine_sum,
    cosine_centred_sum, cosine_unigram_sum, <term>_loss_sum for each further term of the objective; in a full evaluation
    also entropy_sum (nats), confidence_sum and bytes. `weights`, {term: weight}, are the objective's at the end of
    training. `calibration`, in a full evaluation, has columns bin, tokens, confidence_sum, correct_sum.
    """

    per_document: pd.DataFrame
    weights: dict[str, float]
    calibration: pd.DataFrame | None = None

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means over tokens, each under `prefix`_.

        loss (the objective), ce_loss (nats), perplexity, token_acc; cosine of mu and the gold embedding, the same
        centred, and the cosine that a unigram predictor would get; in a full evaluation also entropy (nats),
        bits_per_byte and ece.
        """
        totals = self.per_document.sum(skipna=False)  # a model that diverged has no perplexity, not a perfect one
        mean = {name: float(totals[name] / totals["tokens"]) for name in self.per_document.columns[2:]}
        ce = mean["ce_sum"]
        found = {
            "loss": sum(weight * mean[_column(name)] for name, weight in self.weights.items()),
            "ce_loss": ce,
            "perplexity": math.inf if ce > 700 else math.exp(ce),
            "token_acc": mean["correct"],
            "cosine": mean["cosine_sum"],
            "cosine_centred": mean["cosine_centred_sum"],
            "cosine_unigram": mean["cosine_unigram_sum"],
            **{f"{name}_loss": mean[_column(name)] for name in self.weights if name != "ce"},
        }
        if self.calibration is not None:
            found["entropy"] = mean["entropy_sum"]
            found["bits_per_byte"] = (
                float(totals["ce_sum"] / math.log(2) / totals["bytes"]) if totals["bytes"] else math.nan
            )
            found["ece"] = expected_calibration_error(self.calibration)
        return {f"{prefix}_{name}": value for name, value in found.items()}


def evaluate(
    model: ObjectiveModel,
    blocks: Dataset,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    bytes_of_tokens: np.ndarray | None = None,
) -> Evaluation:
    """Score every next token of `blocks` in evaluation mode; with `bytes_of_tokens` (vocab,), a full evaluation.

    `shard` = (rank, ranks) scores every ranks-th batch only; add the shards' sums with `combine`. The first token of a
    block is context alone.
    """
    device = next(model.parameters()).device
    frequencies, documents = _count(blocks, model.embeddings.weight.shape[0])
    weights = _weights(model)
    measures = _measures(model, frequencies.to(device), full=bytes_of_tokens is not None)
    names = list(measures)
    sums = torch.zeros(1 + len(names) + (bytes_of_tokens is not None), documents, dtype=torch.float64)
    bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
    for tokens, document_ids, values in _scored(model, blocks, batch_size, measures, shard):
        owners = torch.from_numpy(document_ids[:, 1:].reshape(-1)).long()
        rows = [torch.ones(owners.shape), *(values[name] for name in names)]
        if bytes_of_tokens is not None:
            rows.append(torch.from_numpy(bytes_of_tokens[tokens[:, 1:].reshape(-1)]))
            _add_to_bins(bins, values["confidence"], values["correct"])
        for total, row in zip(sums, rows, strict=True):
            total.index_add_(0, owners, row.double())
    columns = ["tokens", *(name if name == "correct" else f"{name}_sum" for name in names)]
    if bytes_of_tokens is None:
        return Evaluation(_frame(sums, columns, "document"), weights)
    calibration = _frame(bins, ["tokens", "confidence_sum", "correct_sum"], "bin")
    return Evaluation(_frame(sums, [*columns, "bytes"], "document"), weights, calibration)


def evaluate_run(
    model: ObjectiveModel, data: PreparedData, batch_size: int
) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    """The full evaluation of a trained model on validation (eval_) and test (test_); an empty split is left out.

    Returns metrics, with the proxy at the temperature tuned on validation and evaluation_seconds; sums per document
    and calibration bins, both with their split.
    """
    start = time.perf_counter()
    lengths = token_lengths(data.tokenizer, model.output.weight.shape[0])
    temperature = tune_temperature(model, data.blocks["validation"], batch_size)
    metrics: dict[str, float] = {"tuned_temperature": temperature}
    documents, calibration = [], []
    for split, prefix in SPLITS.items():
        if split not in data.blocks or not len(data.blocks[split]):
            continue
        result = evaluate(model, data.blocks[split], batch_size, bytes_of_tokens=lengths)
        metrics |= result.metrics(prefix)
        metrics[f"{prefix}_cosine_tuned"] = proxy_at(model, data.blocks[split], batch_size, temperature)
        documents.append(result.per_document[result.per_document["tokens"] > 0].assign(split=split))
        calibration.append(result.calibration.assign(split=split))
    metrics["evaluation_seconds"] = time.perf_counter() - start
    return metrics, pd.concat(documents, ignore_index=True), pd.concat(calibration, ignore_index=True)


def tune_temperature(model: ObjectiveModel, blocks: Dataset, batch_size: int) -> float:
    """The softmax temperature with the highest cosine proxy on the first `TUNING_BLOCKS` of `blocks`.

    A sharper or flatter softmax moves the proxy with no training at all; a gain must beat the control at its best.
    """
    some = blocks.select(range(min(len(blocks), TUNING_BLOCKS)))
    return max(TEMPERATURES, key=lambda temperature: proxy_at(model, some, batch_size, temperature))


def proxy_at(model: ObjectiveModel, blocks: Dataset, batch_size: int, temperature: float) -> float:
    """The mean cosine proxy over all scored tokens at a softmax temperature."""
    measures = {"proxy": CosineProxy(temperature=temperature)}
    values = [scored["proxy"] for _, _, scored in _scored(model, blocks, batch_size, measures)]
    return torch.cat(values).double().mean().item()


def expected_calibration_error(calibration: pd.DataFrame) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over bins of the top probability (Guo et al. 2017, equation 3)."""
    gaps = (calibration["correct_sum"] - calibration["confidence_sum"]).abs()
    return float(gaps.sum() / calibration["tokens"].sum())


def combine(evaluation: Evaluation, total: Callable[[torch.Tensor], torch.Tensor]) -> Evaluation:
    """The evaluation over all shards; `total` adds a tensor over the ranks (for instance accelerator.reduce)."""
    frame = evaluation.per_document
    sums = total(torch.from_numpy(frame.iloc[:, 1:].to_numpy(copy=True)))
    frame = frame.assign(**dict(zip(frame.columns[1:], sums.T.cpu().numpy(), strict=True)))
    return Evaluation(frame, evaluation.weights)


def _measures(model: ObjectiveModel, frequencies: torch.Tensor, full: bool) -> dict[str, Term]:
    terms = {f"{t.name}_loss": t for t in model.objective.terms if t.name in _weights(model) and t.name != "ce"}
    return {
        "ce": CrossEntropy(),
        "correct": Accuracy(),
        "cosine": CosineProxy(),
        "cosine_centred": CosineProxy(frequencies),
        "cosine_unigram": UnigramCosine(frequencies),
        **terms,
        **({"entropy": Entropy(), "confidence": Confidence()} if full else {}),
    }


def _weights(model: ObjectiveModel) -> dict[str, float]:
    """The objective's terms and weights; cross entropy always, others where they count."""
    pairs = zip(model.objective.terms, model.objective.weights, strict=True)
    return {term.name: weight for term, weight in pairs if weight or term.name == "ce"}


def _scored(
    model: ObjectiveModel,
    blocks: Dataset,
    batch_size: int,
    measures: Mapping[str, Term],
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]]:
    """(input_ids, document_ids, values): (batch, time) twice, and each measure flat, (batch x (time - 1),)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for i, (input_ids, document_ids) in enumerate(_batches(blocks, batch_size)):
        if i % shard[1] == shard[0]:
            tokens = torch.from_numpy(input_ids).to(device)
            values = model.values(tokens, tokens, measures)
            yield input_ids, document_ids, {name: value.flatten().cpu() for name, value in values.items()}
    model.train(was_training)


def _add_to_bins(bins: torch.Tensor, confidence: torch.Tensor, correct: torch.Tensor) -> None:
    """Add tokens, confidence and accuracy to the equal-width bin of each token's confidence."""
    index = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    for total, row in zip(bins, (torch.ones_like(confidence), confidence, correct), strict=True):
        total.index_add_(0, index, row.double())


def _frame(sums: torch.Tensor, columns: list[str], index: str) -> pd.DataFrame:
    frame = pd.DataFrame(sums.T.numpy(), columns=columns)
    frame.insert(0, index, np.arange(len(frame)))
    return frame


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
