"""Judges: they score a student's completions, say where they could not, and never make a score up.

    judge = make_judge("rule", "weekly", cache_folder, JudgeLimits())
    judged = judge.score(prompts, completions)      # judged.scores in [0, 1], NaN where not judged.ok

rule, rule_plain   no model (rules.py)
server             a model on a server that speaks the chat protocol (chat_client.py)
anything else      a run folder, a model folder or a name on the Hub, loaded into memory (model_judge.py)
"""

from __future__ import annotations

from pathlib import Path

from nbutils.interaction.judges.judged import RAW_CHARACTERS, Agreement, Judge, Judged, agreement, length_correlation
from nbutils.interaction.judges.rules import RULE, RULE_PLAIN, known_words_of, plain_rule_judge, rule_judge
from nbutils.interaction.prompts import read_rubric
from nbutils.interaction.replies import JudgeLimits

__all__ = [
    "RAW_CHARACTERS",
    "RULE",
    "RULE_PLAIN",
    "SERVER",
    "Agreement",
    "Judge",
    "JudgeLimits",
    "Judged",
    "agreement",
    "check_judge",
    "known_words_of",
    "length_correlation",
    "make_judge",
]

SERVER = "server"
JUDGES = (RULE, RULE_PLAIN, SERVER)


def check_judge(name: str, rubric: str) -> None:
    """What can be known of a judge before it is needed; loads no model, and asks no server but the Hub.

    Raises ParameterError: no such rubric, or a server without its settings; ModelError: no such model.
    """
    read_rubric(rubric)
    if name == SERVER:
        from nbutils.interaction.chat_client import ServerSettings

        ServerSettings.from_environment()
    elif name not in JUDGES:
        from nbutils.interaction.prompted_model import check_prompted_model

        check_prompted_model(name, "judge", JUDGES)


def make_judge(
    name: str,
    rubric: str,
    cache_folder: Path,
    limits: JudgeLimits,
    seed: int = 0,
    known_words: frozenset[str] | None = None,
    asked_words: int = 0,
) -> Judge:
    """The judge called `name`, with the rubric of that name; replies of models and servers are kept in `cache_folder`.

    seed: sent to a server, which may use it. Of "rule" alone: known_words, as `known_words_of` finds them in the
    training text (without them that aspect is left out); asked_words, the length that is best (0: 60).
    Raises as `check_judge` does; RunError where the cache cannot be written.
    """
    check_judge(name, rubric)
    limits.check()
    if name == RULE:
        return rule_judge(limits, known_words, asked_words)
    if name == RULE_PLAIN:
        return plain_rule_judge(limits)
    from nbutils.interaction.replies import ReplyCache

    cache, read = ReplyCache(cache_folder), read_rubric(rubric)
    if name == SERVER:
        from nbutils.interaction.chat_client import ServerSettings
        from nbutils.interaction.judges.server_judge import ServerJudge

        return ServerJudge(ServerSettings.from_environment(), read, limits, cache, seed)
    from nbutils.interaction.judges.model_judge import ModelJudge
    from nbutils.interaction.prompted_model import prompted_model

    return ModelJudge(prompted_model(name), read, limits, cache)
