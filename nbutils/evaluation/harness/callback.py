"""The harness's tasks at intervals of a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from nbutils.evaluation.harness.evaluation import HarnessResult, append_items, evaluate_tasks
from nbutils.evaluation.harness.minimal_pairs import PAIRS_FILE, MinimalPairs
from nbutils.evaluation.harness.settings import check_tasks, number_names, task_names

logger = logging.getLogger(__name__)
ITEMS_FILE = "harness.parquet"
NO_PAIRS = MinimalPairs()


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked, and how often; the arguments are those of `evaluate_tasks`."""

    tasks: str | Sequence[str] = ""
    tasks_folder: str = ""
    few_shot: int = 0
    items: int = 0
    batch_size: int = 8
    seed: int = 0  # the same for all runs that are compared
    prompt_start: Sequence[int] | None = None
    steps: int = 0  # every so many optimiser steps; 0: never in training
    pairs: MinimalPairs = NO_PAIRS  # asked beside the tasks

    def check(self) -> None:
        """Raises ParameterError as `check_tasks` and `check_pairs` do."""
        check_tasks(self.tasks, self.tasks_folder, self.few_shot, self.items)
        self.pairs.check()

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read every task once, so that a data set that cannot be had is told before training and not in its midst.

        Raises ParameterError or CorpusError.
        """
        self.check()
        if names := task_names(self.tasks):
            from nbutils.evaluation.harness.loading import load_tasks

            load_tasks(names, tokenizer, self.tasks_folder, self.few_shot, self.items, self.seed)

    def evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int) -> HarnessResult:
        """`evaluate_tasks` with these settings."""
        return evaluate_tasks(
            model,
            tokenizer,
            self.tasks,
            tasks_folder=self.tasks_folder,
            few_shot=self.few_shot,
            items=self.items,
            batch_size=self.batch_size,
            step=step,
            seed=self.seed,
            prompt_start=self.prompt_start,
        )


@dataclass
class HarnessEvaluation(TrainerCallback):
    """Every `settings.steps` steps but the last, whose model the notebook asks: eval_<task>_acc, eval_blimp_acc.

    The first process asks, the others wait. `log` is the trainer's (`trainer.log`): a line of metrics.csv of its own.
    Items go to harness.parquet in `folder`, pairs to minimal_pairs.parquet; those of a step that a resumed run takes
    again are replaced.
    """

    settings: HarnessSettings
    model: PreTrainedModel  # not wrapped: no other process takes part in its forward passes
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    log: Callable[[dict[str, float]], None]
    seconds: float = field(default=0.0, init=False)  # what it has taken of the training's time

    @property
    def columns(self) -> list[str]:
        """The columns of metrics.csv that it fills."""
        names = [*number_names(self.settings.tasks), *self.settings.pairs.columns]
        return [f"eval_{name}" for name in names] if self.settings.steps else []

    def remembered(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"seconds": self.seconds}

    def resume(self, remembered: Mapping[str, float]) -> None:
        """Go on from there."""
        self.seconds = remembered["seconds"]

    def on_train_begin(self, args, state, control, **kwargs):
        self.settings.check()

    def on_step_end(self, args, state, control, **kwargs):
        if not self.columns or state.global_step % self.settings.steps or state.global_step >= state.max_steps:
            return
        start, due = time.perf_counter(), control.should_log
        if state.is_world_process_zero:
            self._evaluate(state.global_step)
        control.should_log = due  # a log of ours takes the step's own for done, in one process alone
        if args.world_size > 1:
            torch.distributed.barrier()
        self.seconds += time.perf_counter() - start

    def _evaluate(self, step: int) -> None:
        result = self.settings.evaluate(self.model, self.tokenizer, step)
        append_items(self.folder / ITEMS_FILE, result.items)
        numbers = result.numbers
        if scores := self.settings.pairs.evaluate(self.model, self.tokenizer, step):
            append_items(self.folder / PAIRS_FILE, scores.items)
            numbers = numbers | {name: scores.numbers[name] for name in self.settings.pairs.columns}
        self.log({f"eval_{name}": value for name, value in numbers.items()})
        accuracies = [f"{name} {value:.3f}" for name, value in numbers.items() if name.endswith("_acc")]
        logger.info("step %6d | %s", step, ", ".join(accuracies))
