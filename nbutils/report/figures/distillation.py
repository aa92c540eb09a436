"""Teachers and students over steps: where a teacher begins to over-fit, and what each term adds to the objective."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nbutils.foundation import visible
from nbutils.report.evidence import Arm, Study
from nbutils.report.figures.style import COLOURS, DASHES, QUIET, arm_legend, canvas, empty, styled
from nbutils.report.figures.training import POINTS, STEPS, curve_frame, draw_by_arm, draw_curves
from nbutils.report.statistics import mean_interval
from nbutils.runs import measure

# Raw terms in metrics.csv with the parameter that weighs each, and how the legend calls them.
TERMS = {"ce_loss": ("ce_weight", "cross entropy"), "kl_loss": ("kl_weight", "divergence from the teacher")}
KL = "kl_to_teacher"
CURVES = {"ce_loss": "training", "eval_ce_loss": "validation"}


@styled()
def overfitting(study: Study) -> Figure:
    """Training and validation cross entropy of each teacher over epochs, the best validation marked.

    Of several runs of one teacher the first is drawn. Where validation rises while training falls, it over-fits.
    """
    drawn = [(arm, arm.runs[0].metrics()) for arm in study.own_arms if arm.runs]
    drawn = [(arm, metrics) for arm, metrics in drawn if _has_curves(metrics)]
    if not drawn:
        return empty("No teacher has logged its cross entropy while it was fine-tuned.")
    figure, panels = canvas(len(drawn), columns=min(3, max(2, len(drawn))))
    for axes, (arm, metrics) in zip(panels, drawn, strict=True):
        _draw_overfitting(axes, metrics)
        axes.set_title(arm.label if len(drawn) > 1 else "")
    _legend(figure, list(CURVES.values()), dashed=False)
    return figure


def _has_curves(metrics: pd.DataFrame) -> bool:
    return {*CURVES} <= {*metrics.columns} and bool(metrics[[*CURVES]].notna().any().all())


def _draw_overfitting(axes: Axes, metrics: pd.DataFrame) -> None:
    """One teacher's two curves."""
    by_epoch = "epoch" in metrics.columns and metrics["epoch"].notna().any()
    place = metrics["epoch"] if by_epoch else metrics["step"]
    for index, name in enumerate(CURVES):
        logged = pd.DataFrame({"x": place, "value": metrics[name]}).dropna()
        if name == "ce_loss":
            logged = _binned(logged)
        marker = "o" if len(logged) <= 25 else ""
        axes.plot(logged["x"], logged["value"], color=COLOURS[index], marker=marker * index, markersize=4)
    best = metrics["eval_ce_loss"].idxmin()
    axes.axvline(place[best], color=QUIET, linewidth=1, linestyle=(0, (3, 2)))
    axes.annotate(
        "best", (place[best], 1), xycoords=("data", "axes fraction"), xytext=(-3, -3), textcoords="offset points",
        ha="right", va="top", color=QUIET,
    )  # fmt: skip
    axes.set(xlabel="epoch" if by_epoch else STEPS, ylabel=measure("ce_loss").axis.replace(" (", "\n("))


@styled()
def distance_to_teacher(study: Study) -> Figure:
    """How far students are from their teacher: on validation over steps, and at the end by arm, every seed a dot.

    While training the objective's own divergence is logged, at the end the plain KL; where runs log that while they
    train, both are it. The divergence is drawn in nats per token: a sum over a block's tokens is divided by them, and
    arms in `not_in_nats` are left out.
    """
    final = study.final(KL)
    frames = {f"eval_{KL}": curve_frame(study, f"eval_{KL}"), "eval_kl_loss": _divergence_frame(study)}
    column = next((name for name, frame in frames.items() if not frame.empty), None)
    if column is None and final is None:
        return empty("No run of this study has reported how far it is from its teacher.")
    figure, (left, right) = canvas(2, height=2.5, columns=2)
    draw_curves(left, study, frames.get(column, pd.DataFrame()), column or "eval_kl_loss")
    if column is None and not_in_nats(study):
        left.texts[0].set_text("not logged in nats per token")
    draw_by_arm(right, study, final or f"test_{KL}")
    arm_legend(figure, study.arms)
    return figure


