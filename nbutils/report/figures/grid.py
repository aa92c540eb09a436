"""Mixing weight by temperature: where in the grid of settings an arm gains and where it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from nbutils.report.figures.style import INK, canvas, empty, styled
from nbutils.report.studies import Arm, Study
from nbutils.runs import Measure, measure

ROWS, COLUMNS = "alpha", "temperature"
MEASURES = ("ce_loss", "cosine")
MOST_GRIDS = 4  # settings besides the two, each a row of panels


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
