"""The parameters cell of a notebook is the schema: names, types, defaults and help that values are checked against.

Every line of the cell tagged `parameters` is `name: type = default  # help`. The help may state what is allowed, in
words that are read here too:

    alpha: float = 0.5      # weight of the cosine term, in [0, 1]
    temperature: float = 1  # divides the logits, > 0
    max_steps: int = 0      # optimiser steps, at least 0; 0 means by epochs
    split: str = "hash"     # one of hash, given, contiguous: how documents are divided

`at least` and `at most` say the same as `>=` and `<=`, and are better: papermill's `--help-notebook` leaves out a line
with a second `=`. The cell is read by `ast` and `tokenize`: nothing runs, and papermill, slow to import, is not needed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import operator
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbutils.foundation import NOTEBOOKS, ParameterError, PlanError, did_you_mean, relative, resolve

RUN_FOLDER = "run_folder"  # where a run's results go; the runner sets it, so it says nothing about the result
TRUE, FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
INTERVAL = re.compile(rf"\bin ([\[(])\s*({NUMBER})\s*,\s*({NUMBER})\s*([\])])")
COMPARISON = re.compile(rf"(?<![-=<>])(>=|<=|>|<|\bat least\b|\bat most\b)\s*({NUMBER})")
CHOICES = re.compile(r"\bone of ([^:;(]+?)(?=\s*(?:[:;(]|\.(?:\s|$)|$))")
HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "at least": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "at most": operator.le,
}


@dataclass(frozen=True)
class Constraint:
    """What the help allows: comparisons that all hold, or one of some choices. Empty: anything of the type."""

    comparisons: tuple[tuple[str, float], ...] = ()
    choices: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether one value (of a list: each of its items) is allowed."""
        if self.choices:
            return value in self.choices
        return all(HOLDS[sign](value, bound) for sign, bound in self.comparisons)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return " and ".join(f"{sign} {bound:g}" for sign, bound in self.comparisons)


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell. `type` is as written: int, float, bool, str or a list of one of them."""

    name: str
    type: str
    default: Any
    help: str
    constraint: Constraint

    def convert(self, value: Any) -> Any:
        """`value` in the declared type. Raises ValueError with what was wrong, to end the sentence "it ..."."""
        item = self.type.removeprefix("list[").removesuffix("]")
        if item == self.type:
            return self._allowed(CONVERT[item](value))
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a {self.type}, written [a, b]")
        return [self._allowed(CONVERT[item](each)) for each in value]

    def _allowed(self, value: Any) -> Any:
        if not self.constraint.allows(value):
            near = f". {did_you_mean(value, self.constraint.choices)}" if isinstance(value, str) else ""
            raise ValueError(f"must be {self.constraint}{near}".rstrip("."))
        return value


@dataclass(frozen=True)
class Schema:
    """The parameters of one notebook by name, in the order of the cell."""

    notebook: str
    parameters: dict[str, Parameter]

    def convert(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` alone, each value in its declared type.

        Raises ParameterError that names the notebook, the parameter, what was given and what is valid.
        """
        values = {}
        for name, value in given.items():
            if name not in self.parameters:
                near = did_you_mean(str(name), self.parameters)
                raise ParameterError(f"{self.notebook} has no parameter {str(name)!r} (given {_shown(value)}). {near}")
            try:
                values[name] = self.parameters[name].convert(value)
            except ValueError as error:
                raise ParameterError(f"{self.notebook}: parameter {name!r} {error}; given {_shown(value)}.") from None
        return values

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: the values `given`, and the defaults of the others. Raises as `convert` does."""
        return {name: each.default for name, each in self.parameters.items()} | self.convert(given)


def read_schema(notebook: Path) -> Schema:
    """The schema of the file `notebook`.

    Raises ParameterError where it has no parameters cell or several, a line of the cell is not
    `name: type = default  # help`, or a default is not what its own line allows.
    """
    cells = [cell for cell in read_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) != 1 or cells[0]["cell_type"] != "code":
        raise ParameterError(
            f"{relative(notebook)} has {len(cells)} cells tagged 'parameters' and needs one, a code cell. "
            "Without it every run would use the notebook's defaults. Set the tag in JupyterLab's property inspector."
        )
    return Schema(notebook.stem, {p.name: p for p in _read_lines(cells[0]["source"], relative(notebook))})


def _read_lines(source: str, notebook: str) -> Iterator[Parameter]:
    try:
        statements = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise ParameterError(f"{notebook}: the parameters cell is not Python ({error}).") from None
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens if token.type == tokenize.COMMENT
    }
    seen = set()
    for statement in statements:
        try:
            lines = range(statement.lineno, statement.end_lineno + 1)
            parameter = _read_line(statement, " ".join(comments[line] for line in lines if line in comments))
            if parameter.name in seen:
                raise ValueError("stands there twice")
        except ValueError as error:
            line = ast.unparse(statement)
            raise ParameterError(f"{notebook}: in the parameters cell, `{line}` {error}.") from None
        seen.add(parameter.name)
        yield parameter


def _read_line(line: ast.stmt, help_text: str) -> Parameter:
    if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
        raise ValueError("is not of the form `name: type = default  # help`")
    kind = ast.unparse(line.annotation)
    item = kind.removeprefix("list[").removesuffix("]")
    if item not in CONVERT:
        raise ValueError(f"has no type that is known here: {', '.join(CONVERT)}, or list[...] of one of them")
    try:
        value = ast.literal_eval(line.value)
    except ValueError:
        raise ValueError("needs a plain value for a default") from None
    parameter = Parameter(line.target.id, kind, value, help_text, _read_constraint(help_text, item))
    try:
        return Parameter(parameter.name, kind, parameter.convert(value), help_text, parameter.constraint)
    except ValueError as error:
        raise ValueError(f"has a default that its own line refuses: it {error}") from None


def _read_constraint(help_text: str, kind: str) -> Constraint:
    if kind in ("int", "float"):
        bounds = [(sign, float(bound)) for sign, bound in COMPARISON.findall(help_text)]
        for left, low, high, right in INTERVAL.findall(help_text):
            bounds += [(">=" if left == "[" else ">", float(low)), ("<=" if right == "]" else "<", float(high))]
        if bounds:
            return Constraint(comparisons=tuple(bounds))
    match = CHOICES.search(help_text)
    words = re.split(r"\s*,\s*(?:or\s+)?|\s+or\s+", match[1].strip()) if match else []
    return Constraint(choices=tuple(CONVERT[kind](word) for word in words if word))


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+", value.strip()):
        return int(value)
    number = _to_float(value, "an int")
    if not number.is_integer():
        raise ValueError("must be an int")
    return int(number)


def _to_float(value: Any, wanted: str = "a float") -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be {wanted}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be {wanted} that is finite")
    return number


def _to_bool(value: Any) -> bool:
    word = str(value).strip().lower()
    if not isinstance(value, bool | str) or word not in TRUE | FALSE:
        raise ValueError("must be true or false")
    return word in TRUE


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text: put it in quotes")
    return value


CONVERT: dict[str, Callable[[Any], Any]] = {"int": _to_int, "float": _to_float, "bool": _to_bool, "str": _to_str}


def find_notebook(name: str | Path) -> Path:
    """The notebook called `name` (`04_cosine_mixing`) or lying at `name` (`notebooks/04_cosine_mixing.ipynb`).

    Raises PlanError with the nearest name where there is none.
    """
    file = f"{str(name).removesuffix('.ipynb')}.ipynb"
    path = resolve(file) if "/" in file else NOTEBOOKS / file
    if not path.is_file():
        near = did_you_mean(path.stem, [other.stem for other in NOTEBOOKS.glob("*.ipynb")])
        raise PlanError(f"There is no notebook {relative(path)}. {near}")
    return path


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of notebook `path`, each with `cell_type`, `metadata` and `source` as one string.

    Raises PlanError where the file is not a notebook.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{relative(path)} is not a notebook that can be read ({type(error).__name__}: {error}). "
            "Open it in JupyterLab and save it again."
        ) from None


def tags(cell: dict[str, Any]) -> list[str]:
    """The tags of a cell."""
    return cell.get("metadata", {}).get("tags", [])


def source_sha256(path: Path) -> str:
    """A hash of what notebook `path` computes: its code cells in order, and which of them holds the parameters.

    Outputs, metadata and prose are left out: none of them changes a number.
    """
    status = path.stat()
    return _source_sha256(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _source_sha256(path: Path, modified: int, size: int) -> str:
    code = [(cell["source"], "parameters" in tags(cell)) for cell in read_cells(path) if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()
