"""The `python -m nbutils` commands that stand in a file, read by the parser that will read them on the cluster."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbutils.errors import PlanError, WorkbookError
from nbutils.plans import Plan, find_plan, load_plan

START = re.compile(r"\bpython[0-9.]*\s+-m\s+nbutils\b")
VARIABLE = re.compile(r"\$(?:\{(\w+)[^}]*\}|(\w+))")
WHERE_SET = re.compile(r"\$\{\w+:?\+([^{}]*)\}")  # words that stand there where a variable has a value
UNKNOWN = "1"  # stands for a variable whose value is not in the file: a name to the parser, or a number


@dataclass(frozen=True)
class Command:
    """One command of a file; `before` and `after` are what stands around it on its line."""

    before: str
    words: tuple[str, ...]
    after: str
    args: argparse.Namespace

    @property
    def name(self) -> str:
        """The name of the command, such as `batch`."""
        return self.words[0]

    def plan(self, where: str) -> Plan | None:
        """The plan it names, None where a variable does. Raises WorkbookError where the plan does not load."""
        file = getattr(self.args, "params", None) or getattr(self.args, "plan", None)
        if file in (None, UNKNOWN):
            return None
        try:
            return load_plan(find_plan(file))
        except WorkbookError as error:
            raise type(error)(f"{where}: {error}") from None


def find_commands(where: str, text: str, variables: Mapping[str, str] | None = None) -> list[Command]:
    """The commands in shell text, comments left out, each variable in them replaced by its value.

    Raises PlanError where our parser refuses one.
    """
    return [
        Command(before, tuple(words), after, _parse(where, given, words))
        for line in WHERE_SET.sub(r"\1", text.replace("\\\n", " ")).splitlines()
        if not line.lstrip().startswith("#")
        for before, given, after in _in_line(line)
        for words in [[_value(word, variables or {}) for word in given]]
    ]


def _value(word: str, variables: Mapping[str, str]) -> str:
    return VARIABLE.sub(lambda found: variables.get(found[1] or found[2], UNKNOWN), word)


def _in_line(line: str) -> Iterator[tuple[str, list[str], str]]:
    """(what stands before, its words, what ends it) of each command of ours in the line."""
    for match in START.finditer(line):
        lexer = shlex.shlex(line[match.end() :], posix=True, punctuation_chars=True)
        words = []
        try:
            while (word := lexer.get_token()) is not None and not set(word) <= set("();<>|&"):
                words.append(word)
        except ValueError:  # a quotation that began before the command ends in it
            word = ""
        yield line[: match.start()].strip(), words, word or ""


def _parse(where: str, given: list[str], words: list[str]) -> argparse.Namespace:
    from nbutils.__main__ import parser

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return parser().parse_args(words)
    except SystemExit:
        last = told.getvalue().strip().splitlines()[-1].split("error: ")[-1].rstrip(".")
        help_for = " ".join(["python -m nbutils", *words[:1], "--help"])
        raise PlanError(
            f"{where}: `{' '.join(['python -m nbutils', *given])}` is no command: {last}. See `{help_for}`."
        ) from None
