"""Whether to trust an arm: what its objective asks of the model, and whether its probabilities mean what they say."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nbutils.report.evidence import Arm, Study
from nbutils.report.figures.style import LINE, QUIET, arm_legend, canvas, empty, look, styled

SPLITS = ("test", "validation")


@styled()
def gradient_audit(study: Study) -> Figure:
    """Over training: the cosine of the objective's gradient to cross entropy's, and the soft term's weighted norm.

    Over parameters, mean over an arm's runs. Left: 1 says that the objective asks for what cross entropy asks for.
    Right: the norm of every other term, weighted, as a multiple of that of cross entropy's own gradient, unweighted.
    """
    frames = {arm.label: _audited(arm) for arm in study.arms}
    frames = {label: frame for label, frame in frames.items() if len(frame)}
    if not frames:
        return empty("No run of this study has kept an audit of its gradients.")
    figure, (left, right) = canvas(2, height=2.3, columns=2)
    styles = look([arm.label for arm in study.arms])
    for label, frame in frames.items():
        style = styles[label]
        line = {"color": style["color"], "marker": style["marker"], "markersize": 4, "dashes": style["dash"] or (1, 0)}
        left.plot(frame.index, frame["alike"], **line)
        if frame["pull"].gt(0).any():
            right.plot(frame.index, frame["pull"], **line)
    left.set(ylabel="objective's cosine to\ncross entropy's gradient")
    right.set(ylabel="norm of the soft term\n(× cross entropy's)")
    for axes in (left, right):
        axes.set_xlabel("share of the training steps")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(bottom=0)
    arm_legend(figure, [arm for arm in study.arms if arm.label in frames])
    return figure


def _audited(arm: Arm) -> pd.DataFrame:
    """By progress, mean over the arm's runs: columns alike and pull."""
    pieces = []
    for run in arm.runs:
        audit = run.audit()
        if len(audit):
            audit = audit[audit["space"] == "parameters"]
            pull = audit.assign(pull=(audit["weight"] * audit["norm"]).abs()).set_index("progress")
            ce = pull.loc[pull["term"] == "ce", "norm"]
            soft = pull.loc[~pull["term"].isin(["ce", "objective"]), "pull"].groupby(level=0).sum()
            alike = pull.loc[pull["term"] == "objective", "cosine_to_ce"]
            ratio = soft.reindex(alike.index, fill_value=0.0) / ce.reindex(alike.index)
            pieces.append(pd.DataFrame({"alike": alike, "pull": ratio}))
    return pd.concat(pieces).groupby(level=0).mean() if pieces else pd.DataFrame()


@styled()
def reliability(study: Study) -> Figure:
    """How often the most probable token is right, by how probable the model calls it; and how often it says so.

    On the diagonal a model means what it says; below it, it is too sure. Pooled over an arm's runs, on test, or on
    validation where there is no test.
    """
    frames = {arm.label: _bins(arm) for arm in study.arms}
    frames = {label: frame for label, frame in frames.items() if len(frame)}
    if not frames:
        return empty("No run of this study has reported its calibration.")
    figure, (left, right) = canvas(2, height=2.4, columns=2)
    styles = look([arm.label for arm in study.arms])
    left.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, zorder=1)
    left.fill_between([0, 1], [0, 1], color=LINE, alpha=0.4, linewidth=0, zorder=0)
    for label, frame in frames.items():
        style = styles[label]
        line = {"color": style["color"], "marker": style["marker"], "markersize": 3, "dashes": style["dash"] or (1, 0)}
        confidence = frame["confidence_sum"] / frame["tokens"]
        left.plot(confidence, frame["correct_sum"] / frame["tokens"], **line)
        right.plot(confidence, frame["tokens"] / frame["tokens"].sum(), **line)
    left.text(0.97, 0.03, "too sure", ha="right", color=QUIET, transform=left.transAxes)
    left.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    right.set(xlim=(0, 1), ylim=(0, None), ylabel="tokens")
    for axes in (left, right):
        axes.set_xlabel("confidence: probability of the top token")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    arm_legend(figure, [arm for arm in study.arms if arm.label in frames])
    return figure


def _bins(arm: Arm) -> pd.DataFrame:
    """The sums of each bin that holds a token, over the arm's runs, of the first split that any of them has."""
    frames = [frame for run in arm.runs if len(frame := run.calibration())]
    if not frames:
        return pd.DataFrame()
    bins = pd.concat(frames)
    split = next((name for name in SPLITS if (bins["split"] == name).any()), None)
    sums = bins[bins["split"] == split].groupby("bin").sum(numeric_only=True)
    return sums[sums["tokens"] > 0]
