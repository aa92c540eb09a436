"""What a training run reads: rows of the train and the validation split, with what a teacher's cache adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbutils.batches import Rows
from nbutils.errors import ParameterError, did_you_mean
from nbutils.places import relative

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nbutils.objectives import Distillation, Objective, Teacher
    from nbutils.preparation import PreparedData
    from nbutils.teachers import LiveTeacher
    from nbutils.training import TrainingConfig

TASKS = ("lm", "qa")
TOKENS = ("input_ids", "labels", "document_ids")  # columns of blocks that training or evaluation reads


def open_data(data_folder: str, task: str) -> PreparedData:
    """Prepared data for a `task`, lm or qa; without a folder, a small embedded corpus that is prepared once.

    Raises ParameterError where the task is another than that of the data.
    """
    from nbutils.preparation import load_data, small_data, small_questions

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
    from nbutils.chunks import RandomChunks

    blocks = {split: rows.with_format("numpy", columns=_columns(rows)) for split, rows in data.blocks.items()}
    train = blocks["train"]
    if config.random_chunks:
        if data.card.get("task") == "qa":
            raise ParameterError("random_chunks is for running text; questions are whole. Set it to false.")
        train = RandomChunks(data.blocks["train"], data.card["block_size"], config.seed)
    teacher = load_teacher(config, data, model)
    if teacher is None or config.teacher_cache == "off":
        return teacher, train, blocks["validation"]
    from nbutils.teacher_cache import WithTeacher, build_cache

    term = distillation_term(config.objective)
    cache = build_cache(
        teacher, data, config.teacher_cache, term.temperature, config.cache_top_k, config.per_device_eval_batch_size
    )
    return cache, WithTeacher(train, cache, "train"), WithTeacher(blocks["validation"], cache, "validation")


def load_teacher(config: TrainingConfig, data: PreparedData, model: PreTrainedModel) -> LiveTeacher | None:
    """The live teachers of a config whose objective uses them; None otherwise."""
    from nbutils.teacher_cache import check_cache
    from nbutils.teachers import check_shared_vocabulary, load_teachers

    term = distillation_term(config.objective)
    if term is None:
        return None
    check_cache(config.teacher_cache, term.divergence, config.cache_top_k)
    if not config.teachers:
        raise ParameterError(f"divergence {term.divergence} needs a teacher. Name one, or set divergence to none.")
    teacher = load_teachers(config.teachers, data.tokenizer, data.card["block_size"])
    check_shared_vocabulary(term.divergence, teacher, model)
    return teacher


def distillation_term(objective: Objective) -> Distillation | None:
    """The term that asks the teacher; None where there is none."""
    return next((term for term in objective.terms if term.uses_teacher), None)


def _columns(rows) -> list[str]:
    return [name for name in TOKENS if name in rows.column_names]
