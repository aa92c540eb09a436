"""The whole training step on a GPU: tokens a second, utilisation and peak memory, for our head and the textbook form.

Body, head, backward and AdamW under bfloat16 autocast, on random tokens: what the objective costs where it is used.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nbutils.batch import PEAK, flops_per_token
from nbutils.models import build_config
from nbutils.objectives import Objective, ObjectiveModel, next_tokens, textbook_loss

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
