"""What training leaves behind while it runs: metrics.csv, the best model, progress, and the seed of its noise."""

from __future__ import annotations

import csv
import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from nbutils.evaluation import PROXIES
from nbutils.objectives import Objective, ObjectiveModel
from nbutils.training.audit import COLUMNS, audit_gradients

logger = logging.getLogger(__name__)
ANSWERS = ("eval_bleu", "eval_corpus_bleu", "eval_chrf", "eval_exact_match", "eval_token_f1")
SHOWN = ("cosine", "bleu")  # beside perplexity and accuracy, where a study has them
PROGRESS_SECONDS = 1.0  # a live display needs no more


class MetricsWriter(TrainerCallback):
    """metrics.csv: one line per logged set of values, flushed at once; cells that were not logged stay empty."""

    def __init__(self, path: Path, objective: Objective, answers: bool = False, further: Sequence[str] = ()) -> None:
        self.path = path
        self.columns = [
            *(
                "step",
                "epoch",
                "wall_seconds",
                "tokens_seen",
                "tokens_per_second",
                "learning_rate",
                "grad_norm",
                "loss",
            ),
            *(f"{term.name}_loss" for term in objective.terms),
            *("eval_loss", "eval_ce_loss", "eval_perplexity", "eval_token_acc"),
            *(f"eval_{name}" for name in PROXIES if objective.in_embedding_space),
            *(f"eval_{term.name}_loss" for term in objective.terms if term.name != "ce"),
            *(f"eval_{name}" for term in objective.terms for name in term.further_measures()),
            *(ANSWERS if answers else ()),
            *further,
        ]

        self.earlier: Mapping[str, float] | None = None

    def remembered(self) -> dict[str, float]:
        """What the next row needs to know of the rows so far."""
        now = time.perf_counter()
        return {"seconds": now - self.start, "since_row": now - self.last_time, "tokens": self.last_tokens}

    def resume(self, remembered: Mapping[str, float]) -> None:
        """Go on behind the rows that are there, with the clock where it was."""
        self.earlier = remembered

    def on_train_begin(self, args, state, control, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a" if self.earlier else "w", newline="")
        self.rows = csv.DictWriter(self.file, self.columns, extrasaction="ignore")
        self.start = self.last_time = time.perf_counter()
        self.last_tokens = 0
        if self.earlier:
            self.start -= self.earlier["seconds"]
            self.last_time -= self.earlier["since_row"]
            self.last_tokens = self.earlier["tokens"]
        else:
            self.rows.writeheader()
            self.file.flush()  # a checkpoint before the first row has a copy of the file

    def on_log(self, args, state, control, logs, **kwargs):
        if "train_runtime" in logs:
            return  # the Trainer's closing summary: averages that result.json has exactly
        now = time.perf_counter()
        row = {"step": state.global_step, "wall_seconds": round(now - self.start, 3), **logs}
        if "loss" in logs:
            row["tokens_per_second"] = round((logs["tokens_seen"] - self.last_tokens) / (now - self.last_time), 1)
        self.last_time, self.last_tokens = now, logs["tokens_seen"]
        self.rows.writerow(row)
        self.file.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.file.close()


class BestModel(TrainerCallback):
    """Keeps the weights with the lowest eval_ce_loss in a folder of their own, replaced by rename."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder, self.model = folder, model
        self.value, self.step, self.evaluations_since = float("inf"), 0, 0

    def remembered(self) -> dict[str, float]:
        """The best so far and for how long it has been the best."""
        return {"value": repr(self.value), "step": self.step, "evaluations_since": self.evaluations_since}

    def resume(self, remembered: Mapping[str, float]) -> None:
        """Go on from what was the best then; the folder is put back by whoever calls this."""
        self.value, self.step = float(remembered["value"]), remembered["step"]
        self.evaluations_since = remembered["evaluations_since"]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluations_since += 1
        if metrics["eval_ce_loss"] < self.value:
            self.value, self.step, self.evaluations_since = metrics["eval_ce_loss"], state.global_step, 0
            if state.is_world_process_zero:
                beside = self.folder.with_name(self.folder.name + ".new")
                shutil.rmtree(beside, ignore_errors=True)  # a killed run's may be links into its checkpoints
                self.model.save_pretrained(beside)
                replace_folder(beside, self.folder)


class Progress(TrainerCallback):
    """progress.json for whoever watches, and a line in the log at every evaluation."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step, self.loss = time.perf_counter(), state.global_step, float("nan")

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.written >= PROGRESS_SECONDS:
            self.written = time.monotonic()
            beside = self.path.with_suffix(".new")
            beside.write_text(json.dumps({"step": state.global_step, "steps": state.max_steps}))
            beside.replace(self.path)

    def on_log(self, args, state, control, logs, **kwargs):
        self.loss = logs.get("loss", self.loss)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        elapsed = time.perf_counter() - self.start
        left = elapsed * (state.max_steps - state.global_step) / max(1, state.global_step - self.first_step)
        logger.info(
            "step %6d/%d | loss %7.4f | validation ce %7.4f, perplexity %9.2f, accuracy %.3f%s | %s left",
            state.global_step,
            state.max_steps,
            self.loss,
            metrics["eval_ce_loss"],
            metrics["eval_perplexity"],
            metrics["eval_token_acc"],
            "".join(f", {name} {metrics[f'eval_{name}']:.3f}" for name in SHOWN if f"eval_{name}" in metrics),
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )


class EarlyStopping(TrainerCallback):
    """Ends training when `patience` evaluations in a row brought no better model.

    transformers' own callback needs the Trainer's checkpoints, and the best model is kept without them here.
    """

    def __init__(self, patience: int, best_model: BestModel) -> None:
        self.patience, self.best_model = patience, best_model

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        control.should_training_stop |= self.best_model.evaluations_since >= self.patience


class Audit(TrainerCallback):
    """audit.csv: the gradient audit before the first step, in the middle, and after the last step."""

    def __init__(self, path: Path, model: ObjectiveModel, batch: dict[str, torch.Tensor]) -> None:
        self.path, self.model, self.batch = path, model, batch
        self.rows: list[dict] = []
        self.seconds = 0.0
        self.resumed = False

    def remembered(self) -> dict[str, float]:
        """The time it took; its rows are in its file."""
        return {"seconds": self.seconds}

    def resume(self, remembered: Mapping[str, float]) -> None:
        """Go on behind the rows in the file."""
        self.seconds, self.resumed = remembered["seconds"], True
        with self.path.open(newline="") as file:
            self.rows = list(csv.DictReader(file))

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.resumed:
            self.rows = []
            self._audit(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps // 2:
            self._audit(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._audit(args, state)  # not at max_steps: training may stop early

    def _audit(self, args, state) -> None:
        start = time.perf_counter()
        progress = state.global_step / state.max_steps
        batch = {name: tensor.to(args.device) for name, tensor in self.batch.items()}
        self.rows += audit_gradients(self.model, batch, state.global_step, progress)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.seconds += time.perf_counter() - start


class Noise(TrainerCallback):
    """Seeds dropout apart from weights and data order: two runs that differ in noise_seed alone are an A/A pair."""

    def __init__(self, seed: int, noise_seed: int) -> None:
        self.seed, self.noise_seed = seed, noise_seed

    def on_train_begin(self, args, state, control, **kwargs):
        state_of = np.random.SeedSequence([self.seed, self.noise_seed, args.process_index])
        torch.manual_seed(int(state_of.generate_state(1)[0]))


def replace_folder(new: Path, old: Path) -> None:
    """`new` takes the place of `old`, which may not exist; a reader finds one of the two or, for an instant, none."""
    aside = old.with_name(old.name + ".old")
    if old.exists():
        old.replace(aside)
    new.replace(old)
    shutil.rmtree(aside, ignore_errors=True)


def reset_peak_memory() -> None:
    """From here on `memory_mib` counts anew, where the system can: on a GPU and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.debug("The peak of resident memory cannot be reset here; it is that of the whole process.")


def memory_mib() -> float:
    """Peak memory in MiB since the last reset: the GPU's where one is used, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    if peak := next((line for line in lines if line.startswith("VmHWM")), None):  # some sandboxes have none
        return int(peak.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
