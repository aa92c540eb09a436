"""What the Trainer is told: its arguments for a TrainingConfig, how many steps that makes, kernels that repeat."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from nbutils.foundation import ParameterError

if TYPE_CHECKING:
    from nbutils.training.trainer import TrainingConfig

RANKS_WAIT_SECONDS = 6 * 3600  # while one of them answers questions, or makes a teacher's cache


def training_arguments(config: TrainingConfig, train_rows: int) -> TrainingArguments:
    """The Trainer's arguments; saving and logging are ours."""
    if "tensorboard" in config.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.run_folder / "tensorboard"))
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    arguments = TrainingArguments(
        output_dir=str(config.run_folder / "checkpoints"),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if config.lr_scheduler_type == "cosine_with_min_lr" else {},
        warmup_steps=config.warmup_steps or config.warmup_ratio,  # below 1 the Trainer reads it as a ratio
        optim=config.optim,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps",
        eval_steps=config.eval_steps or max(1, total_steps(config, train_rows) // 10),
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        save_strategy="no",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=_installed(config.report_to) or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_timeout=RANKS_WAIT_SECONDS,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several visible GPUs would mean DataParallel; `processes` means DDP
    return arguments


def _installed(trackers: list[str]) -> list[str]:
    """`trackers`, where all of them can be used here. Raises ParameterError."""
    available = get_available_reporting_integrations()
    for name in trackers:
        if name not in available:
            there = ", ".join(available) or "none"
            raise ParameterError(f"report_to names {name!r}, which is not installed here (there: {there}). Install it.")
    return trackers


def total_steps(config: TrainingConfig, train_rows: int) -> int:
    """Optimiser steps of the whole run; the last, smaller batch of an epoch counts."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    batches = -(-train_rows // (config.per_device_train_batch_size * ranks))
    return config.max_steps or int(config.num_train_epochs * -(-batches // config.gradient_accumulation_steps))


def make_deterministic(wanted: bool) -> None:
    """Kernels whose results repeat bit for bit, where PyTorch has them; it warns where it has not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