def _divergence_frame(study: Study) -> pd.DataFrame:
    """The divergence term on validation over steps in nats per token, of the arms that have it."""
    frame = curve_frame(study, "eval_kl_loss")
    divisors = {arm.label: divisor(arm) for arm in study.arms}
    frame = frame[~frame["arm"].isin([arm.label for arm in not_in_nats(study)])]
    return frame.assign(value=frame["value"] / frame["arm"].map(divisors).astype(float))


def not_in_nats(study: Study) -> list[Arm]:
    """Arms whose logged divergence is no number of nats per token.

    A stored top k holds every other token in one bin, which makes the divergence smaller by construction; a sum over
    sequences of unlike lengths has no number of tokens to be divided by.
    """
    trained = [arm for arm in study.arms if any("eval_kl_loss" in run.metrics().columns for run in arm.runs)]
    binned = [arm for arm in trained if arm.runs[0].params.get("teacher_cache") == "topk"]
    return [arm for arm in trained if arm in binned or not math.isfinite(divisor(arm))]


def divisor(arm: Arm) -> float:
    """By what an arm's divergence is divided to be per token: 1, or the tokens of a block where it is summed over one.

    nan where sequences have unlike lengths, or the data are gone.
    """
    if not arm.runs or arm.runs[0].params.get("kd_reduction") != "batchmean":
        return 1.0
    card = arm.runs[0].data_card()
    return float(card["block_size"]) if card.get("task", "lm") == "lm" and "block_size" in card else math.nan


@styled()
def loss_terms(study: Study) -> Figure:
    """What each term adds to the objective over steps, weight times raw value, a panel for each arm with a teacher.

    A divergence that is a sum over sequences is drawn as it is minimised, and its panel says so.
    """
    arms = [(arm, _contributions(arm)) for arm in study.own_arms]
    arms = [(arm, frame) for arm, frame in arms if frame["term"].nunique() > 1]
    if not arms:
        return empty("No run of this study has logged two terms of its objective with their weights.")
    figure, panels = canvas(len(arms), columns=min(3, max(2, len(arms))))
    labels = [label for _, label in TERMS.values()]
    for axes, (arm, frame) in zip(panels, arms, strict=True):
        sns.lineplot(
            data=frame, x="step", y="value", hue="term", hue_order=labels, style="term", style_order=labels,
            palette=dict(zip(labels, COLOURS, strict=False)), dashes=dict(zip(labels, DASHES, strict=False)),
            errorbar=mean_interval, err_kws={"alpha": 0.15, "linewidth": 0}, legend=False, ax=axes,
        )  # fmt: skip
        axes.set(xlabel=STEPS, ylabel=_terms_label(arm), title=arm.label if len(arms) > 1 else "")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    _legend(figure, labels)
    return figure


def _terms_label(arm: Arm) -> str:
    summed = arm.runs[0].params.get("kd_reduction") == "batchmean"
    return "weight × term\n(nats per token,\ndivergence per sequence)" if summed else "weight × term\n(nats per token)"


def _contributions(arm: Arm) -> pd.DataFrame:
    """Weight times raw value of each term that an arm's runs logged: columns step, value, term, seed."""
    pieces = []
    for run in arm.runs:
        metrics = run.metrics()
        for column, (weight, label) in TERMS.items():
            if column in metrics.columns and run.params.get(weight):
                logged = metrics[["step", column]].dropna().set_axis(["x", "value"], axis=1)
                logged = _binned(logged).rename(columns={"x": "step"})
                pieces.append(
                    logged.assign(value=logged["value"] * run.params[weight], term=label, seed=visible(run.variant))
                )
    return pd.concat(pieces) if pieces else pd.DataFrame(columns=["step", "value", "term", "seed"])


def _binned(curve: pd.DataFrame) -> pd.DataFrame:
    """A long curve (columns x, value) averaged to POINTS bins."""
    if len(curve) <= POINTS:
        return curve
    width = curve["x"].max() / POINTS
    middles = ((np.ceil(curve["x"] / width) - 0.5) * width).clip(lower=0)
    return curve.assign(x=middles).groupby("x", as_index=False)["value"].mean()


def _legend(figure: Figure, labels: list[str], dashed: bool = True) -> None:
    handles = []
    for label, colour, dash in zip(labels, COLOURS, DASHES, strict=False):
        line = Line2D([], [], color=colour, label=label)
        line.set_dashes(dash if dashed and dash else (None, None))
        handles.append(line)
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=3)
