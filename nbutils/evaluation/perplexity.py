"""Evaluation: sums per document over scored tokens, and the metrics that follow from them.

Every variant of every study is measured here, by the same code. Logits are never held for more than a chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from nbutils.data import UNLABELLED, Rows, in_order, token_lengths
from nbutils.objectives import (
    Accuracy,
    Confidence,
    CosineProxy,
    CrossEntropy,
    Distillation,
    Entropy,
    ObjectiveModel,
    TeacherAccuracy,
    TeacherAgreement,
    TeacherCrossEntropy,
    Term,
    UnigramCosine,
    next_tokens,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from nbutils.data import PreparedData

LARGEST_EXPONENT = 700  # whose exponential a float still holds
CALIBRATION_BINS = 15  # Guo et al. 2017
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)  # tried for the control's proxy
PROXIES = ("cosine", "cosine_centred", "cosine_unigram")
TUNED = "cosine_tuned"  # the first of them at the tuned temperature
TUNING_BLOCKS = 128  # of validation are enough to choose among them
SPLITS = {"validation": "eval", "test": "test"}  # and what their metrics begin with
# Whatever a student learned from, it is compared with its teacher alike: plainly, over the tokens that are scored.
TEACHER_MEASURES = {
    "kl_to_teacher": Distillation(temperature=1.0, positions="answers"),
    "agreement": TeacherAgreement(),
    "teacher_ce": TeacherCrossEntropy(),
    "teacher_correct": TeacherAccuracy(),
}


@dataclass(frozen=True)
class Evaluation:
    """Sums over the scored tokens of each document; every metric and interval follows from them.

    `per_document` has columns document, tokens and a sum for each measure: ce_sum (nats), correct, where the objective
    has a term in embedding space cosine_sum, cosine_centred_sum, cosine_unigram_sum (and cosine_tuned_sum),
    <term>_loss_sum for each further term and, where it is not divided by the tokens, <term>_units; in a full evaluation
    also entropy_sum (nats), confidence_sum, bytes and, where the model has a teacher, kl_to_teacher_sum (nats),
    agreement_sum, teacher_ce_sum (nats) and teacher_correct_sum. `further` measures have a <name>_sum each, too.
    `weights`, {term: weight}, are the objective's at the end of training. `calibration`, in a full evaluation, has
    columns bin, tokens, confidence_sum, correct_sum.
    """

    per_document: pd.DataFrame
    weights: dict[str, float]
    calibration: pd.DataFrame | None = None
    further: tuple[str, ...] = ()

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means over tokens, each under `prefix`_.

        loss (the objective), ce_loss (nats), perplexity, token_acc; of an objective in embedding space the cosine of mu
        and the gold embedding, the same centred, and what a unigram predictor would get; in a full evaluation also
        entropy (nats), bits_per_byte, ece and, with a teacher, kl_to_teacher (nats) and agreement.
        """
        totals = self.per_document.sum(skipna=False)  # a model that diverged has no perplexity, not a perfect one
        mean = {name: float(totals[name] / totals["tokens"]) for name in self.per_document.columns[2:]}
        own = {name: _column(name) for name in self.weights} | {name: f"{name}_sum" for name in self.further}
        for name, column in own.items():
            if (units := f"{name}_units") in totals:
                mean[column] = float(totals[column] / totals[units])
        ce = mean["ce_sum"]
        found = {
            "loss": sum(weight * mean[_column(name)] for name, weight in self.weights.items()),
            "ce_loss": ce,
            "perplexity": perplexity(ce),
            "token_acc": mean["correct"],
            **{name: mean[f"{name}_sum"] for name in (*PROXIES, TUNED) if f"{name}_sum" in mean},
            **{f"{name}_loss": mean[_column(name)] for name in self.weights if name != "ce"},
            **{name: mean[f"{name}_sum"] for name in self.further},
        }
        if self.calibration is not None:
            found["entropy"] = mean["entropy_sum"]
            found["bits_per_byte"] = (
                float(totals["ce_sum"] / math.log(2) / totals["bytes"]) if totals["bytes"] else math.nan
            )
            found["ece"] = expected_calibration_error(self.calibration)
            found |= {name: mean[f"{name}_sum"] for name in ("kl_to_teacher", "agreement") if f"{name}_sum" in mean}
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        if "teacher_ce_sum" in mean:
            metrics[f"teacher_{prefix}_ce_loss"] = mean["teacher_ce_sum"]
            metrics[f"teacher_{prefix}_perplexity"] = perplexity(mean["teacher_ce_sum"])
            metrics[f"teacher_{prefix}_token_acc"] = mean["teacher_correct_sum"]
        return metrics


