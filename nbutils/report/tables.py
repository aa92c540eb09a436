"""Tables of a study: one row an arm, in columns that are described."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from IPython.display import HTML

from nbutils.foundation import escaped
from nbutils.report import judging, statistics
from nbutils.report.arms import mean_of, paired
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import Table, frame_of, table
from nbutils.runs import UNKNOWN, Measure, measure, percent

COSTS = ("train_seconds", "tokens_per_second", "peak_memory_mib", "tokens_seen", "parameters")
ACROSS_TOKENIZERS = "Between models of different tokenizers only bits per byte are comparable."
Column = Callable[[Arm], str]  # what stands in an arm's cell


def arms_table(
    study: Study,
    columns: Mapping[str, Column],
    caption: str,
    arms: Sequence[Arm] | None = None,
    name: Column = lambda arm: arm.label,
    heading: str = "Arm",
    counted: str = "Seeds",
    text: Iterable[str] | None = None,
    above: Sequence[Mapping[str, str]] = (),
) -> Table:
    """A row for each of `arms`, all of the study's if not given: its name, how many seeds it has, and `columns`.

    The control's is shaded. heading, counted: titles of the first two columns, "" for no count. above: rows before.
    """
    arms = study.arms if arms is None else arms
    titles = {heading: name} | ({counted: seeds} if counted else {}) | {**columns}
    rows = [*above, *({title: cell(arm) for title, cell in titles.items()} for arm in arms)]
    frame = frame_of(rows) if rows else frame_of({title: () for title in titles})
    return table(frame, caption, [False] * len(above) + [arm is study.control for arm in arms], text)


def measured(metrics: Iterable[str] | Mapping[str, str]) -> dict[str, Column]:
    """A column for each metric, mean and 95 % interval over seeds, under its title or under the measure's own."""
    titles = metrics if isinstance(metrics, Mapping) else {metric: measure(metric).axis for metric in metrics}
    return {title: partial(_in_metric, metric) for metric, title in titles.items()}


def _in_metric(metric: str, arm: Arm) -> str:
    return mean_and_interval(arm.results(metric), measure(metric))


def with_control(study: Study) -> Column:
    """The names of arms, the control marked as such."""
    return lambda arm: arm.label + "\n(control)" * (arm is study.control)


def mean_and_interval(values: Sequence[float], quantity: Measure) -> str:
    """Mean over its interval, or the mean alone where all seeds agree."""
    if not values:
        return UNKNOWN
    mean = quantity.number(mean_of(values, quantity))
    return mean if np.ptp(values) == 0 else f"{mean}\n{quantity.interval(*interval_of(values, quantity))}"


def interval_of(values: Sequence[float], quantity: Measure) -> tuple[float, float]:
    """The 95 % interval of a mean, of a perplexity that of its logarithm, raised again."""
    if not quantity.geometric:
        return statistics.mean_interval(values)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low, high = np.exp(statistics.mean_interval(np.log(values)))
    return float(low), float(high)


def difference_and_interval(values: Sequence[float], quantity: Measure) -> str:
    """Mean difference over its 95 % interval; a dash without a pair."""
    if not values:
        return UNKNOWN
    low, high = statistics.mean_interval(values)
    return f"{quantity.difference(float(np.mean(values)))}\n{quantity.difference_interval(low, high)}"


def share_and_interval(values: Sequence[float], whole: float) -> str:
    """Mean of `values` as per cent of `whole`, with its interval where there is one."""
    share, interval = Measure("", digits=0, scale=100 / whole), statistics.mean_interval(values)
    return f"{share.number(float(np.mean(values)))} %" + f"\n{share.interval(*interval)}" * math.isfinite(interval[0])


def seeds(arm: Arm) -> str:
    """How many seeds an arm's numbers rest on: "5", or "4 of 5" where runs are missing."""
    return str(len(arm.runs)) if len(arm.runs) == arm.planned else f"{len(arm.runs)} of {arm.planned}"


def difference_lines(study: Study, arm: Arm, metric: str) -> tuple[str, str]:
    """An arm's seed-paired difference to the control and its interval: the planned contrast's, or the 95 % one."""
    judged, quantity = study.asked(arm, metric), measure(metric)
    if judged and judged.verdict.outcome != judging.NOT_JUDGED:
        verdict = judged.verdict
        return quantity.difference(verdict.difference), quantity.difference_interval(verdict.low, verdict.high)
    return exploratory_lines(study, arm, metric)


def exploratory_lines(study: Study, arm: Arm, metric: str) -> tuple[str, str]:
    """The seed-paired difference to the control and its 95 % interval; of a perplexity in per cent."""
    quantity, differences = measure(metric), study.differences(arm, metric)
    if not differences:
        return UNKNOWN, UNKNOWN
    if not quantity.geometric:
        interval = statistics.mean_interval(differences)
        return quantity.difference(float(np.mean(differences))), quantity.difference_interval(*interval)
    sides = [{seed: math.log(value) for seed, value in each.by_seed(metric).items() if value > 0}
             for each in (arm, study.control)]  # fmt: skip
    logs = paired(*sides)
    low, high = statistics.mean_interval(logs)
    mean = percent(math.expm1(np.mean(logs))) if logs else UNKNOWN
    return mean, f"[{percent(math.expm1(low))}, {percent(math.expm1(high))}]" if math.isfinite(low) else UNKNOWN


def cost_table(study: Study) -> HTML:
    """What each arm cost: mean and 95 % interval over seeds, time also as a multiple of the control's."""
    columns = measured([*filter(study.reports, COSTS)])
    control = study.control.results("train_seconds") if study.control else []
    if control:
        columns["time against\nthe control"] = lambda arm: (
            f"× {arm.mean('train_seconds') / np.mean(control):.2f}" if arm.results("train_seconds") else UNKNOWN
        )
    return arms_table(study, columns, "Mean and 95 % interval over seeds. Training only; evaluation not counted.")


def measure_table(study: Study, names: Sequence[str], caption: str, absent: str) -> HTML:
    """Arm by measure, mean with 95 % interval over seeds, of those of `names` that any run reports.

    A name without a split stands for the result on test, or on validation where there is no test. `absent` is shown
    where nothing was reported.
    """
    found = [*filter(None, map(study.reported, names))]
    return arms_table(study, measured(found), caption) if found else HTML(f'<p class="note">{escaped(absent)}</p>')
