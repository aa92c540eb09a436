"""A made-up plan of interactions on disk, with all that such runs leave behind; no training.

Text alone, imitation and SimPO in one stage; a judge's ranking in another, against that text; PPO on stories, which has
no control; and distillation, which counts no words, against SimPO.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from synthetic_runs import PARAMETERS, STEPS, final_numbers, write_run

from nbutils.interaction.settings import FROM_TEXT
from nbutils.report.evidence import Arm, Study

SEEDS = (1, 2, 3)
ROUNDS, SCORED = 5, 40
NOTEBOOK = """data_folder: str = ""  # a data-prep run folder
start_model: str = ""  # what all begin with
model_name: str = "micro"  # where there is none
method: str = "simpo"  # of learning
prompts: str = "contexts"  # or story
judge: str = "rule"  # who scores
second_judge: str = "rule_plain"  # who did not train it
rubric: str = "weekly"  # what judges are told
correcting_teacher: str = "human"  # who corrects
rounds: int = 5  # of samples
prompts_per_round: int = 8  # prompts
top_p: float = 0.8  # of the sampling
judged_samples: int = 40  # responses that both judges score
max_steps: int = 200  # optimiser steps
seed: int = 42  # of all
run_folder: str = ""  # where results go"""
USUAL = {"data_folder": "", "start_model": "", "model_name": "micro", "prompts": "contexts", "judge": "rule"}
USUAL |= {"second_judge": "rule_plain", "rubric": "weekly", "correcting_teacher": "human", "rounds": ROUNDS}
USUAL |= {"prompts_per_round": 8, "top_p": 0.8, "judged_samples": SCORED, "max_steps": STEPS}
STAGES = {
    "corrected": ("text", "sft", "simpo"),
    "judged": ("simpo_judge",),
    "stories": ("ppo",),
}
CHANGES = {"stories": {"prompts": "story", "top_p": 1.0}}  # parameters of a stage that are not usual
# Of each method: judge, second judge, bits of cross entropy gained, words of people, student and teacher, KL.
TOLD = {
    "text": (0.50, 0.60, 0.00, (12_000, 0, 0), 0.0),
    "sft": (0.52, 0.61, 0.02, (4_000, 4_000, 4_000), 0.3),
    "simpo": (0.56, 0.64, 0.03, (4_000, 4_100, 4_000), 0.6),
    "simpo_judge": (0.80, 0.40, 0.30, (4_000, 16_000, 2_000), 3.0),
    "ppo": (0.30, 0.20, 0.10, (0, 9_000, 900), 1.0),
}
FAILURES, LENGTH, AGREEMENT = {"ppo": 0.25}, {"simpo_judge": 0.8}, {"simpo_judge": 0.1, "ppo": 0.05}
ASPECTS = {"readability": 0.1, "known_words": -0.1}  # beside the score itself
SIDES = {"better": "higher", "claim": "better", "smallest_effect": 0.02}
CONTRASTS = [
    {"name": "beats-sft", "question": "Does SimPO beat imitation?", "stage": "corrected", "primary": True,
     "metric": "test_second_judge_score", "treatment": {"method": "simpo"}, "control": {"method": "sft"}},
    {"name": "keeps-grammar", "question": "Does SimPO keep grammar?", "stage": "corrected", "metric": "pairs_acc",
     "treatment": {"method": "simpo"}, "control": {"method": "text"}},
    {"name": "ranking", "question": "Does ranking raise its judge's score?", "stage": "judged",
     "metric": "test_judge_score", "treatment": {"method": "simpo_judge"}, "control": {"method": "text"},
     "control_stage": "corrected"},
    {"name": "distilled", "question": "Is distillation better?", "stage": "distilled", "metric": "test_ce_loss",
     "treatment": {"alpha": 0.5}, "control": {"method": "simpo"}, "control_stage": "corrected", "better": "lower"},
]  # fmt: skip
SCORE, SECOND = "test_judge_score", "test_second_judge_score"
HOSTILE = "<script>alert(1)</script>\u202egnp"


def write_plan(folder: Path) -> Path:
    """The plan file and the notebooks it names, in `folder`."""
    for name, source in (("interaction", NOTEBOOK), ("distillation", PARAMETERS)):
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source, "outputs": []}
        cells = [cell | {"execution_count": None, "id": "parameters"}]
        notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
    stages: list[dict[str, Any]] = [
        {"name": stage, "notebook": str(folder / "interaction.ipynb"), "params": USUAL | CHANGES.get(stage, {}),
         "matrix": {"method": list(methods), "seed": list(SEEDS)}}
        for stage, methods in STAGES.items()
    ]  # fmt: skip
    matrix = {"alpha": [0.5], "seed": list(SEEDS)}
    stages.append({"name": "distilled", "notebook": str(folder / "distillation.ipynb"), "matrix": matrix})
    plan = {"name": "talk", "stages": stages, "contrasts": [SIDES | each for each in CONTRASTS]}
    path = folder / "talk.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def write_interaction(folder: Path, seeds: Sequence[int] = SEEDS) -> tuple[Path, Path]:
    """(runs folder, plan file) of the whole plan."""
    folder.mkdir(exist_ok=True)
    file, runs = write_plan(folder), folder / "runs"
    for stage, methods in STAGES.items():
        for method in methods:
            for seed in seeds:
                matrix = {"method": method, "seed": seed}
                params = USUAL | CHANGES.get(stage, {}) | matrix
                numbers = interaction_numbers(method, seed)
                run = write_run(runs / "talk", stage, matrix, numbers | {"eval_cosine": 0.3}, params=params)
                (run / "result.json").write_text(json.dumps(numbers))
                write_rounds(run, method, seed)
    for seed in seeds:
        write_run(runs / "talk", "distilled", {"alpha": 0.5, "seed": seed}, final_numbers(0.5, seed, 0))
    return runs, file


