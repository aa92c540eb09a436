"""A student that reads a teacher's cache against one whose teacher runs on every batch: seconds an epoch, final loss.

    python -m nbutils batch params/benchmarks.yaml        # the sizes that the bars were set for

Random tokens and random models: time does not depend on what they say. What a cache costs once is beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nbutils.benchmarks.measuring import interleaved, verdict_table
from nbutils.benchmarks.sides import LOGIT_SPREAD, TEMPERATURE
from nbutils.data import PreparedData, Rows, in_order
from nbutils.models import CACHES, LiveTeacher, WithTeacher, build_cache
from nbutils.objectives import ObjectiveModel, Teacher, distillation, next_tokens

BARS = {"hidden": 0.5, "topk": 0.4}  # share of the live teacher's seconds an epoch, at most
SEEDS = 3  # students of the live teacher, whose final losses say what the seed alone does
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """A student's epoch: `blocks` of `block_size` tokens in batches; layers, width and heads of both models."""

    vocab: int = 8192
    blocks: int = 64
    block_size: int = 128
    batch: int = 8
    top_k: int = 64
    teacher: tuple[int, int, int] = (8, 384, 6)
    student: tuple[int, int, int] = (4, 192, 3)

    def data(self) -> PreparedData:
        """Random tokens, an eighth as many for validation."""
        from datasets import Dataset, Features, List, Value

        generator = torch.Generator().manual_seed(0)
        features = Features({"input_ids": List(Value("int32"))})
        blocks = {
            split: Dataset.from_dict(
                {"input_ids": torch.randint(self.vocab, (number, self.block_size), generator=generator).tolist()},
                features,
            ).with_format("numpy")
            for split, number in (("train", self.blocks), ("validation", max(1, self.blocks // 8)))
        }
        card = {"fingerprint": f"random tokens {self}", "vocab_size": self.vocab, "block_size": self.block_size}
        return PreparedData(Path(tempfile.gettempdir()), card | {"task": "lm"}, None, blocks, None)

    def model(self, shape: tuple[int, int, int], seed: int, tied: bool = True) -> GPT2LMHeadModel:
        layers, width, heads = shape
        torch.manual_seed(seed)
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=self.vocab,
            n_positions=self.block_size,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            **no_dropout,
        )
        return GPT2LMHeadModel(config).to("cuda" if torch.cuda.is_available() else "cpu")

    def live_teacher(self) -> LiveTeacher:
        """A teacher with opinions: its logits are as spread as a trained model's."""
        model = self.model(self.teacher, seed=1, tied=False).eval().requires_grad_(False)
        model.lm_head.weight.normal_(std=LOGIT_SPREAD / self.teacher[1] ** 0.5)
        return LiveTeacher((model,))


class Student:
    """A student of a teacher, live or cached, and its optimiser."""

    def __init__(self, sizes: Sizes, teacher: Teacher, rows: Rows, seed: int = 0) -> None:
        objective = distillation("forward", 0.5, 0.5, TEMPERATURE)
        self.model = ObjectiveModel(sizes.model(sizes.student, seed), objective, teacher)
        self.rows, self.batch = rows, sizes.batch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def epoch(self) -> None:
        """One pass over the training rows, in their order."""
        device = self.model.output.weight.device
        for batch in in_order(self.rows, self.batch):
            batch = {name: value.to(device) for name, value in batch.items()}
            targets = next_tokens(batch["labels"])
            counts = {term.name: term.units(targets).sum() for term in self.model.objective.terms}
            self.model(**batch, counts=counts)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, teacher: LiveTeacher, rows: Rows) -> float:
        """The objective on `rows`, against the live teacher whatever the student learnt from; nats."""
        objective, device = self.model.objective, self.model.output.weight.device
        subject = ObjectiveModel(self.model.model, objective, teacher)
        measures = {term.name: term for term in objective.terms}
        sums = dict.fromkeys(measures, 0.0)
        positions = 0
        for batch in in_order(rows, self.batch):
            values = subject.values(batch["input_ids"].to(device), batch["labels"].to(device), measures)
            sums = {name: total + values[name].sum().item() for name, total in sums.items()}
            positions += values[next(iter(values))].numel()
        return sum(w * sums[t.name] for t, w in zip(objective.terms, objective.weights, strict=True)) / positions


def compare_caches(sizes: Sizes, rounds: int) -> pd.DataFrame:
    """A row each for "live", "hidden" and "topk": what a student pays and gets.

    Columns: seconds (an epoch, the median of `rounds` in turns), loss (on validation, after one epoch), seed noise (the
    live students' largest less smallest loss over seeds), made (seconds the cache took, once), bytes a token.
    """
    data, live = sizes.data(), sizes.live_teacher()
    caches = {}
    try:
        for kind in CACHES:
            caches[kind] = build_cache(live, data, kind, TEMPERATURE, sizes.top_k, sizes.batch)
        train, validation = data.blocks["train"], data.blocks["validation"]
        sources: dict[str, tuple[Teacher, Rows]] = {"live": (live, train)}
        sources |= {kind: (cache, WithTeacher(train, cache, "train")) for kind, cache in caches.items()}
        seconds = interleaved({side: Student(sizes, *source).epoch for side, source in sources.items()}, rounds)
        losses = {side: _final_loss(sizes, source, live, validation) for side, source in sources.items()}
        others = [_final_loss(sizes, sources["live"], live, validation, seed) for seed in range(1, SEEDS)]
    finally:
        for cache in caches.values():
            shutil.rmtree(cache.folder, ignore_errors=True)
    noise = max(losses["live"], *others) - min(losses["live"], *others)
    made = {"live": 0.0} | {kind: cache.card["seconds"] for kind, cache in caches.items()}
    size = {"live": 0} | {kind: cache.bytes_per_token for kind, cache in caches.items()}
    columns = {"seconds": seconds, "loss": losses, "made": made, "bytes a token": size}
    return pd.DataFrame(columns).assign(**{"seed noise": noise})


def _final_loss(
    sizes: Sizes, source: tuple[Teacher, Rows], live: LiveTeacher, validation: Rows, seed: int = 0
) -> float:
    student = Student(sizes, *source, seed)
    student.epoch()
    return student.loss(live, validation)


def cache_verdicts(measured: pd.DataFrame) -> pd.DataFrame:
    """`verdict_table` of time and loss for each kind of cache.

    Of the loss "ours" is its distance from the live student's and "theirs" the seed noise.
    """
    rows = []
    live = measured.loc["live"]
    for kind in CACHES:
        case, cached = f"{kind} cache", measured.loc[kind]
        rows.append((case, "seconds", cached["seconds"], live["seconds"], "live teacher", BARS[kind]))
        distance = abs(cached["loss"] - live["loss"])
        rows.append((case, "loss", distance, live["seed noise"], f"seed noise of {SEEDS} students", 1.0))
    return verdict_table(rows)


def cache_results(measured: pd.DataFrame) -> dict[str, float]:
    """What result.json keeps of `compare_caches`: cached_{side}_{seconds, loss, made_seconds, bytes_per_token}."""
    names = {"seconds": "seconds", "loss": "loss", "made": "made_seconds", "bytes a token": "bytes_per_token"}
    return {
        f"cached_{side}_{name}": float(measured.loc[side, column])
        for side in measured.index
        for column, name in names.items()
    } | {"cached_seed_noise": float(measured["seed noise"].iloc[0])}
