"""The cosine study: its rule of success, which weighs quality and proxy together, the grid of settings, the proxy.

    win         perplexity or accuracy equal or better, and the proxy better
    trade-off   the proxy better, perplexity modestly worse
    neither     the proxy not better, or bought with more than that
    undecided   the seeds are too few or too unlike each other to say which

"Equal or better", "better" and "modestly worse" are read from seed-paired intervals against the control, never from
means. The margins are those of planned contrasts that claim "no worse", else those below. All arms of a study share
the level of 0.05 by Holm's rule, or one of nine arms that change nothing would be a win in 14 of 100 studies. An arm
that is no better than a model of counts has no outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from IPython.display import HTML

from nbutils.report import figures, statistics
from nbutils.report.arms import paired
from nbutils.report.diagnostics import has_proxy, proxy_table
from nbutils.report.evidence import Arm, Evidence, Judged, Study
from nbutils.report.page import by_study, figure_by_study, section, stacked
from nbutils.report.studies.description import Description, Formula, settings_of
from nbutils.report.tables import arms_table, difference_lines
from nbutils.runs import UNKNOWN, measure

TUNED = {True: "yes", False: "not shown", None: UNKNOWN}

WIN, TRADE_OFF, NEITHER, UNDECIDED = "win", "trade-off", "neither", "undecided"
AT_FLOOR = "none: no better than counts"

CE_MARGIN = 0.01  # nats per token: perplexity 1 % worse counts as equal
ACCURACY_MARGIN = 0.002  # 0.2 percentage points
PROXY_EFFECT = 0.01  # a smaller gain in cosine is none
MODEST = 0.05  # nats per token: perplexity up to about 5 % worse is a price one may pay
BUDGET = ("max_steps", "num_train_epochs")  # parameters that say how long an arm trains
RULE = (
    f"Win: cross entropy at most {CE_MARGIN:g} nats or token accuracy at most {100 * ACCURACY_MARGIN:g} percentage "
    f"points worse than the control's, cross entropy in no case more than {MODEST:g} nats worse, and the proxy higher. "
    f"Trade-off: the proxy higher, cross entropy at most {MODEST:g} nats worse. Neither: a gain in the proxy of "
    f"{PROXY_EFFECT:g} is ruled out, or it costs more. Each is read from the whole seed-paired interval, at the level "
    'that Holm\'s rule leaves the arm; a planned "no worse" contrast brings its own margin. Undecided: the interval '
    "allows more than one of these. The differences shown have intervals of their contrasts, or of 95 %."
)
RULE_TOLD = "The study's own rule, which weighs perplexity and accuracy against the proxy, applied to every arm."
GRID_TOLD = (
    "Where in the grid an arm gains and where it loses. One cell that stands out among many is a reason to ask again "
    "with more seeds, not a finding."
)
GRID_CAPTION = "Seed-paired difference to the control, mean over seeds. Green: better. Pink: worse."
PROXY_TOLD = (
    "How near the expected embedding under the model's distribution lies to the embedding of the true token. A sharper "
    "or flatter distribution moves it too, so a gain here is no gain in meaning by itself."
)
PROXY_CAPTION = (
    "Mean cosine of expected and true embedding. Left: on validation over optimiser steps. Right: at the end, every "
    "seed as a faint mark, below it the mean with its 95 % interval."
)
# Formulas in plain HTML: a report runs no script, and MathJax is one.
FORMULAS = (
    Formula("Objective", "L = (1 − α) CE + α C; with a ramp, α grows linearly from 0 over the first steps"),
    Formula("Cross entropy", "CE = mean over tokens of −log p<sub>y</sub>, with p = softmax(z), in nats"),
    Formula("Expected embedding", "μ = Σ<sub>j</sub> p<sub>T,j</sub> E<sub>j</sub>, with p<sub>T</sub> = "
            "softmax(z / T); with top-k, over the k most probable tokens; E is the input embedding"),
    Formula("Cosine term", "C = mean over tokens of 1 − cos(μ, E<sub>y</sub>)"),
)  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """What an arm gains over its control in one measure, positive is better: interval and the effect that matters."""

    low: float
    high: float
    threshold: float


@dataclass(frozen=True)
class Outcome:
    """The rule applied to one arm. `beats_tuned` is None where no run reports the tuned control's proxy."""

    arm: Arm
    result: str
    pairs: int
    beats_tuned: bool | None


