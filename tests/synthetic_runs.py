"""Run folders made up on disk, file by file, for tests of what reads them: no notebook, no training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
PARAMETERS = """data_folder: str = ""  # a data-prep run folder
alpha: float = 0.5  # weight of the cosine term, in [0, 1]
max_steps: int = 200  # optimiser steps
seed: int = 42  # weights and data order
noise_seed: int = 0  # dropout
run_folder: str = ""  # where results go"""


def _contrast(name: str, question: str, metric: str, alpha: float, effect: float, **changes: Any) -> dict[str, Any]:
    told = {"name": name, "question": question, "stage": "cosine", "metric": metric, "smallest_effect": effect}
    sides = {"treatment": {"alpha": alpha, "noise_seed": 0}, "control": {"alpha": 0.0, "noise_seed": 0}}
    return told | sides | {"better": "lower", "claim": "no worse"} | changes


GAIN = {"better": "higher", "claim": "better"}
CONTRASTS = [
    _contrast(
        "mixing-perplexity",
        "Is alpha 0.5 no worse than cross entropy in perplexity?",
        "test_ce_loss",
        0.5,
        0.01,
        primary=True,
    ),
    _contrast(
        "mixing-proxy",
        "Does alpha 0.5 raise the cosine of the expected with the true embedding?",
        "test_cosine",
        0.5,
        0.005,
        **GAIN,
    ),
    _contrast(
        "cosine-alone",
        "Is the cosine term alone no worse than cross entropy in perplexity?",
        "test_ce_loss",
        1.0,
        0.01,
    ),
    _contrast("mixing-accuracy", "Does alpha 0.5 raise token accuracy?", "test_token_acc", 0.5, 0.002, **GAIN),
]
STEPS, EVALUATE_EVERY = 200, 20
UNIGRAM = 6.2  # nats per token


def write_plan(folder: Path, **changes: Any) -> Path:
    """A plan file with one study and its A/A pair, and the notebook it names, in `folder`."""
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": PARAMETERS, "outputs": []}
    cell["execution_count"] = None
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell | {"id": "parameters"}]}
    (folder / "study.ipynb").write_text(json.dumps(notebook))
    stage = {"name": "cosine", "notebook": str(folder / "study.ipynb"), "params": {"max_steps": STEPS}}
    stage["matrix"] = {"alpha": [0.0, 0.5, 1.0], "seed": [1, 2, 3, 4, 5], "noise_seed": [0, 1]}
    stage["exclude"] = [{"alpha": 0.5, "noise_seed": 1}, {"alpha": 1.0, "noise_seed": 1}]
    sides = {"treatment": {"alpha": 0.0, "noise_seed": 1}, "control": {"alpha": 0.0, "noise_seed": 0}}
    plan = {"name": "toy", "stages": [stage], "contrasts": CONTRASTS, "noise_floor": {"stage": "cosine", **sides}}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return path


def final_numbers(alpha: float, seed: int, noise_seed: int) -> dict[str, float]:
    """Results in which alpha 0.5 gains 0.004 nats and 0.02 of cosine, alpha 1 loses 0.5 nats; seeds matter more."""
    of_seed, of_run = np.random.default_rng(seed), np.random.default_rng([seed, round(alpha * 10), noise_seed])
    ce = 4.1 + 0.03 * of_seed.normal() + 0.004 * of_run.normal() + {0.0: 0.0, 0.5: -0.004, 1.0: 0.5}[alpha]
    cosine = 0.35 + 0.04 * alpha + 0.01 * of_seed.normal() + 0.002 * of_run.normal()
    accuracy = 0.31 + 0.0005 * of_run.normal() - 0.05 * (alpha == 1.0) + 0.001 * (alpha == 0.5)
    numbers = {}
    for split, shift in (("eval", 0.0), ("test", 0.02)):
        numbers |= {f"{split}_ce_loss": ce + shift, f"{split}_perplexity": float(np.exp(ce + shift))}
        numbers |= {f"{split}_loss": ce + shift, f"{split}_cosine": cosine, f"{split}_token_acc": accuracy}
        numbers[f"unigram_{split}_ce_loss"] = UNIGRAM
    return numbers | {
        "parameters": 1_234_567,
        "steps": STEPS,
        "tokens_seen": STEPS * 1024,
        "train_seconds": 20 + 3 * (alpha > 0) + of_run.normal(),
        "tokens_per_second": STEPS * 1024 / (20 + 3 * (alpha > 0)),
        "peak_memory_mib": 640 + 40 * (alpha > 0),
        "best_eval_ce_loss": ce,
    }