def evaluate(
    model: ObjectiveModel,
    blocks: Rows,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    bytes_of_tokens: np.ndarray | None = None,
    tuned_temperature: float | None = None,
    further: Mapping[str, Term] = MappingProxyType({}),
) -> Evaluation:
    """Score every labelled next token of `blocks` in evaluation mode; with `bytes_of_tokens` (vocab,), in full.

    With a `tuned_temperature`, the proxy is measured at that one, too, and so are the measures of `further`.
    `shard` = (rank, ranks) scores every ranks-th batch only; add the shards' sums with `combine`. The first token of a
    block is context alone.
    """
    device = next(model.parameters()).device
    frequencies, documents = token_frequencies(getattr(blocks, "dataset", blocks), model.embeddings.weight.shape[0])
    weights = _weights(model)
    measures = _measures(model, frequencies.to(device), bytes_of_tokens is not None, tuned_temperature)
    further = dict(further)
    for term in model.objective.terms:
        further |= term.further_measures()
    measures |= further
    names = list(measures)
    trained = {t.name: t for t in model.objective.terms if t.name in weights}
    counted = {name: term for name, term in (trained | further).items() if term.own_rows}
    columns = ["tokens", *(name if name == "correct" else f"{name}_sum" for name in names)]
    columns += [f"{name}_units" for name in counted]
    columns += ["bytes"] if bytes_of_tokens is not None else []
    sums = torch.zeros(len(columns), len(documents), dtype=torch.float64)
    bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
    for targets, owners, values in _scored(model, blocks, batch_size, measures, shard):
        scored = targets >= 0  # (batch, time)
        rows = [scored, *(values[name] for name in names), *(term.units(targets) for term in counted.values())]
        if bytes_of_tokens is not None:
            rows.append(torch.from_numpy(bytes_of_tokens)[targets.clamp_min(0)] * scored)
            _add_to_bins(bins, values["confidence"][scored], values["correct"][scored])
        for total, row in zip(sums, rows, strict=True):
            total.index_add_(0, torch.searchsorted(documents, owners.flatten()), row.flatten().double())
    per_document = _frame(sums, columns, "document", documents.numpy())
    if bytes_of_tokens is None:
        return Evaluation(per_document, weights, further=tuple(further))
    calibration = _frame(bins, ["tokens", "confidence_sum", "correct_sum"], "bin")
    return Evaluation(per_document, weights, calibration, tuple(further))


def evaluate_run(
    model: ObjectiveModel,
    data: PreparedData,
    batch_size: int,
    splits: Sequence[str] = tuple(SPLITS),
    rows: Mapping[str, Rows] | None = None,
    further: Mapping[str, Term] = MappingProxyType({}),
) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    """The full evaluation of a trained model on validation (eval_) and test (test_), or on those of `splits` alone.

    `rows` stand for the data's own blocks where a teacher's cache adds to them; `further` measures are taken, too.

    Returns metrics, with the proxy at the temperature tuned on validation and evaluation_seconds; sums per document
    and calibration bins, both with their split.
    """
    start = time.perf_counter()
    lengths = token_lengths(data.tokenizer, model.output.weight.shape[0])
    metrics: dict[str, float] = {}
    tuned = (
        tune_temperature(model, data.blocks["validation"], batch_size) if model.objective.in_embedding_space else None
    )
    if tuned is not None:
        metrics["tuned_temperature"] = tuned
    documents, calibration = [], []
    for split, prefix in SPLITS.items():
        if split not in splits or split not in data.blocks or not len(data.blocks[split]):
            continue
        blocks = (rows or data.blocks)[split]
        settings = {"bytes_of_tokens": lengths, "tuned_temperature": tuned, "further": further}
        result = evaluate(model, blocks, batch_size, **settings)
        metrics |= result.metrics(prefix)
        documents.append(result.per_document[result.per_document["tokens"] > 0].assign(split=split))
        calibration.append(result.calibration.assign(split=split))
    metrics["evaluation_seconds"] = time.perf_counter() - start
    return metrics, pd.concat(documents, ignore_index=True), pd.concat(calibration, ignore_index=True)


def tune_temperature(model: ObjectiveModel, blocks: Dataset, batch_size: int) -> float:
    """The softmax temperature with the highest cosine proxy on the first `TUNING_BLOCKS` of `blocks`.

    A sharper or flatter softmax moves the proxy with no training at all; a gain must beat the control at its best.
    """
    proxies = proxies_at(model, blocks.select(range(min(len(blocks), TUNING_BLOCKS))), batch_size, TEMPERATURES)
    return max(TEMPERATURES, key=proxies.__getitem__)


def proxies_at(
    model: ObjectiveModel, blocks: Dataset, batch_size: int, temperatures: Sequence[float]
) -> dict[float, float]:
    """The mean cosine proxy over all scored tokens at each softmax temperature."""
    measures = {str(temperature): CosineProxy(temperature=temperature) for temperature in temperatures}
    found = [(targets >= 0, values) for targets, _, values in _scored(model, blocks, batch_size, measures)]
    return {
        temperature: torch.cat([values[str(temperature)][scored] for scored, values in found]).double().mean().item()
        for temperature in temperatures
    }


