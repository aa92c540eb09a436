"""The verdicts of a report, in words and in one table of the numbers they were read from."""

from __future__ import annotations

import math

import numpy as np
from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped, shortened
from nbutils.interaction import taught_by
from nbutils.models import NO_DIVERGENCE
from nbutils.report import judging, statistics
from nbutils.report.arms import SEEDS, named
from nbutils.report.documents import document_sentence
from nbutils.report.evidence import Arm, Evidence, Judged, Study
from nbutils.report.page import code, frame_of, heading, table
from nbutils.report.studies.registry import cautions
from nbutils.report.warnings import warnings
from nbutils.runs import UNKNOWN, Measure, measure, p_text, percent

CLASSES = {
    judging.SUPPORTED: "supported",
    judging.TOO_SMALL: "too-small",
    judging.NOT_SUPPORTED: "not-supported",
    judging.UNDECIDED: "undecided",
    judging.INTERIM: "interim",
    judging.NOT_JUDGED: "not-judged",
}

LARGEST_LOGARITHM = 50  # nats beyond which a ratio of perplexities says nothing, or is no number
MOST_NAMED = 4  # parameters in one sentence
NO_RUNS = """
<p class="lead">There are no runs to report on yet.</p>
<p>In the folder {folder}{plan} no run was found. To get some, in the repository's root:</p>
<ul>
<li><code>make report</code> runs the quick plan and makes this report from it, in about ten minutes;</li>
<li><code>python -m nbutils batch params/quick.yaml</code> runs that plan, or any other, alone;</li>
<li>or open a study notebook, run it, and set <code>plan</code> to <code>interactive</code> here.</li>
</ul>
"""

# Parameters that change no weight, and those that only a student with a teacher has a use for
TRAINS_NOTHING = ("audit_blocks", "samples", "answers", "compression", "evaluate_test", "logging_steps", "report_to")
OF_A_TEACHER = ("teacher", "second_teacher", "kl_", "kd_", "jsd_", "cache_")
TEACHERS = ("correcting_teacher", "distilling_teacher")  # of an interaction


def has_contrasts(study: Study) -> bool:
    """Whether a planned contrast of the study has an interval, for which it takes two seed pairs."""
    return any(np.isfinite(judged.verdict.low) for judged in study.judged)


def verdicts(evidence: Evidence) -> HTML:
    """What the runs say, a paragraph for each planned contrast, the primary one first; or how to get runs."""
    if not any(slot.run for slot in evidence.slots) and not evidence.unplanned:
        plan = f" for the plan {code(evidence.plans[0].name)}" if len(evidence.plans) == 1 else ""
        return HTML(NO_RUNS.format(folder=code(evidence.folder.name), plan=plan))
    sentences = "".join(f"<p>{escaped(sentence, LONGEST_PARAGRAPH)}</p>" for sentence in warnings(evidence))
    parts = [f'<div class="warning">{sentences}</div>'] if sentences else []
    if len(evidence.studies) > 1:
        parts.append(_counted(evidence))
    for study in sorted(evidence.studies, key=lambda study: not study.judged):
        if not study.judged and lends_controls(study, evidence):
            continue
        if len(evidence.studies) > 1:
            parts.append(heading(study, evidence))
        parts += [_verdict(judged, study) for judged in study.judged]
        if not study.judged:
            parts.append("<p>No contrast was planned for this stage: what follows about it is exploratory.</p>")
    if not evidence.studies and not evidence.teachers:
        parts.append("<p>No run has trained or judged a model yet.</p>")
    return HTML("\n".join(parts))


def lends_controls(study: Study, evidence: Evidence) -> bool:
    """Whether contrasts of other stages of its plan take their controls from this one."""
    others = (each for each in evidence.studies if each.plan == study.plan)
    return any(arm.borrowed_from == study.stage for each in others for arm in each.arms)


def _counted(evidence: Evidence) -> str:
    """How many questions there are and how they were answered: what a page of many stages opens with."""
    found = [judged.verdict.outcome for study in evidence.studies for judged in study.judged]
    counts = ", ".join(f"{found.count(outcome)} {outcome}" for outcome in CLASSES if outcome in found)
    return f'<p class="lead">{len(found)} question{"s" * (len(found) != 1)}: {escaped(counts)}.</p>' if found else ""


def _verdict(judged: Judged, study: Study) -> str:
    """One contrast in plain words: the outcome, the question, what was measured, what to keep in mind."""
    verdict, contrast = judged.verdict, judged.contrast
    kind = "" if contrast.primary else " (secondary question)"
    outcome = verdict.outcome[0].upper() + verdict.outcome[1:]
    sentences = [
        _meaning(judged),
        _measured(judged, study),
        *_caveats(judged),
        *_trained_otherwise(judged, study),
        *cautions(judged, study),
        *document_sentence(judged, study),
        *_nothing_to_lose(judged, study),
    ]
    return (
        f'<div class="verdict {CLASSES[verdict.outcome]}"><p><span class="outcome">{outcome}.</span> '
        f"<strong>{escaped(contrast.question)}</strong>{kind}</p>"
        f"<p>{' '.join(escaped(each, LONGEST_PARAGRAPH) for each in sentences if each)}</p></div>"
    )


