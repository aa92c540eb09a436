"""Prefix smoothing: what an arm reaches by how much it smooths, and the target distributions it learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nbutils.objectives import BUT_WHITESPACE, FORMS, NO_SMOOTHING, PREFIXES, RANDOM, UNIFORM, leaves_no_gold_mass
from nbutils.report.evidence import Arm, Study
from nbutils.report.figures.style import COLOURS, INK, LINE, QUIET, canvas, empty, styled
from nbutils.report.statistics import mean_interval
from nbutils.report.studies.smoothing import (
    OVER_WORDS,
    arm_names,
    by_seed,
    cross_entropy,
    differences,
    effective,
    is_null,
    is_one_hot_score,
    is_plain,
    noise_band,
    seeds_of,
    smoothing_of,
)
from nbutils.runs import measure

NUMBERS = ("ce_loss", "bits_per_byte", "unsmoothed_bits_per_byte", "kl_to_target", "spelling_acc")
# Colour and marker by what is smoothed over, so that neither alone has to be told apart.
MARKS = {
    PREFIXES: (COLOURS[1], "o"),
    BUT_WHITESPACE: (COLOURS[4], "v"),
    UNIFORM: (COLOURS[2], "s"),
    RANDOM: (COLOURS[5], "^"),
}
FILLS = dict(zip(FORMS[1:], ("full", "none", "bottom", "left", "right"), strict=True))  # of the marker, by form
LABEL_WIDTH = 26  # characters of a vertical axis' title in one line: a panel is not high
ASIDE = 0.004  # of the axis, by which arms of equal smoothing stand beside each other
WORDS = 3  # gold tokens drawn of each
BARS = 8  # tokens drawn of a target
AXIS_HEIGHT = 0.45  # inches for the numbers and the name below the last row


@styled()
def by_smoothing(study: Study) -> Figure:
    """Each number of an arm against its effective smoothing, a panel each, cross entropy as a line with the A/A band.

    A mark is the mean over the seeds that cross entropy has too; faint marks and interval are the seed-paired
    differences to it, drawn from its mean, so that they compare with the band.
    """
    metrics = [metric for metric in map(study.reported, NUMBERS) if metric]
    arms = [arm for arm in study.arms if math.isfinite(effective(arm)) and not is_plain(arm)]
    metrics = [metric for metric in metrics if any(by_seed(arm, metric) for arm in arms)]
    if not metrics:
        return empty("No smoothed run of this study has reported its effective smoothing and a result.")
    figure, (*panels, last) = canvas(len(metrics) + 1)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_control(axes, study, metric)
        for arm in sorted(arms, key=_is_beyond):  # such an arm comes last: it leaves the axis to the others
            _draw_arm(axes, arm, cross_entropy(study), metric)
        _name_axes(axes, metric, furthest=100 * max(map(effective, arms)))
    last.set_axis_off()
    last.legend(handles=_handles(study, arms), loc="center left", borderaxespad=0, labelspacing=0.6)
    return figure


def _draw_control(axes: Axes, study: Study, metric: str) -> None:
    """The line of cross entropy's mean over seeds, and around it the range of differences that noise alone makes.

    Dark for means over as many seeds as the fullest arm has, light for those of the arm with the fewest.
    """
    control = cross_entropy(study)
    values = list(by_seed(control, metric).values()) if control else []
    if not values:
        return
    level, scale = float(np.mean(values)), measure(metric).scale
    fewest, most = seeds_of(study, metric)
    for seeds, strength in ((fewest, 0.45), (most, 1.0)):
        band = noise_band(study, metric, seeds)
        if math.isfinite(band):
            shade = {"color": LINE, "alpha": strength, "linewidth": 0, "zorder": 1}
            axes.axhspan((level - band) * scale, (level + band) * scale, **shade)
    axes.axhline(level * scale, color=COLOURS[0], linewidth=2.2, zorder=2)


def _draw_arm(axes: Axes, arm: Arm, control: Arm | None, metric: str) -> None:
    """One arm's seeds, interval and mean."""
    plain = by_seed(control, metric) if control else {}
    values = differences(arm, control, metric) if plain else list(by_seed(arm, metric).values())
    if not values:
        return
    level, scale, style = float(np.mean(list(plain.values()) or 0.0)), measure(metric).scale, _style(arm)
    place = 100 * effective(arm) + _aside(arm)
    heights = (level + np.array(values)) * scale
    if _is_beyond(arm) and is_one_hot_score(metric):
        told = f"↑ {measure(metric).number(heights.mean() / scale)}"
        placed = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(told, (place, 1.01), color=style["color"], fontsize=7.5, **placed)
        return
    faint = {"markersize": 3, "alpha": 0.35, "markeredgewidth": 0, "color": style["color"], "fillstyle": "full"}
    axes.plot([place] * len(heights), heights, linestyle="", zorder=3, **style | faint)
    low, high = mean_interval(heights)
    axes.plot([place, place], [low, high], color=style["color"], linewidth=1.2, zorder=4)
    axes.plot(place, heights.mean(), linestyle="", zorder=5, **style)


