"""A made-up plan of prefix smoothing on disk, with all that such runs leave behind; no training.

Cross entropy, three forms, both controls at equal gold mass, a cell that equals cross entropy, and one that leaves the
gold token nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from synthetic_runs import PARAMETERS, STEPS, final_numbers, write_run

from nbutils.report.evidence import Arm, Study

SEEDS = (1, 2, 3, 4, 5)
NOTEBOOK = PARAMETERS.replace(
    "alpha: float = 0.5  # weight of the cosine term, in [0, 1]\n",
    'smoothing: str = "none"  # form\ntau: float = 0.2  # of the softmax\neps: float = 0.1  # of the mixed forms\n'
    'smoothed_over: str = "prefixes"  # or a control\n',
)
USUAL = {"smoothing": "none", "tau": 0.2, "eps": 0.1, "smoothed_over": "prefixes"}
ARMS = {
    "none": USUAL,
    "prefixes": USUAL | {"smoothing": "normalised"},
    "whitespace": USUAL | {"smoothing": "normalised", "smoothed_over": "prefixes_but_whitespace"},
    "uniform": USUAL | {"smoothing": "normalised", "smoothed_over": "uniform"},
    "random": USUAL | {"smoothing": "normalised", "smoothed_over": "random"},
    "stronger": USUAL | {"smoothing": "normalised", "tau": 0.5},
    "null": USUAL | {"smoothing": "unnormalised", "tau": 0.1},
    "mixed": USUAL | {"smoothing": "mixed_uniform"},
    "no-gold": USUAL | {"smoothing": "mixed_uniform", "eps": 1.0},
}
# (effective smoothing, ceiling, gold cross entropy gained, un-smoothed bits per byte gained, spelling gained)
TOLD = {
    "none": (0.0, 0.0, 0.0, 0.0, 0.0),
    "prefixes": (0.233, 0.30, 0.24, -0.010, 0.03),
    "whitespace": (0.20, 0.26, 0.21, -0.012, 0.03),
    "uniform": (0.233, 0.30, 0.27, 0.004, 0.0),
    "random": (0.233, 0.30, 0.29, 0.006, 0.0),
    "stronger": (0.524, 0.80, 0.70, 0.020, 0.02),
    "null": (2e-5, 2e-5, 0.0, 0.0, 0.0),
    "mixed": (0.08, 0.09, 0.07, -0.004, 0.01),
    "no-gold": (0.80, None, 2.5, None, -0.05),
}
SIDES = {"stage": "prefix", "claim": "better"}
CONTRASTS = [
    {"name": "beats-ce", "question": "Does prefix smoothing beat CE on un-smoothed bits per byte?", "better": "lower",
     "metric": "test_unsmoothed_bits_per_byte", "treatment": ARMS["prefixes"], "control": USUAL, "primary": True,
     "smallest_effect": 0.005},
    {"name": "beats-uniform", "question": "Does it beat uniform smoothing at equal gold mass?", "better": "lower",
     "metric": "test_unsmoothed_bits_per_byte", "treatment": ARMS["prefixes"], "control": ARMS["uniform"],
     "smallest_effect": 0.005},
    {"name": "spelling", "question": "Does it improve spelling?", "better": "higher", "metric": "spelling_acc",
     "treatment": ARMS["prefixes"], "control": USUAL, "smallest_effect": 0.01},
    {"name": "one-hot", "question": "Is it better scored one-hot?", "better": "lower", "metric": "test_ce_loss",
     "treatment": ARMS["prefixes"], "control": USUAL, "smallest_effect": 0.01},
    {"name": "no-gold", "question": "And without gold mass?", "better": "lower",
     "metric": "test_unsmoothed_bits_per_byte", "treatment": ARMS["no-gold"], "control": USUAL,
     "smallest_effect": 0.005},
]  # fmt: skip
NATS_PER_BIT_AND_BYTE = 3.0  # bytes of a token times ln 2: bits per byte are nats over it
TARGETS = [
    {"gold": " personality", "tokens": [" ", " p", " per", " person", " personal", " personality"],
     "weights": [0.01, 0.02, 0.03, 0.09, 0.13, 0.72]},
    {"gold": " strawberry", "tokens": [" ", " s", " st", " straw", " strawberry"],
     "weights": [0.02, 0.03, 0.04, 0.14, 0.77]},
]  # fmt: skip
UNIFORM_TARGETS = [{"gold": " personality", "tokens": [" personality"], "weights": [0.72], "each_other": 1e-5}]
TASKS = {"piqa": 40, "spelling_count": 30}


def write_plan(folder: Path) -> Path:
    """The plan file and the notebook it names, in `folder`."""
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": NOTEBOOK, "outputs": []}
    cells = [cell | {"execution_count": None, "id": "parameters"}]
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    (folder / "prefix.ipynb").write_text(json.dumps(notebook))
    matrix = {name: list(dict.fromkeys(arm[name] for arm in ARMS.values())) for name in USUAL} | {"seed": [*SEEDS]}
    everything = pd.MultiIndex.from_product([matrix[name] for name in USUAL], names=[*USUAL]).to_frame()
    wanted = [tuple(arm.values()) for arm in ARMS.values()]
    exclude = [dict(zip(USUAL, row, strict=True)) for row in everything.index.tolist() if row not in wanted]
    stage = {"name": "prefix", "notebook": str(folder / "prefix.ipynb"), "params": {"max_steps": STEPS}}
    stage |= {"matrix": matrix, "exclude": exclude}
    floor = {"stage": "prefix", "treatment": ARMS["null"], "control": USUAL}
    plan = {"name": "smooth", "stages": [stage], "noise_floor": floor}
    plan["contrasts"] = [SIDES | contrast for contrast in CONTRASTS]
    path = folder / "smooth.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def write_prefix(folder: Path, seeds: tuple[int, ...] = SEEDS) -> tuple[Path, Path]:
    """(runs folder, plan file) of the whole plan."""
    folder.mkdir(exist_ok=True)
    file, runs = write_plan(folder), folder / "runs"
    for name, arm in ARMS.items():
        for seed in seeds:
            numbers = prefix_numbers(name, seed)
            matrix = arm | {"seed": seed}
            run = write_run(runs / "smooth", "prefix", matrix, numbers | {"eval_cosine": 0.3})
            (run / "result.json").write_text(json.dumps(numbers))
            if name != "none":
                (run / "targets.json").write_text(json.dumps(UNIFORM_TARGETS if name == "uniform" else TARGETS))
            harness_rows(name, seed).to_parquet(run / "harness.parquet")
            _write_samples(run, name)
    return runs, file


def prefix_numbers(name: str, seed: int) -> dict[str, float]:
    """Results of an arm; its seed moves it as it moves cross entropy, and a little by itself."""
    smoothing, most, harm, unsmoothed, spelling = TOLD[name]
    own = np.random.default_rng([seed, [*TOLD].index(name)])
    plain = {key: value for key, value in final_numbers(0.0, seed, 0).items() if "cosine" not in key}
    numbers = plain | {"effective_smoothing": smoothing, "equals_cross_entropy": int(name in ("none", "null"))}
    numbers |= {"target_entropy": 2 * smoothing} | ({"unsmoothing_d": 0.05} if unsmoothed is not None else {})
    moved = 0.0 if name == "none" else 0.002 * own.normal()
    for split in ("eval", "test"):
        ce = plain[f"{split}_ce_loss"] + harm + moved
        bits = plain[f"{split}_ce_loss"] / NATS_PER_BIT_AND_BYTE
        numbers |= {f"{split}_ce_loss": ce, f"{split}_loss": ce, f"{split}_perplexity": float(np.exp(ce))}
        numbers[f"{split}_bits_per_byte"] = ce / NATS_PER_BIT_AND_BYTE
        numbers |= {f"{split}_kl_to_target": ce - 3 * smoothing, f"{split}_ece": 0.02 + 0.2 * smoothing}
        numbers |= {f"{split}_prefix_mass": 0.05 + 0.4 * smoothing, f"{split}_entropy": 3.0 + smoothing}
        if unsmoothed is not None:
            numbers[f"{split}_unsmoothed_bits_per_byte"] = bits + unsmoothed + moved / NATS_PER_BIT_AND_BYTE
            numbers[f"{split}_unsmoothed_ce"] = NATS_PER_BIT_AND_BYTE * numbers[f"{split}_unsmoothed_bits_per_byte"]
            numbers |= {f"{split}_clipped_gold": 0.1 * smoothing, f"{split}_clipped_mass": 0.001 * smoothing}
        if most is not None:
            numbers[f"{split}_predicted_cost"] = most
    return numbers | task_results(harness_rows(name, seed)) | {"spelling_acc": 0.3 + spelling + 0.002 * own.normal()}


def harness_rows(name: str, seed: int) -> pd.DataFrame:
    """What the harness kept of two steps of a run: at the first nothing is right."""
    items = np.random.default_rng([len(name), seed])
    frames = []
    for step in (100, STEPS):
        for place, (task, count) in enumerate(TASKS.items()):
            hardness = np.random.default_rng(place).random(count)
            skill = (0.5 + TOLD[name][4] * 3) * (step == STEPS)
            correct = (hardness + 0.1 * items.normal(size=count) < skill).astype(bool)
            frame = {"step": step, "task": task, "item": [f"{task}-{n}" for n in range(count)], "correct": correct}
            frame |= {"correct_norm": np.roll(correct, 1), "gold_bytes": np.arange(count) % 7 + 5, "choices": 2 + place}
            bits = 2.0 * frame["gold_bytes"] * (1 + 0.1 * hardness + 0.05 * TOLD[name][0])
            frames.append(pd.DataFrame(frame | {"gold_bits": bits}))
    return pd.concat(frames, ignore_index=True)


def task_results(rows: pd.DataFrame) -> dict[str, float]:
    """The harness's numbers in result.json."""
    found = {}
    for task, own in rows[rows["step"] == STEPS].groupby("task"):
        found |= {f"{task}_acc": own["correct"].mean(), f"{task}_acc_norm": own["correct_norm"].mean()}
        found[f"{task}_gold_bits_per_byte"] = float(own["gold_bits"].sum() / own["gold_bytes"].sum())
    return found


def arm_of(study: Study, name: str) -> Arm:
    """The arm of that name in ARMS."""
    return study.arm_of(ARMS[name])


def increases(name: str, metric: str = "test_ce_loss") -> list[float]:
    """What an arm's runs have more of than the control's, by seed."""
    return [prefix_numbers(name, seed)[metric] - prefix_numbers("none", seed)[metric] for seed in SEEDS]


def _write_samples(run: Path, name: str) -> None:
    samplers = ("as trained", "un-smoothed")
    samples: list[Mapping[str, Any]] = [
        {"prompt": f"Once <b>upon</b> a time {n}", "reference": "there was a mill.", "document": n, "sampler": sampler,
         "completion": f"of {name}, {sampler} {n} <script>x</script>"}
        for n in range(6)
        for sampler in samplers
    ]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
