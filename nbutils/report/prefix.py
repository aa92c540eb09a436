"""Prefix smoothing in the report: what it costs by the arithmetic of its target, what is left when that is undone.

Nothing is shown of studies without runs of prefix smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped
from nbutils.objectives import NO_SMOOTHING, leaves_no_gold_mass
from nbutils.report import figures
from nbutils.report.appendix import AS_TRAINED
from nbutils.report.page import figure_of, frame_of, heading, side_by_side, stacked, table
from nbutils.report.smoothing_results import (
    NO_GOLD_MASS,
    OVER_WORDS,
    arm_names,
    by_seed,
    ceiling,
    cross_entropy,
    differences,
    effective,
    is_null,
    is_plain,
    reported,
    settings_text,
    smoothing_of,
    smooths,
    with_repeats,
)
from nbutils.report.statistics import mean_interval
from nbutils.report.studies import Arm, Evidence, Study
from nbutils.report.tables import mean_and_interval, seeds
from nbutils.report.tasks import task_table
from nbutils.runs import UNKNOWN, Measure, measure

TITLE = (
    "<h2>Prefix smoothing</h2><p>A target that gives some of the gold token's probability to the prefixes of its text. "
    "Effective smoothing is the probability it takes from the gold token, by how often each token occurs.</p>"
)
FIGURE_CAPTION = (
    "A mark is an arm's mean over seeds; arms of equal smoothing stand beside each other. Interval (95 %) and faint "
    "marks are seed-paired differences to cross entropy, drawn from its line. Grey band: differences as large come "
    "from noise alone (arms that equal cross entropy, and the plan's A/A pair); the light band is for arms with the "
    "fewest seeds, the dark one for those with the most. Each arm's KL is to another target."
)
BEYOND = " A number at an arrow is that of an arm with eps 1, off the scale."
TARGETS_CAPTION = (
    "What the model was trained to say where the bottom token is the gold one; ␣ is a space. Each row is one run."
)
CEILING_CAPTION = (
    "Observed: seed-paired increase of one-hot cross entropy over the control, with its 95 % interval. Ceiling: "
    "E[−log q(gold)] over the scored tokens, the most that scoring a model one-hot costs if it has learned its target "
    "perfectly and is otherwise as good. The last column has the target taken out again."
)
ONE_HOT = (
    "An increase below the ceiling may be nothing but the target, and one above it is more than the target explains. "
    "One-hot perplexity alone cannot tell benefit or harm from what the model was taught: prefixes of likely tokens "
    "get probability back, by an amount that it does not show. The un-smoothed numbers can."
)
# Titles in the table of arms. The first have intervals, the others, which say how rather than how good, do not.
TITLES = {
    "ce_loss": "gold cross\nentropy\n(nats per token)",
    "kl_to_target": "KL to its\nown target\n(nats per token)",
    "unsmoothed_bits_per_byte": "un-smoothed\nbits per byte",
}
ASIDE = {
    "unsmoothing_d": "d",
    "clipped_gold": "clipped\n(%)",
    "prefix_mass": "prefix\nmass\n(%)",
    "ece": "calibration\nerror\n(%)",
}
ARMS_CAPTION = (
    "Mean over seeds, 95 % interval where given. d: share of the smoothed model mixed into the un-smoothed one, chosen "
    "on validation. Clipped: gold tokens whose un-smoothed probability came out below 0. Prefix mass: probability of "
    "strict prefixes of the gold token at word starts."
)
SAMPLERS = (AS_TRAINED, "un-smoothed")  # as samples.jsonl calls them
SAMPLED_ARMS = 2
SAMPLES = 4  # prompts shown
SAMPLES_CAPTION = (
    "Shaded: the prompt, the first that all share. Of each arm the run with its first seed; un-smoothed: drawn from "
    "the distribution with the smoothing taken out."
)


def prefix_smoothing(evidence: Evidence, folder: Path) -> HTML:
    """The whole section, its heading included, figures saved in `folder`; empty where no run smoothed over prefixes."""
    parts = [
        HTML(heading(study, evidence) + _study(study, folder).data) for study in evidence.studies if smooths(study)
    ]
    return stacked(HTML(TITLE), *parts) if parts else HTML("")


def _study(study: Study, folder: Path) -> HTML:
    study = with_repeats(study)
    beyond = BEYOND * any(leaves_no_gold_mass(smoothing_of(arm)) for arm in study.arms)
    parts = [
        figure_of(study, figures.by_smoothing, "smoothing", FIGURE_CAPTION + beyond, folder, whole=True),
        ceiling_table(study),
        figure_of(study, figures.target_examples, "targets", TARGETS_CAPTION, folder, whole=True),
        arm_table(study),
        task_table(study),
        sampler_table(study),
    ]
    return stacked(*(part for part in parts if part.data))


def arm_table(study: Study) -> HTML:
    """Every arm: what it smooths, by how much, and all that its runs reached."""
    titles = {metric: title for name, title in (TITLES | ASIDE).items() if (metric := reported(study, name))}
    rows = []
    for arm in study.arms:
        row = {"Arm": _described(arm), "Seeds": seeds(arm), "effective\nsmoothing\n(%)": _effective(arm)}
        for metric, title in titles.items():
            values, quantity = list(by_seed(arm, metric).values()), measure(metric)
            row[title] = mean_and_interval(values, quantity)
            if title in ASIDE.values():
                row[title] = quantity.number(float(np.mean(values))) if values else UNKNOWN
        rows.append(row)
    caption = f"{_split(titles)}{ARMS_CAPTION}"
    if any(leaves_no_gold_mass(smoothing_of(arm)) for arm in study.arms):
        caption += f" With eps 1 {NO_GOLD_MASS.replace('its', 'the', 1).replace(' (eps 1)', '')}."
    if any(arm.borrowed_from for arm in study.arms):
        caption += " Cross entropy of another stage has nothing to un-smooth: its own stand for its un-smoothed ones."
    return table(frame_of(rows), caption, [arm is cross_entropy(study) for arm in study.arms])


def _split(metrics: Iterable[str]) -> str:
    """On which text the numbers were reached."""
    found = {"test": "test_", "validation": "eval_"}
    told = [split for split, prefix in found.items() if any(metric.startswith(prefix) for metric in metrics)]
    return f"On the {told[0]} split. " if len(told) == 1 else ""


def _described(arm: Arm) -> str:
    """What an arm smooths, a line each: the form, its numbers, over what, and whether it does anything."""
    smoothing = smoothing_of(arm)
    if is_plain(arm) or smoothing.form == NO_SMOOTHING:
        return "cross entropy" + (f"\n(stage {arm.borrowed_from})" if arm.borrowed_from else "\n(control)")
    lines = [smoothing.form.replace("_", " "), f"({settings_text(smoothing)})"]
    lines.append(f"(over {OVER_WORDS.get(smoothing.over, smoothing.over)})")
    return "\n".join([*lines, "(equals cross entropy: serves as A/A)"] if is_null(arm) else lines)


def _effective(arm: Arm) -> str:
    value = effective(arm)
    return "< 0.01" if 0 < value < 5e-5 else measure("effective_smoothing").number(value)


def ceiling_table(study: Study) -> HTML:
    """The most that each target alone costs beside the increase that was seen; empty without a control or a ceiling."""
    control, metric = cross_entropy(study), study.final("ce_loss")
    unsmoothed = study.final("unsmoothed_bits_per_byte")
    if control is None or metric is None or not reported(study, "predicted_cost"):
        return HTML("")
    rows, names, quantity = [], arm_names(study), measure(metric)
    for arm in study.arms:
        increases = differences(arm, control, metric)
        if arm is control or is_null(arm) or is_plain(arm) or not increases:
            continue
        most = ceiling(study, arm)
        row = {"Arm": names[arm.label], "effective smoothing (%)": _effective(arm)}
        row["Ceiling\n(nats per token)"] = measure("predicted_cost").number(most)
        row["Observed increase\n(nats per token)"] = _difference(increases, quantity)
        row["Observed / ceiling"] = _share(increases, most)
        if unsmoothed:
            row["Δ un-smoothed\nbits per byte"] = _difference(
                differences(arm, control, unsmoothed), measure(unsmoothed)
            )
        rows.append(row)
    if not rows:
        return HTML("")
    return stacked(table(frame_of(rows), CEILING_CAPTION), HTML(f"<p>{escaped(ONE_HOT, LONGEST_PARAGRAPH)}</p>"))


def _difference(values: list[float], quantity: Measure) -> str:
    if not values:
        return UNKNOWN
    return f"{quantity.difference(float(np.mean(values)))}\n{quantity.difference_interval(*mean_interval(values))}"


def _share(increases: list[float], most: float) -> str:
    """Observed over ceiling in per cent with its interval; a dash where there is no finite ceiling."""
    if not (math.isfinite(most) and most > 0 and np.isfinite(increases).all()):
        return UNKNOWN
    share = Measure("", digits=0, scale=100 / most)
    low, high = mean_interval(increases)
    return f"{share.number(float(np.mean(increases)))} %" + f"\n{share.interval(low, high)}" * math.isfinite(low)


def sampler_table(study: Study) -> HTML:
    """The same prompts continued as trained and un-smoothed; empty where no run has both."""
    asked = [side for each in study.judged for side in study.sides(each.contrast)]
    arms = [arm for arm in study.arms if arm.runs and not is_plain(arm)]
    texts = {arm.label: _by_sampler(arm) for arm in sorted(arms, key=lambda arm: arm not in asked)}
    texts = {label: own for label, own in texts.items() if all(own.values())}
    shown = [(label, sampler) for label in list(texts)[:SAMPLED_ARMS] for sampler in SAMPLERS]
    prompts = texts[shown[0][0]][SAMPLERS[0]] if shown else {}
    shared = [prompt for prompt in prompts if all(prompt in texts[label][sampler] for label, sampler in shown)]
    if not shared:
        return HTML("")
    names = arm_names(study)
    rows = [(prompt, [_escaped(texts[label][sampler][prompt]) for label, sampler in shown]) for prompt in shared]
    return side_by_side([f"{names[label]}: {sampler}" for label, sampler in shown], rows[:SAMPLES], SAMPLES_CAPTION)


def _by_sampler(arm: Arm) -> dict[str, dict[str, str]]:
    """{sampler: {prompt: completion}} of an arm's first run."""
    samples = arm.runs[0].samples()
    return {
        sampler: {str(s["prompt"]): str(s["completion"]) for s in samples if s.get("sampler") == sampler}
        for sampler in SAMPLERS
    }


def _escaped(text: str) -> str:
    return escaped(text.strip())