def _is_beyond(arm: Arm) -> bool:
    """Whether an arm's one-hot scores are off the others' scale: it was taught not to say the gold token."""
    return leaves_no_gold_mass(smoothing_of(arm))


def _aside(arm: Arm) -> float:
    """How far aside an arm is drawn, by what it is smoothed over: at equal gold mass marks would lie on each other."""
    over = smoothing_of(arm).over
    if is_null(arm) or over not in MARKS:
        return 0.0
    return 100 * ASIDE * ([*MARKS].index(over) - (len(MARKS) - 1) / 2)


def _style(arm: Arm) -> dict[str, Any]:
    """Marker, colour and fill of an arm; a cross where it smooths in name only."""
    if is_null(arm):
        return {"color": INK, "marker": "x", "markersize": 5}
    smoothing = smoothing_of(arm)
    color, marker = MARKS.get(smoothing.over, MARKS[PREFIXES])
    return {"color": color, "marker": marker, "markersize": 6.5} | _filled(smoothing.form)


def _filled(form: str) -> dict[str, Any]:
    return {"fillstyle": FILLS.get(form, "full"), "markerfacecoloralt": "white", "markeredgewidth": 1.2}


def _name_axes(axes: Axes, metric: str, furthest: float) -> None:
    """Titles, the direction that is better, and one horizontal range for all panels."""
    quantity = measure(metric)
    title = [fill(quantity.label, LABEL_WIDTH)] + [f"({quantity.unit})"] * bool(quantity.unit)
    axes.set(xlabel=measure("effective_smoothing").axis, ylabel="\n".join(title))
    axes.set_xlim(-0.05 * furthest, 1.06 * furthest)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if quantity.better:
        told = {"lower": "↓ better", "higher": "↑ better"}[quantity.better]
        axes.set_title(told, loc="left", color=QUIET, fontweight="normal", fontsize=8)


def _handles(study: Study, arms: Sequence[Arm]) -> list[Artist]:
    """What is smoothed over, the forms where there are several, cross entropy, and the A/A band."""
    told = [smoothing_of(arm) for arm in arms if not is_null(arm)]
    overs = [over for over in MARKS if any(each.over == over for each in told)]
    forms = [form for form in FILLS if any(each.form == form for each in told)]
    point = {"linestyle": "", "markersize": 6}
    handles = [Line2D([], [], color=MARKS[o][0], marker=MARKS[o][1], label=OVER_WORDS[o], **point) for o in overs]
    if len(forms) > 1:
        grey = {"color": QUIET, "marker": "o"} | point
        handles += [Line2D([], [], label=form.replace("_", " "), **grey | _filled(form)) for form in forms]
    if any(map(is_null, arms)):
        handles.append(Line2D([], [], color=INK, marker="x", label="equals cross entropy (A/A)", **point))
    if cross_entropy(study):
        handles.append(Line2D([], [], color=COLOURS[0], linewidth=2.2, label="cross entropy"))
        if math.isfinite(noise_band(study, study.reported("ce_loss") or "", 1)):
            handles.append(Patch(color=LINE, label="A/A noise floor"))
    return handles