def _meaning(judged: Judged) -> str:
    """What the outcome means for this claim."""
    verdict, contrast = judged.verdict, judged.contrast
    quantity = measure(contrast.metric)
    effect = f"{quantity.short(contrast.smallest_effect)} {quantity.difference_unit}".rstrip()
    if verdict.outcome == judging.SUPPORTED:
        return f"If it is worse at all, then by less than the margin of {effect}." * (contrast.claim == "no worse")
    if verdict.outcome == judging.TOO_SMALL:
        return f"There is a gain, and all of its interval lies below the smallest effect of interest, {effect}."
    if verdict.outcome == judging.NOT_SUPPORTED:
        if contrast.claim == "no worse":
            return f"It is worse by more than the margin of {effect}."
        is_worse = verdict.low > 0 if contrast.better == "lower" else verdict.high < 0
        return "It is worse." if is_worse else f"A gain of {effect} is ruled out."
    if verdict.outcome == judging.INTERIM:
        return f"{verdict.pairs} of {verdict.planned} registered pairs are in, and there is no verdict before all are."
    if verdict.outcome == judging.NOT_JUDGED or _is_held_back(judged):
        return verdict.note
    return _could_be_seen(judged, quantity, effect)


def _is_held_back(judged: Judged) -> bool:
    """Whether the interval alone would decide, and the shape of the differences forbids it."""
    verdict = judged.verdict
    alone = judging.outcome_of(judged.contrast, verdict.low, verdict.high)
    return verdict.outcome == judging.UNDECIDED and alone != judging.UNDECIDED


def _could_be_seen(judged: Judged, quantity: Measure, effect: str) -> str:
    """What as many pairs could have shown, at the level of this verdict, and how many more it would take."""
    verdict, contrast = judged.verdict, judged.contrast
    subject = "a margin" if contrast.claim == "no worse" else "an effect"
    seen = (
        f"{verdict.pairs} pairs could have shown {subject} of {_with_unit(quantity, verdict.minimum_detectable)} or "
        f"more (power 0.8 at level {verdict.alpha:.3g}, spread at its upper limit)"
    )
    if verdict.minimum_detectable <= contrast.smallest_effect:
        return f"{seen}, and the plan asks about {effect}: this is one of the other cases."
    share = verdict.alpha / judging.level_of_look(verdict.look)
    level = share * judging.level_of_look(verdict.look + 1)
    needed = statistics.pairs_needed(verdict.spread, contrast.smallest_effect, level)
    many = f"about {needed:,} pairs" if needed else f"more than {statistics.MOST_PAIRS:,} pairs"
    return f"{seen}; the plan asks about {effect}. An extension, judged at level {level:.2g}, takes {many}."


def _measured(judged: Judged, study: Study) -> str:
    """The numbers behind the verdict."""
    verdict, contrast = judged.verdict, judged.contrast
    if verdict.outcome == judging.NOT_JUDGED or not verdict.pairs:
        return ""
    quantity = measure(contrast.metric)
    treatment, control = study.sides(contrast)
    sides = f"{_label(treatment, contrast.treatment)} minus {_label(control, contrast.control)}"
    if contrast.control_metric:
        sides += f" ({measure(contrast.control_metric).label})"
    difference = f"{quantity.difference(verdict.difference)} {quantity.difference_unit}".strip()
    interval = quantity.difference_interval(verdict.low, verdict.high)
    up = sum(each > 0 for each in verdict.differences)
    text = (
        f"{quantity.label[0].upper()}{quantity.label[1:]}, {sides}: {difference}, {level(verdict)} interval "
        f"{interval}, {verdict.pairs} seed pairs, {up} of them up"
    )
    if contrast.metric.endswith("ce_loss") and abs(verdict.difference) < LARGEST_LOGARITHM:
        text += f"; perplexity {percent(math.expm1(verdict.difference))}"
    return text + "."


def _caveats(judged: Judged) -> list[str]:
    """Sentences that limit a verdict."""
    verdict, quantity = judged.verdict, measure(judged.contrast.metric)
    found = [] if verdict.outcome == judging.NOT_JUDGED or _is_held_back(judged) else [verdict.note]
    if verdict.without_one:
        alone = verdict.without_one
        found.append(
            f"Without seed {judged.seeds[alone.place]} this would read: {alone.outcome}, "
            f"{quantity.difference(alone.difference)}."
        )
    if verdict.earlier:
        told = ", then ".join(verdict.earlier)
        found.append(f"The plan was extended after a look: it was {told}. All looks share a level of 0.05.")
    if judged.missing:
        what, rest = shortened(judged.missing[0]), len(judged.missing) - 1
        more = f", and {rest} more" if rest else ""
        found.append(f"{len(judged.missing)} of {verdict.planned} planned pairs are missing ({what}{more}).")
    band = judged.floor.band(verdict.pairs) if judged.floor else math.nan
    if judged.contrast.claim == "better" and band > 0 and abs(verdict.difference) <= band:
        found.append(f"The difference is not distinguishable from A/A noise (95 % within {quantity.number(band)}).")
    return found


