"""A made-up plan of teachers and students on disk, with all that such runs leave behind; no training.

One teacher, a control in the cosine stage, students of two divergences that share it, and question answering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from synthetic_runs import FULL_CARD, PARAMETERS, STEPS, final_numbers, write_run

SEEDS = (1, 2, 3, 4, 5)
STUDENT = (
    PARAMETERS.replace("alpha: float = 0.5  # weight of the cosine term, in [0, 1]\n", "")
    + """
teacher: str = ""  # a run, a folder or a Hub name
divergence: str = "forward"  # none, forward, reverse or jsd
ce_weight: float = 0.5  # of cross entropy
kl_weight: float = 0.5  # of the divergence
kl_temperature: float = 2.0  # of both distributions
kd_reduction: str = "token"  # or batchmean
kl_positions: str = "all"  # or answers
teacher_cache: str = "off"  # or hidden, topk"""
)
TEACHER = PARAMETERS.replace("alpha: float = 0.5  # weight of the cosine term, in [0, 1]\n", "")
LEARNING = {"teacher": "runs/kd/teacher", "ce_weight": 0.5, "kl_weight": 0.5, "kl_temperature": 2.0}
LEARNING |= {"kd_reduction": "token", "kl_positions": "all", "teacher_cache": "off", "max_steps": STEPS}
ANSWERING = {"kl_positions": "answers"}
SIDES = {"better": "lower", "claim": "better", "smallest_effect": 0.01}
CONTROL = {"control_stage": "cosine", "control": {"alpha": 0.0, "noise_seed": 0}}
CONTRASTS = [
    {"name": "teaching", "question": "Does a teacher lower cross entropy?", "stage": "distillation",
     "metric": "test_ce_loss", "treatment": {"divergence": "forward"}, **CONTROL, **SIDES, "primary": True},
    {"name": "mixing", "question": "Does mixing keep perplexity?", "stage": "cosine", "metric": "test_ce_loss",
     "treatment": {"alpha": 0.5, "noise_seed": 0}, "control": CONTROL["control"], **SIDES | {"claim": "no worse"}},
    {"name": "answers", "question": "Does a teacher raise BLEU?", "stage": "qa", "metric": "test_bleu",
     "treatment": {"divergence": "forward"}, "control": {"divergence": "none"}, **SIDES | {"better": "higher"}},
]  # fmt: skip
# What each arm gains over the control in nats, and its KL to the teacher.
GAINS = {"none": (0.0, 0.9), "forward": (0.06, 0.4), "reverse": (0.03, 0.5)}
TEACHER_CE = 3.9
WORDS = ("mean", "median", "mode", "variance", "range", "sum", "product", "count", "least", "largest")
PROMPTS = [(f"What does function {n} do?", f"It returns the {word} of the data.") for n, word in enumerate(WORDS)]


def write_plan(folder: Path, params: Mapping[str, Any] = {}) -> Path:
    """The plan file and the notebooks it names; `params` are set in the distillation stage."""
    notebooks = {"teacher": TEACHER, "cosine": PARAMETERS, "student": STUDENT}
    for name, parameters in notebooks.items():
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": parameters, "outputs": []}
        cells = [cell | {"execution_count": None, "id": "parameters"}]
        content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
        (folder / f"{name}.ipynb").write_text(json.dumps(content))
    mixing = {"alpha": [0.0, 0.5], "seed": [*SEEDS], "noise_seed": [0, 1]}
    settings = {name: value for name, value in LEARNING.items() if name != "teacher"}
    taught = {"needs": {"teacher": "teacher"}, "matrix": {"divergence": ["forward", "reverse"], "seed": [*SEEDS]}}
    asked = {"needs": {"teacher": "teacher"}, "matrix": {"divergence": ["none", "forward"], "seed": [*SEEDS]}}
    stages = [
        {"name": "teacher", "notebook": "teacher", "params": {"max_steps": STEPS}},
        {"name": "cosine", "notebook": "cosine", "matrix": mixing, "exclude": [{"alpha": 0.5, "noise_seed": 1}]},
        {"name": "distillation", "notebook": "student", **taught, "params": settings | params},
        {"name": "qa", "notebook": "student", **asked, "params": settings | ANSWERING},
    ]
    stages = [stage | {"notebook": str(folder / f"{stage['notebook']}.ipynb")} for stage in stages]
    sides = {"treatment": {"alpha": 0.0, "noise_seed": 1}, "control": {"alpha": 0.0, "noise_seed": 0}}
    plan = {"name": "kd", "stages": stages, "contrasts": CONTRASTS, "noise_floor": {"stage": "cosine", **sides}}
    path = folder / "kd.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def write_distillation(folder: Path, teacher_ce: float = TEACHER_CE, **params: Any) -> tuple[Path, Path]:
    """(runs folder, plan file) of the whole plan; `params` are the distillation stage's, beside the matrix."""
    folder.mkdir(exist_ok=True)
    file, runs = write_plan(folder, params), folder / "runs"
    card = folder / "prepared" / "data" / "card.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps(FULL_CARD | {"block_size": 128}))
    inputs = {"data_folder": {"folder": str(folder / "prepared"), "fingerprint": "d" * 64}}
    taught = inputs | {"teacher": {"folder": str(runs / "kd" / "teacher"), "fingerprint": "t" * 64}}
    _write_teacher(runs / "kd")
    for alpha, noise_seeds in ((0.0, (0, 1)), (0.5, (0,))):
        for seed in SEEDS:
            for noise_seed in noise_seeds:
                matrix = {"alpha": alpha, "seed": seed, "noise_seed": noise_seed}
                numbers = final_numbers(alpha, seed, noise_seed)
                write_run(runs / "kd", "cosine", matrix, numbers, inputs=inputs)
    for stage, divergences in (("distillation", ("forward", "reverse")), ("qa", ("none", "forward"))):
        for divergence in divergences:
            for seed in SEEDS:
                given = params if stage == "distillation" else ANSWERING
                _write_student(runs / "kd", stage, divergence, seed, teacher_ce, given, taught)
    return runs, file


