"""Whole models: tokens a second and memory of a training step on a GPU, and what distillation saves.

Body, head, backward and AdamW under bfloat16 autocast, on random tokens: what the objective costs where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nbutils.batch import PEAK, flops_per_token
from nbutils.benchmarks.measuring import MIB, Step, interleaved, slug
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
    for _ in range(WARM_UP):
        step()
    seconds = interleaved({"step": step}, steps)["step"]
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu else math.nan
    alpha, top_k = objective.weights[1], objective.terms[1].top_k
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = batch * block * flops_per_token(config, parameters, block, {"alpha": alpha, "cos_topk": top_k})
    return seconds, flops, peak


def _training_step(model: ObjectiveModel, tokens: Tensor) -> Step:
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


def step_results(whole: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """What result.json keeps of whole training steps: {case}_{side}_step_{quantity}; `whole` by the case's name."""
    return {
        slug(f"{case} {side} step {quantity}"): float(value)
        for case, table in whole.items()
        for (side, quantity), value in table.stack().items()
    }


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


def compression_numbers(
    teachers: Sequence[str | Path], student: SavedModel | str | Path, workload: Workload = Workload()
) -> dict[str, float]:
    """The student's NUMBERS and the teachers' as teacher_*, for result.json; `sizes_and_speeds` says what they are.

    Several teachers must all be kept and all run: their sizes add up, and so do their times.
    """
    table = sizes_and_speeds([*teachers, student], workload)
    of_teachers, numbers = table.iloc[:-1], table.iloc[-1].to_dict()
    for name in NUMBERS:
        together = 1 / (1 / of_teachers[name]).sum() if name.endswith("per_second") else of_teachers[name].sum()
        numbers[f"teacher_{name}"] = float(together)
    return numbers


def sizes_and_speeds(models: Sequence[SavedModel | str | Path], workload: Workload = Workload()) -> pd.DataFrame:
    """A row for each model, columns NUMBERS.

    parameters (shared matrices once), bytes_on_disk (of the weights), generation_tokens_per_second (new tokens of
    greedy generation that no end token stops), scoring_tokens_per_second (a forward pass with logits). Models take
    turns after a round that warms up. Raises ModelError where a folder holds no model.
    """
    subjects = [each if isinstance(each, SavedModel) else SavedModel(each) for each in models]
    loaded = [each.model or load_trained(Path(each.folder)) for each in subjects]
    parameters = [sum(each.numel() for each in model.parameters()) for model in loaded]
    stored = [bytes_on_disk(each.folder) for each in subjects]
    columns = parameters, stored, *_speeds(loaded, workload)
    return pd.DataFrame(dict(zip(NUMBERS, columns, strict=True)))


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


def _speeds(models: Sequence[PreTrainedModel], workload: Workload) -> tuple[list[float], list[float]]:
    """Tokens a second of each model: generated, and scored."""
    tokens, new_tokens = _prompts(models, workload)
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        generation = interleaved({i: _generation(m, tokens, new_tokens) for i, m in enumerate(models)}, workload.rounds)
        scoring = interleaved({i: _scoring(m, tokens) for i, m in enumerate(models)}, workload.rounds)
    finally:
        for model, was_training in zip(models, modes, strict=True):
            model.train(was_training)
    return (
        [len(tokens) * new_tokens / seconds for seconds in generation.values()],
        [tokens.numel() / seconds for seconds in scoring.values()],
    )


def _prompts(models: Sequence[PreTrainedModel], workload: Workload) -> tuple[Tensor, int]:
    """Token ids (prompts, tokens) that every model knows, and how many tokens fit behind them in all models."""
    positions = min(getattr(model.config, "max_position_embeddings", None) or 10**9 for model in models)
    length = min(workload.prompt_tokens, max(1, positions // 2))
    vocabulary = min(model.config.vocab_size for model in models)
    tokens = torch.randint(vocabulary, (workload.prompts, length), generator=torch.Generator().manual_seed(0))
    return tokens, min(workload.new_tokens, positions - length)


def _generation(model: PreTrainedModel, tokens: Tensor, new_tokens: int) -> Step:
    prompts = tokens.to(model.device)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "eos_token_id": None}
    return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **settings)


def _scoring(model: PreTrainedModel, tokens: Tensor) -> Step:
    prompts = tokens.to(model.device)
    return torch.no_grad()(lambda: model(prompts, use_cache=False).logits)
