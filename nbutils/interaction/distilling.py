"""The teacher whose distribution a student learns from in rounds, on the same text and words as text alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbutils.errors import ParameterError
from nbutils.interaction.settings import DISTILL, END_TOKENS, Interaction
from nbutils.teachers import check_teacher, load_teachers, model_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nbutils.teachers import LiveTeacher

WORDS_ALONE = ("human", "server")  # who may correct and has no distribution to give
CURE = "Name a run of 02_teacher_finetune or of another training, a model folder or a Hub name as distilling_teacher."


def check_distilling_teacher(settings: Interaction, name: str) -> None:
    """What can be known of the teacher called `name` before anything runs; loads no weights.

    Raises ParameterError where there is none, one that says words alone, or one with too few positions; ModelError
    where there is no such model.
    """
    if not name:
        raise ParameterError(
            f"method {DISTILL} learns from a teacher's distribution, and distilling_teacher is empty. {CURE}"
        )
    if name in WORDS_ALONE:
        raise ParameterError(
            f"method {DISTILL} learns from a teacher's distribution, and distilling_teacher is {name!r}, who gives "
            f"words alone. {CURE}"
        )
    check_teacher(name, 0)
    from nbutils.models import build_config

    positions = getattr(build_config(model_of(name), 0, 0), "max_position_embeddings", None)
    longest = settings.prompt_tokens + settings.response_tokens + END_TOKENS
    settings.check_lengths(longest, positions, whose=f"distilling_teacher {name!r}")


def distilling_teacher(settings: Interaction, name: str, tokenizer: PreTrainedTokenizerBase) -> LiveTeacher | None:
    """The frozen teacher of a student with that `tokenizer`, None where the method has no use for one.

    Raises as `check_distilling_teacher` does; ModelError, too, where the teacher has another vocabulary.
    """
    if settings.method != DISTILL:
        return None
    check_distilling_teacher(settings, name)
    return load_teachers([name], tokenizer, 0)
