"""Rounds of an interaction: what reward the words bought, how far the student went, and what a second judge says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nbutils.figures.style import LINE, QUIET, arm_legend, canvas, empty, look, styled
from nbutils.interaction_results import SCORES, by_round, scored_otherwise
from nbutils.measures import measure
from nbutils.studies import Arm, Study

MARKED = 25  # rounds of a line that has marks
ROOM = 0.08  # of an axis, left around what is drawn
Panel = Callable[[Axes, Study, dict[str, dict[str, Any]]], set[str]]


@styled()
def rounds_and_judges(study: Study) -> Figure:
    """Reward over the words spent, KL from the start over rounds, and at the end the held-out judge beside the first.

    Lines are means over seeds with the 95 % interval as a band. A judge's mark is an arm's mean, its seeds faint; arms
    that were asked otherwise than the first (`beside`) are left out there. Panels without data are left out.
    """
    panels: list[Panel] = [
        panel
        for panel, has_data in (
            (_draw_reward, any(len(by_round(arm, "reward")) for arm in study.arms)),
            (_draw_kl, any(len(by_round(arm, "kl")) for arm in study.arms)),
            (_draw_judges, bool(beside(study))),
        )
        if has_data
    ]
    if not panels:
        return empty("No run of this study has kept its rounds or the scores of two judges.")
    figure, axes = canvas(len(panels), height=2.5, columns=max(2, len(panels)))
    styles = look([arm.label for arm in study.arms])
    drawn = set().union(*(panel(each, study, styles) for panel, each in zip(panels, axes, strict=True)))
    arm_legend(figure, [arm if arm.label in drawn else replace(arm, runs=()) for arm in study.arms])
    return figure


def beside(study: Study) -> list[Arm]:
    """The arms whose scores by both judges can be set beside each other: those asked as the first of them was."""
    metrics = [study.final(name) for name in SCORES]
    both = [arm for arm in study.arms if all(metric and arm.results(metric) for metric in metrics)]
    return [
        arm for arm in both if not any(scored_otherwise(arm, both[0], judge) for judge in ("judge", "second_judge"))
    ]


def _draw_reward(axes: Axes, study: Study, styles: dict[str, dict[str, Any]]) -> set[str]:
    drawn = _draw_lines(axes, study, styles, "reward", by_words=True)
    axes.set(xlabel="words (people, student, teacher)", ylabel="reward: judge's score\n(0 to 1)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return drawn


def _draw_kl(axes: Axes, study: Study, styles: dict[str, dict[str, Any]]) -> set[str]:
    drawn = _draw_lines(axes, study, styles, "kl", by_words=False)
    axes.set(xlabel="round", ylabel="KL from the start\n(nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return drawn


def _draw_lines(axes: Axes, study: Study, styles: dict[str, dict[str, Any]], column: str, by_words: bool) -> set[str]:
    """Mean and band of each arm; the axis holds the means, and of the bands what fits."""
    lines = {arm.label: by_round(arm, column) for arm in study.arms}
    lines = {
        label: line for label, line in lines.items() if len(line) and not (by_words and line["words"].isna().all())
    }
    for label, line in lines.items():
        style, place = styles[label], line["words"] if by_words else line.index
        wide = 2.6 if label == study.arms[0].label else 1.4
        marks = {"marker": style["marker"], "markersize": 4, "markeredgewidth": 0} if len(line) <= MARKED else {}
        (drawn,) = axes.plot(place, line["mean"], color=style["color"], linewidth=wide, **marks)
        drawn.set_dashes(style["dash"] or (None, None))
        axes.fill_between(place.astype(float), line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)
    _bound(axes, pd.concat(list(lines.values())))
    return set(lines)


def _bound(axes: Axes, lines: pd.DataFrame) -> None:
    """A vertical range for the means: an interval over two seeds may be ten times as wide."""
    low, high = lines["mean"].min(), lines["mean"].max()
    span = (high - low) or 0.1
    least, most = lines["low"].fillna(low).min(), lines["high"].fillna(high).max()
    axes.set_ylim(max(least, low - span / 2) - ROOM * span, min(most, high + span / 2) + ROOM * span)


def _draw_judges(axes: Axes, study: Study, styles: dict[str, dict[str, Any]]) -> set[str]:
    """The held-out judge's score over the first judge's; what lies below and right of the first arm is suspect."""
    arms, metrics = beside(study), [study.final(name) for name in SCORES]
    points = {arm.label: _points(arm, metrics) for arm in arms}
    points = {label: own for label, own in points.items() if len(own)}
    for label, own in points.items():
        style = styles[label]
        mark = {"color": style["color"], "marker": style["marker"], "linewidths": 0}
        axes.scatter(*own.T, s=14, alpha=0.35, **mark)
        axes.scatter(*own.mean(axis=0), s=50, zorder=3, **mark)
    axes.margins(0.12)
    axes.set(xlabel=measure(SCORES[0]).axis, ylabel=_upright(SCORES[1]))
    if study.control is not None and study.control.label in points:
        _shade(axes, points[study.control.label].mean(axis=0))
    return set(points)


def _points(arm: Arm, metrics: Sequence[str]) -> np.ndarray:
    """(seeds, 2) of the runs that have both scores."""
    first, second = (arm.by_seed(metric) for metric in metrics)
    pairs = np.array([(first[seed], second[seed]) for seed in first if seed in second], float).reshape(-1, 2)
    return pairs[np.isfinite(pairs).all(axis=1)]


def _shade(axes: Axes, origin: np.ndarray) -> None:
    """The quadrant where the first judge says better and the held-out one worse than of text alone."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    corner = (origin[0], bottom)
    axes.add_patch(
        Rectangle(corner, right - origin[0], origin[1] - bottom, color=LINE, alpha=0.6, linewidth=0, zorder=0)
    )
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title("grey: first judge up, other down", loc="right", color=QUIET, fontweight="normal", fontsize=7.5)


def _short(value: float) -> str:
    """A count of words for an axis: 1.5M, 20k, 500."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _upright(name: str) -> str:
    return measure(name).axis.replace(" (", "\n(")