def composite(study: Study) -> list[Outcome]:
    """The rule's outcome for every arm but control and longer control; empty without a control or the measures."""
    ce, accuracy, proxy = (study.final(name) for name in ("ce_loss", "token_acc", "cosine"))
    if study.control is None or ce is None or proxy is None or not mixes(study):
        return []
    arms = [arm for arm in study.arms if arm is not study.control and not is_longer(arm, study.control)]
    rules = [Rule(study, arm, ce, accuracy, proxy) for arm in arms]
    levels = statistics.holm_levels([rule.p_of_win for rule in rules])
    return [
        Outcome(
            arm,
            rule.outcome(level) if not (arm.floor_not_beaten or study.control.floor_not_beaten) else AT_FLOOR,
            len(study.differences(arm, ce)),
            _beats_tuned(study, arm, proxy),
        )
        for arm, rule, level in zip(arms, rules, levels, strict=True)
    ]


@dataclass(frozen=True)
class Rule:
    """The rule for one arm, at whatever level: its gains over the control, seed by seed, and their margins."""

    study: Study
    arm: Arm
    ce: str
    accuracy: str | None
    proxy: str

    @property
    def p_of_win(self) -> float:
        """The p value of a win: all that it takes must hold, of perplexity and accuracy one (Bonferroni's share)."""
        equal = [_p(self._gains(name), -self._margin(name)) for name in (self.ce, self.accuracy) if name]
        each = [_p(self._gains(self.proxy), 0.0), _p(self._gains(self.ce), -MODEST), len(equal) * min(equal)]
        return min(1.0, max(each))

    def outcome(self, level: float) -> str:
        """What the intervals at this level allow."""
        quality, accurate, closer = (self._gain(name, level) for name in (self.ce, self.accuracy, self.proxy))
        return decide(quality, accurate, closer)

    def _gain(self, metric: str | None, level: float) -> Gain | None:
        if metric is None:
            return None
        if metric != self.proxy and self.accuracy:
            level /= 2  # either of the two may make an arm equal
        return Gain(*statistics.mean_interval(self._gains(metric), level), self._margin(metric))

    def _gains(self, metric: str) -> list[float]:
        """Differences to the control, positive where the arm is better."""
        differences = self.study.differences(self.arm, metric)
        return [-each for each in differences] if metric == self.ce else differences

    def _margin(self, metric: str) -> float:
        """The margin of a planned "no worse" contrast of this arm, else the rule's own."""
        judged = self.study.asked(self.arm, metric)
        if judged and judged.contrast.claim == "no worse":
            return judged.contrast.smallest_effect
        return {self.ce: CE_MARGIN, self.proxy: PROXY_EFFECT}.get(metric, ACCURACY_MARGIN)


def _p(gains: list[float], boundary: float) -> float:
    """Two-sided p that the mean gain is `boundary`; 1 where it does not lie above it, or there is no interval."""
    value = statistics.p_value(gains, boundary)
    return float(value) if np.isfinite(value) and np.mean(gains) > boundary else 1.0


def mixes(study: Study) -> bool:
    """Whether a study is about mixing a cosine term in, which the rule and the grid are made for."""
    return any(
        "alpha" in settings for arm in study.own_arms for settings in (arm.values, *(r.params for r in arm.runs))
    )


def is_longer(arm: Arm, control: Arm) -> bool:
    """Whether `arm` is the control with a larger budget and nothing else changed."""
    names = {name for name in {*arm.values, *control.values} if arm.values.get(name) != control.values.get(name)}
    return bool(names) and names <= {*BUDGET} and all(arm.values[name] > control.values[name] for name in names)


