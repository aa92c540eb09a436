"""A plan file names stages, each a notebook with parameters and a matrix of variants, and the contrasts to judge.

Reading a plan checks all that can be known without running anything. A plan that loads can be started.

    name: quick
    stages:
      - {name: data, notebook: 01_data_prep, params: {vocab_size: 2048}}
      - name: cosine
        notebook: 04_cosine_mixing
        needs: {data_folder: data}     # this parameter is the folder of that stage's run
        matrix: {alpha: [0.0, 0.5, 1.0], seed: [1, 2, 3]}
        exclude: [{alpha: 1.0, seed: [2, 3]}]   # `only`, of the same form, keeps what fits one of its entries
    contrasts:
      - name: mixing
        question: Is alpha 0.5 better in perplexity?
        stage: cosine                  # control_stage: another stage, where the control stands in that
        metric: test_ce_loss           # control_metric: another result, where the control is judged on that
        treatment: {alpha: 0.5}
        control: {alpha: 0.0}
        better: lower
        claim: better                  # or no worse
        primary: true
        smallest_effect: 0.01          # in the metric's unit; for the claim "no worse" the margin
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbutils.foundation import (
    LONGEST_QUOTED,
    PARAMS,
    ParameterError,
    PlanError,
    Resources,
    did_you_mean,
    read_resources,
    read_yaml,
    relative,
    resolve,
    shortened,
    typed,
)
from nbutils.runs.contrasts import Comparison, Contrast, check_criterion, check_metrics, check_pairs
from nbutils.runs.params import RUN_FOLDER, Schema, find_notebook, read_schema

KINDS = {str: "text, in quotes if it looks like a number", list: "a list", dict: "a mapping, {name: value}"}
SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
LONGEST_NAME = 120  # a variant is a folder name; file systems allow 255 bytes and temporary names add to it
PLAN_FILE = "plan.yaml"  # the plan's folder keeps a copy of the plan its runs were made from
INTERACTIVE = "interactive"  # the plan name of runs started by hand in a notebook
PLAN_KEYS = {"name": str, "stages": list, "contrasts": list, "noise_floor": dict}
STAGE_KEYS = {"name": str, "notebook": str, "needs": dict, "params": dict, "matrix": dict, "exclude": list}
STAGE_KEYS |= {"only": list, "resources": dict}
COMPARISON_KEYS = {"stage": str, "metric": str, "treatment": dict, "control": dict}
CONTRAST_KEYS = COMPARISON_KEYS | dict.fromkeys(("name", "question", "better", "claim"), str)
CONTRAST_KEYS |= {"smallest_effect": object, "primary": object, "control_metric": str, "control_stage": str}
OPTIONAL = {"primary", "control_metric", "control_stage"}


@dataclass(frozen=True)
class Variant:
    """One run to make. `params` are complete but for the run folder and what `needs` brings: parameter -> variant."""

    name: str
    stage: str
    notebook: Path
    params: dict[str, Any]
    matrix: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class Stage:
    """One notebook with what its variants share; `needs` maps a parameter to the earlier stage it comes from.

    What fits an entry of `exclude` is left out; where there is `only`, what fits none of its entries is left out too.
    """

    name: str
    notebook: Path
    schema: Schema
    params: dict[str, Any]
    matrix: dict[str, list[Any]]
    exclude: list[dict[str, list[Any]]]
    only: list[dict[str, list[Any]]]
    needs: dict[str, str]
    resources: Resources

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The matrix values of each variant, the last name changing fastest."""
        for values in itertools.product(*self.matrix.values()):
            combination = dict(zip(self.matrix, values, strict=True))
            if not _fits(combination, self.exclude) and (not self.only or _fits(combination, self.only)):
                yield combination


