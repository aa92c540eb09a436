"""Prompts as files in params/prompts: rubrics of judges, what a correcting teacher is told, the story prompt.

Fields stand in braces ({prompt}, {completion}). What fills them is data: braces in it mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nbutils.foundation import PARAMS, ParameterError, PlanError, did_you_mean, read_yaml, relative

FOLDER = PARAMS / "prompts"
RUBRIC_PREFIX = "judge-"
FIELD = re.compile(r"\{([a-z_]+)\}")
FIELDS = ("prompt", "completion")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")  # of a file: no dot, no slash
HIGHEST = 100  # grade of an aspect; replies of judges have at most three digits

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Aspect:
    """What is graded by a whole number from `low` (worst) to `high` (best)."""

    name: str
    low: int
    high: int

    @property
    def allowed(self) -> range:
        return range(self.low, self.high + 1)

    def scaled(self, grade: float) -> float:
        """A grade as a number in [0, 1]."""
        return (grade - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Rubric:
    """What a judge is told; `plain` is the rendering for models that know no chat."""

    name: str
    system: str
    user: str
    plain: str
    aspects: tuple[Aspect, ...]

    @property
    def digest(self) -> str:
        """A hash of all that decides what is asked."""
        return digest(self)

    def messages(self, prompt: str, completion: str) -> Messages:
        """The turns of a chat, to be answered by the judge."""
        user = fill(self.user, prompt=prompt.strip(), completion=completion.strip())
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def plain_text(self, prompt: str, completion: str) -> str:
        """One text, the completion as it follows the prompt; it ends with a line break, for the first grade."""
        return fill(self.plain, prompt=prompt.lstrip(), completion=completion.rstrip()).rstrip() + "\n"


@dataclass(frozen=True)
class CorrectionPrompt:
    """What a correcting teacher is told; `prefill` is the beginning of its own turn."""

    name: str
    system: str
    user: tuple[str, ...]
    prefill: str

    @property
    def digest(self) -> str:
        """A hash of all that decides what is asked."""
        return digest(self)

    def messages(self, prompt: str, completion: str) -> Messages:
        """The turns of a chat; the last one is the teacher's, for it to go on with."""
        told = {"prompt": prompt.strip(), "completion": completion.strip()}
        turns = [{"role": "user", "content": fill(each, **told)} for each in self.user]
        system, prefill = {"role": "system", "content": self.system}, {"role": "assistant"}
        return [system, *turns, prefill | {"content": fill(self.prefill, **told)}]


@dataclass(frozen=True)
class StoryPrompt:
    """The opening of every story, the tokens a story may have, and what its length earns."""

    name: str
    prompt: str
    max_new_tokens: int
    length_weight: float


def fill(template: str, **fields: str) -> str:
    """`template` with each {field} replaced by its text, in one pass: what a text holds is not looked at again."""
    return FIELD.sub(lambda found: fields[found[1]], template)


def digest(prompt: Any) -> str:
    """A hash of what a prompt file says, whatever its layout."""
    return hashlib.sha256(json.dumps(asdict(prompt), sort_keys=True).encode()).hexdigest()


def rubric_names(folder: Path = FOLDER) -> list[str]:
    """The rubrics there are."""
    return sorted(path.stem.removeprefix(RUBRIC_PREFIX) for path in folder.glob(f"{RUBRIC_PREFIX}*.yaml"))


def read_rubric(name: str, folder: Path = FOLDER) -> Rubric:
    """The rubric judge-<name>.yaml. Raises ParameterError where there is none, or it does not say what to grade."""
    if not NAME.fullmatch(name) or not (folder / f"{RUBRIC_PREFIX}{name}.yaml").is_file():
        raise ParameterError(
            f"rubric is {name!r}, and {relative(folder)} has no {RUBRIC_PREFIX}{name}.yaml. "
            f"{did_you_mean(name, rubric_names(folder))}"
        )
    file = _File(folder / f"{RUBRIC_PREFIX}{name}.yaml", Rubric)
    texts = {key: file.text(key, FIELDS) for key in ("user", "plain")}
    rubric = Rubric(file.text("name"), file.text("system"), **texts, aspects=_aspects(file))
    for aspect in rubric.aspects:
        if aspect.name not in rubric.user:
            raise file.error(
                f"grades {aspect.name!r}, which user does not ask for. Ask for it by that name, line by line"
            )
    return rubric


