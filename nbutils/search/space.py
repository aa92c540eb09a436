"""What is searched: lines such as `learning_rate: 1e-4..1e-2 log`, checked against the notebook's parameters.

kl_weight: 0..1                       evenly
learning_rate: 1e-4..1e-2 log         evenly in its logarithm
per_device_train_batch_size: 4..32    whole numbers, where the parameter is one
lr_scheduler_type: linear, cosine     one of these
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from nbutils.foundation import ParameterError, PlainLoader, did_you_mean
from nbutils.runs import RUN_FOLDER, Schema

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from nbutils.search.setting import Setting

NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\s*\.\.\s*({NUMBER})(\s+log)?")
EXAMPLES = "'learning_rate: 1e-4..1e-2 log', 'kl_weight: 0..1' or 'lr_scheduler_type: linear, cosine'"
DIGITS = 4  # significant ones of a value tried: no more can matter, and a plan stays readable
NEVER = {
    RUN_FOLDER: "is set by the runner",
    "seed": "only repeats a setting: its best value is luck",
    "noise_seed": "only repeats a setting: its best value is luck",
    "evaluate_test": "is off in every trial",
}


@dataclass(frozen=True)
class Dimension:
    """One parameter searched: numbers from `low` to `high`, both included, or one of `choices`."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        kind = IntDistribution if self.integer else FloatDistribution
        return kind(self.low, self.high, log=self.log)

    def rounded(self, value: Any) -> Any:
        """The value a trial is run with: a drawn float with DIGITS digits, still inside the range."""
        if self.choices or self.integer:
            return value
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))

    def __str__(self) -> str:
        if self.choices:
            return f"{self.name}: {', '.join(map(str, self.choices))}"
        return f"{self.name}: {self.low:g}..{self.high:g}{' log' * self.log}"


def read_space(lines: Iterable[str], setting: Setting) -> tuple[Dimension, ...]:
    """The dimensions that `lines` describe, for the notebook of `setting`.

    Raises ParameterError that names the line where one cannot be read, names no parameter, or leaves what is allowed.
    """
    space: list[Dimension] = []
    for line in lines:
        dimension = _read_line(line, setting.schema)
        if dimension.name in {each.name for each in space}:
            raise ParameterError(f"The search space has {dimension.name!r} twice. Keep one of the lines.")
        if dimension.name in setting.fixed:
            raise ParameterError(f"{dimension.name!r} is searched and fixed. Take it out of `space` or of `fixed`.")
        if dimension.name in setting.needs:
            raise ParameterError(f"{dimension.name!r} comes from an earlier stage of the plan and cannot be searched.")
        space.append(dimension)
    if not space:
        raise ParameterError(f"The search space is empty. Give lines such as {EXAMPLES}.")
    return tuple(space)


def read_values(lines: Iterable[str], schema: Schema, where: str) -> dict[str, Any]:
    """{parameter: value} of lines such as `max_steps: 60`, each in its declared type. Raises ParameterError."""
    values: dict[str, Any] = {}
    for line in lines:
        try:
            given = yaml.load(line, Loader=PlainLoader)
        except yaml.YAMLError:
            given = None
        if not isinstance(given, dict) or len(given) != 1:
            raise ParameterError(f"{where} has {line!r}, which is no `name: value`, as 'max_steps: 60' is.")
        for name, value in given.items():
            if name in values:
                raise ParameterError(f"{where} has {name!r} twice. Keep one of the lines.")
            values |= schema.convert({name: value})
    if RUN_FOLDER in values:
        raise ParameterError(f"{where} names {RUN_FOLDER}, which is set by the runner. Leave it out.")
    return values


def _read_line(line: str, schema: Schema) -> Dimension:
    name, separator, told = (part.strip() for part in line.partition(":"))
    if not separator or not told:
        raise ParameterError(f"The search space has {line!r}. Write it as {EXAMPLES}.")
    if name in NEVER:
        raise ParameterError(f"{name!r} cannot be searched: it {NEVER[name]}.")
    if name not in schema.parameters:
        raise ParameterError(
            f"{schema.notebook} has no parameter {name!r} to search. {did_you_mean(name, schema.parameters)}"
        )
    kind = schema.parameters[name].type
    if kind.startswith("list"):
        raise ParameterError(f"{name!r} is a {kind} and cannot be searched. Search single values.")
    if ".." in told:
        return _read_range(line, name, told, schema, kind)
    choices = [schema.convert({name: word})[name] for word in _words(told)]
    if len(set(choices)) < 2 or len(set(choices)) < len(choices):
        raise ParameterError(f"The search space has {line!r}. Give two different values or more, or a range low..high.")
    return Dimension(name, choices=tuple(choices))


def _read_range(line: str, name: str, told: str, schema: Schema, kind: str) -> Dimension:
    match = RANGE.fullmatch(told)
    if kind not in ("int", "float"):
        raise ParameterError(f"{name!r} is a {kind} and has no range. Write its values as '{name}: a, b'.")
    if not match:
        raise ParameterError(f"The search space has {line!r}. A range is low..high or low..high log, as in {EXAMPLES}.")
    low, high = (schema.convert({name: bound})[name] for bound in match.groups()[:2])
    if not low < high:
        raise ParameterError(f"The search space has {line!r}, whose low end is not below its high end. Swap them.")
    if match[3] and low <= 0:
        raise ParameterError(f"The search space has {line!r}: log needs a low end above 0. Leave log out, or raise it.")
    return Dimension(name, low, high, log=bool(match[3]), integer=kind == "int")


def _words(told: str) -> list[Any]:
    return [yaml.load(word, Loader=PlainLoader) for word in told.split(",")]


def values_of(space: Iterable[Dimension], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """{parameter: value to run with} for what Optuna drew."""
    return {each.name: each.rounded(drawn[each.name]) for each in space}