@styled()
def target_examples(study: Study) -> Figure:
    """Example targets, a row for each form and each thing else smoothed over, a column for each gold token.

    Of several arms of one kind that a contrast asks about is drawn. Tokens are listed as the run wrote them, the gold
    token last; what they leave of the probability is "all others".
    """
    drawn = [(arm, arm.runs[0].targets()) for arm in _one_of_each(study)]
    drawn = [(arm, [each for each in examples if _is_example(each)][:WORDS]) for arm, examples in drawn]
    drawn = [(arm, examples) for arm, examples in drawn if examples]
    if not drawn:
        return empty("No run of this study has kept examples of its targets.")
    columns = max(len(examples) for _, examples in drawn)
    bars = max(len(_bars(each)) for _, examples in drawn for each in examples)
    height = 0.4 + 0.14 * bars + AXIS_HEIGHT / len(drawn)
    figure, panels = canvas(len(drawn) * columns, height=height, columns=columns)
    names = arm_names(study)
    for row, (arm, examples) in enumerate(drawn):
        for column in range(columns):
            axes = panels[row * columns + column]
            if column >= len(examples):
                axes.set_axis_off()
                continue
            _draw_target(axes, _bars(examples[column]), bars, _style(arm)["color"])
            axes.set_title(names[arm.label] if column == 0 else "")
            if row == len(drawn) - 1:
                axes.set_xlabel("probability")
            else:
                axes.tick_params(labelbottom=False)
    return figure


def _one_of_each(study: Study) -> list[Arm]:
    """An arm of each form, then one of each thing else smoothed over; those that contrasts ask about come first."""
    by_form: dict[str, Arm] = {}
    by_over: dict[str, Arm] = {}
    foremost = [arm for most in range(1, len(study.arms) + 1) for arm in study.foremost(most).arms]
    for arm in foremost:
        smoothing = smoothing_of(arm)
        if smoothing.form == NO_SMOOTHING or is_null(arm) or not arm.runs or not arm.runs[0].targets():
            continue
        if smoothing.over == PREFIXES:
            by_form.setdefault(smoothing.form, arm)
        else:
            by_over.setdefault(smoothing.over, arm)
    known = [(by_form, form) for form in FILLS] + [(by_over, over) for over in MARKS]
    return [arms[name] for arms, name in known if name in arms]


def _is_example(example: Any) -> bool:
    if not isinstance(example, dict) or not isinstance(example.get("tokens"), list) or not example["tokens"]:
        return False
    weights = example.get("weights")
    if "gold" not in example or not isinstance(weights, list) or len(weights) != len(example["tokens"]):
        return False
    return all(isinstance(weight, int | float) for weight in weights)


def _bars(example: dict[str, Any]) -> list[tuple[str, float]]:
    """(text, probability) of a target's tokens: at most BARS, the heaviest, in the order given; then the rest."""
    pairs = [(spelled(text), float(weight)) for text, weight in zip(example["tokens"], example["weights"], strict=True)]
    kept = sorted(sorted(range(len(pairs)), key=lambda place: (place != len(pairs) - 1, -pairs[place][1]))[:BARS])
    shown = [pairs[place] for place in kept]
    rest = 1.0 - sum(weight for _, weight in shown)
    return [("all others", rest), *shown] if rest > 5e-4 else shown


def _draw_target(axes: Axes, bars: Sequence[tuple[str, float]], places: int, color: str) -> None:
    """One target as bars, the gold token at the bottom in full colour; there is room for so many `places`."""
    weights = [weight for _, weight in bars]
    drawn = axes.barh(range(len(bars)), weights, color=color, alpha=0.55, height=0.7)
    drawn[-1].set(alpha=1.0)
    for place, weight in enumerate(weights):
        text = f"{weight:.3f}" if weight >= 5e-4 else f"{weight:.0e}" if weight else "0"
        axes.annotate(text, (weight, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [text for text, _ in bars])
    axes.set(ylim=(len(bars) - 0.5, len(bars) - places - 0.5), xlim=(0, 1.2), xticks=(0, 0.5, 1))
    axes.grid(axis="y", visible=False)


def spelled(text: object) -> str:
    """A token's text for a picture: a space is seen, and what is no plain ASCII is written as an escape."""
    shown = str(text).encode("unicode_escape").decode("ascii").replace(" ", "␣")
    return shown if len(shown) <= 24 else shown[:23] + "…"
