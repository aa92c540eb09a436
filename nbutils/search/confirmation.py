"""The best setting as a plan: over new seeds, beside its control, with the contrast declared before any of it runs.

The loss that a search reports for its best trial is the lowest of many, so it is too good: what the setting is worth
shows only on seeds it was not chosen on, and on the test split that the search never read. Of data without a test
split the contrast is about validation, and the plan says what that leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nbutils.batch import data_card
from nbutils.foundation import ParameterError, PlanError, atomic_write, relative, resolve
from nbutils.runs import SLUG, load_plan
from nbutils.search.setting import Setting
from nbutils.search.space import Dimension, read_values
from nbutils.search.study import INDEX, OBJECTIVE, PARAMS
from nbutils.search.work import Search

HEADER = "# Written by a search; a later one writes over it."
STAGE = "tuned"
METRIC = "test_ce_loss"
WITHOUT_TEST = "eval_ce_loss"
LAST = {"evaluated_model": "last"}  # the best by validation would be chosen on what it is judged on
NO_TEST_SPLIT = (
    "# The data have no test split, so the contrast is about validation, on which the setting was chosen: other seeds\n"
    "# than the trials', but the same text. A notebook that has evaluated_model judges the last, not the best on it."
)


@dataclass(frozen=True)
class Confirmation:
    """What the plan is to compare: the best setting with `control`, a line such as `divergence: none`, over `seeds`.

    An empty `control` compares nothing. `plan_file` is where the plan goes besides its place beside the study.
    """

    control: str = ""
    seeds: Sequence[int] = (1, 2, 3)
    smallest_effect: float = 0.01
    plan_file: str = ""


def check_confirmation(setting: Setting, space: Sequence[Dimension], asked: Confirmation) -> None:
    """Raise ParameterError or PlanError where no plan could be written, before any trial has run."""
    own = setting.params.get("seed")
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise ParameterError(f"confirm_seeds is {list(asked.seeds)}. Give at least one seed, each once.")
    if own in asked.seeds:
        raise ParameterError(
            f"confirm_seeds has {own}, the seed of the trials: its luck would count twice. Give other seeds."
        )
    control = _control(setting, asked)
    searched = {each.name for each in space}
    for name, value in control.items():
        if name not in searched and setting.params[name] == value:
            raise ParameterError(
                f"The search runs with {name} {value}, which is the control itself. Put another {name} into `fixed`."
            )
    if asked.plan_file:
        path = resolve(asked.plan_file)
        if path.suffix != ".yaml" or not SLUG.fullmatch(path.stem):
            raise PlanError(
                f"plan_file is {asked.plan_file!r}. Give a .yaml file with a name of a-z, 0-9 and ._- only."
            )
        if path.is_file() and not path.read_text(encoding="utf-8").startswith(HEADER):
            raise PlanError(f"{relative(path)} is a plan that no search wrote. Name another file in plan_file.")


def best_plan(search: Search, asked: Confirmation, beside: Path | None = None) -> Path:
    """Write the plan of the best trial as `best.yaml` in folder `beside` (by default the study's); returns its path.

    Raises RunError where no trial finished, PlanError or ParameterError as `check_confirmation` does.
    """
    check_confirmation(search.setting, search.shared.space, asked)
    best = search.best()
    place = f"trial {best.user_attrs[INDEX]} of {len(search.shared.counted())}"
    found = f"# The best setting: {place}, {OBJECTIVE} {best.value:.4f}."
    if search.setting.needs:
        needed = ", ".join(search.setting.needs.values())
        found += f"\n# It reads the runs that the trials read: {needed} of plan {search.setting.name}."
    if not _has_test(search.setting):
        found += f"\n{NO_TEST_SPLIT}"
    files = [(beside or search.path.parent) / "best.yaml"]
    if asked.plan_file:
        files.append(resolve(asked.plan_file))
    for path in files:
        name = "tuned" if path.name == "best.yaml" else path.stem
        content = _content(search.setting, best.user_attrs[PARAMS], asked, name)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, f"{HEADER}\n{found}\n{text}")
        load_plan(path)
    return files[0]


def _content(setting: Setting, values: dict[str, Any], asked: Confirmation, name: str) -> dict[str, Any]:
    params = setting.unusual() | values
    params.pop("seed", None)
    control = _control(setting, asked)
    if not _has_test(setting):
        params |= {name: last for name, last in LAST.items() if name in setting.schema.parameters.keys() - values}
    matrix: dict[str, list[Any]] = {}
    contrasts = []
    for parameter, value in control.items():
        treatment = params.pop(parameter, setting.params[parameter])
        if treatment == value:  # the search itself came out at the control: there is nothing to compare
            params[parameter] = value
            continue
        matrix[parameter] = [value, treatment]
        contrasts.append(_contrast(setting, parameter, value, treatment, asked.smallest_effect))
    stage = {"name": STAGE, "notebook": relative(setting.notebook), "params": params}
    if "seed" in setting.schema.parameters:
        matrix["seed"] = list(asked.seeds)
    if matrix:
        stage["matrix"] = matrix
    return {"name": name, "stages": [stage]} | ({"contrasts": contrasts} if contrasts else {})


def _has_test(setting: Setting) -> bool:
    """Whether the data have a test split; what is known only once a notebook has made its own data has one."""
    card = data_card(setting.params)
    return not card or "test" in card["splits"]


def _contrast(setting: Setting, name: str, control: Any, treatment: Any, effect: float) -> dict[str, Any]:
    has_test = _has_test(setting)
    loss = "test loss" if has_test else "validation loss"
    return {
        "name": "the tuned setting beats its control",
        "question": f"Does {name} {treatment} have a lower {loss} than {name} {control}, all else as tuned?",
        "stage": STAGE,
        "metric": METRIC if has_test else WITHOUT_TEST,
        "treatment": {name: treatment},
        "control": {name: control},
        "better": "lower",
        "claim": "better",
        "smallest_effect": effect,
        "primary": True,
    }


def _control(setting: Setting, asked: Confirmation) -> dict[str, Any]:
    return read_values([asked.control] if asked.control else [], setting.schema, "control")
