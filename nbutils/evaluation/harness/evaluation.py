"""Scores of a model in memory on tasks of EleutherAI's harness: in all, and item by item."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.evaluation.harness.settings import SPELLING, check_tasks, task_names
from nbutils.foundation import ParameterError, atomic_write

if TYPE_CHECKING:
    import pandas
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COLUMNS = {
    "step": "int64",
    "task": "str",
    "item": "str",
    "correct": "bool",
    "correct_norm": "bool",
    "gold_bits": "float64",
    "gold_bytes": "int64",
    "choices": "int64",
}


@dataclass(frozen=True)
class HarnessResult:
    """What an evaluation found.

    numbers: <task>_acc, <task>_acc_norm, <task>_gold_bits_per_byte, and of a whole probe spelling_acc and
    spelling_gold_bits_per_byte, the means of its three tasks. items: a row an item, columns COLUMNS. skipped: items of
    each task that were not scored, because an answer has more tokens than the model has positions.
    """

    numbers: dict[str, float]
    items: pandas.DataFrame
    skipped: dict[str, int]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    tasks_folder: str = "",
    few_shot: int = 0,
    items: int = 0,
    batch_size: int = 8,
    step: int = 0,
    seed: int = 0,
    prompt_start: Sequence[int] | None = None,
) -> HarnessResult:
    """Ask `model` the `tasks` (see `settings`); none of them, an empty result.

    The choice with the highest log-likelihood is the model's (acc), or that with the highest for each character
    (acc_norm; Winogrande's choices share their scored text, so there the two are one). Bits per byte are of the gold
    answer as it is scored, its leading space included: sum of bits over sum of bytes.

    tasks_folder: local files, or empty for the Hub; few_shot: solved examples in each prompt, drawn by `seed`; items:
    how many of each task, evenly spread, 0 for all; step: written to the rows; seed: also draws the probe's words, so
    give all runs that are compared the same; prompt_start: token ids that stand before a prompt, what a document began
    with in training (the end token, where documents only end in one); None for what the tokenizer itself puts there.

    The model's mode and all random states are as before afterwards. Raises ParameterError or CorpusError.
    """
    names = task_names(tasks)
    check_tasks(names, tasks_folder, few_shot, items)
    if not names:
        return HarnessResult({}, _frame([]), {})
    with _quiet(), undisturbed(model):
        from lm_eval.evaluator import evaluate

        from nbutils.evaluation.harness.loading import ModelInMemory, load_tasks

        asked = load_tasks(names, tokenizer, tasks_folder, few_shot, items, seed)
        language_model = ModelInMemory(model, tokenizer, batch_size, prompt_start)
        result = evaluate(
            lm=language_model,
            task_dict={"tasks": asked},
            bootstrap_iters=0,
            log_samples=True,
        )
    positions = language_model.max_length
    if language_model.cut_prompts:
        logger.warning(
            "%d prompts begin later than they should: the model has %d positions", language_model.cut_prompts, positions
        )
    rows, skipped = [], {}
    for name in names:
        found = [_row(asked[name], name, sample, step) for sample in result["samples"][name]]
        skipped[name] = sum(row is None for row in found)
        _tell_skipped(name, skipped[name], len(found), positions)
        rows += [row for row in found if row is not None]
    frame = _frame(rows)
    return HarnessResult(_numbers(frame, names), frame, skipped)


def append_items(path: Path, items: pandas.DataFrame) -> None:
    """Add `items` to the Parquet file at `path`, in the place of what it has of the same steps. Written as a whole.

    Without items no file is made.
    """
    import pandas

    if items.empty:
        return
    if path.is_file():
        before = pandas.read_parquet(path)
        items = pandas.concat([before[~before["step"].isin(items["step"].unique())], items])
    buffer = io.BytesIO()
    items.sort_values("step", kind="stable").to_parquet(buffer, index=False)
    atomic_write(path, buffer.getvalue())


def _row(task: ConfigurableTask, name: str, sample: dict[str, Any], step: int) -> dict[str, Any] | None:
    """One item's row; None where one of its choices could not be scored."""
    likelihoods = [found[0] for found in sample["filtered_resps"]]
    if any(math.isnan(each) for each in likelihoods):
        return None
    document, choices = sample["doc"], task.doc_to_choice(sample["doc"])
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    gold = question if task.multiple_input else target
    prompt, answer = sample["arguments"][gold]
    moved = len(prompt) - len(prompt.rstrip())  # the harness scores a prompt's last spaces with the answer
    told = json.dumps([question, choices, target], ensure_ascii=False)
    return {
        "step": step,
        "task": name,
        "item": hashlib.sha256(told.encode()).hexdigest()[:16],
        "correct": bool(sample["acc"]),
        "correct_norm": bool(sample.get("acc_norm", sample["acc"])),
        "gold_bits": -likelihoods[gold] / math.log(2),
        "gold_bytes": len(answer.encode()) + moved,
        "choices": len(choices),
    }


def _tell_skipped(name: str, skipped: int, asked: int, positions: int) -> None:
    if skipped == asked:
        raise ParameterError(
            f"No item of {name} fits the model's {positions} positions: each has an answer of more tokens, or of none. "
            f"Take {name} out of tasks, or train with a larger block_size."
        )
    if skipped:
        logger.warning("%d of %d items of %s do not fit the model's %d positions", skipped, asked, name, positions)


def _numbers(items: pandas.DataFrame, names: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in names:
        rows = items[items["task"] == name]
        numbers[f"{name}_acc"] = float(rows["correct"].mean())
        numbers[f"{name}_acc_norm"] = float(rows["correct_norm"].mean())
        numbers[f"{name}_gold_bits_per_byte"] = float(rows["gold_bits"].sum() / rows["gold_bytes"].sum())
    if set(SPELLING) <= set(names):
        for number in ("acc", "gold_bits_per_byte"):
            numbers[f"spelling_{number}"] = sum(numbers[f"{name}_{number}"] for name in SPELLING) / len(SPELLING)
    return numbers


def _frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines and progress bars; errors still come through."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from nbutils.evaluation.harness.loading import harness_log_at

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with harness_log_at(logging.ERROR), contextlib.redirect_stderr(io.StringIO()):  # its bars know no switch
            yield
    finally:
        if bars:
            enable_progress_bars()


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Each module's mode and all random states are restored: training goes on as if nothing had been asked."""
    import numpy
    import torch

    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
