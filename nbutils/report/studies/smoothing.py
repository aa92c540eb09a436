"""What the runs of a prefix-smoothing study say, held against cross entropy seed by seed.

A run of another study's notebook may serve as the control. Cross entropy is a smoothing by 0 with a one-hot target, so
where its notebook reports no un-smoothed numbers they are its own, and its KL to the target is its cross entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.objectives import (
    BUT_WHITESPACE,
    MIXED_FORMS,
    NO_SMOOTHING,
    PREFIXES,
    RANDOM,
    UNIFORM,
    Smoothing,
    leaves_no_gold_mass,
)
from nbutils.report.arms import number, paired, without_seeds
from nbutils.report.evidence import FINAL, Arm, Judged, Study
from nbutils.report.statistics import NoiseFloor
from nbutils.runs import measure

if TYPE_CHECKING:
    from nbutils.runs import Run

OVER_WORDS = {
    PREFIXES: "prefixes",
    BUT_WHITESPACE: "prefixes but whitespace",
    UNIFORM: "all tokens evenly",
    RANDOM: "random tokens",
}
CROSS_ENTROPY = "cross entropy"
# What stands for a measure in runs trained on one-hot targets that do not report it.
OF_ONE_HOT = {"unsmoothed_bits_per_byte": "bits_per_byte", "unsmoothed_ce": "ce_loss", "kl_to_target": "ce_loss"}
ONE_HOT_SCORES = ("ce_loss", "perplexity", "bits_per_byte")
NO_GOLD_MASS = "its target leaves the gold token no mass (eps 1), so nothing can be un-smoothed"


def smooths(study: Study) -> bool:
    """Whether a study's own runs are of prefix smoothing."""
    return any("smoothed_over" in run.params for arm in study.own_arms for run in arm.runs)


def smoothing_of(arm: Arm) -> Smoothing:
    """What an arm's runs were trained towards; cross entropy where they are of a notebook without smoothing."""
    params = arm.params or arm.values
    given = {"form": "smoothing", "tau": "tau", "eps": "eps", "over": "smoothed_over"}
    told = {field: params[name] for field, name in given.items() if name in params}
    return Smoothing(**{"form": NO_SMOOTHING} | told)


def is_plain(arm: Arm) -> bool:
    """Whether an arm was trained on cross entropy alone, in whatever notebook."""
    return bool(arm.runs) and _is_one_hot(arm.params)


def _is_one_hot(params: Mapping[str, Any]) -> bool:
    if "smoothing" in params:
        return params["smoothing"] == NO_SMOOTHING
    if "divergence" in params:
        return params["divergence"] == "none" or params.get("kl_weight") == 0
    return params.get("alpha") == 0


def cross_entropy(study: Study) -> Arm | None:
    """The arm trained on cross entropy: the study's control where it was, else the first that was."""
    arms = sorted(study.arms, key=lambda arm: arm is not study.control)
    return next(filter(is_plain, arms), None)


def is_null(arm: Arm) -> bool:
    """Whether an arm smooths in name only, so that its difference to cross entropy is noise."""
    return not is_plain(arm) and any(value == 1 for value in arm.results("equals_cross_entropy"))


def with_repeats(study: Study) -> Study:
    """The study with an arm of its A/A runs, where these smooth in name only and stand in no arm of it.

    They do not where they have a noise seed of their own, which repeats an arm and makes none (nbutils.report.arms).
    """
    known = {run.variant for run in study.runs}
    runs = [ours.run for ours, _ in study.repeats if not ours.trouble and ours.run.variant not in known]
    arm = Arm("A/A", without_seeds(runs[0].matrix) if runs else {}, tuple(runs), len(study.repeats))
    return replace(study, arms=(*study.arms, arm)) if is_null(arm) else study


def arm_names(study: Study) -> dict[str, str]:
    """A short name for the label of each arm: "normalised, tau 0.2, random tokens"; the label where two are alike."""
    short = {arm.label: _short_name(arm) for arm in study.arms}
    alike = [name for name in short.values() if list(short.values()).count(name) > 1]
    return {label: label if name in alike else name for label, name in short.items()}


def _short_name(arm: Arm) -> str:
    smoothing = smoothing_of(arm)
    if smoothing.form == NO_SMOOTHING:
        return f"{CROSS_ENTROPY} (stage {arm.borrowed_from})" if arm.borrowed_from else CROSS_ENTROPY
    where = "" if smoothing.over == PREFIXES else f", {OVER_WORDS.get(smoothing.over, smoothing.over)}"
    return f"{smoothing.form}, {settings_text(smoothing)}{where}".replace("_", " ")


