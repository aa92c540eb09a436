"""What a training run reads: rows of the train and the validation split, with what a teacher's cache adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbutils.data import TASKS, Rows
from nbutils.foundation import ParameterError, did_you_mean, relative
from nbutils.models import (
    LiveTeacher,
    TeacherCache,
    WithTeacher,
    build_cache,
    check_cache,
    check_shared_vocabulary,
    teachers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbutils.data import PreparedData
    from nbutils.objectives import Teacher
    from nbutils.training.trainer import TrainingConfig

TOKENS = ("input_ids", "labels", "document_ids")  # columns of blocks that training or evaluation reads


def open_data(data_folder: str, task: str) -> PreparedData:
    """Prepared data for a `task`, lm or qa; without a folder, a small embedded corpus that is prepared once.

    Raises ParameterError where the task is another than that of the data.
    """
    from nbutils.data import load_data, small_data, small_questions

    if task not in TASKS:
        raise ParameterError(f"task is {task!r}. {did_you_mean(task, TASKS)}")
    data = load_data(data_folder or (small_questions() if task == "qa" else small_data()))
    prepared = data.card.get("task", "lm")
    if prepared != task:
        raise ParameterError(
            f"task is {task!r}, but {relative(data.folder)} was prepared with task {prepared!r}. Set task to "
            f"{prepared}, or give data prepared with task {task}."
        )
    return data


def training_rows(
    config: TrainingConfig, data: PreparedData, model: PreTrainedModel
) -> tuple[Teacher | None, Rows, Rows]:
    """The teacher, or None where the objective has no use for one, and the rows of train and validation.

    Raises ParameterError or ModelError where teacher, cache and objective do not fit each other.
    """
    from nbutils.data import RandomChunks

    if config.random_chunks and data.card.get("task") == "qa":
        raise ParameterError("random_chunks is for running text; questions are whole. Set it to false.")
    teacher, rows = None, plain_rows(data)
    if (term := config.objective.teacher_term) is not None:
        if not config.teachers:
            raise ParameterError(f"divergence {term.divergence} needs a teacher. Name one, or set divergence to none.")
        teacher, cached = evaluation_rows(config, data)
        check_shared_vocabulary(term.divergence, load_teachers(config, data), model)
        rows |= {"validation": cached["validation"]}
    if config.random_chunks:
        rows["train"] = RandomChunks(data.blocks["train"], data.card["block_size"], config.seed)
    if isinstance(teacher, TeacherCache):
        rows["train"] = WithTeacher(rows["train"], teacher, "train")
    return teacher, rows["train"], rows["validation"]


def evaluation_rows(config: TrainingConfig, data: PreparedData) -> tuple[Teacher, dict[str, Rows]]:
    """Who says what the teachers predict, themselves or their cache, and the rows of each held-out split for it."""
    teacher, rows = load_teachers(config, data), plain_rows(data)
    del rows["train"]
    term = config.objective.teacher_term
    check_cache(config.teacher_cache, term.divergence if term else "none", config.cache_top_k)
    if term is None or config.teacher_cache == "off":
        return teacher, rows
    settings = config.teacher_cache, term.temperature, config.cache_top_k, config.per_device_eval_batch_size
    cache = build_cache(teacher, data, *settings)
    return cache, {split: WithTeacher(each, cache, split) for split, each in rows.items()}


def load_teachers(config: TrainingConfig, data: PreparedData) -> LiveTeacher:
    """The config's teachers, checked; their weights are loaded when they first run."""
    return teachers.load_teachers(config.teachers, data.tokenizer, data.card["block_size"])


def plain_rows(data: PreparedData) -> dict[str, Rows]:
    """The rows of each split as arrays of the columns that are read."""
    columns = {split: [name for name in TOKENS if name in rows.column_names] for split, rows in data.blocks.items()}
    return {split: rows.with_format("numpy", columns=columns[split]) for split, rows in data.blocks.items()}
