"""Training: a thin subclass of transformers.Trainer that minimises an Objective and writes metrics.csv.

    from nbutils.training.launching import launch
    result = launch(train, TrainingConfig(data_folder=..., run_folder=..., objective=cosine_mixing(0.5)), processes=1)

Loss and gradients are exact under gradient accumulation and over ranks: every term's positions are counted over the
whole optimiser step before its first forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as logging_of_transformers

from nbutils.data import IGNORE_INDEX, PreparedData, Rows, TrainingOrder, WithEmptyRow, collate, load_data
from nbutils.evaluation import Generation, HarnessEvaluation, HarnessSettings, answer_questions, combine, evaluate
from nbutils.foundation import noted, write_json
from nbutils.models import TeacherCache, load_model, saved_model
from nbutils.objectives import Objective, ObjectiveModel, next_tokens
from nbutils.training.arguments import make_deterministic, training_arguments
from nbutils.training.audit import audit_batch
from nbutils.training.cache_exactness import exactness_once
from nbutils.training.resuming import FILES, MODEL, Checkpointing, load_trained_tensors
from nbutils.training.rows import load_teachers, training_rows
from nbutils.training.tracking import (
    Audit,
    BestModel,
    EarlyStopping,
    MetricsWriter,
    Noise,
    Progress,
    memory_mib,
    reset_peak_memory,
)


@dataclass(frozen=True)
class TrainingConfig:
    """What a training run is; the names are those of the notebooks' parameters."""

    data_folder: Path
    run_folder: Path
    objective: Objective
    model_name: str = "tiny"
    from_scratch: bool = True
    dropout: float = 0.1
    teachers: tuple[str, ...] = ()  # runs of 02_teacher_finetune, model folders or Hub names
    teacher_cache: str = "off"  # off, hidden, topk
    cache_top_k: int = 64
    random_chunks: bool = False
    optim: str = "adamw_torch"  # adamw_torch, adafactor
    early_stopping_patience: int = 0  # evaluations; 0: train to the end
    num_train_epochs: float = 1.0
    max_steps: int = 0  # 0: by epochs
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0  # 0: by the ratio
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_steps: int = 0  # 0: ten times in all
    logging_steps: int = 1
    precision: str = "auto"  # auto, float32, bf16, fp16
    deterministic: bool = True
    audit_blocks: int = 2  # 0: no gradient audit
    quantised: bool = False
    report_to: list[str] = field(default_factory=list)
    generation: Generation | None = None  # of answers, at every evaluation; for questions alone
    seed: int = 42
    noise_seed: int = 0
    harness: HarnessSettings | None = None  # lm-eval tasks, at intervals of the training
    checkpoint_steps: int = 0  # 0: only when asked to stop and, in a plan, at the end
    checkpoints_kept: int = 2  # beside that of the best evaluation

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **fixed: Any) -> TrainingConfig:
        """The config whose fields are a notebook's parameters of the same names, and `fixed`."""
        names = {each.name for each in fields(cls)} - fixed.keys()
        return cls(**{name: value for name, value in parameters.items() if name in names}, **fixed)


def train(config: TrainingConfig) -> dict[str, float]:
    """Train one variant; writes metrics.csv, model/ (the last) and model_best/ (by eval_ce_loss) into the run folder.

    A run that was stopped or killed goes on from its newest whole checkpoint in checkpoints/, without being asked, and
    ends with the numbers it would have had. Raises Preempted where it is asked to stop, RunError where the checkpoints
    there are those of a run with other parameters or data.

    Returns the numbers of the training itself: parameters, steps, tokens_seen, train_seconds, tokens_per_second,
    peak_memory_mib, best_eval_ce_loss, best_step and, of a teacher's cache, teacher_cache_*. Same config, same machine:
    same weights, bit for bit, where `deterministic`.
    """
    logging_of_transformers.disable_progress_bar()  # a bar for each saved model is noise
    reset_peak_memory()
    data = load_data(config.data_folder)
    make_deterministic(config.deterministic)
    set_seed(config.seed)
    block_size = data.card["block_size"]
    model = load_model(
        config.model_name, data.tokenizer, block_size, config.from_scratch, config.dropout, config.quantised
    )
    teacher, train_rows, eval_rows = training_rows(config, data, model)
    subject = ObjectiveModel(model, config.objective, teacher)
    questions = data if config.generation else None
    known = {"data_fingerprint": data.card["fingerprint"], "tokenizer": data.tokenizer}
    trainer = ObjectiveTrainer(config, subject, train_rows, eval_rows, questions, **known)
    if trainer.is_world_process_zero():
        write_json(config.run_folder / "objective.json", config.objective.described())
    with noted() as trainer.checkpointing.stop:
        trainer.train(resume_from_checkpoint=trainer.checkpointing.find())
    seconds = trainer.training_seconds
    if trainer.is_world_process_zero():
        model.save_pretrained(config.run_folder / "model")
        for folder in {saved_model(config.run_folder, which) for which in ("best", "last")}:
            data.tokenizer.save_pretrained(folder)
    numbers = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.tokens_seen,
        "train_seconds": seconds,
        "seconds_per_step": seconds / max(1, trainer.state.global_step),
        "tokens_per_second": trainer.tokens_seen / seconds,
        "peak_memory_mib": memory_mib(),
        "best_eval_ce_loss": trainer.best_model.value,
        "best_step": trainer.best_model.step,
    }
    if isinstance(teacher, TeacherCache) and trainer.is_world_process_zero():
        numbers |= exactness_once(teacher, load_teachers(config, data), subject, data)
    return numbers