def settings_text(smoothing: Smoothing) -> str:
    """The numbers that a form has a use for: "tau 0.2", "eps 0.1"."""
    told = [f"eps {smoothing.eps:g}"] if smoothing.form in MIXED_FORMS else []
    if smoothing.form not in (NO_SMOOTHING, "mixed_uniform"):
        told.append(f"tau {smoothing.tau:g}")
    return ", ".join(told)


def by_seed(arm: Arm, metric: str) -> dict[Any, float]:
    """`metric` of every run by its seed; of one-hot runs that do not report it, what it is by definition."""
    values = {run.matrix.get("seed"): _reached(run, metric) for run in arm.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def _reached(run: Run, metric: str) -> float | None:
    prefix = next((each for each in FINAL if metric.startswith(each)), "")
    stands = prefix + OF_ONE_HOT.get(metric.removeprefix(prefix), "")
    found = metric if metric in run.result else stands if _is_one_hot(run.params) else ""
    return number(run.result[found]) if found in run.result else None


def effective(arm: Arm) -> float:
    """An arm's effective smoothing, 1 - mean gold mass; nan where no run reports it."""
    return 0.0 if is_plain(arm) and not arm.results("effective_smoothing") else arm.mean("effective_smoothing")


def differences(arm: Arm, control: Arm | None, metric: str) -> list[float]:
    """`arm` minus `control` in `metric`, for every seed that both have."""
    return paired(by_seed(arm, metric), by_seed(control, metric) if control else {})


def noise_band(study: Study, metric: str, seeds: int) -> float:
    """Half the width of the A/A band in `metric` for means over so many `seeds`.

    From every pair of runs that differ in noise alone: null arms against cross entropy, and the plan's A/A pairs. Those
    of one seed share a run, so their mean counts, once. nan where there is none.
    """
    plain = by_seed(control, metric) if (control := cross_entropy(study)) else {}
    pairs = {
        run.variant: (run.matrix.get("seed"), _reached(run, metric), plain.get(run.matrix.get("seed")))
        for arm in study.arms
        if is_null(arm)
        for run in arm.runs
    }
    for ours, theirs in study.repeats:
        if not (ours.trouble or theirs.trouble):
            pairs[ours.variant] = ours.matrix.get("seed"), _reached(ours.run, metric), _reached(theirs.run, metric)
    of_seed: dict[Any, list[float]] = {}
    for seed, one, other in pairs.values():
        if one is not None and other is not None:
            of_seed.setdefault(seed, []).append(one - other)
    return NoiseFloor(tuple(float(np.mean(each)) for each in of_seed.values())).band(seeds)


def seeds_of(study: Study, metric: str) -> tuple[int, int]:
    """The fewest and the most seeds that a smoothed arm's mean in `metric` is taken over, 0 where there is none."""
    counts = [len(differences(arm, cross_entropy(study), metric)) for arm in study.arms if not is_plain(arm)]
    counts = [count for count in counts if count]
    return (min(counts), max(counts)) if counts else (0, 0)


def ceiling(study: Study, arm: Arm) -> float:
    """The most that an arm's target alone costs in gold cross entropy, E[-log q_y(y)] in nats per token.

    A model that has learned its target has p(y) = sum over t of q_t(y) P(t) >= q_y(y) P(y), so that scored one-hot it
    loses at most this. nan where no run reports it, or the gold token has no mass.
    """
    return arm.mean(study.reported("predicted_cost") or "")


def is_one_hot_score(metric: str) -> bool:
    """Whether a measure holds a model against one-hot targets, whatever it was trained on."""
    return any(metric == prefix + name for prefix in FINAL for name in ONE_HOT_SCORES)


def cautions(judged: Judged, study: Study) -> list[str]:
    """Sentences on a contrast of a smoothed arm: why it lacks a number, or what a one-hot score cannot tell."""
    arm, metric = study.sides(judged.contrast)[0], judged.contrast.metric
    if arm is None or not arm.runs or not smooths(study):
        return []
    if not arm.results(metric):
        because = NO_GOLD_MASS if "unsmoothed" in metric and leaves_no_gold_mass(smoothing_of(arm)) else ""
        told = f": {because}" if because else ""
        return [f"No run of {arm_names(study)[arm.label]} reports {measure(metric).label}{told}."]
    most = ceiling(study, arm)
    if not is_one_hot_score(metric) or not most > 0:
        return []
    return [
        f"One-hot scores punish a smoothed model for what it was taught: its target alone costs up to "
        f"{measure('predicted_cost').number(most)} nats per token. Read this beside the un-smoothed numbers."
    ]