def write_run(plan_folder: Path, stage: str, matrix: Mapping[str, Any], result: Mapping[str, float], **changes) -> Path:
    """One run folder with everything a finished run leaves; `changes` replace entries of its manifest."""
    from nbutils.runs.plans import variant_name

    variant = variant_name(stage, matrix)
    folder = plan_folder / variant
    folder.mkdir(parents=True)
    manifest = {
        "plan": plan_folder.name, "stage": stage, "variant": variant, "notebook": "notebooks/study.ipynb",
        "key": "0123456789abcdef" * 4, "status": "finished", "exit_code": 0, "error": None,
        "params": {"data_folder": "", "max_steps": STEPS, **matrix}, "matrix": dict(matrix), "inputs": {},
        "fingerprint": "f" * 64, "data_fingerprint": "d" * 64,
        "source": {"git_commit": "c" * 40, "git_dirty": False, "notebook_sha256": "n" * 64, "nbutils_sha256": "b" * 64},
        "packages": {"python": "3.11.2", "torch": "2.13.0", "unrelated": "1"},
        "hardware": {"machine": "node", "processor": "CPU", "cores": 2, "threads": 1, "memory_gib": 8.0, "gpus": []},
        "attempts": [
            {"start": "2026-11-18T10:00:00.000+00:00", "end": "2026-11-18T10:01:30.000+00:00", "exit_code": 0,
             "status": "finished"}
        ],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "params.yaml").write_text(yaml.safe_dump(manifest["params"]))
    if manifest | changes == manifest or (manifest | changes)["status"] == "finished":
        (folder / "result.json").write_text(json.dumps(dict(result)))
        _write_metrics(folder, result, matrix)
        _write_documents(folder, result)
        _write_samples(folder, str(matrix))
    return folder


def _write_metrics(folder: Path, result: Mapping[str, float], matrix: Mapping[str, Any]) -> None:
    """Curves that fall from near the unigram level to the final numbers."""
    noise = np.random.default_rng([matrix.get("seed", 0), 7])
    columns = ["step", "tokens_seen", "loss", "ce_loss", "cosine_loss", "eval_loss", "eval_ce_loss", "eval_perplexity"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, [*columns, "eval_cosine"])
        rows.writeheader()
        for step in range(1, STEPS + 1):
            ce = result["eval_ce_loss"] + 3 * np.exp(-step / 40)
            row = {"step": step, "tokens_seen": step * 1024, "ce_loss": ce + 0.05 * noise.normal()}
            rows.writerow(row | {"loss": row["ce_loss"], "cosine_loss": 0.6 + 0.3 * np.exp(-step / 40)})
            if step % EVALUATE_EVERY == 0:
                evaluated = {"eval_loss": ce, "eval_ce_loss": ce, "eval_perplexity": np.exp(ce)}
                rows.writerow({"step": step} | evaluated | {"eval_cosine": result["eval_cosine"] * step / STEPS})


def _write_documents(folder: Path, result: Mapping[str, float]) -> None:
    generator = np.random.default_rng(11)
    tokens = generator.integers(50, 3000, 40)
    rates = generator.normal(result["test_ce_loss"], 0.3, 40)
    frame = pd.DataFrame({"split": "test", "document": range(40), "tokens": tokens, "ce_sum": rates * tokens})
    frame.to_parquet(folder / "per_document.parquet")