@dataclass(frozen=True)
class Plan:
    """A checked plan: its variants stand in an order in which each comes after all it needs."""

    name: str
    file: Path
    stages: tuple[Stage, ...]
    variants: tuple[Variant, ...]
    contrasts: tuple[Contrast, ...]
    noise_floor: Comparison | None

    def variant(self, name: str) -> Variant:
        """The variant called `name`. Raises PlanError with the nearest name where there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        near = did_you_mean(name, [variant.name for variant in self.variants])
        raise PlanError(f"Plan {self.name!r} has no variant {name!r}. {near}")

    @property
    def comparisons(self) -> list[Comparison]:
        """The contrasts and, where there is one, the noise floor."""
        return [*self.contrasts, *([self.noise_floor] if self.noise_floor else [])]


def find_plan(name: str | Path) -> Path:
    """The plan file at `name`, from here or from the repository's root; a plain word is the name of one in params/.

    It may not exist: whoever reads it says so.
    """
    named, here = PARAMS / f"{name}.yaml", typed(name)
    found = here if here.exists() else resolve(name)
    if SLUG.fullmatch(str(name)) and (named.is_file() or not (found.suffix or found.is_dir())):
        return named
    return found


def load_plan(path: Path) -> Plan:
    """The plan in the file `path`.

    Raises PlanError or ParameterError, naming the plan, the place in it, what was given and what is valid.
    """
    content, where = read_yaml(path), relative(path)
    _check_keys(where, content, PLAN_KEYS, required=("name", "stages"))
    if content["name"] == INTERACTIVE:
        raise PlanError(f"{where}: the name {INTERACTIVE!r} is kept for runs started by hand. Choose another.")
    stages: list[Stage] = []
    variants: list[Variant] = []
    for given in content["stages"]:
        stage = _read_stage(where, given, stages)
        stages.append(stage)
        variants += _variants(f"{where}: stage {stage.name!r}", stage, variants)
    if not stages:
        raise PlanError(f"{where}: stages is empty, so there is nothing to run.")
    _refuse_equal(f"{where}: variant", [variant.name for variant in variants])
    contrasts = tuple(_read_contrasts(where, content.get("contrasts") or [], stages, variants))
    floor = content.get("noise_floor")
    if floor is not None:
        floor = _read_noise_floor(f"{where}: noise_floor", floor, contrasts, stages, variants)
    return Plan(_check_slug(where, content["name"]), path, tuple(stages), tuple(variants), contrasts, floor)


def _read_stage(plan: str, given: Any, earlier: list[Stage]) -> Stage:
    where = f"{plan}: stage {len(earlier) + 1}"
    _check_keys(where, given, STAGE_KEYS, required=("name", "notebook"))
    where = f"{plan}: stage {_check_slug(where, given['name'])!r}"
    _refuse_equal(f"{plan}: stage", [*(stage.name for stage in earlier), given["name"]])
    notebook = find_notebook(given["notebook"])
    schema = read_schema(notebook)
    needs, params, matrix = (given.get(key) or {} for key in ("needs", "params", "matrix"))
    _refuse_equal(f"{where}: parameter", [*needs, *params, *matrix], "Set it in one of needs, params and matrix.")
    if RUN_FOLDER in {*needs, *params, *matrix}:
        raise PlanError(f"{where}: {RUN_FOLDER} is set by the runner and cannot stand in a plan.")
    for name, stage in needs.items():
        _check_need(where, name, stage, schema, earlier)
    try:
        params = schema.convert(params)
        matrix = {name: _matrix_values(where, name, values, schema) for name, values in matrix.items()}
        exclude, only = (
            [_matching(f"{where}: {key}", entry, matrix, schema) for entry in given.get(key) or []]
            for key in ("exclude", "only")
        )
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    resources = read_resources(where, given.get("resources") or {})
    return Stage(given["name"], notebook, schema, params, matrix, exclude, only, needs, resources)


def _check_need(where: str, name: str, stage: Any, schema: Schema, earlier: list[Stage]) -> None:
    if name not in schema.parameters:
        near = did_you_mean(name, schema.parameters)
        raise PlanError(f"{where} needs {name!r}, which is no parameter of {schema.notebook}. {near}")
    if schema.parameters[name].type != "str":
        raise PlanError(f"{where} needs {name!r}, which is no folder: it is of type {schema.parameters[name].type}.")
    names = [each.name for each in earlier]
    if stage not in names:
        near = did_you_mean(str(stage), names) if names else "It is the first stage; put what it needs before it."
        raise PlanError(f"{where} needs {stage!r} for {name}, and no earlier stage has that name. {near}")


def _matrix_values(where: str, name: Any, values: Any, schema: Schema) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise PlanError(f"{where}: matrix {name} is {values!r}. Give a list of values, [a, b].")
    values = [schema.convert({name: value})[name] for value in values]
    _refuse_equal(f"{where}: matrix {name} value", [_word(value) for value in values], "Keep one of them.")
    return values


def _matching(where: str, entry: Any, matrix: Mapping[str, list[Any]], schema: Schema) -> dict[str, list[Any]]:
    """An entry of `exclude` or `only`, every value in a list. Raises PlanError where it can fit nothing."""
    _check_keys(where, entry, dict.fromkeys(matrix, object))
    values = {}
    for name, given in entry.items():
        several = isinstance(given, list) and not schema.parameters[name].type.startswith("list")
        values[name] = [schema.convert({name: value})[name] for value in (given if several else [given])]
        if missing := [value for value in values[name] if value not in matrix[name]]:
            raise PlanError(f"{where} has {name} {missing[0]!r}, which the matrix has not, so it fits nothing.")
    return values


def _fits(combination: Mapping[str, Any], entries: Iterable[Mapping[str, list[Any]]]) -> bool:
    """Whether a combination of matrix values has what one of `entries` asks for."""
    return any(all(combination[name] in values for name, values in entry.items()) for entry in entries)


def _variants(where: str, stage: Stage, earlier: list[Variant]) -> Iterator[Variant]:
    combinations = list(stage.combinations())
    if not combinations:
        raise PlanError(f"{where}: exclude and only leave no variant.")
    defaults = stage.schema.resolve({})
    for matrix in combinations:
        given = stage.params | matrix
        needs = {name: _needed(where, other, given, earlier) for name, other in stage.needs.items()}
        params = {n: v for n, v in (defaults | given).items() if n != RUN_FOLDER and n not in needs}
        name = variant_name(stage.name, matrix)
        yield Variant(name, stage.name, stage.notebook, params, matrix, needs, stage.resources)


def _needed(where: str, stage: str, given: Mapping[str, Any], earlier: list[Variant]) -> str:
    """The one variant of `stage` that agrees with `given`, a variant's own values, on the names both have."""
    candidates = [variant for variant in earlier if variant.stage == stage]
    if len(candidates) > 1:
        candidates = [v for v in candidates if all(given[n] == value for n, value in v.matrix.items() if n in given)]
    if len(candidates) != 1:
        names = {name for variant in earlier if variant.stage == stage for name in variant.matrix}
        raise PlanError(
            f"{where} needs one variant of {stage!r} and {len(candidates) or 'none'} of them fit. Variants fit whose "
            f"matrix values are equal; give this stage a value for: {', '.join(sorted(names))}."
        )
    return candidates[0].name


