"""Whole models: tokens a second and memory of a training step on a GPU, and what distillation saves.

Body, head, backward and AdamW under bfloat16 autocast, on random tokens: what the objective costs where it is used.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nbutils.batch import PEAK, flops_per_token
from nbutils.benchmarks.measuring import interleaved
from nbutils.foundation import ModelError
from nbutils.models import WEIGHT_FILES, build_config, load_trained, weight_files
from nbutils.objectives import Objective, ObjectiveModel, next_tokens, textbook_loss

NUMBERS = ("parameters", "bytes_on_disk", "generation_tokens_per_second", "scoring_tokens_per_second")

WARM_UP = 3  # steps that are not counted: allocation, choice of kernels


class TextbookModel(ObjectiveModel):
    """The same model with the objective's textbook form on full logits."""

    def forward(self, input_ids: Tensor, labels: Tensor, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, _ = self.targets(input_ids, labels)
        logits, targets = self.output(hidden).float(), next_tokens(labels)  # (positions, vocab), (batch, time)
        parts = zip(self.objective.terms, self.objective.weights, strict=True)
        return {"loss": sum(w * textbook_loss(t, logits, self.embeddings.weight, targets) for t, w in parts if w)}


def training_steps(
    model_name: str, objective: Objective, batch: int, block: int, steps: int, device: str = "cuda"
) -> pd.DataFrame:
    """Seconds a step, tokens/s, FLOP utilisation (NaN for a GPU without a known peak) and peak MiB, a row each side.

    `model_name` as in `build_config`, with random weights. Raises ModelError where there is none.
    """
    sides = {"textbook": TextbookModel, "chunked": ObjectiveModel}
    rows = [(name, *_measure(side, model_name, objective, batch, block, steps, device)) for name, side in sides.items()]
    table = pd.DataFrame(rows, columns=["side", "seconds", "flops", "peak_memory_mib"])
    table["tokens_per_second"] = batch * block / table["seconds"]
    table["utilisation"] = table.pop("flops") / table["seconds"] / peak_flops(device)
    return table.set_index("side")


def peak_flops(device: str) -> float:
    """The dense bfloat16 peak of this GPU from `nbutils.batch.cost.PEAK`; NaN where it is not listed, or no GPU."""
    if not device.startswith("cuda"):
        return math.nan
    name = _plain(torch.cuda.get_device_name(device))
    known = [gpu for gpu in PEAK if _plain(gpu) in name]
    return PEAK[max(known, key=len)] if known else math.nan


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def _measure(
    side: type[ObjectiveModel], model_name: str, objective: Objective, batch: int, block: int, steps: int, device: str
) -> tuple[float, float, float]:
    """Median seconds of a step, FLOPs of a step, peak MiB."""
    torch.manual_seed(0)
    config = build_config(model_name, 0, block)
    model = side(AutoModelForCausalLM.from_config(config), objective).to(device)
    step = _training_step(model, torch.randint(config.vocab_size, (batch, block), device=device))
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = list(_timed(step, WARM_UP + steps, on_gpu))[WARM_UP:]
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else math.nan
    alpha, top_k = objective.weights[1], objective.terms[1].top_k
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = batch * block * flops_per_token(config, parameters, block, {"alpha": alpha, "cos_topk": top_k})
    return median(seconds), flops, peak


def _training_step(model: ObjectiveModel, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    count = torch.tensor(tokens[:, 1:].numel(), device=tokens.device)
    counts = {term.name: count for term in model.objective.terms}

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(tokens, tokens, counts)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timed(step: Callable[[], None], times: int, on_gpu: bool) -> Iterator[float]:
    for _ in range(times):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        yield time.perf_counter() - start


@dataclass(frozen=True)
class SavedModel:
    """A model to measure: the folder or Hub name its files come from, and the model where it is loaded already."""

    folder: str | Path
    model: PreTrainedModel | None = None


@dataclass(frozen=True)
class Workload:
    """What all models do: `prompts` prompts of the same random tokens, `new_tokens` added to each; median of `rounds`.

    Where a model has fewer positions, all get shorter prompts and add less.
    """

    prompts: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 32
    rounds: int = 3
    seed: int = 0


def compression_numbers(
    teachers: Sequence[SavedModel | str | Path], student: SavedModel | str | Path, workload: Workload = Workload()
) -> dict[str, float]:
    """The student's NUMBERS and the teachers' as teacher_*, for result.json; `compression_table` says what they are.

    Several teachers must all be kept and all run: their sizes add up, and so do their times.
    """
    subjects = {f"teacher {i}": each for i, each in enumerate(teachers)} | {"student": student}
    table = compression_table(subjects, workload)[list(NUMBERS)]
    of_teachers = table.drop(index="student")
    numbers = table.loc["student"].to_dict()
    for name in NUMBERS:
        together = 1 / (1 / of_teachers[name]).sum() if name.endswith("per_second") else of_teachers[name].sum()
        numbers[f"teacher_{name}"] = float(together)
    return numbers


def compression_table(models: Mapping[str, SavedModel | str | Path], workload: Workload = Workload()) -> pd.DataFrame:
    """A row for each model, the first (the teacher) being what the others are compared with.

    Columns: parameters (shared matrices once), bytes_on_disk (of the weights), generation_tokens_per_second (new
    tokens of greedy generation that no end token stops), scoring_tokens_per_second (a forward pass with logits),
    times_smaller (parameters), times_smaller_on_disk, times_faster (generation). Models take turns after a round that
    warms up. Raises ModelError where a folder holds no model.
    """
    subjects = {name: each if isinstance(each, SavedModel) else SavedModel(each) for name, each in models.items()}
    loaded = {name: each.model or load_trained(Path(each.folder)) for name, each in subjects.items()}
    table = pd.DataFrame(index=list(subjects))
    table["parameters"] = [sum(each.numel() for each in model.parameters()) for model in loaded.values()]
    table["bytes_on_disk"] = [bytes_on_disk(each.folder) for each in subjects.values()]
    for name, values in _speeds(loaded, workload).items():
        table[name] = values
    return with_ratios(table)


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with how many times smaller and faster each row is than the first."""
    first = table.iloc[0]
    return table.assign(
        times_smaller=first["parameters"] / table["parameters"],
        times_smaller_on_disk=first["bytes_on_disk"] / table["bytes_on_disk"],
        times_faster=table["generation_tokens_per_second"] / first["generation_tokens_per_second"],
    )


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of the files that hold the weights of a model folder, or of a Hub model that was loaded before.

    Raises ModelError where there is none.
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"{folder} holds no weights ({', '.join(WEIGHT_FILES)}). Give a folder written by save_pretrained, or the "
            "Hub name of a model that was loaded before."
        )
    return sum(file.stat().st_size for file in files)


def _speeds(models: Mapping[str, PreTrainedModel], workload: Workload) -> dict[str, list[float]]:
    tokens, new_tokens = _prompts(list(models.values()), workload)
    modes = {model: model.training for model in models.values()}
    for model in modes:
        model.eval()
    try:
        generate = {name: _generation(model, tokens, new_tokens) for name, model in models.items()}
        generation_seconds = interleaved(generate, workload.rounds)
        score = {name: _scoring(model, tokens) for name, model in models.items()}
        scoring_seconds = interleaved(score, workload.rounds)
    finally:
        for model, was_training in modes.items():
            model.train(was_training)
    return {
        "generation_tokens_per_second": [len(tokens) * new_tokens / generation_seconds[name] for name in models],
        "scoring_tokens_per_second": [tokens.numel() / scoring_seconds[name] for name in models],
    }


def _prompts(models: Sequence[PreTrainedModel], workload: Workload) -> tuple[Tensor, int]:
    """Token ids (prompts, tokens) that every model knows, and how many tokens fit behind them in all models."""
    positions = min(getattr(model.config, "max_position_embeddings", None) or 10**9 for model in models)
    length = min(workload.prompt_tokens, max(1, positions // 2))
    vocabulary = min(model.config.vocab_size for model in models)
    generator = torch.Generator().manual_seed(workload.seed)
    tokens = torch.randint(vocabulary, (workload.prompts, length), generator=generator)
    return tokens, min(workload.new_tokens, positions - length)


def _generation(model: PreTrainedModel, tokens: Tensor, new_tokens: int) -> Callable[[], Any]:
    prompts = tokens.to(model.device)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "eos_token_id": None}

    def step() -> Tensor:
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **settings)

    return step


def _scoring(model: PreTrainedModel, tokens: Tensor) -> Callable[[], Any]:
    prompts = tokens.to(model.device)

    @torch.no_grad()
    def step() -> Tensor:
        return model(prompts, use_cache=False).logits

    return step
