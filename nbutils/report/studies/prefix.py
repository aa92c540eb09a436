"""Prefix smoothing in the report: what it costs by the arithmetic of its target, what is left when that is undone.

Nothing is shown of studies without runs of prefix smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped
from nbutils.objectives import MIXED_FORMS, NO_SMOOTHING, RANDOM, UNIFORM, leaves_no_gold_mass
from nbutils.report.appendix import AS_TRAINED
from nbutils.report.evidence import Arm, Evidence, Study
from nbutils.report.page import figure_of, heading, section, side_by_side, stacked
from nbutils.report.studies.description import Description, Formula, has, reports, settings_of
from nbutils.report.studies.prefix_figures import by_smoothing, target_examples
from nbutils.report.studies.smoothing import (
    NO_GOLD_MASS,
    OVER_WORDS,
    arm_names,
    by_seed,
    cautions,
    ceiling,
    cross_entropy,
    differences,
    effective,
    is_null,
    is_plain,
    settings_text,
    smoothing_of,
    smooths,
    with_repeats,
)
from nbutils.report.studies.tasks import task_table
from nbutils.report.tables import arms_table, difference_and_interval, mean_and_interval, share_and_interval
from nbutils.runs import UNKNOWN, measure

TITLE = "Prefix smoothing"
TOLD = (
    "A target that gives some of the gold token's probability to the prefixes of its text. Effective smoothing is the "
    "probability it takes from the gold token, by how often each token occurs."
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
    shown = [study for study in evidence.studies if smooths(study)]
    return section(TITLE, TOLD, *(HTML(heading(each, evidence) + _study(each, folder).data) for each in shown))


def _study(study: Study, folder: Path) -> HTML:
    study = with_repeats(study)
    beyond = BEYOND * any(leaves_no_gold_mass(smoothing_of(arm)) for arm in study.arms)
    parts = [
        figure_of(study, by_smoothing, "smoothing", FIGURE_CAPTION + beyond, folder, whole=True),
        ceiling_table(study),
        figure_of(study, target_examples, "targets", TARGETS_CAPTION, folder, whole=True),
        arm_table(study),
        task_table(study),
        sampler_table(study),
    ]
    return stacked(*(part for part in parts if part.data))


def arm_table(study: Study) -> HTML:
    """Every arm: what it smooths, by how much, and all that its runs reached."""
    titles = {metric: title for name, title in (TITLES | ASIDE).items() if (metric := study.reported(name))}
    columns = {"effective\nsmoothing\n(%)": _effective}
    columns |= {
        title: partial(_mean if title in ASIDE.values() else _with_interval, metric) for metric, title in titles.items()
    }
    caption = f"{_split(titles)}{ARMS_CAPTION}"
    if any(leaves_no_gold_mass(smoothing_of(arm)) for arm in study.arms):
        caption += f" With eps 1 {NO_GOLD_MASS.replace('its', 'the', 1).replace(' (eps 1)', '')}."
    if any(arm.borrowed_from for arm in study.arms):
        caption += " Cross entropy of another stage has nothing to un-smooth: its own stand for its un-smoothed ones."
    return arms_table(replace(study, control=cross_entropy(study)), columns, caption, name=_described)


def _with_interval(metric: str, arm: Arm) -> str:
    return mean_and_interval(list(by_seed(arm, metric).values()), measure(metric))


def _mean(metric: str, arm: Arm) -> str:
    values = list(by_seed(arm, metric).values())
    return measure(metric).number(float(np.mean(values))) if values else UNKNOWN


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
    if control is None or metric is None or not study.reported("predicted_cost"):
        return HTML("")
    arms = [arm for arm in study.arms if arm is not control and not is_null(arm) and not is_plain(arm)]
    arms, names = [arm for arm in arms if differences(arm, control, metric)], arm_names(study)
    if not arms:
        return HTML("")

    def increase(name: str, arm: Arm) -> str:
        return difference_and_interval(differences(arm, control, name), measure(name))

    columns = {
        "effective smoothing (%)": _effective,
        "Ceiling\n(nats per token)": lambda arm: measure("predicted_cost").number(ceiling(study, arm)),
        "Observed increase\n(nats per token)": partial(increase, metric),
        "Observed / ceiling": lambda arm: _share(differences(arm, control, metric), ceiling(study, arm)),
    }
    if unsmoothed := study.final("unsmoothed_bits_per_byte"):
        columns["Δ un-smoothed\nbits per byte"] = partial(increase, unsmoothed)
    shown = arms_table(
        replace(study, control=None), columns, CEILING_CAPTION, arms, lambda arm: names[arm.label], counted=""
    )
    return stacked(shown, HTML(f"<p>{escaped(ONE_HOT, LONGEST_PARAGRAPH)}</p>"))


def _share(increases: list[float], most: float) -> str:
    """Observed over ceiling in per cent with its interval; a dash where there is no finite ceiling."""
    known = math.isfinite(most) and most > 0 and np.isfinite(increases).all()
    return share_and_interval(increases, most) if known else UNKNOWN


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


FORMULAS = (
    Formula(
        "Objective",
        "L = log Σ<sub>j</sub> exp z<sub>j</sub> − Σ<sub>k</sub> q<sub>y,k</sub> z<sub>k</sub>, the cross entropy"
        " to the target q<sub>y</sub> of the gold token y. Without a proper prefix, and for special tokens, "
        "q<sub>y</sub> is one-hot",
    ),
    Formula(
        "Normalised target",
        "softmax(k / (L τ)) over the tokens whose k bytes begin the L bytes of the gold token, itself included",
        has("smoothing", "normalised"),
    ),
    Formula(
        "Unnormalised target",
        "softmax(k / τ) over the tokens whose k bytes begin those of the gold token, itself included",
        has("smoothing", "unnormalised"),
    ),
    Formula(
        "Mixed target",
        "1 − ε on the gold token, ε over the proper prefixes, evenly or by a softmax of their bytes",
        has("smoothing", *MIXED_FORMS),
    ),
    Formula(
        "Effective smoothing",
        "1 − mean of q<sub>y</sub>(y), each token weighted by how often it occurs in training",
    ),
    Formula(
        "Uniform control",
        "the gold token keeps its q<sub>y</sub>(y), all other tokens share the rest evenly",
        has("smoothed_over", UNIFORM),
    ),
    Formula(
        "Random control",
        "each proper prefix is replaced by a random token of as many bytes that is none",
        has("smoothed_over", RANDOM),
    ),
    Formula(
        "KL to the target",
        "KL(q<sub>y</sub> ‖ p) = L − H(q<sub>y</sub>)",
        reports("_kl_to_target"),
    ),
    Formula(
        "Ceiling",
        "E[−log q<sub>y</sub>(y)]: a model that has learned its target has p(y) = Σ<sub>t</sub> q<sub>t</sub>(y) "
        "P(t) ≥ q<sub>y</sub>(y) P(y)",
        reports("predicted_cost"),
    ),
    Formula(
        "Un-smoothed",
        "P(y) = (p(y) − Σ<sub>t longer</sub> q<sub>t</sub>(y) P(t)) / q<sub>y</sub>(y), from the longest token to"
        " the shortest, clipped at 0 and renormalised (uniform: all equations at once, then clipped); scored is "
        "(1 − d) P + d p, with the d that is best on validation. Cross entropy of the same notebook is treated "
        "alike, as if smoothed by the normalised form at τ 0.2: what choosing d can gain every arm gains. A "
        "control of another study's notebook is scored as it is",
        reports("unsmoothed_bits_per_byte"),
    ),
)
PREFIX_SMOOTHING = Description(
    name="prefix smoothing",
    parameter="smoothed_over",
    formulas=FORMULAS,
    settings=settings_of({"Smoothing": "smoothing", "Tau": "tau", "Eps": "eps", "Over": "smoothed_over"}),
    sections=prefix_smoothing,
    cautions=(cautions,),
)