def variant_name(stage: str, matrix: Mapping[str, Any]) -> str:
    """A folder name for a variant, in letters, digits and `._-`: `cosine-alpha0.5-seed1`."""
    name = "-".join([stage, *(f"{key}{_word(value)}" for key, value in matrix.items())])
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower())
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _word(value: Any) -> str:
    return "_".join(map(_word, value)) if isinstance(value, list) else str(value)


def _read_contrasts(plan: str, given: list[Any], stages: list[Stage], variants: list[Variant]) -> Iterator[Contrast]:
    required = [key for key in CONTRAST_KEYS if key not in OPTIONAL]
    for number, entry in enumerate(given, 1):
        _check_keys(f"{plan}: contrast {number}", entry, CONTRAST_KEYS, required)
        where = f"{plan}: contrast {entry['name']!r}"
        check_criterion(where, entry)
        effect = float(entry["smallest_effect"])
        yield _comparison(Contrast, where, entry | {"smallest_effect": effect}, stages, variants)
    _refuse_equal(f"{plan}: contrast", [entry["name"] for entry in given])
    primary = [entry["name"] for entry in given if entry.get("primary")]
    if given and len(primary) != 1:
        raise PlanError(
            f"{plan}: {len(primary)} contrasts are primary. Mark one with `primary: true`: the question the study "
            "stands or falls with; the others are corrected for being many."
        )


def _read_noise_floor(
    where: str, given: Any, contrasts: tuple[Contrast, ...], stages: list[Stage], variants: list[Variant]
) -> Comparison:
    _check_keys(where, given, COMPARISON_KEYS, required=("stage", "treatment", "control"))
    metric = next((contrast.metric for contrast in contrasts if contrast.primary), None)
    if "metric" not in given and metric is None:
        raise PlanError(f"{where}: metric is missing, and there is no primary contrast to take it from.")
    return _comparison(Comparison, where, {"metric": metric} | given, stages, variants)


def _comparison(
    kind: type[Comparison], where: str, given: Mapping[str, Any], stages: list[Stage], variants: list[Variant]
) -> Any:
    """The comparison that an entry describes, its sides in their types. Raises where it could not be judged."""
    by_name = {stage.name: stage for stage in stages}
    stands_in = {"treatment": given["stage"], "control": given.get("control_stage") or given["stage"]}
    for name in stands_in.values():
        if name not in by_name:
            raise PlanError(f"{where}: there is no stage {name!r}. {did_you_mean(name, by_name)}")
    try:
        sides = {side: by_name[name].schema.convert(given[side]) for side, name in stands_in.items()}
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    comparison = kind(**{**given, **sides})
    check_pairs(where, comparison, {stage.name: stage.matrix for stage in stages}, variants)
    check_metrics(where, comparison, {stage.name: stage.notebook for stage in stages})
    return comparison


def _check_keys(where: str, given: Any, kinds: Mapping[str, type], required: Iterable[str] = ()) -> None:
    """Raise PlanError where `given` is no mapping, or has a key that is none, of another kind, or missing."""
    if not isinstance(given, dict):
        raise PlanError(
            f"{where} is {_quoted(given)}. Give a mapping with the keys {', '.join(kinds) or 'of a matrix'}."
        )
    for key, value in given.items():
        if key not in kinds:
            raise PlanError(f"{where} has no key {_quoted(str(key))}. {did_you_mean(str(key), kinds)}")
        if value is not None and not isinstance(value, kinds[key]):
            raise PlanError(f"{where}: {key} is {_quoted(value)}. Give {KINDS[kinds[key]]}.")
    for key in required:
        if given.get(key) in (None, ""):
            raise PlanError(f"{where}: {key} is missing.")


def _quoted(given: Any) -> str:
    return shortened(repr(given), LONGEST_QUOTED)


def _check_slug(where: str, name: str) -> str:
    """`name`, which becomes a folder. Raises PlanError where it cannot."""
    if not SLUG.fullmatch(name):
        raise PlanError(
            f"{where}: the name {name!r} becomes a folder. Use a-z, 0-9 and ._- only, a letter or digit first."
        )
    return name


def _refuse_equal(where: str, names: list[Any], cure: str = "Each needs a name of its own.") -> None:
    """Raise PlanError where a name stands there twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise PlanError(f"{where} {name!r} stands there {times} times. {cure}")
