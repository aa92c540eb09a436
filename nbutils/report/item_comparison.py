"""Two models on the same items: what differs, item by item, and how sure that is over the items.

The interval says how well these items stand for others of their kind. It does not see what another seed would have
given; for that, runs are paired by seed (nbutils/report/statistics.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbutils.foundation import ParameterError

if TYPE_CHECKING:
    import numpy as np
    import pandas

ALPHA = 0.05
SIDES = ("_treatment", "_control")


def compare_items(treatment: pandas.DataFrame, control: pandas.DataFrame, alpha: float = ALPHA) -> pandas.DataFrame:
    """One row a task: differences, treatment minus control, over the items that both were asked.

    treatment, control: rows of harness.parquet (step, task, item, correct, correct_norm, gold_bits, gold_bytes); of
    several steps the last counts. Columns of the result:

        task, items, left_out           items compared; items that only one of the two has
        accuracy_difference, _low, _high, _p        mean of the items' differences, Student's t, exact McNemar
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

    from nbutils.report.statistics import mean_interval

    low, high = mean_interval(differences, alpha)
    gained, discordant = int((differences > 0).sum()), int((differences != 0).sum())
    p = float(binomtest(gained, discordant).pvalue) if discordant else 1.0
    values = {"difference": float(differences.mean()), "low": low, "high": high, "p": p}
    return {f"{name}_{key}": value for key, value in values.items()}


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
