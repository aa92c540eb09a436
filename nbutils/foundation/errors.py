"""The workbook's own errors: each says what is wrong and what to do, and shows no traceback in a notebook."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import PurePath

NEAR = 0.7  # of 1, as difflib compares: what shares some letters alone, "teacher" and "trace", is below it
SHORTEST_PART, MOST_PARTS = 3, 4  # letters of a name that stands in others, and how many of those are named


class WorkbookError(Exception):
    """A mistake a user can mend. The message names the cause and the cure.

    Jupyter shows the message alone; the runner maps it to exit code 2.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ParameterError(WorkbookError):
    """A notebook parameter is unknown, of another type, or out of range."""


class PlanError(WorkbookError):
    """A plan file does not say what can be run."""


class CorpusError(WorkbookError):
    """Documents are missing, unreadable, or too few."""


class ModelError(WorkbookError):
    """A model or tokenizer is missing, or does not fit the data."""


class RunError(WorkbookError):
    """A run folder cannot be used: locked, damaged, or not writable."""


class LockedRunError(RunError):
    """Another runner is at work on the run."""


class Unreachable(WorkbookError):
    """Something on the Hub that may well exist, but cannot be had from here and now."""


class UnreachableModelError(ModelError, Unreachable):
    """A model or tokenizer on a Hub that does not answer."""


class Preempted(Exception):
    """The run was asked to stop, which is nobody's mistake: run again, it goes on from what it saved.

    Jupyter shows the message alone; the runner maps it to exit code 75. `agreed`: all processes of a training end here.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class RankKilled(RuntimeError):
    """A training process was killed from outside, as by the memory killer; the runner maps it to exit code 138."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence with the nearest valid name, else with those that hold `name` or stand in it, else with all."""
    valid = sorted(valid)
    ending = PurePath(name).suffix
    if ending and all(PurePath(each).suffix == ending for each in valid):  # what files share makes none of them near
        stems = {PurePath(each).stem: each for each in valid}
        near = [stems[stem] for stem in nearest(PurePath(name).stem, list(stems))]
    else:
        near = nearest(name, valid)
    *others, last = map(repr, near or [""])
    either = f"{', '.join(others)} or {last}" if others else last
    return f"Did you mean {either}?" if near else f"Valid names: {', '.join(valid)}."


def nearest(name: str, valid: list[str]) -> list[str]:
    """The valid name that is nearest, else some that hold `name` or stand in it; empty where none does."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=NEAR)
    long = [each for each in valid if min(len(each), len(name)) >= SHORTEST_PART]
    parts = [each for each in long if name in each or each in name]
    return near or parts[:MOST_PARTS]