def perplexity(ce: float) -> float:
    """exp of a cross entropy in nats; NaN of NaN."""
    return math.inf if ce > LARGEST_EXPONENT else math.exp(ce)


def expected_calibration_error(calibration: pd.DataFrame) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over bins of the top probability (Guo et al. 2017, equation 3)."""
    gaps = (calibration["correct_sum"] - calibration["confidence_sum"]).abs()
    return float(gaps.sum() / calibration["tokens"].sum())


def combine(evaluation: Evaluation, total: Callable[[torch.Tensor], torch.Tensor]) -> Evaluation:
    """The evaluation over all shards; `total` adds a tensor over the ranks (for instance accelerator.reduce)."""
    frame = evaluation.per_document
    sums = total(torch.from_numpy(frame.iloc[:, 1:].to_numpy(copy=True)))
    frame = frame.assign(**dict(zip(frame.columns[1:], sums.T.cpu().numpy(), strict=True)))
    return replace(evaluation, per_document=frame)


def _measures(
    model: ObjectiveModel, frequencies: torch.Tensor, full: bool, tuned_temperature: float | None
) -> dict[str, Term]:
    terms = {f"{t.name}_loss": t for t in model.objective.terms if t.name in _weights(model) and t.name != "ce"}
    proxies = (CosineProxy(), CosineProxy(frequencies), UnigramCosine(frequencies))
    return {
        "ce": CrossEntropy(),
        "correct": Accuracy(),
        **(dict(zip(PROXIES, proxies, strict=True)) if model.objective.in_embedding_space else {}),
        **({TUNED: CosineProxy(temperature=tuned_temperature)} if tuned_temperature else {}),
        **terms,
        **({"entropy": Entropy(), "confidence": Confidence()} if full else {}),
        **(TEACHER_MEASURES if full and model.teacher is not None else {}),
    }


def _weights(model: ObjectiveModel) -> dict[str, float]:
    """The objective's terms and weights; cross entropy always, others where they count."""
    pairs = zip(model.objective.terms, model.objective.weights, strict=True)
    return {term.name: weight for term, weight in pairs if weight or term.name == "ce"}


def batches_to_score(
    model: ObjectiveModel, blocks: Rows, batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """(batch on the model's device, targets, owners): next tokens and their documents, (batch, time), in evaluation
    mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for i, batch in enumerate(in_order(_as_numpy(blocks), batch_size)):
        if i % shard[1] == shard[0]:
            documents = batch.pop("document_ids")
            targets = next_tokens(batch["labels"])
            moved = torch.cat([documents[:, 1:], documents[:, -1:]], 1)
            owners = documents.where(targets == UNLABELLED, moved)  # what follows a row's last token is padding
            yield {name: tensor.to(device) for name, tensor in batch.items()}, targets, owners
    model.train(was_training)


def _scored(
    model: ObjectiveModel,
    blocks: Rows,
    batch_size: int,
    measures: Mapping[str, Term],
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """(targets, owners, values), each (batch, time): the next tokens, their documents, and each measure of them."""
    for batch, targets, owners in batches_to_score(model, blocks, batch_size, shard):
        values = model.values(batch.pop("input_ids"), batch.pop("labels"), measures, batch)
        yield targets, owners, {name: value.cpu() for name, value in values.items()}


def _add_to_bins(bins: torch.Tensor, confidence: torch.Tensor, correct: torch.Tensor) -> None:
    """Add tokens, confidence and accuracy to the equal-width bin of each token's confidence."""
    index = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    for total, row in zip(bins, (torch.ones_like(confidence), confidence, correct), strict=True):
        total.index_add_(0, index, row.double())


def _frame(sums: torch.Tensor, columns: list[str], index: str, numbers: np.ndarray | None = None) -> pd.DataFrame:
    frame = pd.DataFrame(sums.T.numpy(), columns=columns)
    frame.insert(0, index, np.arange(len(frame)) if numbers is None else numbers)
    return frame


def token_frequencies(blocks: Dataset, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequency of each token among those that are scored (vocab,), and the documents' numbers, ascending.

    A corpus of millions of documents holds out a few: sums are kept for those alone.
    """
    counts, documents = torch.zeros(vocab, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for batch in in_order(_as_numpy(blocks), 1024):
        targets = next_tokens(batch["labels"])
        counts += targets[targets >= 0].bincount(minlength=vocab)
        documents = torch.cat([documents, batch["document_ids"].flatten()]).unique()
    return counts.double() / counts.sum(), documents


def _column(term: str) -> str:
    return "ce_sum" if term == "ce" else f"{term}_loss_sum"


def _as_numpy(blocks: Rows) -> Rows:
    """`blocks` with arrays in the place of lists, where they are a data set of the datasets library."""
    return blocks.with_format("numpy") if hasattr(blocks, "with_format") else blocks