def _nothing_to_lose(judged: Judged, study: Study) -> list[str]:
    """A sentence where "no worse" is asked of a control that does no better than a guess."""
    contrast, quantity = judged.contrast, measure(judged.contrast.metric)
    control = study.sides(contrast)[1]
    values = control.results(contrast.control_metric or contrast.metric) if control else []
    if contrast.claim != "no worse" or math.isnan(quantity.chance) or len(values) < 2:
        return []
    if statistics.mean_interval(values)[0] > quantity.chance:
        return []
    return [
        f"The control itself is at chance ({quantity.number(quantity.chance)} {quantity.unit}): it has nothing to "
        "lose, and that nothing was lost says nothing."
    ]


def _trained_otherwise(judged: Judged, study: Study) -> list[str]:
    """A sentence on the parameters in which a control of another stage differs and the contrast does not name."""
    contrast, (treatment, control) = judged.contrast, study.sides(judged.contrast)
    if not contrast.control_stage or not treatment or not control or not treatment.runs or not control.runs:
        return []
    ours, theirs = treatment.runs[0].params, control.runs[0].params
    known = {*contrast.treatment, *contrast.control, *SEEDS, *TRAINS_NOTHING}
    if theirs.get("divergence") == NO_DIVERGENCE:
        known |= {name for name in theirs if name.startswith(OF_A_TEACHER)}
    known |= {*TEACHERS} - (taught_by(ours).keys() & taught_by(theirs).keys())
    differing = [name for name in ours if name in theirs and name not in known and ours[name] != theirs[name]]
    if not differing:
        return []
    values = {name: [named(side[name]) or "empty" for side in (ours, theirs)] for name in differing[:MOST_NAMED]}
    told = [f"{name} {mine}, not {other}" for name, (mine, other) in values.items()]
    more = f", and {len(differing) - MOST_NAMED} more" * (len(differing) > MOST_NAMED)
    return [
        f"The control, of stage {contrast.control_stage}, was trained with other settings than the treatment "
        f"({'; '.join(told)}{more}), which may explain the difference as well."
    ]


def _label(arm: Arm | None, values: dict) -> str:
    """How a contrast's side is called: its arm's label, or its own values where no arm has them."""
    return arm.label if arm else ", ".join(f"{name} {named(value)}" for name, value in values.items())


def level(verdict: judging.Verdict) -> str:
    """The confidence of the verdict's interval: "95 %", or Holm's "98.3 %"."""
    return f"{100 * (1 - verdict.alpha):.3g} %"


def verdict_table(study: Study) -> HTML:
    """Every planned contrast with what it asked and all the numbers its verdict was read from."""
    rows = []
    for judged in study.judged:
        verdict, contrast, quantity = judged.verdict, judged.contrast, measure(judged.contrast.metric)
        band = judged.floor.band(verdict.pairs) if judged.floor else math.nan
        goal = "margin" if contrast.claim == "no worse" else "smallest effect"
        difference = UNKNOWN
        if verdict.outcome != judging.NOT_JUDGED:
            interval = quantity.difference_interval(verdict.low, verdict.high)
            difference = f"{quantity.difference(verdict.difference)}\n{interval}\n({level(verdict)})"
        rows.append(
            {
                "Contrast": f"{contrast.name}\n({'primary' if contrast.primary else 'secondary'})",
                "Verdict": verdict.outcome,
                "Claim": f"{contrast.claim}\n({goal} {quantity.short(contrast.smallest_effect)})",
                "Measure": quantity.label + (f"\n({quantity.difference_unit})" if quantity.difference_unit else ""),
                "Difference": difference,
                "p": p_text(verdict.p_value),
                "Pairs": str(verdict.pairs)
                if verdict.pairs == verdict.planned
                else f"{verdict.pairs} of {verdict.planned}",
                "Detectable": quantity.number(verdict.minimum_detectable),
                "A/A floor": f"±{quantity.number(band)}" if math.isfinite(band) else UNKNOWN,
            }
        )
    note = (
        "Difference: treatment minus control with its interval, at the level it is judged at: 0.04 at the first look "
        "for the primary contrast, what Holm's rule leaves of it for the others, less at an extension. p tests the "
        "claim's boundary: 0, or the margin. Detectable: the effect that as many pairs show at that level with power "
        "0.8, their spread at its upper limit. A/A floor: where 95 % of such differences lie between two runs that "
        "differ in noise alone."
    )
    if not rows:
        return HTML("<p>No contrast was planned for this stage.</p>")
    return table(frame_of(rows), note, text=("Contrast", "Claim", "Measure", "Verdict"))


def _with_unit(quantity: Measure, value: float) -> str:
    """The size of a difference and its unit."""
    return f"{quantity.number(value)} {quantity.difference_unit}".rstrip()
