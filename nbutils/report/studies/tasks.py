"""What the harness's tasks say of each arm, beside chance, and item by item against cross entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from IPython.display import HTML

from nbutils.foundation import ParameterError
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import MOST_ARMS, frame_of, more_arms, table
from nbutils.report.studies.smoothing import arm_names, cross_entropy
from nbutils.report.tables import mean_and_interval
from nbutils.runs import TASKS, measure

if TYPE_CHECKING:
    import numpy as np
    import pandas

    from nbutils.runs import Run

ALPHA = 0.05
SIDES = ("_treatment", "_control")

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


def compare_items(treatment: pandas.DataFrame, control: pandas.DataFrame, alpha: float = ALPHA) -> pandas.DataFrame:
    """One row a task: differences, treatment minus control, over the items that both were asked.

    treatment, control: rows of harness.parquet (step, task, item, correct, correct_norm, gold_bits, gold_bytes); of
    several steps the last counts. Columns of the result:

        task, items, left_out           items compared; items that only one of the two has
        accuracy_difference, _low, _high, _p        mean of the items' differences, `items_interval`, exact McNemar
        accuracy_norm_difference, _low, _high, _p   the same of the normalised choice
        only_treatment, only_control    items that one of the two alone has right
        bits_per_byte_difference, _low, _high       of the gold answers: sum of bits over sum of bytes

    Raises ParameterError where they have no item in common.
    Source: E. Miller, Adding Error Bars to Evals, arXiv 2411.00640 (paired differences); Q. McNemar, Psychometrika 12
    (1947); W. Cochran, Sampling Techniques, 3rd ed. (1977), 6.4 (ratio of sums).
    """
    import pandas

    both = _last_step(treatment).merge(_last_step(control), on=["task", "item"], how="outer", suffixes=SIDES)
    shared = both.dropna(subset=["correct_treatment", "correct_control"])
    if shared.empty:
        raise ParameterError("The two have no item in common. Compare runs with the same tasks, items and tokenizer.")
    lonely = (both.groupby("task").size() - shared.groupby("task").size()).to_dict()
    rows = [_task_row(str(task), items, int(lonely[task]), alpha) for task, items in shared.groupby("task", sort=True)]
    return pandas.DataFrame(rows)


def _last_step(items: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of the last step; items that stand twice in a data set are one."""
    return items[items["step"] == items["step"].max()].drop(columns="step").drop_duplicates(["task", "item"])


def _task_row(task: str, items: pandas.DataFrame, left_out: int, alpha: float) -> dict[str, object]:
    row: dict[str, object] = {"task": task, "items": len(items), "left_out": left_out}
    for column, name in (("correct", "accuracy"), ("correct_norm", "accuracy_norm")):
        treatment, control = (items[column + side].to_numpy(dtype=float) for side in SIDES)
        row |= _accuracy(name, treatment - control, alpha)
    differences = items["correct_treatment"].to_numpy(dtype=float) - items["correct_control"].to_numpy(dtype=float)
    row |= {"only_treatment": int((differences > 0).sum()), "only_control": int((differences < 0).sum())}
    return row | _bits(items, alpha)


def _accuracy(name: str, differences: np.ndarray, alpha: float) -> dict[str, float]:
    """`differences` are -1, 0 or 1 an item."""
    from scipy.stats import binomtest

    low, high = items_interval(differences, alpha)
    gained, discordant = int((differences > 0).sum()), int((differences != 0).sum())
    p = float(binomtest(gained, discordant).pvalue) if discordant else 1.0
    values = {"difference": float(differences.mean()), "low": low, "high": high, "p": p}
    return {f"{name}_{key}": value for key, value in values.items()}


def items_interval(differences: np.ndarray, alpha: float = ALPHA) -> tuple[float, float]:
    """The interval of the mean of paired differences in [-1, 1], one an item; never of zero width.

    Agresti and Min's: half an item more in each cell of the paired table, then Wald's, which holds its level where few
    items differ. Source: A. Agresti and Y. Min, Statistics in Medicine 24 (2005).
    """
    import numpy as np
    from scipy.special import ndtri

    count = len(differences) + 2
    mean = differences.sum() / count
    variance = (np.square(differences).sum() + 1) / count - mean**2
    half = float(ndtri(1 - alpha / 2) * np.sqrt(variance / count))
    return float(mean - half), float(mean + half)


def _bits(items: pandas.DataFrame, alpha: float) -> dict[str, float]:
    """The difference of two ratios of sums and its interval, by the spread of each item's part in it."""
    import numpy as np  # here: who looks at a batch's state imports this package, and no numbers
    from scipy.special import stdtrit

    bits, sizes = ([items[name + side].to_numpy(dtype=float) for side in SIDES] for name in ("gold_bits", "gold_bytes"))
    ratios = [bits[side].sum() / sizes[side].sum() for side in (0, 1)]
    parts = [(bits[side] - ratios[side] * sizes[side]) / sizes[side].mean() for side in (0, 1)]
    difference, count = float(ratios[0] - ratios[1]), len(items)
    half = np.nan
    if count > 1:
        half = float(stdtrit(count - 1, 1 - alpha / 2) * (parts[0] - parts[1]).std(ddof=1) / np.sqrt(count))
    return {
        "bits_per_byte_difference": difference,
        "bits_per_byte_low": difference - half,
        "bits_per_byte_high": difference + half,
    }
