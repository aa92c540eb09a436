"""Rounds of an interaction: what reward the words bought, how far the student went, and what a second judge says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nbutils.foundation import shortened
from nbutils.report.evidence import Arm, Study
from nbutils.report.figures.style import LINE, QUIET, arm_legend, canvas, empty, look, styled
from nbutils.report.studies.rounds import JUDGES, SCORES, by_round, scored_otherwise
from nbutils.runs import measure

MARKED = 25  # rounds of a line that has marks
ROOM = 0.08  # of an axis, left around what is drawn
LONGEST_NAME = 28  # characters of what a panel's rewards are of
REWARDED_BY = ("judge", "prompts", "rubric")  # parameters by which a reward is another
REWARD, KL = ("reward", "words"), ("kl", "step")  # a column of rounds, and what it is drawn over
Styles = dict[str, dict[str, Any]]
Lines = dict[str, pd.DataFrame]
Panel = Callable[[Axes, Styles], set[str]]


@styled()
def rounds_and_judges(study: Study) -> Figure:
    """Reward over the words spent, KL from the start over steps, and at the end the held-out judge beside the first.

    Rewards that cannot be compared (`rewarded`) have panels of their own. Lines are means over seeds with the 95 %
    interval as a band. A judge's mark is an arm's mean, its seeds faint; arms that were asked otherwise than the first
    (`beside`) are left out there. Panels without data are left out.
    """
    rewards, styles = rewarded(study), look([arm.label for arm in study.arms])
    panels: list[Panel] = [
        partial(_draw_reward, lines=_lines(arms, *REWARD), title=title if len(rewards) > 1 else "")
        for title, arms in rewards.items()
    ]
    panels += [partial(_draw_kl, lines=lines)] if (lines := _lines(study.arms, *KL)) else []
    panels += [partial(_draw_judges, study=study)] if beside(study) else []
    if not panels:
        return empty("No run of this study has kept its rounds or the scores of two judges.")
    figure, axes = canvas(len(panels), height=2.5, columns=2 if len(panels) in (1, 2, 4) else 3)
    drawn = set().union(*(panel(each, styles) for panel, each in zip(panels, axes, strict=True)))
    arm_legend(figure, [arm if arm.label in drawn else replace(arm, runs=()) for arm in study.arms])
    return figure


def rewarded(study: Study) -> dict[str, list[Arm]]:
    """Arms with rewards by who gave them, and for what, as a title: only those of one title can be compared."""
    asked = {arm.label: arm.runs[0].params for arm in study.arms if _lines([arm], *REWARD)}
    telling: list[str] = []  # a rubric that goes with the prompts tells nothing more
    for name in REWARDED_BY:
        if _kinds(asked.values(), [*telling, name]) > _kinds(asked.values(), telling):
            telling.append(name)
    found: dict[str, list[Arm]] = {}
    for arm in study.arms:
        if (params := asked.get(arm.label)) is not None:
            told = [f"{name} {shortened(str(params.get(name)).rsplit('/', 1)[-1], LONGEST_NAME)}" for name in telling]
            found.setdefault("\n".join(told), []).append(arm)
    return found


def _kinds(asked: Iterable[Mapping[str, Any]], names: Sequence[str]) -> int:
    """In how many ways runs were asked, by these parameters."""
    return len({tuple(str(params.get(name)) for name in names) for params in asked})


def beside(study: Study) -> list[Arm]:
    """The arms whose scores by both judges can be set beside each other: those asked as the first of them was."""
    metrics = [study.final(name) for name in SCORES]
    both = [arm for arm in study.arms if all(metric and arm.results(metric) for metric in metrics)]
    return [arm for arm in both if not any(scored_otherwise(arm, both[0], judge) for judge in JUDGES)]


def _lines(arms: Iterable[Arm], column: str, place: str) -> Lines:
    """`column` by round of each arm that has it, where its place is known."""
    lines = {arm.label: by_round(arm, column).dropna(subset=place) for arm in arms}
    return {label: line for label, line in lines.items() if len(line)}


def _draw_reward(axes: Axes, styles: Styles, lines: Lines, title: str) -> set[str]:
    _draw_lines(axes, styles, lines, REWARD[1])
    axes.set(xlabel="words used", ylabel="reward: judge's score\n(0 to 1)")
    axes.set_title(title, fontweight="normal", fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return {*lines}


def _draw_kl(axes: Axes, styles: Styles, lines: Lines) -> set[str]:
    _draw_lines(axes, styles, lines, KL[1])
    axes.set(xlabel="optimiser step", ylabel="KL from the start\n(nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return {*lines}


def _draw_lines(axes: Axes, styles: Styles, lines: Lines, place: str) -> None:
    """Mean and band of each arm; the axis holds the means, and of the bands what fits."""
    for label, line in lines.items():
        style = styles[label]
        marks = {"marker": style["marker"], "markersize": 4, "markeredgewidth": 0} if len(line) <= MARKED else {}
        (drawn,) = axes.plot(line[place], line["mean"], color=style["color"], linewidth=1.4, **marks)
        drawn.set_dashes(style["dash"] or (None, None))
        axes.fill_between(line[place], line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)
    _bound(axes, pd.concat(list(lines.values())))


def _bound(axes: Axes, lines: pd.DataFrame) -> None:
    """A vertical range for the means: an interval over two seeds may be ten times as wide."""
    low, high = lines["mean"].min(), lines["mean"].max()
    span = (high - low) or 0.1
    least, most = lines["low"].fillna(low).min(), lines["high"].fillna(high).max()
    axes.set_ylim(max(least, low - span / 2) - ROOM * span, min(most, high + span / 2) + ROOM * span)


def _draw_judges(axes: Axes, styles: Styles, study: Study) -> set[str]:
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
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
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
