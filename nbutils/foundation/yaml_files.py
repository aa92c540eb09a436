"""YAML files read the way their authors mean them.

PyYAML follows YAML 1.1: it takes `1e-4` for text, `off` for false, `1:30` for 90 and `010` for 8, and lets the last of
two equal keys win without a word. Here numbers and booleans are those of YAML 1.2 and an equal key is an error. Safe:
the loader makes plain values only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nbutils.foundation.errors import PlanError, did_you_mean
from nbutils.foundation.places import NOTEBOOKS, PARAMS, relative
from nbutils.foundation.plaintext import LONGEST_PARAGRAPH, LONGEST_QUOTED, shortened

NOTEBOOK = ".ipynb"

# https://yaml.org/spec/1.2.2/#103-core-schema; integers come first, the pattern of floats matches them too
RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class PlainLoader(yaml.SafeLoader):
    """yaml.SafeLoader with YAML 1.2 scalars that refuses a mapping with two equal keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"{shortened(repr(key.value), LONGEST_QUOTED // 2)} stands here a second time",
                        key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in RESOLVERS:
    PlainLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
PlainLoader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)  # YAML 1.1 reads 010 as 8


def read_yaml(path: Path) -> Any:
    """The value in the YAML file `path`. Raises PlanError that names the line where it is not YAML, or what it is."""
    if path.suffix == NOTEBOOK:
        raise PlanError(_is_notebook(relative(path)))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except FileNotFoundError:
        if path.parent == PARAMS and (NOTEBOOKS / f"{path.stem}{NOTEBOOK}").is_file():
            raise PlanError(_is_notebook(path.stem)) from None
        others = _yaml_files(path.parent)
        near = did_you_mean(path.name, others) if others else f"{relative(path.parent)} holds no YAML file."
        raise PlanError(f"There is no file {relative(path)}. {near}") from None
    except IsADirectoryError:
        files = _yaml_files(path)
        cure = f"Name one of its files: {', '.join(files)}." if files else "It holds no YAML file."
        raise PlanError(f"{relative(path)} is a folder. {shortened(cure, LONGEST_PARAGRAPH)}") from None
    except OSError as error:
        raise PlanError(f"{relative(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{relative(path)} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PlanError(f"{relative(path)}{_where(error)}") from None


def _yaml_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.yaml"))


def _is_notebook(name: str) -> str:
    return (
        f"{name} is a notebook, no plan. Run it with: python -m nbutils run {name} --params FILE --variant NAME, where "
        "FILE is a plan with a stage of it, or has lines `name: value`."
    )


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = shortened(getattr(error, "problem", None) or str(error).splitlines()[0], LONGEST_QUOTED)
    if mark is None:
        return f" is not YAML: {problem}."
    return f", line {mark.line + 1}, column {mark.column + 1}, is not YAML: {problem}."
