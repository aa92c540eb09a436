"""What happened while the arms of a study trained, and where they ended: curves over steps, values by arm, cost.

Every curve is the mean over an arm's seeds with Student's 95 % interval as a band; one seed has no band.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nbutils.foundation import visible
from nbutils.report.arms import FLOORS, number
from nbutils.report.evidence import FINAL, Study
from nbutils.report.figures.style import QUIET, arm_legend, canvas, empty, log_axis, look, styled
from nbutils.report.statistics import mean_interval
from nbutils.runs import measure

POINTS = 100  # more along one curve cannot be told apart on paper
STEPS = "optimiser step"


@styled()
def loss_curves(study: Study) -> Figure:
    """The training objective and every raw term of it over steps, a panel each."""
    columns = dict.fromkeys(column for run in study.runs for column in run.metrics().columns)
    terms = [name for name in columns if name == "loss" or name.endswith("_loss")]
    return _curves(study, [name for name in terms if not name.startswith(FINAL)], "a training loss")


@styled()
def perplexity_curves(study: Study, unigram_ce: float | None = None) -> Figure:
    """Validation perplexity over steps on a log axis, and the levels of models of counts: unigram, bigram, trigram.

    They are what the runs report when they end; `unigram_ce`, in nats per token, stands in for the first until then.
    """
    figure = _curves(study, ["eval_perplexity"], "a validation perplexity")
    axes = figure.axes[0]
    if not axes.lines:
        return figure
    log_axis(axes, "y")
    for floor in FLOORS:
        levels = [number(run.result.get(f"{floor}_eval_ce_loss")) for run in study.runs]
        level = float(np.nanmean(levels)) if np.isfinite(levels).any() else None
        if floor == FLOORS[0] and unigram_ce is not None:
            level = unigram_ce
        if level is not None:
            axes.axhline(np.exp(level), color=QUIET, linewidth=1, linestyle=(0, (6, 3)))
            placed = {"xycoords": ("axes fraction", "data"), "va": "center", "color": QUIET}
            axes.annotate(f"{floor}\nmodel {np.exp(level):,.0f}", (1.01, np.exp(level)), **placed)
    return figure


@styled()
def proxy(study: Study, name: str = "cosine") -> Figure:
    """A measure `name` that is not the loss: on validation over steps, and at the end by arm, every seed a dot."""
    final = study.final(name)
    frame = curve_frame(study, f"eval_{name}")
    if frame.empty and final is None:
        return empty(f"No run of this study has reported {measure(name).label}.")
    figure, (left, right) = canvas(2, columns=2)
    draw_curves(left, study, frame, f"eval_{name}")
    draw_by_arm(right, study, final or f"test_{name}")
    arm_legend(figure, study.arms)
    return figure


@styled()
def cost_quality(study: Study) -> Figure:
    """Training time and peak memory beside the final cross entropy: one faint mark a seed, a strong one an arm."""
    quality = study.final("ce_loss")
    costs = [name for name in ("train_seconds", "peak_memory_mib") if study.reports(name)]
    if quality is None or not costs:
        return empty("No run of this study has reported both a cost and a cross entropy.")
    figure, panels = canvas(len(costs), columns=2)
    styles = look([arm.label for arm in study.arms])
    for axes, cost in zip(panels, costs, strict=True):
        for arm in study.arms:
            pairs = [[number(run.result.get(name)) for name in (cost, quality)] for run in arm.runs]
            points = np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2)
            style = styles[arm.label]
            mark = {"color": style["color"], "marker": style["marker"], "linewidths": 0}
            axes.scatter(*points.T, s=16, alpha=0.4, **mark)
            if len(points):
                axes.scatter(*points.mean(axis=0), s=60, **mark)
        axes.set(xlabel=measure(cost).axis, ylabel=_upright(quality))
    arm_legend(figure, study.arms)
    return figure


def _curves(study: Study, columns: Sequence[str], what: str) -> Figure:
    """A panel for each of `columns` that any run has logged."""
    frames = {name: curve_frame(study, name) for name in columns}
    frames = {name: frame for name, frame in frames.items() if not frame.empty}
    if not frames:
        return empty(f"No run of this study has logged {what}.")
    figure, panels = canvas(len(frames))
    for axes, (name, frame) in zip(panels, frames.items(), strict=True):
        draw_curves(axes, study, frame, name)
    arm_legend(figure, study.arms)
    return figure


def curve_frame(study: Study, column: str) -> pd.DataFrame:
    """What every run logged in `column`: columns step, value, arm, seed; long curves averaged to POINTS bins."""
    pieces = []
    for arm in study.arms:
        for run in arm.runs:
            metrics = run.metrics()
            if column in metrics.columns:
                piece = metrics[["step", column]].dropna().set_axis(["step", "value"], axis=1)
                pieces.append(piece.assign(arm=arm.label, seed=visible(run.variant)))
    frame = pd.concat(pieces) if pieces else pd.DataFrame(columns=["step", "value", "arm", "seed"])
    if frame.empty or frame["step"].nunique() <= POINTS:
        return frame
    width = frame["step"].max() / POINTS
    middles = ((np.ceil(frame["step"] / width) - 0.5) * width).clip(lower=0)
    return frame.assign(step=middles).groupby(["arm", "seed", "step"], as_index=False)["value"].mean()


def draw_curves(axes: Axes, study: Study, frame: pd.DataFrame, column: str) -> None:
    """Mean and band of each arm over steps."""
    axes.set(xlabel=STEPS, ylabel=_upright(column))
    if frame.empty:
        axes.text(0.5, 0.5, "not logged while training", transform=axes.transAxes, ha="center", color=QUIET)
        return
    styles = look([arm.label for arm in study.arms])
    drawn = [arm.label for arm in study.arms if (frame["arm"] == arm.label).any()]
    sparse = frame["step"].nunique() <= 25
    sns.lineplot(
        data=frame,
        x="step",
        y="value",
        hue="arm",
        style="arm",
        size="arm",
        hue_order=drawn,
        style_order=drawn,
        sizes={label: 2.6 if label == study.arms[0].label else 1.4 for label in drawn},
        palette={label: styles[label]["color"] for label in drawn},
        dashes={label: styles[label]["dash"] for label in drawn},
        markers={label: styles[label]["marker"] for label in drawn} if sparse else False,
        markersize=4,
        markeredgewidth=0,
        errorbar=mean_interval,
        err_kws={"alpha": 0.15, "linewidth": 0},
        legend=False,
        ax=axes,
    )


def draw_by_arm(axes: Axes, study: Study, metric: str) -> None:
    """The final value of every seed as a faint mark, each arm's mean with its interval, arms from top to bottom."""
    styles = look([arm.label for arm in study.arms])
    arms = [arm for arm in study.arms if arm.results(metric)] or [arm for arm in study.arms if arm.runs]
    rows = [(arm.label, value) for arm in arms for value in arm.results(metric)]
    labels = [arm.label for arm in arms]
    palette = {label: styles[label]["color"] for label in labels}
    frame = pd.DataFrame(rows, columns=["arm", "value"])
    sns.stripplot(
        frame, x="value", y="arm", hue="arm", order=labels, hue_order=labels, palette=palette, jitter=False,
        size=4, alpha=0.4, legend=False, ax=axes,
    )  # fmt: skip
    for place, arm in enumerate(arms):
        values = arm.results(metric)
        low, high = mean_interval(values)
        style = styles[arm.label]
        if len(values):
            axes.plot([low, high], [place + 0.22] * 2, color=style["color"], linewidth=1.2)
            axes.plot(np.mean(values), place + 0.22, style["marker"], color=style["color"], markersize=5)
    axes.set(xlabel=measure(metric).axis, ylabel="", ylim=(len(arms) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def _upright(name: str) -> str:
    """The title of a vertical axis: the unit in a line of its own, for a panel is not high."""
    return measure(name).axis.replace(" (", "\n(")