class ObjectiveTrainer(Trainer):
    """transformers.Trainer for an ObjectiveModel on prepared rows; with `questions`, also answers them.

    Logs at every `logging_steps`: loss (the objective), <term>_loss (raw, unweighted), gradient norm, learning rate and
    tokens; at every evaluation, the metrics of `evaluation.evaluate`.
    """

    kept_files = FILES  # of the run's folder, that a checkpoint has copies of
    further_columns: tuple[str, ...] = ()  # of metrics.csv

    def __init__(
        self,
        config: TrainingConfig,
        model: ObjectiveModel,
        train_rows: Rows,
        eval_rows: Rows,
        questions: PreparedData | None = None,
        data_fingerprint: str = "",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.generation, self.questions = config.generation, questions
        self.objective_model = model
        self.tokens_seen = 0
        self.evaluation_seconds = self.elapsed_before = 0.0
        self._audit: Audit | None = None
        # since the last log
        self.term_sums: dict[str, Tensor] = {}
        self.term_counts: dict[str, Tensor] = {}
        # of the present step, each taken once, and only for a term that is on
        self._step_counts: dict[str, Tensor] = {}
        super().__init__(
            model=model,
            args=training_arguments(config, len(train_rows)),
            train_dataset=WithEmptyRow(train_rows),
            eval_dataset=eval_rows,
            data_collator=collate,
        )
        self.loss_is_scaled_for_ga = True  # counts span the accumulation steps
        if model.teacher is not None:
            model.teacher.to(self.args.device)
        self._add_callbacks(config, train_rows, tokenizer)
        self.checkpointing = Checkpointing(self, config, data_fingerprint)
        self.add_callback(self.checkpointing)  # the last, to see what the others decide

    def _add_callbacks(
        self, config: TrainingConfig, train_rows: Rows, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        model, folder = self.objective_model, config.run_folder
        self.remove_callback(PrinterCallback)
        self.best_model = BestModel(folder / "model_best", model.model)
        self.add_callback(Noise(config.seed, config.noise_seed))
        self.add_callback(self.best_model)  # on every rank, for all of them stop together
        if config.early_stopping_patience:
            self.add_callback(EarlyStopping(config.early_stopping_patience, self.best_model))
        self.remembering = [self.best_model]  # callbacks whose state is part of a checkpoint
        self._tasks: HarnessEvaluation | None = None
        if config.harness and config.harness.steps:
            self._tasks = HarnessEvaluation(config.harness, model.model, tokenizer, folder, self.log)
            self.remembering.append(self._tasks)
            self.add_callback(self._tasks)
        if self.args.process_index == 0:
            columns = (*self.further_columns, *(self._tasks.columns if self._tasks else ()))
            writer = MetricsWriter(folder / "metrics.csv", config.objective, bool(self.questions), columns)
            self.remembering.append(writer)
            self.add_callback(writer)
            self.add_callback(Progress(folder / "progress.json"))
        if self.args.process_index == 0 and config.audit_blocks:
            some = audit_batch(train_rows, config.audit_blocks, len(model.output.weight))
            self._audit = Audit(folder / "audit.csv", model, some)
            self.remembering.append(self._audit)
            self.add_callback(self._audit)

    def train(self, resume_from_checkpoint: str | None = None, **settings: Any) -> TrainOutput:
        """The Trainer's, from the beginning or a checkpoint."""
        self._start = time.perf_counter()
        if resume_from_checkpoint:
            self.checkpointing.restore(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **settings)

    @property
    def trained_module(self) -> torch.nn.Module:
        """What a checkpoint has the parameters of."""
        return self.objective_model.model

    @property
    def elapsed_seconds(self) -> float:
        """Of this and earlier processes, from the start of the training on."""
        return self.elapsed_before + time.perf_counter() - self._start

    @property
    def training_seconds(self) -> float:
        """What of it was training: not evaluation, tasks, audit or saving."""
        tasks = self._tasks.seconds if self._tasks else 0.0
        return self.elapsed_seconds - self.evaluation_seconds - tasks - self.audit_seconds - self.checkpointing.seconds

    @property
    def audit_seconds(self) -> float:
        """What the gradient audit has taken of the training's time."""
        return self._audit.seconds if self._audit else 0.0

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, in our order. Where ranks skip batches, accelerate itself would tell them no epoch."""
        loader = super().get_train_dataloader()
        loader.batch_sampler.set_epoch = self._order.set_epoch
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingOrder:
        ranks = self.args.world_size
        filled = ranks * self.args.train_batch_size if ranks > 1 else 1
        self._order = TrainingOrder(self.train_dataset.rows, self.args.data_seed, filled)
        return self._order

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.checkpointing.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained_tensors(self.trained_module, Path(resume_from_checkpoint) / MODEL)

    def _run_epoch(self, **settings: Any) -> None:
        if self.checkpointing.ended:  # the Trainer would make one more step before it looks
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**settings)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and each term's units in them over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = self._step_counts = self._count(batches, device)
        real = sum(map(self._tokens_read, batches))
        self.tokens_seen += int(self.accelerator.reduce(real.to(device), "sum"))
        self.objective_model.progress = self.state.global_step / self.state.max_steps
        return batches, dict(counts)

    def _count(self, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        """What each term is divided by: its units in a step's batches, over all ranks."""
        targets = [next_tokens(batch["labels"]) for batch in batches]
        return {
            term.name: self.accelerator.reduce(sum(term.units(y).sum() for y in targets).to(device), "sum")
            for term in self.objective_model.objective.terms
        }

    def _tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens of a batch that count as seen, a scalar: all but padding."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """This rank's share of the step's loss, times the ranks, because DDP averages gradients over them."""
        outputs = model(**inputs, counts=num_items_in_batch)
        for name, value in outputs.items():
            if name != "loss":
                self.term_sums[name] = self.term_sums.get(name, 0) + value
                self.term_counts[name] = self.term_counts.get(name, 0) + self._step_counts.pop(name, 0)
        loss = outputs["loss"] * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean since the last log, and the tokens seen."""
        if "loss" in logs:
            for name, value in self.term_sums.items():
                total = self.accelerator.reduce(value, "sum")
                logs[self._logged_name(name)] = (total / self.term_counts[name].clamp_min(1)).item()
            self.term_sums, self.term_counts = {}, {}
        logs["tokens_seen"] = self.tokens_seen
        super().log(logs, start_time)

    def _logged_name(self, name: str) -> str:
        return f"{name}_loss"

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of `evaluation.evaluate` over all ranks."""
        start = time.perf_counter()
        with self.compute_loss_context_manager():
            shard = self.args.process_index, self.args.world_size
            blocks = eval_dataset if eval_dataset is not None else self.eval_dataset
            result = evaluate(self.objective_model, blocks, self.args.per_device_eval_batch_size, shard)
        if self.args.world_size > 1:
            result = combine(result, lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum"))
        metrics = result.metrics(metric_key_prefix)
        if self.questions is not None and self.is_world_process_zero():
            metrics |= self._answers(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - start  # the best model's saving, too, is no training
        return metrics

    def _answers(self, prefix: str) -> dict[str, float]:
        """What the model's answers to the validation questions score."""
        subject, size = self.objective_model.model, self.args.per_device_eval_batch_size
        measured = answer_questions(subject, self.questions, "validation", self.generation, size)
        return {f"{prefix}_{name}": value for name, value in measured.numbers.items()}
