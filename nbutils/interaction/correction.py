"""Correcting teachers: they rewrite, or write instead, what a student made of a prompt.

    corrector = make_corrector("runs/babylm/teacher", cache_folder=folder)
    corrections = corrector.correct(prompts, completions, references, round=0, max_tokens=256)

human            the true continuation itself, which costs no teacher's words
server           a model on a server that speaks the chat protocol (chat_client.py)
anything else    a run folder, a model folder or a name on the Hub, in memory: one with a chat template is told what to
                 correct, one without writes on where the prompt ends, which is what a teacher is to do with gibberish
"""

from __future__ import annotations

from pathlib import Path

from nbutils.foundation import RUNS
from nbutils.interaction.chat_client import ServerSettings
from nbutils.interaction.correctors import (
    Corrections,
    Corrector,
    Drawn,
    HumanCorrector,
    ModelCorrector,
    ServerCorrector,
)
from nbutils.interaction.prompted_model import check_prompted_model, prompted_model
from nbutils.interaction.prompts import read_correction
from nbutils.interaction.replies import JudgeLimits, ReplyCache

__all__ = ["Corrections", "Corrector", "check_corrector", "make_corrector"]

HUMAN, SERVER = "human", "server"
CORRECTORS = (HUMAN, SERVER)


def check_corrector(name: str, prompt: str = "correction") -> None:
    """What can be known of a teacher before it is needed; loads no model, and asks no server but the Hub.

    Raises ParameterError: no such prompt, or a server without its settings; ModelError: no such model.
    """
    read_correction(prompt)
    if name == SERVER:
        ServerSettings.from_environment()
    elif name != HUMAN:
        check_prompted_model(name, "correcting_teacher", CORRECTORS)


def make_corrector(
    name: str,
    prompt: str = "correction",
    cache_folder: Path = RUNS / "judge_cache",
    limits: JudgeLimits | None = None,
    temperature: float = 1.0,
    top_p: float = 0.8,
    seed: int = 0,
) -> Corrector:
    """The teacher called `name`, told what params/prompts/<prompt>.yaml says; its texts are kept in `cache_folder`.

    Raises as `check_corrector` does; RunError where the cache cannot be written.
    """
    check_corrector(name, prompt)
    limits = (limits or JudgeLimits()).check()
    drawn = Drawn(temperature, top_p, seed).check()
    if name == HUMAN:
        return HumanCorrector(limits)
    settings = read_correction(prompt), ReplyCache(cache_folder), limits, drawn
    if name == SERVER:
        return ServerCorrector(ServerSettings.from_environment(), *settings)
    return ModelCorrector(prompted_model(name), *settings)
