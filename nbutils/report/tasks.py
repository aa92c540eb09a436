"""What the harness's tasks say of each arm, beside chance, and item by item against cross entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from IPython.display import HTML

from nbutils.foundation import ParameterError
from nbutils.report.item_comparison import compare_items
from nbutils.report.page import MOST_ARMS, frame_of, more_arms, table
from nbutils.report.smoothing_results import arm_names, cross_entropy
from nbutils.report.studies import Arm, Study
from nbutils.report.tables import mean_and_interval
from nbutils.runs import TASKS, measure

if TYPE_CHECKING:
    from nbutils.runs import Run

# Measures of a task by the ending of their name in result.json: how `compare_items` calls the difference, a title.
MEASURED = {
    "_acc": ("accuracy", "Accuracy\n(%)"),
    "_acc_norm": ("accuracy_norm", "Normalised\naccuracy (%)"),
    "_gold_bits_per_byte": ("bits_per_byte", "Bits per byte\nof the answer"),
}
ITEM, NUMBERS = ["task", "item"], ["correct", "correct_norm", "gold_bits", "gold_bytes"]
CAPTION = (
    "Of each arm the mean with its 95 % interval over seeds. Δ: difference to cross entropy, item by item, each item "
    "averaged over the seeds that both have. Its 95 % interval is over items: measurement error, how far other items "
    "of the kind would move the difference. It does not see what other seeds would do; the unit of a verdict is the "
    "seed. Chance: what guessing among each item's answers gets."
)


def task_table(study: Study) -> HTML:
    """Accuracy, normalised accuracy and bits per byte of the gold answer by task and arm; empty without such runs."""
    asked = [arm for arm in study.arms if any(len(run.harness()) for run in arm.runs)]
    arms = [arm for arm in study.foremost(MOST_ARMS).arms if arm in asked]
    if not arms:
        return HTML("")
    control = cross_entropy(study)
    compared = {arm.label: _against(arm, control) for arm in arms if control in asked and arm is not control}
    items, names = pd.concat(_last_items(run) for arm in arms for run in arm.runs), arm_names(study)
    rows, marked = [], []
    for task, own in items.groupby("task", sort=False):
        for arm in arms:
            title = _title(str(task), own) if arm is arms[0] else ""
            rows.append({"Task": title, "Arm": names[arm.label]} | _numbers(arm, str(task), compared.get(arm.label)))
            marked.append(arm is control)
    left = len(asked) - len(arms)
    caption = CAPTION + more_arms(left, "in result.json alone")
    if left_out := sum(int(each["left_out"].sum()) for each in compared.values()):
        caption += f" {left_out:,} items that only one of two arms was asked are left out of the differences."
    return table(frame_of(rows), caption, marked, text=("Task", "Arm"))


def _title(task: str, items: pd.DataFrame) -> str:
    """A task's name, how many items it has, and what guessing gets."""
    lines = [TASKS.get(task, task.replace("_", " ")), f"({items['item'].nunique():,} items)"]
    if "choices" in items:
        lines.append(f"(chance {100 * (1 / items['choices']).mean():.1f} %)")
    return "\n".join(lines)


def _numbers(arm: Arm, task: str, compared: pd.DataFrame | None) -> dict[str, str]:
    """An arm's numbers in a task, each over its difference to cross entropy, where there is one."""
    row = {}
    differences = compared[compared["task"] == task] if compared is not None else pd.DataFrame()
    for ending, (name, title) in MEASURED.items():
        quantity = measure(f"{task}{ending}")
        row[title] = mean_and_interval(arm.results(f"{task}{ending}"), quantity)
        if len(differences):
            found, low, high = (float(differences[f"{name}_{part}"].iloc[0]) for part in ("difference", "low", "high"))
            row[title] += f"\nΔ {quantity.difference(found)}\n{quantity.difference_interval(low, high)}"
    return row


def _against(arm: Arm, control: Arm) -> pd.DataFrame:
    """`compare_items` of two arms over the seeds that both have; empty where no item is common."""
    empty = pd.DataFrame(columns=["task", "left_out"])
    sides = [{run.matrix.get("seed"): _last_items(run) for run in side.runs} for side in (arm, control)]
    seeds = [seed for seed, items in sides[0].items() if len(items) and len(sides[1].get(seed, ()))]
    if not seeds:
        return empty
    try:
        return compare_items(*(_averaged([side[seed] for seed in seeds]) for side in sides))
    except ParameterError:
        return empty


def _last_items(run: Run) -> pd.DataFrame:
    """A run's items at its last step, each once."""
    items = run.harness()
    return items[items["step"] == items["step"].max()].drop_duplicates(ITEM) if len(items) else items


def _averaged(items: list[pd.DataFrame]) -> pd.DataFrame:
    """Each item's mean over runs, as the rows of one step."""
    together = pd.concat(items).astype(dict.fromkeys(NUMBERS, float))
    return together.groupby(ITEM, as_index=False)[NUMBERS].mean().assign(step=0)
