"""Was the objective applied, was training stable, do probabilities mean what they say: what comes before results."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.foundation import visible
from nbutils.report.evidence import Arm, Study
from nbutils.report.page import frame_of, table
from nbutils.report.tables import arms_table, measure_table
from nbutils.runs import UNKNOWN, measure

PROXIES = ("cosine", "cosine_unigram", "cosine_centred", "cosine_tuned", "tuned_temperature")
STABILITY = ("gradient_spikes", "early_gradient_peak", "early_ce_rise", "seconds_per_step")
COUNTED = {"unstable_early": "Unstable early", "diverged": "Diverged"}
APPLIED = 0.02  # relative error of the trained gradient: float32 gives 1e-6, bfloat16 below 1e-2, a wrong term near 1
SAME_DIRECTION = 0.999  # cosine of two gradients that no optimiser tells apart
NOT_APPLIED = "Not applied"
AUDIT_COLUMNS = {
    "Weight": ("weight", ".3g"),
    "Norm": ("norm", ".3g"),
    "Cosine to\ncross entropy": ("cosine_to_ce", ".3f"),
    "Cosine to\nobjective": ("cosine_to_objective", ".3f"),
    "Error of the\ntrained gradient": ("applied_error", ".0e"),
}
AUDIT_CAPTION = (
    "The gradients over parameters at the audited steps, first → last: means over the runs of an arm, and the largest "
    "error, of every step where one is too large. audit.csv of each run has the gradients over logits, too."
)
NO_AUDIT = '<p class="note">No run has kept an audit of its gradients.</p>'


def has_proxy(study: Study) -> bool:
    """Whether a run of the study, not of a control it borrows, reports the proxy."""
    metric = study.final(PROXIES[0])
    return any(arm.results(metric) for arm in study.own_arms) if metric else False


proxy_table = partial(
    measure_table,
    names=PROXIES,
    caption="Mean and 95 % interval over seeds. The unigram model's value is what token frequencies alone give; "
    "centred takes the text's mean embedding away; the tuned temperature was chosen on validation.",
    absent="No run has reported the proxy.",
)
calibration_table = partial(
    measure_table,
    names=("ece", "entropy", "bits_per_byte"),
    caption="Mean and 95 % interval over seeds. Calibration error: mean gap between confidence and accuracy, 15 bins.",
    absent="No run has reported its calibration.",
)
sample_table = partial(
    measure_table,
    names=("samples_repetition", "samples_distinct_2", "samples_similarity", "samples_similarity_shuffled"),
    caption="Of all samples of a run, mean and 95 % interval over seeds. Similarity to another truth is what any text "
    "on the same subject gets: only what lies above it is about this continuation.",
    absent="No run has measured its samples.",
)


def stability_table(study: Study) -> HTML:
    """A line for every arm: gradient spikes, early instability, divergence, seconds a step."""
    columns = {COUNTED[name]: partial(_how_many, name) for name in COUNTED if study.reports(name)}
    columns |= {measure(name).axis: partial(_worst, name) for name in STABILITY if study.reports(name)}
    if not columns:
        return HTML('<p class="note">No run has reported how stable its training was.</p>')
    note = (
        "Mean over runs, and the worst of them. Unstable early: in the first fifth of the steps a gradient norm above "
        "5 × its running median, or training cross entropy more than 0.5 nats above its lowest value so far."
    )
    return arms_table(study, columns, note, counted="Runs")


def _how_many(name: str, arm: Arm) -> str:
    values = arm.results(name)
    return f"{sum(value > 0 for value in values)} of {len(values)}" if values else UNKNOWN


def _worst(name: str, arm: Arm) -> str:
    values, quantity = arm.results(name), measure(name)
    return f"{quantity.number(arm.mean(name))}\n(worst {quantity.number(max(values))})" if values else UNKNOWN


def audit_findings(study: Study) -> HTML:
    """For every arm, whether its objective was applied, and whether it asked for anything cross entropy does not."""
    rows = [(arm, audit_of(arm)) for arm in study.arms]
    rows = [(arm, audit) for arm, audit in rows if len(audit)]
    if not rows:
        return HTML(NO_AUDIT)
    frame = frame_of([{"Arm": arm.label, **finding(audit)} for arm, audit in rows])
    note = (
        "The trained gradient against the textbook's, and the objective's direction against cross entropy's, over "
        "parameters at the start, middle and end of every run; the value shown is the one that says most."
    )
    return table(frame, note, text=("Arm", "Finding"))


def not_applied(study: Study) -> list[str]:
    """Labels of the arms whose audit says that they trained on another gradient than their objective's."""
    audits = [(arm, audit_of(arm)) for arm in study.own_arms]
    return [arm.label for arm, audit in audits if len(audit) and finding(audit)["Finding"].startswith(NOT_APPLIED)]


