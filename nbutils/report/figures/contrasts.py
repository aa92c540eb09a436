"""Intervals of the planned contrasts against 0, the smallest effect and the noise floor; grids of settings."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nbutils.report import judging
from nbutils.report.evidence import Arm, Judged, Study
from nbutils.report.figures.style import INK, LINE, QUIET, WIDTH, canvas, empty, styled
from nbutils.runs import Measure, measure

ROWS, COLUMNS = "alpha", "temperature"
MEASURES = ("ce_loss", "cosine")
MOST_GRIDS = 4  # settings besides the two, each a row of panels

NAME_WIDTH = 26  # characters of a contrast's name in one line
LABEL_WIDTH = 70  # of an axis
FAR = 6.0  # an interval this many times beyond every threshold is drawn as an arrow, or it would flatten the rest
# Shape as well as colour: filled for an answer, hollow for none.
MARKS = {
    judging.SUPPORTED: {"marker": "o", "color": "#0b6e4f"},
    judging.TOO_SMALL: {"marker": "D", "color": "#2f6f9f"},
    judging.NOT_SUPPORTED: {"marker": "X", "color": "#a3333d"},
    judging.UNDECIDED: {"marker": "o", "color": "#8a5a00", "markerfacecolor": "white"},
    judging.INTERIM: {"marker": "s", "color": "#5b6570", "markerfacecolor": "white"},
}


@styled()
def contrast_forest(study: Study) -> Figure:
    """Each planned contrast's difference with its interval, a panel for each metric, all in the metric's own unit.

    The dashed line is the smallest effect of interest (for "no worse", the margin), the grey band the 95 %
    range of differences between two runs of one arm; each dot is a seed's difference. Contrasts without an interval
    are left to the table.
    """
    drawn = [judged for judged in study.judged if np.isfinite(judged.verdict.low)]
    if not drawn:
        return empty("No planned contrast has the two seed pairs that an interval needs.")
    metrics = dict.fromkeys(judged.contrast.metric for judged in drawn)
    groups = [[judged for judged in drawn if judged.contrast.metric == metric] for metric in metrics]
    heights = [0.75 + 0.42 * len(group) for group in groups]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, group in zip(panels, groups, strict=True):
        _draw_group(axes, group)
    _legend(figure, drawn)
    return figure


def _draw_group(axes: Axes, group: Sequence[Judged]) -> None:
    """The contrasts of one metric, the first on top."""
    metric = measure(group[0].contrast.metric)
    left, right = _limits(group)
    for row, judged in enumerate(group):
        verdict, mark = judged.verdict, MARKS[judged.verdict.outcome]
        span = [row - 0.38, row + 0.38]
        band = _band(judged)
        axes.fill_betweenx(span, -band, band, color=LINE, linewidth=0, zorder=1)
        axes.plot([_threshold(judged)] * 2, span, color=INK, linewidth=1, linestyle=(0, (3, 2)), zorder=2)
        if left <= verdict.difference <= right:
            axes.plot([verdict.low, verdict.high], [row, row], color=mark["color"], linewidth=1.6, zorder=3)
            axes.plot(verdict.difference, row, linestyle="", markersize=7, zorder=4, **mark)
            seeds = np.array(verdict.differences)
            shown = seeds[(seeds >= left) & (seeds <= right)]
            axes.plot(shown, [row + 0.24] * len(shown), ".", color=mark["color"], alpha=0.55, markersize=4, zorder=3)
        else:
            _draw_beyond(axes, judged, row, metric, right if verdict.difference > 0 else left)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=2)
    axes.set_yticks(range(len(group)), [fill(judged.contrast.name, NAME_WIDTH) for judged in group])
    axes.set(ylim=(len(group) - 0.5, -0.5), xlim=(left, right))
    axes.grid(axis="y", visible=False)
    unit = f", {metric.difference_unit}" if metric.difference_unit else ""
    axes.set_xlabel(fill(f"treatment − control in {metric.label}{unit}", LABEL_WIDTH))
    axes.xaxis.set_major_formatter(lambda value, _: metric.signed(value))
    better, side = ("← better", "left") if group[0].contrast.better == "lower" else ("better →", "right")
    axes.set_title(better, loc=side, color=QUIET, fontweight="normal")


def _draw_beyond(axes: Axes, judged: Judged, row: int, metric: Measure, edge: float) -> None:
    """An interval too far out for the others' scale: an arrow at the edge, and its numbers."""
    verdict, color = judged.verdict, MARKS[judged.verdict.outcome]["color"]
    outwards = 1 if edge > 0 else -1
    interval = metric.difference_interval(verdict.low, verdict.high)
    axes.annotate(
        f"{metric.difference(verdict.difference)} {interval}",
        xy=(edge, row),
        xytext=(-30 * outwards, 0),
        textcoords="offset points",
        ha="right" if outwards > 0 else "left",
        va="center",
        color=color,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "linewidth": 0},
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6},
    )


