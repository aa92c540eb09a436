"""The teacher whose distribution a student learns from in rounds, on the same text and words as text alone."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from nbutils.foundation import ParameterError
from nbutils.interaction.settings import DISTILL, Interaction
from nbutils.models import check_teacher, load_teachers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from nbutils.data import Rows
    from nbutils.models import LiveTeacher

logger = logging.getLogger(__name__)
WORDS_ALONE = ("human", "server")  # who may correct and has no distribution to give
CURE = "Name a run of 02_teacher_finetune or of another training, a model folder or a Hub name as distilling_teacher."
ENDINGS, READ = 16, 64  # documents' ends that a teacher is asked about, tokens that it reads before each
MOST_BLOCKS = 2000  # looked at for them
LEAST_AT_ENDS = 1e-3  # a teacher that knows the end token gives it some tenths there


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
    settings.check_model(name, "distilling_teacher")


def distilling_teacher(
    settings: Interaction, name: str, tokenizer: PreTrainedTokenizerBase, blocks: Rows = ()
) -> LiveTeacher | None:
    """The frozen teacher of a student with that `tokenizer`, None where the method has no use for one.

    blocks: of the text it will teach on. The log tells where documents end in them and the teacher never ends a text.
    Raises as `check_distilling_teacher` does; ModelError, too, where the teacher has another vocabulary.
    """
    if settings.method != DISTILL:
        return None
    check_distilling_teacher(settings, name)
    teacher = load_teachers([name], tokenizer, 0)
    _tell_of_ends(teacher, name, tokenizer, blocks)
    return teacher


def _tell_of_ends(teacher: LiveTeacher, name: str, tokenizer: PreTrainedTokenizerBase, blocks: Rows) -> None:
    import torch

    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    found = []
    for read in islice(_before_ends(blocks, end), ENDINGS):
        with torch.no_grad():
            logits = [model(torch.from_numpy(read)[None]).logits[0, -1].float() for model in teacher.models]
        found.append(torch.stack(logits).mean(0).softmax(-1))
    if not found:
        return
    at_ends = torch.stack(found).mean(0)  # (vocab,)
    if at_ends[end] < LEAST_AT_ENDS:
        other = "" if begin in (None, end) else f", {tokenizer.bos_token} {float(at_ends[begin]):.2g}"
        logger.warning(
            "distilling_teacher %r gives the end token %s a probability of %.2g where documents end%s: it parts texts "
            "in another way, and teaches its student not to end them. Take a teacher that was trained on the same "
            "prepared data, as by 02_teacher_finetune, or lower kd_weight.",
            *(name, tokenizer.eos_token, float(at_ends[end]), other),
        )


def _before_ends(blocks: Rows, end: int) -> Iterator[np.ndarray]:
    """What stands before an end token, int64 (time,): one of each block, the document's last tokens alone."""
    for index in range(min(len(blocks), MOST_BLOCKS)):
        tokens = np.asarray(blocks[index]["input_ids"], np.int64)
        before = [part for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1] if len(part) > 1]
        if before:
            yield max(before, key=len)[-READ - 1 : -1]
