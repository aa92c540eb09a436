"""What a search tried: losses in the order of the trials, over each parameter, and which parameters mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nbutils.report import COLOURS, INK, canvas, empty, look, styled

if TYPE_CHECKING:
    from nbutils.search.space import Dimension

STATES = ("pruned", "finished")  # those with a loss; grey is what was given up
LOSS = "validation loss (nats)"
NOTHING = "No trial has a loss yet."


@styled()
def search_history(table: pd.DataFrame) -> Figure:
    """The loss of each trial in their order, and the lowest so far of those that finished.

    `table` is `nbutils.search.trial_table`: trial, state, value. A pruned trial stands where it was stopped.
    """
    shown = _with_loss(table)
    if shown.empty:
        return empty(NOTHING)
    figure, (axes,) = canvas(height=2.6)
    _points(axes, shown, shown["trial"])
    finished = shown[shown["state"] == "finished"].sort_values("trial")
    lowest = finished["value"].cummin()
    axes.step(finished["trial"], lowest, where="post", color=INK, linewidth=1, label="lowest so far")
    axes.set(xlabel="trial", ylabel=LOSS)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper")
    return figure


@styled()
def search_slices(table: pd.DataFrame, space: Sequence[Dimension]) -> Figure:
    """The loss over each parameter searched, a panel each; a logarithmic range is shown as one."""
    shown = _with_loss(table)
    if shown.empty:
        return empty(NOTHING)
    figure, panels = canvas(len(space))
    for index, (axes, dimension) in enumerate(zip(panels, space, strict=True)):
        values = shown[dimension.name]
        if dimension.choices:
            words = [str(each) for each in dimension.choices]
            values = values.map(str).map(words.index)
            axes.set_xticks(range(len(words)), words)
            axes.set_xlim(-0.5, len(words) - 0.5)
        elif dimension.log:
            axes.set(xscale="log", xlim=(dimension.low / 1.1, dimension.high * 1.1))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            margin = (dimension.high - dimension.low) / 20
            axes.set_xlim(dimension.low - margin, dimension.high + margin)
        _points(axes, shown, values)
        axes.set(xlabel=dimension.name, ylabel=LOSS if index % 3 == 0 else "")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(STATES))
    return figure


@styled()
def search_importances(shares: Mapping[str, float]) -> Figure:
    """A bar for each parameter's share, the largest on top; `shares` is `nbutils.search.importances`."""
    if not shares:
        return empty("Too few trials have finished to say which parameter mattered.")
    figure, (axes,) = canvas(height=0.8 + 0.25 * len(shares))
    names = sorted(shares, key=shares.get)
    bars = axes.barh(names, [shares[name] for name in names], color=COLOURS[1], height=0.6)
    axes.bar_label(bars, fmt="{:.2f}", padding=3, color=INK, fontsize=8)
    axes.set(xlabel="share in reaching the better trials", xlim=(0, 1.08))
    axes.grid(axis="y", visible=False)
    return figure


def _with_loss(table: pd.DataFrame) -> pd.DataFrame:
    values = pd.to_numeric(table["value"])
    return table.assign(value=values)[np.isfinite(values) & table["state"].isin(STATES)]


def _points(axes: Axes, shown: pd.DataFrame, x: pd.Series) -> None:
    for state, style in look(STATES).items():
        chosen = shown["state"] == state
        if chosen.any():
            axes.scatter(
                x[chosen], shown["value"][chosen], s=18, color=style["color"], marker=style["marker"], label=state
            )