def finding(audit: pd.DataFrame) -> dict[str, str]:
    """One arm's audit in a sentence, with the three numbers behind it. `audit` is audit.csv of its runs."""
    parameters = audit[audit["space"] == "parameters"]
    objective = parameters[parameters["term"] == "objective"]
    error = float(objective["applied_error"].max(skipna=False))  # nan: a gradient that is none or not finite
    alike, share = float(objective["cosine_to_ce"].min()), soft_share(parameters)
    if not np.isfinite(error):
        told = "Cannot be told: a gradient is not finite."
    elif error > APPLIED:
        told = f"{NOT_APPLIED}: the gradient trained on is not that of the stated objective."
    elif share == 0:
        told = "Applied: plain cross entropy, no other term."
    elif alike >= SAME_DIRECTION:
        told = "Applied, but it asks for nothing else: its gradient points where cross entropy's points."
    else:
        told = "Applied, and it pulls elsewhere than cross entropy: where results are equal, it did nothing."
    return {
        "Finding": told,
        "Error of the\ntrained gradient": f"{error:.1e}",
        "Cosine to cross\nentropy's gradient": UNKNOWN if np.isnan(alike) else f"{alike:.4f}",
        "Share of the\nsoft term": f"{100 * share:.1f} %",
    }


def soft_share(parameters: pd.DataFrame) -> float:
    """The largest share of terms other than cross entropy in the weighted gradient norms, at any audited step."""
    terms = parameters[parameters["term"] != "objective"]
    pull = (terms["weight"] * terms["norm"]).abs()
    soft = pull.where(terms["term"] != "ce", 0.0).groupby([terms["run"], terms["step"]]).sum()
    total = pull.groupby([terms["run"], terms["step"]]).sum()
    share = (soft / total.where(total > 0)).max()
    return float(share) if np.isfinite(share) else 0.0


def audited(study: Study) -> bool:
    """Whether a run of the study has kept an audit of its gradients."""
    return any(len(audit_of(arm)) for arm in study.own_arms)


def audit_table(study: Study) -> HTML:
    """Every term of each arm's objective, in the space of parameters, from the first audited step to the last.

    Logits, and borrowed arms, which stand with their own stage, are left to audit.csv.
    """
    rows = []
    for arm in study.own_arms:
        audit = audit_of(arm)
        if not len(audit):
            continue
        parameters = audit[audit["space"] == "parameters"]
        terms = dict([*parameters.groupby("term", sort=True)])
        if {*terms} == {"ce", "objective"}:
            del terms["ce"]  # it is the objective
        rows.append({"Arm": arm.label, "Term": "\n".join(terms)})
        for title, column in AUDIT_COLUMNS.items():
            rows[-1][title] = "\n".join(_over_steps(own, *column) for own in terms.values())
    return table(frame_of(rows), AUDIT_CAPTION, text=("Arm", "Term")) if rows else HTML(NO_AUDIT)


def _over_steps(own: pd.DataFrame, column: str, spec: str) -> str:
    """A term's mean over runs at each audited step, of its errors the largest; one number where that tells as much."""
    steps = own.groupby("progress")[column]
    values = steps.max(skipna=False) if column == "applied_error" else steps.mean()  # no error is passed over
    if column == "applied_error" and values.max(skipna=False) <= APPLIED:
        return _number(values.max(), spec)
    told = [_number(value, spec) for value in values]
    return " → ".join(told if len({*told}) > 1 else told[:1])


def audit_of(arm: Arm) -> pd.DataFrame:
    """audit.csv of all runs of an arm, with the column run; empty where none has one."""
    frames = [run.audit().assign(run=visible(run.variant)) for run in arm.runs]
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _number(value: float, spec: str) -> str:
    return format(value, spec) if np.isfinite(value) else UNKNOWN