def decide(quality: Gain, accuracy: Gain | None, proxy: Gain) -> str:
    """The outcome that these intervals allow. A comparison with nan, an interval that is not there, allows none."""
    if proxy.high < proxy.threshold or quality.high < -MODEST:
        return NEITHER
    if not (proxy.low > 0 and quality.low > -MODEST):
        return UNDECIDED
    is_equal = any(each is not None and each.low > -each.threshold for each in (quality, accuracy))
    return WIN if is_equal else TRADE_OFF


def _beats_tuned(study: Study, arm: Arm, proxy: str) -> bool | None:
    """Whether the proxy lies above that of the control at its tuned temperature, by the 95 % interval."""
    tuned = study.control.by_seed(f"{proxy}_tuned")
    differences = paired(arm.by_seed(proxy), tuned)
    return statistics.mean_interval(differences)[0] > 0 if len(differences) > 1 else None


def composite_table(study: Study) -> HTML:
    """Every arm's outcome under the rule, with the differences it was read from; or what it lacks."""
    outcomes = composite(study)
    if not outcomes:
        return HTML("<p>The rule needs a planned contrast's control, a cross entropy and a cosine proxy.</p>")
    of_arm = {outcome.arm.label: outcome for outcome in outcomes}
    columns = {"Outcome": lambda arm: of_arm[arm.label].result}
    metrics = [metric for metric in map(study.final, ("ce_loss", "token_acc", "cosine")) if metric]
    for metric in metrics:
        quantity = measure(metric)
        unit = f"\n({quantity.difference_unit})" if quantity.difference_unit else ""
        columns[f"Δ {quantity.label}{unit}"] = partial(_lines, study, metric)
    if study.reports(f"{metrics[-1]}_tuned"):
        columns["Above the\ntuned control"] = lambda arm: TUNED[of_arm[arm.label].beats_tuned]
    columns["Pairs"] = lambda arm: str(of_arm[arm.label].pairs)
    arms = [outcome.arm for outcome in outcomes]
    return arms_table(study, columns, RULE, arms, counted="", text=("Arm", "Outcome"))


def _lines(study: Study, metric: str, arm: Arm) -> str:
    return "\n".join(difference_lines(study, arm, metric))


def _explained_by_frequencies(judged: Judged, study: Study) -> list[str]:
    """What the raw proxy's verdict must be read beside: a model gains in it by making its embeddings alike."""
    metric, arm = judged.contrast.metric, study.sides(judged.contrast)[0]
    alone = f"{metric}_unigram"
    if not metric.endswith("_cosine") or arm is None or not arm.results(metric) or not arm.results(alone):
        return []
    mine, theirs = (measure(metric).number(arm.mean(name)) for name in (metric, alone))
    return [
        f"In the embeddings of {arm.label}, token frequencies alone would give {theirs} where the model gives {mine}: "
        "read this beside the centred proxy."
    ]


def mixing(evidence: Evidence, folder: Path) -> HTML:
    """The rule's outcomes, the grid of settings, and the proxy, each under its heading where a study has it."""
    grid = {"folder": folder, "whole": True, "where": mixes, "absent": ""}
    proxy = {"where": has_proxy, "absent": ""}
    return stacked(
        section("Win, trade-off or neither", RULE_TOLD, by_study(evidence, composite_table, where=mixes, absent="")),
        section(
            "Mixing weight and temperature",
            GRID_TOLD,
            figure_by_study(evidence, figures.heat_map, "grid", GRID_CAPTION, **grid),
        ),
        section(
            "The proxy",
            PROXY_TOLD,
            figure_by_study(evidence, figures.proxy, "proxy", PROXY_CAPTION, folder, **proxy),
            by_study(evidence, proxy_table, **proxy),
        ),
    )


MIXING = Description(
    name="mixing",
    parameter="alpha",
    formulas=FORMULAS,
    settings=lambda params: (
        settings_of({"Alpha": "alpha", "Temp": "temperature"})(params) | {"TopK": params.get("cos_topk") or "None"}
    ),
    sections=mixing,
    cautions=(_explained_by_frequencies,),
)