def _write_samples(folder: Path, who: str) -> None:
    samples = [
        {
            "prompt": f"The function number {n} returns",
            "reference": " the mean of the data, or None where there is none.",
            "completion": f" a list of values that {who} would write.",
            "document": n,
        }
        for n in range(7)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def write_runs(folder: Path, keep: Callable[[dict[str, Any]], bool] = lambda matrix: True) -> Path:
    """The runs folder of the plan of `write_plan`, every variant finished but those `keep` refuses; returns it."""
    for alpha in (0.0, 0.5, 1.0):
        for seed in range(1, 6):
            for noise_seed in (0, 1) if alpha == 0 else (0,):
                matrix = {"alpha": alpha, "seed": seed, "noise_seed": noise_seed}
                if keep(matrix):
                    write_run(folder / "toy", "cosine", matrix, final_numbers(alpha, seed, noise_seed))
    return folder


# --- a study with all that a run can leave behind -------------------------------------------------

FULL_PARAMETERS = PARAMETERS.replace(
    "max_steps",
    'temperature: float = 1.0  # of the cosine term\nmodel_name: str = "micro"  # configuration\n'
    "num_train_epochs: float = 1.0  # passes\nmax_steps",
)
FULL_CARD = {
    "config": {"dataset_name": "HuggingFaceFW/finepdfs", "dataset_config_name": "eng_Latn", "text_field": "text"},
    "dataset_name": "HuggingFaceFW/finepdfs",
    "stages": [{"stage": "read", "documents": 6500, "characters": 9}, {"stage": "split", "documents": 6000}],
    "splits": {"train": {"documents": 5000, "tokens": 4_000_000, "bytes": 16_000_000, "blocks": 7812}},
    "leakage": {},
    "unigram_ce": {"validation": UNIGRAM},
    "vocab_size": 50257,
    "block_size": 512,
    "seen_by_base_model": "Perhaps seen.",
    "fingerprint": "d" * 64,
    "fallback_taken": "",
}
CONFIG = {"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
USUAL = {"alpha": 0.0, "temperature": 1.0, "num_train_epochs": 1.0}


def write_full(folder: Path, card: Mapping[str, Any] = FULL_CARD, seeds: int = 3) -> tuple[Path, Path]:
    """(runs folder, plan file) of alpha by temperature with a longer control, every artefact there; alpha 0.5 wins."""
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": FULL_PARAMETERS, "outputs": []}
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [cell | {"id": "p", "execution_count": None}],
    }
    folder.mkdir(exist_ok=True)
    (folder / "full.ipynb").write_text(json.dumps(notebook))
    matrix = {"alpha": [0.0, 0.5, 1.0], "temperature": [1.0, 0.7, 1.5], "num_train_epochs": [1.0, 1.45]}
    matrix["seed"] = list(range(1, seeds + 1))
    exclude = [{"alpha": 0.0, "temperature": [0.7, 1.5]}, {"alpha": [0.5, 1.0], "num_train_epochs": 1.45}]
    stage = {"name": "cosine", "notebook": str(folder / "full.ipynb"), "matrix": matrix, "exclude": exclude}
    sides = {"treatment": USUAL | {"alpha": 0.5}, "control": USUAL}
    told = {"stage": "cosine", **sides}
    contrasts = [
        told | {"name": "keeps", "question": "Is it no worse?", "metric": "test_ce_loss", "better": "lower",
                "claim": "no worse", "smallest_effect": 0.01, "primary": True},
        told | {"name": "closer", "question": "Is it above the tuned control?", "metric": "test_cosine",
                "control_metric": "test_cosine_tuned", "better": "higher", "claim": "better", "smallest_effect": 0.005},
    ]  # fmt: skip
    file = folder / "full.yaml"
    file.write_text(yaml.safe_dump({"name": "full", "stages": [stage], "contrasts": contrasts}, sort_keys=False))
    runs = folder / "runs"
    data = folder / "prepared"
    (data / "data").mkdir(parents=True)
    (data / "data" / "card.json").write_text(json.dumps(dict(card)))
    inputs = {"data_folder": {"folder": str(data), "fingerprint": "d" * 64}}
    settings = [(0.0, 1.0, 1.0), (0.0, 1.0, 1.45), *((a, t, 1.0) for a in (0.5, 1.0) for t in (1.0, 0.7, 1.5))]
    for alpha, temperature, epochs in settings:
        for seed in range(1, seeds + 1):
            variant = {"alpha": alpha, "temperature": temperature, "num_train_epochs": epochs, "seed": seed}
            run = write_run(runs / "full", "cosine", variant, _full_numbers(variant), inputs=inputs)
            _write_artefacts(run, alpha, seed)
    return runs, file


def _full_numbers(variant: Mapping[str, Any]) -> dict[str, float]:
    alpha, temperature, epochs, seed = variant.values()
    numbers = final_numbers(alpha, seed, 0)
    shift = 0.02 * (temperature - 1.0) * alpha - 0.003 * (epochs > 1)
    for split in ("eval", "test"):
        numbers[f"{split}_ce_loss"] += shift
        numbers[f"{split}_perplexity"] = float(np.exp(numbers[f"{split}_ce_loss"]))
        numbers |= {f"{split}_cosine_unigram": 0.2, f"{split}_cosine_centred": numbers[f"{split}_cosine"] - 0.1}
        numbers |= {f"{split}_cosine_tuned": numbers[f"{split}_cosine"] + 0.005, f"{split}_ece": 0.02 + 0.03 * alpha}
        numbers |= {f"{split}_entropy": 3.5 - alpha, f"{split}_bits_per_byte": 1.3 + shift}
    time = 20.0 * epochs + 9.0 * (alpha > 0)
    return numbers | {
        "train_seconds": time, "seconds_per_step": time / epochs / STEPS, "gradient_spikes": 6 * (alpha == 1),
        "early_gradient_peak": 1.4 + 6.0 * (alpha == 1), "early_ce_rise": 0.02 + 0.6 * (alpha == 1),
        "unstable_early": int(alpha == 1), "diverged": 0, "tuned_temperature": 0.9,
        "samples_repetition": 0.1, "samples_distinct_2": 0.8,
    }  # fmt: skip


def audit_rows(alpha: float, error: float = 1e-6, alike: float = 0.4) -> list[dict[str, Any]]:
    """What audit.csv of a run holds; `alike` is the cosine of the soft term's gradient to cross entropy's."""
    rows = []
    for step, progress in ((0, 0.0), (100, 0.5), (200, 1.0)):
        for space in ("logits", "parameters"):
            told = {"step": step, "progress": progress, "space": space}
            rows.append(told | {"term": "ce", "weight": 1 - alpha, "norm": 2.0, "cosine_to_ce": 1.0})
            if alpha:
                rows.append(told | {"term": "cosine", "weight": alpha, "norm": 0.5, "cosine_to_ce": alike})
            whole = told | {"term": "objective", "weight": 1.0, "norm": 1.5}
            whole["cosine_to_ce"] = 1 - alpha * (1 - alike)
            rows.append(whole | ({"applied_error": error} if space == "parameters" else {}))
    return [{"cosine_to_objective": 0.9, "applied_error": None} | row for row in rows]


def _write_artefacts(run: Path, alpha: float, seed: int) -> None:
    pd.DataFrame(audit_rows(alpha)).to_csv(run / "audit.csv", index=False)
    bins = np.arange(15)
    confidence = (bins + 0.5) / 15
    tokens = 1000 - 40 * bins
    correct = tokens * confidence * (0.97 - 0.2 * alpha)
    frame = {"split": "test", "bin": bins, "tokens": tokens, "confidence_sum": tokens * confidence}
    pd.DataFrame(frame | {"correct_sum": correct}).to_csv(run / "calibration.csv", index=False)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps(CONFIG))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for place, sample in enumerate(samples):
        sample |= {"repetition": 0.1 * place, "distinct_2": 0.9, "similarity": 0.3 + 0.05 * place}
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