def student_numbers(divergence: str, seed: int, teacher_ce: float = TEACHER_CE) -> dict[str, float]:
    """Results of a student; its seed moves it as it moves the control."""
    gain, kl = GAINS[divergence]
    plain = final_numbers(0.0, seed, 0)
    generator = np.random.default_rng([seed, 100 * len(divergence)])
    numbers = {name: value for name, value in plain.items() if "cosine" not in name}
    for split in ("eval", "test"):
        ce = plain[f"{split}_ce_loss"] - gain + 0.002 * generator.normal()
        numbers |= {f"{split}_ce_loss": ce, f"{split}_perplexity": float(np.exp(ce)), f"{split}_loss": ce}
        numbers |= {
            f"{split}_kl_to_teacher": kl + 0.01 * generator.normal(),
            f"{split}_agreement": 0.5 + 0.1 * (kl < 0.6),
        }
        numbers |= {f"teacher_{split}_ce_loss": teacher_ce, f"teacher_{split}_perplexity": float(np.exp(teacher_ce))}
        numbers[f"teacher_{split}_token_acc"] = 0.35
    return numbers | {
        "train_seconds": plain["train_seconds"] * (1.5 if divergence != "none" else 1.0),
        "teacher_parameters": 9_876_543, "bytes_on_disk": 5 * 2**20, "teacher_bytes_on_disk": 40 * 2**20,
        "generation_tokens_per_second": 900.0 + seed, "teacher_generation_tokens_per_second": 300.0,
    }  # fmt: skip


def answer_rows(divergence: str, seed: int) -> pd.DataFrame:
    """Answers to PROMPTS on the test split; distilled students get more of them right."""
    generator = np.random.default_rng([seed, len(divergence)])
    rows = []
    for document, (question, reference) in enumerate(PROMPTS):
        right = generator.random() < (0.8 if divergence == "forward" else 0.4)
        answer = reference if right else "It <b>prints</b> a list of the data that were read."
        rows.append({"split": "test", "document": document, "question": question, "reference": reference,
                     "answer": answer, "bleu": 1.0 if right else 0.1 + 0.01 * document, "exact_match": float(right),
                     "token_f1": 1.0 if right else 0.3})  # fmt: skip
    return pd.DataFrame(rows)


def _write_teacher(plan_folder: Path) -> None:
    """A teacher that over-fits: best at three quarters of its steps."""
    result = {f"{split}_ce_loss": TEACHER_CE for split in ("eval", "test")}
    result |= {f"{split}_perplexity": float(np.exp(TEACHER_CE)) for split in ("eval", "test")}
    result |= {f"before_{name}": 4.4 if "ce" in name else float(np.exp(4.4)) for name in [*result]}
    result |= {"test_bleu": 0.8765, "test_corpus_bleu": 70.0}
    result |= {"expected_before": 23.29, "expected_after": 22.41, "eval_cosine": 0.3}
    run = write_run(plan_folder, "teacher", {}, result)
    rows = []
    for step in range(1, STEPS + 1):
        row = {"step": step, "epoch": 4 * step / STEPS, "ce_loss": 3.2 + 1.5 * np.exp(-step / 60)}
        if step % 20 == 0:
            row["eval_ce_loss"] = TEACHER_CE + ((step - 140) / 200) ** 2
        rows.append(row)
    pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)
    answer_rows("forward", 7).to_parquet(run / "answers.parquet")


def _write_student(
    plan_folder: Path, stage: str, divergence: str, seed: int, teacher_ce: float, given: Mapping[str, Any], inputs: dict
) -> None:
    numbers, matrix = student_numbers(divergence, seed, teacher_ce), {"divergence": divergence, "seed": seed}
    params = {"data_folder": "", "noise_seed": 0, **LEARNING, **given, **matrix}
    answered = answer_rows(divergence, seed) if stage == "qa" else pd.DataFrame()
    for split in ("eval", "test") if stage == "qa" else ():
        numbers |= {f"{split}_{name}": float(answered[name].mean()) for name in ("bleu", "exact_match", "token_f1")}
        numbers |= {f"{split}_corpus_bleu": 40.0 + seed, f"{split}_chrf": 55.0 + seed}
    run = write_run(plan_folder, stage, matrix, numbers | {"eval_cosine": 0.3}, params=params, inputs=inputs)
    (run / "result.json").write_text(json.dumps(numbers))
    rows = []
    for step in range(1, STEPS + 1):
        fall = np.exp(-step / 40)
        row = {"step": step, "ce_loss": numbers["eval_ce_loss"] + 3 * fall}
        row |= {"kl_loss": 4 * numbers["eval_kl_to_teacher"] + 4 * fall} if divergence != "none" else {}
        if step % 20 == 0:
            row |= {"eval_ce_loss": numbers["eval_ce_loss"] + 3 * fall}
            row |= {"eval_kl_loss": row["kl_loss"]} if divergence != "none" else {}
            row |= {"eval_bleu": numbers["eval_bleu"] * (1 - fall)} if stage == "qa" else {}
        rows.append(row)
    pd.DataFrame(rows).to_csv(run / "metrics.csv", index=False)
    if stage == "qa":
        answered.to_parquet(run / "answers.parquet")
        signatures = {
            "bleu": "mean sentence BLEU|smooth:method4",
            "chrf": "chrF2|nrefs:1",
            "corpus_bleu": "BLEU|nrefs:1",
        }
        (run / "answers.json").write_text(json.dumps({"signatures": signatures}))
