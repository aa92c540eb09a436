"""What every trial of a search has in common: a notebook and its parameters, from a plan's stage or given here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbutils.batch import is_finished
from nbutils.foundation import RUNS, ParameterError, PlanError, RunError, command, did_you_mean, exclusively, relative
from nbutils.runs import RUN_FOLDER, Place, Plan, Schema, Variant, find_notebook, find_plan, load_plan, read_schema
from nbutils.search.space import read_values

REPEATS = ("seed", "noise_seed")  # of a matrix: the first value does for a search
NO_TEST = "evaluate_test"  # a notebook's parameter; where it has none, its test results are left unread


@dataclass(frozen=True)
class Setting:
    """The notebook that trials run, and its parameters but for those searched.

    `fixed` are the parameters given here, `needs` the runs of the plan that must be there: parameter -> variant.
    """

    name: str
    notebook: Path
    schema: Schema
    params: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    plan_folder: Path | None = None

    def trial_params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a trial that tries `values`: those that differ from the notebook's defaults, and these.

        The test split is not even evaluated where the notebook can leave it out.
        """
        hidden = {NO_TEST: False} if NO_TEST in self.schema.parameters else {}
        return self.unusual() | dict(values) | hidden

    def unusual(self) -> dict[str, Any]:
        """The common parameters that differ from the notebook's defaults."""
        defaults = {name: each.default for name, each in self.schema.parameters.items()}
        return {name: value for name, value in self.params.items() if value != defaults[name]}


def read_setting(
    notebook: str = "",
    plan: str = "",
    stage: str = "",
    fixed: Iterable[str] = (),
    space: Iterable[str] = (),
    folders: Mapping[str, str] | None = None,
    plan_folder: Path | None = None,
) -> Setting:
    """The setting of `stage` of the plan file `plan`, or of `notebook` alone; `fixed` lines override either.

    `folders` are parameters too, {name: run folder}; empty ones are left as they are. Parameters that the lines of
    `space` search need no value. The plan's runs lie in `plan_folder`, by default
    runs/<plan>. Raises PlanError or ParameterError.
    """
    if not plan:
        if stage:
            raise ParameterError(f"stage is {stage!r}, but no plan is given. Give the plan, or leave stage empty.")
        path = find_notebook(notebook)
        schema = read_schema(path)
        given = _given(fixed, folders, schema)
        return Setting(path.stem, path, schema, _complete(schema, given), given)
    loaded = load_plan(find_plan(plan))
    names = [each.name for each in loaded.stages]
    if stage not in names:
        told = f"has no stage {stage!r}" if stage else "is given without the stage to search"
        raise PlanError(f"Plan {loaded.name!r} {told}. {did_you_mean(stage, names)}")
    found = next(each for each in loaded.stages if each.name == stage)
    given = _given(fixed, folders, found.schema)
    variant = _variant(loaded, stage, given, {line.partition(":")[0].strip() for line in space})
    params = _complete(found.schema, variant.params | given)
    needs = {name: needed for name, needed in variant.needs.items() if name not in given}
    folder = plan_folder or RUNS / loaded.name
    return Setting(loaded.name, found.notebook, found.schema, params, given, needs, loaded, folder)


def _given(fixed: Iterable[str], folders: Mapping[str, str] | None, schema: Schema) -> dict[str, Any]:
    named = {name: folder for name, folder in (folders or {}).items() if folder}
    return read_values(fixed, schema, "fixed") | schema.convert(named)


def _complete(schema: Schema, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.resolve(given).items() if name != RUN_FOLDER}


def _variant(plan: Plan, stage: str, given: Mapping[str, Any], searched: set[str]) -> Variant:
    """The variant of `stage` to start from. Raises PlanError where a matrix leaves the choice open."""
    matrix = next(each for each in plan.stages if each.name == stage).matrix
    for name, values in matrix.items():
        if name not in {*REPEATS, *given, *searched} and len(values) > 1:
            told = ", ".join(map(str, values))
            raise PlanError(
                f"Stage {stage!r} of plan {plan.name!r} has several values of {name} ({told}). Say in `fixed` which "
                f"one the search is about, as '{name}: {values[-1]}'."
            )
    variants = [variant for variant in plan.variants if variant.stage == stage]
    shared = {name: given[name] for name, values in matrix.items() if name in given and given[name] in values}
    return next((each for each in variants if each.matrix.items() >= shared.items()), variants[0])


def prepare(setting: Setting) -> Setting:
    """Make the runs that `setting` needs, where they are not finished; returns it with their folders as parameters.

    Workers that share a study wait for each other here. Raises RunError where such a run fails.
    """
    if not setting.needs:
        return setting
    folders = {}
    with exclusively(setting.plan_folder / ".preparing"):
        for parameter, name in setting.needs.items():
            if not is_finished(setting.plan.variant(name), setting.plan_folder):
                _make(setting, name)
            folders[parameter] = relative(Place(setting.plan_folder, name).published)
    return replace(setting, params=setting.params | folders)


def _make(setting: Setting, name: str) -> None:
    print(f"Making {name} of plan {setting.plan.name} first, in {relative(setting.plan_folder)} ...", flush=True)
    words = ["batch", setting.plan.file, "--only", name, "--out", setting.plan_folder]
    process = subprocess.Popen(
        command(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        raise RunError(f"{name}, which the trials need, was not made. Mend what its batch says above, then search.")
