"""The terms that an objective may be made of, by name, and an objective read from lines such as "cosine 0.5".

A term is one file in `terms/`: `register` is its one line here. Files are found by listing that folder, or by a path in
the line itself (`my/term.py 0.1`), so that a new term edits no other file.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from nbutils.foundation import ParameterError, did_you_mean, resolve
from nbutils.objectives import terms as folder
from nbutils.objectives.objective import Objective
from nbutils.objectives.term import REGISTERED, Term
from nbutils.objectives.terms.cross_entropy import CrossEntropy

TRUTH = {"true": True, "false": False}


def registered() -> dict[str, type[Term]]:
    """{name: term} of all files in `terms/`, and of those registered elsewhere."""
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(REGISTERED.items()))


def objective_from(lines: Sequence[str]) -> Objective:
    """The weighted sum of the terms that `lines` name, each "NAME WEIGHT [parameter=value ...]".

    Cross entropy is measured in any case: where no line names it, it has weight 0. Raises ParameterError where a name,
    a weight or a parameter cannot be.
    """
    pairs = [_read(line) for line in lines]
    names = [term.name for term, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ParameterError(f"terms: {repeated!r} stands there twice. Add its weights in one line.")
    if not any(weight for _, weight in pairs):
        raise ParameterError("terms: no term has a weight, so nothing would be learned. Try cross_entropy 1.0.")
    if "ce" not in names:
        pairs.insert(0, (CrossEntropy(), 0.0))
    return Objective(tuple(term for term, _ in pairs), tuple(weight for _, weight in pairs))


def _read(line: str) -> tuple[Term, float]:
    if not line.strip():
        raise ParameterError("terms: a line is empty. Write `cross_entropy 1.0`, say.")
    name, *rest = line.split()
    if not rest:
        raise ParameterError(f"terms: {line!r} has no weight. Write `{name} 0.5`, say.")
    weight = _number(rest[0], f"terms: the weight of {line!r}", 0.0, float("inf"))
    kind = _kind(name)
    if kind.uses_teacher:
        raise ParameterError(f"terms: {name} needs a teacher, which this notebook has not. Use 03_distillation.")
    assignments = [_assignment(each, line) for each in rest[1:]]
    given = dict(assignments)
    if len(given) < len(assignments):
        raise ParameterError(f"terms: {line!r} gives a parameter twice.")
    fields = {each.name: each for each in dataclasses.fields(kind) if each.name != "name"}
    for parameter in given.keys() - fields.keys():
        raise ParameterError(f"terms: {name} has no parameter {parameter!r}. {did_you_mean(parameter, list(fields))}")
    missing = [each.name for each in fields.values() if each.default is dataclasses.MISSING and each.name not in given]
    if missing:
        raise ParameterError(
            f"terms: {name} needs {', '.join(missing)}, which a line cannot give. Use its own notebook."
        )
    values = {parameter: _value(fields[parameter], text, kind, name) for parameter, text in given.items()}
    return kind(**values), weight


def _kind(name: str) -> type[Term]:
    if name.endswith(".py"):
        return _from_file(name)
    known = registered()
    if name not in known:
        raise ParameterError(f"terms: there is no term {name!r}. {did_you_mean(name, list(known))}")
    return known[name]


def _from_file(name: str) -> type[Term]:
    """The term that a file registers. Ranks cannot import it: with several processes a term lies in `terms/`."""
    path = resolve(name)
    if not path.is_file():
        raise ParameterError(f"terms: there is no file {name}. Give a path from the repository's root.")
    before = dict(REGISTERED)
    spec = importlib.util.spec_from_file_location(f"workbook_term_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    new = [kind for known, kind in REGISTERED.items() if before.get(known) is not kind]
    if len(new) != 1:
        raise ParameterError(f"terms: {name} registers {len(new)} terms; one file is one term.")
    return new[0]


def _assignment(text: str, line: str) -> tuple[str, str]:
    parameter, equals, value = text.partition("=")
    if not equals:
        raise ParameterError(f"terms: {text!r} in {line!r} is no parameter. Write parameter=value, without spaces.")
    return parameter, value


def _value(field: dataclasses.Field, text: str, kind: type[Term], name: str) -> Any:
    """`text` as the type that the parameter is declared with."""
    what = f"terms: {field.name} of {name}"
    declared = field.type if isinstance(field.type, str) else field.type.__name__  # a file without `annotations`
    if declared == "bool":
        if text.lower() not in TRUTH:
            raise ParameterError(f"{what} is {text!r}; give true or false.")
        return TRUTH[text.lower()]
    if declared not in ("int", "float"):
        return text
    bounds = {parameter: limits for parameter, *limits in kind.bounds}
    number = _number(text, what, *bounds.get(field.name, (-math.inf, math.inf)))
    if declared == "int" and not number.is_integer():
        raise ParameterError(f"{what} is {text}; give a whole number.")
    return int(number) if declared == "int" else number


def _number(text: str, what: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ParameterError(f"{what} is {text!r}, which is no number.") from None
    if not math.isfinite(number):
        raise ParameterError(f"{what} is {text}; give a finite number.")
    if not low <= number <= high:
        raise ParameterError(f"{what} is {text}; it lies between {low:g} and {high:g}.")
    return number
