"""The harness's task objects, from its own files or ours, and its view of a model in memory.

For each task a small file is written that includes the task file and changes where its items come from, and nothing
else: prompts, choices and metrics stay what the included file says.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nbutils.evaluation.harness.settings import SPELLING, TASKS, example_file
from nbutils.evaluation.harness.spelling import write_spelling
from nbutils.foundation import ParameterError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerBase

NOT_SCORED = (math.nan, False)
NO_LIMIT = 10**9

OURS = Path(__file__).parent / "tasks"


def load_tasks(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tasks_folder: str = "",
    few_shot: int = 0,
    items: int = 0,
    seed: int = 0,
) -> dict[str, ConfigurableTask]:
    """The tasks `names` by name, ready to be asked; the arguments are those of `evaluate_tasks`.

    Raises ParameterError, or CorpusError where the Hub cannot be reached.
    """
    import yaml
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        probe = Path(folder) / "probe"
        if set(names) & set(SPELLING):
            write_spelling(probe, tokenizer, seed, items)
        for name in names:
            content = _task_file(name, str(probe) if name in SPELLING else tasks_folder, few_shot, items)
            path = Path(folder) / "files" / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            # the tag names a function of ours, which safe_dump would put in quotes
            tag = "custom_dataset: !function nbutils.evaluation.harness.items.splits\n"
            path.write_text(yaml.safe_dump(content, sort_keys=False) + tag, encoding="utf-8")
        manager = TaskManager(include_path=str(Path(folder) / "files"), include_defaults=False)
        with harness_log_at(logging.ERROR):  # it warns of every set of items that is not one of its own
            tasks = manager.load(list(names))["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(seed)
        _check_examples(task, few_shot)
    return tasks


@contextmanager
def harness_log_at(level: int) -> Iterator[None]:
    """Within, the harness logs what is at least of this level."""
    harness_logger = logging.getLogger("lm_eval")
    before = harness_logger.level
    harness_logger.setLevel(level)
    try:
        yield
    finally:
        harness_logger.setLevel(before)


def _task_file(name: str, tasks_folder: str, few_shot: int, items: int) -> dict[str, Any]:
    """What the task's own file is changed in."""
    evaluated = "validation" if name in SPELLING else TASKS[name].evaluated
    examples = ""
    if few_shot:
        examples = example_file(name, tasks_folder)[0] if tasks_folder and name in TASKS else "train"
    return {
        "include": str(_included(name)),
        "task": name,
        "dataset_kwargs": {"task": name, "tasks_folder": tasks_folder, "items": items, "examples": examples},
        "num_fewshot": few_shot,
        "training_split": "train" if examples == "train" else None,
        "fewshot_split": examples or None,
        "validation_split": None,
        # as the test split: only then does the harness leave the item itself out of its examples
        "test_split": evaluated,
    }


def _included(name: str) -> Path:
    import lm_eval.tasks

    file = f"{name}.yaml" if name in SPELLING else TASKS[name].task_file
    return OURS / file if "/" not in file else Path(lm_eval.tasks.__file__).parent / file


def _check_examples(task: ConfigurableTask, few_shot: int) -> None:
    """What `check_tasks` could not know: how many the Hub has, or the vocabulary's words make."""
    if few_shot:
        own = task.config.fewshot_split == task.config.test_split  # the item itself is no example of its own
        most = len(task.dataset[task.config.fewshot_split]) - own
        if few_shot > most:
            raise ParameterError(
                f"few_shot is {few_shot}, but there are {most} examples for {task.task_name}. Lower few_shot."
            )


class ModelInMemory(HFLM):
    """HFLM that leaves tokenizer and model as they were, and scores nothing it would have to cut.

    A continuation longer than the model's positions gets NaN in place of a failed assertion. `cut_prompts` counts
    prompts that lost their beginning for want of positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        prompt_start: Sequence[int] | None,
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a pad token
        tokenizer.model_max_length = NO_LIMIT  # or it warns of every long prompt; the model's own limit is kept below
        self.prompt_start = prompt_start
        self.cut_prompts = 0
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            prefix_token_id=prompt_start[-1] if prompt_start else None,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of `string` after `prompt_start`, or after what the tokenizer itself begins a text with."""
        if self.prompt_start is None:
            return super().tok_encode(string, add_special_tokens, **kwargs)
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        return ids if add_special_tokens is False else [*self.prompt_start, *ids]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list:
        fits = [0 < len(continuation) <= self.max_length for _, _, continuation in requests]
        kept = [request for request, fit in zip(requests, fits, strict=True) if fit]
        self.cut_prompts += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in kept)
        found = iter(super()._loglikelihood_tokens(kept, disable_tqdm, **kwargs) if kept else ())
        return [next(found) if fit else NOT_SCORED for fit in fits]
