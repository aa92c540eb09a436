"""The parameters of a run with a judge, checked before anything is loaded, and what every arm is asked at last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbutils.foundation import ParameterError
from nbutils.interaction.correction import CORRECTORS, HUMAN, check_corrector
from nbutils.interaction.distilling import check_distilling_teacher
from nbutils.interaction.judges import JUDGES, check_judge
from nbutils.interaction.prompts import read_story
from nbutils.interaction.settings import CONTEXTS, DISTILL, NO_JUDGE, STORY, Interaction, check_held_out
from nbutils.models import CONFIGURATIONS

RUBRICS = {CONTEXTS: "weekly", STORY: "story"}  # whatever an arm learned by
MOST_TOKENS = 256  # of a context, its end token included, and of a response to it


def check_interaction(params: Mapping[str, Any], block_size: int = 0) -> None:
    """Check the parameters of a variant of 06_interaction; block_size: of its data, 0 where not known yet.

    Judges and teachers that are missing are runs still to be made. Raises ParameterError.
    """
    asked = Interaction.of(params)
    asked.check()
    if block_size and asked.prompts == CONTEXTS:
        from_scratch = params.get("start_model") == "" and params.get("model_name") in CONFIGURATIONS
        asked.check_lengths(block_size, block_size if from_scratch else None)
    judges = {name: params[name] for name in ("judge", "second_judge") if name in params}
    teacher = params.get("correcting_teacher")
    if asked.needs_judge and judges.get("judge") == NO_JUDGE:
        raise ParameterError(f"method {asked.method} learns from scores, and judge is 'none'. Name one, as rule.")
    for what, judge in judges.items():
        if judge != NO_JUDGE:
            check_judge(judge, params["rubric"])
            if judge not in JUDGES:
                asked.check_model(judge, what)
    if asked.method == "three_way" and teacher == HUMAN:
        raise ParameterError(
            "method three_way prefers human text to corrections, and correcting_teacher is human. Name a model or a "
            "server as correcting_teacher, or set method to simpo."
        )
    check_held_out(params)
    if asked.needs_teacher and teacher is not None:
        check_corrector(teacher)
        if teacher not in CORRECTORS:
            asked.check_model(teacher, "correcting_teacher")
    if asked.method == DISTILL and "distilling_teacher" in params:
        check_distilling_teacher(asked, params["distilling_teacher"])


def held_out(settings: Interaction, kind: str, block_size: int) -> Interaction:
    """`settings` with the prompts of `kind`, and as many tokens as those and their responses may have."""
    half = block_size // 2
    tokens = min(MOST_TOKENS, half) - 1, min(MOST_TOKENS, block_size - half)
    if kind == STORY:
        tokens = 0, read_story().max_new_tokens
    return replace(settings, prompts=kind, prompt_tokens=tokens[0], response_tokens=tokens[1])