def read_correction(name: str = "correction", folder: Path = FOLDER) -> CorrectionPrompt:
    """What a correcting teacher is told, from <name>.yaml. Raises ParameterError."""
    file = _File(_found(name, folder, "correction prompt"), CorrectionPrompt)
    turns = file.content["user"]
    if not isinstance(turns, list) or not turns or not all(isinstance(each, str) and each.strip() for each in turns):
        raise file.error("needs user as a list of texts, the turns of the chat")
    file.check_fields("user", "\n".join(turns), FIELDS)
    return CorrectionPrompt(
        file.text("name"), file.text("system"), tuple(turns), file.text("prefill", (), allowed=FIELDS)
    )


def read_story(name: str = "story", folder: Path = FOLDER) -> StoryPrompt:
    """The prompt of all stories, from <name>.yaml. Raises ParameterError."""
    file = _File(_found(name, folder, "story prompt"), StoryPrompt)
    tokens, weight = file.content["max_new_tokens"], file.content["length_weight"]
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise file.error(f"has max_new_tokens {tokens!r}. Give a whole number of at least 1")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise file.error(f"has length_weight {weight!r}. Give a number of at least 0")
    return StoryPrompt(file.text("name"), file.text("prompt"), tokens, float(weight))


class _File:
    """A prompt file: a mapping with exactly the fields of a dataclass."""

    def __init__(self, path: Path, kind: type) -> None:
        self.path = path
        try:
            content = read_yaml(path)
        except PlanError as error:
            raise ParameterError(str(error)) from None
        keys = list(kind.__dataclass_fields__)
        if not isinstance(content, Mapping):
            raise self.error(f"holds no mapping. Give it the keys {', '.join(keys)}")
        for key in content:
            if key not in keys:
                raise self.error(f"has the key {key!r}. {did_you_mean(str(key), keys).rstrip('.')}")
        missing = [key for key in keys if key not in content]
        if missing:
            raise self.error(f"lacks {', '.join(missing)}. Add it")
        self.content: dict[str, Any] = dict(content)

    def error(self, what: str) -> ParameterError:
        return ParameterError(f"{relative(self.path)} {what}.")

    def text(self, key: str, needed: Sequence[str] = (), allowed: Sequence[str] = ()) -> str:
        """A text with the `needed` fields and no others but those `allowed`."""
        text = self.content[key]
        if not isinstance(text, str) or not text.strip():
            raise self.error(f"has {key} {text!r}. Give a text")
        self.check_fields(key, text, needed, allowed)
        return text

    def check_fields(self, key: str, text: str, needed: Sequence[str], allowed: Sequence[str] = ()) -> None:
        found = FIELD.findall(text)
        for field in needed:
            if field not in found:
                raise self.error(f"needs {{{field}}} in {key}, the place where the {field} goes")
        for field in found:
            if field not in (*needed, *allowed):
                valid = ", ".join(f"{{{each}}}" for each in (*needed, *allowed)) or "none"
                raise self.error(f"has {{{field}}} in {key}, which nothing fills. Fields of {key}: {valid}")


def _aspects(file: _File) -> tuple[Aspect, ...]:
    given = file.content["aspects"]
    if not isinstance(given, list) or not given:
        raise file.error("needs aspects: a list of {name, low, high}")
    aspects = []
    for each in given:
        if not isinstance(each, Mapping) or set(each) != {"name", "low", "high"}:
            raise file.error(f"has the aspect {each!r}. Give each aspect name, low and high, and nothing else")
        name, low, high = each["name"], each["low"], each["high"]
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z_]*", name):
            raise file.error(f"has the aspect {name!r}. Name it by small letters and underscores")
        if not (type(low) is type(high) is int and 0 <= low < high <= HIGHEST):
            raise file.error(
                f"grades {name} from {low!r} to {high!r}. Give whole numbers, 0 <= low < high <= {HIGHEST}"
            )
        aspects.append(Aspect(name, low, high))
    if len({aspect.name for aspect in aspects}) < len(aspects):
        raise file.error("names an aspect twice. Give each a name of its own")
    return tuple(aspects)


def _found(name: str, folder: Path, kind: str) -> Path:
    path = folder / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        names = [each.stem for each in folder.glob("*.yaml") if not each.name.startswith(RUBRIC_PREFIX)]
        raise ParameterError(f"There is no {kind} {name!r} in {relative(folder)}. {did_you_mean(name, names)}")
    return path