def _limits(group: Sequence[Judged]) -> tuple[float, float]:
    """The x range: 0, thresholds and bands always, and the intervals on their scale unless none is."""
    fixed = [0.0, *map(_threshold, group)] + [sign * _band(judged) for judged in group for sign in (-1, 1)]
    reach = FAR * np.abs(fixed).max()
    ends = [[judged.verdict.low, judged.verdict.high] for judged in group]
    near = [pair for pair in ends if np.abs(pair).max() <= reach] or ends
    values = np.concatenate([fixed, *near])
    margin = 0.08 * np.ptp(values)
    return values.min() - margin, values.max() + margin


def _threshold(judged: Judged) -> float:
    """The smallest effect of interest, or for "no worse" the margin, as a difference."""
    contrast = judged.contrast
    gain = -1 if contrast.better == "lower" else 1
    return gain * contrast.smallest_effect * (-1 if contrast.claim == "no worse" else 1)


def _band(judged: Judged) -> float:
    """Half the width of the noise floor; 0 where there is none to draw."""
    band = judged.floor.band(judged.verdict.pairs) if judged.floor else 0.0
    return band if np.isfinite(band) else 0.0


def _legend(figure: Figure, drawn: Sequence[Judged]) -> None:
    """The outcomes that occur, the threshold, and the noise floor where there is one."""
    outcomes = [outcome for outcome in MARKS if any(judged.verdict.outcome == outcome for judged in drawn)]
    handles = [Line2D([], [], linewidth=1.6, markersize=6, label=name, **MARKS[name]) for name in outcomes]
    dashed = {"color": INK, "linewidth": 1, "linestyle": (0, (3, 2))}
    handles.append(Line2D([], [], label="smallest effect or margin", **dashed))
    if any(judged.floor for judged in drawn):
        handles.append(Patch(color=LINE, label="A/A noise floor"))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4))


@styled()
def heat_map(study: Study) -> Figure:
    """Seed-paired difference to the control by alpha and temperature, a panel for each measure and other setting.

    Green is better, pink is worse, and the control's row is 0 by definition. Alpha 0 has no temperature: its value
    stands in every column.
    """
    grids = _grids(study)[:MOST_GRIDS]
    metrics = [metric for metric in map(study.final, MEASURES) if metric]
    if study.control is None or not grids or not metrics:
        return empty("The plan does not cross alpha with temperature, or has no control yet.")
    height = 0.75 + 0.3 * max(len({arm.values[ROWS] for arm in arms}) for _, arms in grids)
    figure, panels = canvas(len(grids) * len(metrics), height=height, columns=len(metrics))
    for index, metric in enumerate(metrics):
        tables = [_table(study, arms, metric) for _, arms in grids]
        reach = max((np.nanmax(np.abs(values)) for *_, values in tables if np.isfinite(values).any()), default=0.0)
        for place, ((other, _), cells) in enumerate(zip(grids, tables, strict=True)):
            axes = panels[place * len(metrics) + index]
            _draw(axes, *cells, measure(metric), reach or 1.0)
            axes.set_title(measure(metric).axis + f"\n{other}" * bool(other), fontweight="normal")
    return figure


def _grids(study: Study) -> list[tuple[str, list[Arm]]]:
    """Arms that differ in alpha and temperature alone, under the name of what else is set; the control is in each."""
    groups: dict[tuple, list[Arm]] = {}
    for arm in study.arms:
        if ROWS in arm.values and COLUMNS in arm.values:
            other = tuple((name, value) for name, value in arm.values.items() if name not in (ROWS, COLUMNS))
            groups.setdefault(other, []).append(arm)
    usual = study.control.values if study.control else {}
    found = []
    for other, arms in groups.items():
        if len({arm.values[ROWS] for arm in arms if arm.values[ROWS]}) < 2 and len(arms) < 4:
            continue
        if len({arm.values[COLUMNS] for arm in arms}) < 2:
            continue
        name = ", ".join(f"{name} {value}" for name, value in other if usual.get(name) != value)
        found.append((name, arms))
    return found


def _table(study: Study, arms: Sequence[Arm], metric: str) -> tuple[list[Any], list[Any], np.ndarray]:
    """(alphas, temperatures, mean paired differences); nan where an arm is missing."""
    rows = sorted({arm.values[ROWS] for arm in arms} | {study.control.values[ROWS]})
    columns = sorted({arm.values[COLUMNS] for arm in arms})
    values = np.full((len(rows), len(columns)), np.nan)
    for arm in arms:
        differences = study.differences(arm, metric)
        if differences:
            values[rows.index(arm.values[ROWS]), columns.index(arm.values[COLUMNS])] = np.mean(differences)
    if study.control.values[ROWS] == 0:
        values[rows.index(0)] = 0.0
    return rows, columns, values


def _draw(axes, rows: Sequence[Any], columns: Sequence[Any], values: np.ndarray, quantity: Measure, reach: float):
    """One grid with its numbers written in the cells."""
    gains = -values if quantity.better == "lower" else values
    axes.imshow(gains, cmap="PiYG", norm=CenteredNorm(0, 1.6 * reach), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = quantity.difference(value)
        axes.text(column, row, text, ha="center", va="center", color=INK, fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set(xlabel=COLUMNS, ylabel=ROWS)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