def interaction_numbers(method: str, seed: int) -> dict[str, float]:
    """Results of a run; the seed moves both judges' scores and cross entropy, each method's own part is small."""
    first, second, gained, words, kl = TOLD[method]
    of_seed, own = np.random.default_rng(seed), np.random.default_rng([seed, [*TOLD].index(method)])
    numbers = {name: value for name, value in final_numbers(0.0, seed, 0).items() if "cosine" not in name}
    for split in ("eval", "test"):
        numbers[f"{split}_ce_loss"] += gained
        numbers[f"{split}_perplexity"] = float(np.exp(numbers[f"{split}_ce_loss"]))
    shared = 0.02 * of_seed.normal()
    scores = {"judge": first + shared, "second_judge": second + shared + 0.002 * own.normal()}
    for judge, score in scores.items():
        numbers |= {f"test_{judge}_score": score, f"test_{judge}_failures": 0.0}
        numbers |= {f"test_{judge}_{aspect}": score + more for aspect, more in ASPECTS.items()}
    numbers |= {"test_distinct_1": 0.4, "test_distinct_2": 0.7 + 0.01 * of_seed.normal(), "test_repetition": 0.05}
    numbers |= {
        "test_response_words": 20.0 + 0.5 * seed,
        "kl_to_start": kl,
    }
    if method not in FROM_TEXT:
        numbers["judge_failure_rate"] = FAILURES.get(method, 0)
    numbers |= {"judge_length_correlation": LENGTH.get(method, 0.1), "judges_agreement": AGREEMENT.get(method, 0.75)}
    numbers |= dict(zip(("human_words", "student_words", "teacher_words"), words, strict=True))
    paradigms = {"number": 0.6 + 0.01 * seed, "gender": 0.7}
    accuracies = {f"pairs_{name}_acc": value for name, value in paradigms.items()}
    return (
        numbers | accuracies | {"judges_agreement_samples": SCORED, "pairs_acc": float(np.mean([*paradigms.values()]))}
    )


def rows_of_rounds(method: str, seed: int) -> list[dict[str, Any]]:
    """rounds.csv: the reward goes from .3 to the final score, words are spent evenly; text alone has no samples."""
    first, _, _, words, kl = TOLD[method]
    rows = []
    for number in range(1, ROUNDS + 1):
        share = number / ROUNDS
        row: dict[str, Any] = {"round": number, "step": 10 * (number - 1), "examples": 8, "reward": float("nan")}
        row |= {"scored": float("nan"), "failures": 0, "uncorrected": int(method == "sft"), "kl": float("nan")}
        if method != "text":
            row |= {"reward": 0.3 + (first - 0.3) * share + 0.01 * seed, "scored": 8, "kl": kl * share}
            row |= {"failures": 2 if method == "ppo" else 0}
        spent = dict(zip(("human_words", "student_words", "teacher_words"), words, strict=True))
        rows.append(row | {name: int(count * share) for name, count in spent.items()})
    return rows


def write_rounds(run: Path, method: str, seed: int) -> None:
    """rounds.csv and, of methods with samples, round_samples.jsonl and judged.jsonl."""
    rows = rows_of_rounds(method, seed)
    with (run / "rounds.csv").open("w", newline="") as file:
        written = csv.DictWriter(file, [*rows[0]])
        written.writeheader()
        written.writerows(rows)
    judged = [
        {"prompt": "p", "completion": "c", "judge": None if n < 10 else 0.5, "second_judge": 0.4} for n in range(SCORED)
    ]
    (run / "judged.jsonl").write_text("".join(json.dumps(each) + "\n" for each in judged))
    if method == "text":
        return
    samples = []
    for row in rows:
        told = {
            "round": row["round"],
            "prompt": f"Once {HOSTILE} upon" if method == "ppo" else f"Prompt {row['round']}",
        }
        told |= {"completion": f"{method} wrote {HOSTILE} in {row['round']}", "raw": f"I say {HOSTILE}"}
        corrected = f"corrected {HOSTILE} {row['round']}" if method in ("sft", "simpo") else None
        failed = method == "ppo" and row["round"] == ROUNDS
        samples.append(told | {"correction": corrected, "score": None if failed else row["reward"]})
        samples.append(told | {"prompt": f"Another {row['round']}", "correction": None, "score": 0.1})
    (run / "round_samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))


# ---- arms made otherwise ----------------------------------------------------------------------------


def arm(study: Study, label: str) -> Arm:
    """The arm of that label."""
    return next(each for each in study.arms if each.label == label)


def changed(one: Arm, **numbers: float | None) -> Arm:
    """The arm with other results, None for none."""
    runs = [replace(run) for run in one.runs]
    for run in runs:
        known = run.result | numbers
        run.__dict__["result"] = {name: value for name, value in known.items() if value is not None}
    return replace(one, runs=tuple(runs))


def with_params(one: Arm, **params: Any) -> Arm:
    """The arm as if its runs had been asked with other parameters."""
    manifests = [run.manifest | {"params": run.manifest["params"] | params} for run in one.runs]
    return replace(one, runs=tuple(replace(run, manifest=m) for run, m in zip(one.runs, manifests, strict=True)))


def with_arm(study: Study, other: Arm) -> Study:
    """The study with `other` in the place of the arm of its label."""
    return replace(study, arms=tuple(other if each.label == other.label else each for each in study.arms))


def values(method: str, name: str) -> list[float]:
    """A result of a method's runs, by seed."""
    return [interaction_numbers(method, seed)[name] for seed in SEEDS]
