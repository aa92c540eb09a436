"""What a reader must know first: what is missing, when the questions were asked, which arms learned nothing."""

from __future__ import annotations

from IPython.display import HTML

from nbutils.foundation import escaped
from nbutils.report.diagnostics import not_applied
from nbutils.report.evidence import Evidence, Registered, Study
from nbutils.report.page import code
from nbutils.runs import versions_of_code

CHANGED = "The contrasts were changed since they were first registered: read its verdicts as exploratory."
COUNTED = {
    "unigram": "token frequencies",
    "bigram": "how often one token follows another",
    "trigram": "how often one token follows two others",
}


def contrasts_registered(evidence: Evidence) -> HTML:
    """Since when each plan asks what it asks, and whether that was before its first run began."""
    items = [f"<li>{code(p.name)}: {escaped(_since(p.registered))}</li>" for p in evidence.plans]
    return HTML(f"<ul>{''.join(items)}</ul>" if items else '<p class="note">No plan has runs yet.</p>')


def _since(registered: Registered) -> str:
    if registered.changed:
        return CHANGED
    if not registered.at:
        return "Nothing recorded which contrasts stood when the first run began."
    at, began = (when[:16].replace("T", " ") for when in (registered.at, registered.began))
    told = f"The contrasts and their pairs were registered on {at} (UTC)"
    if not began:
        return f"{told}; no run that they ask about has begun."
    if registered.is_before:
        return f"{told}, before the first run began, {began}."
    return f"{told}, after the first run began, {began}: read its verdicts as exploratory."


def warnings(evidence: Evidence) -> list[str]:
    """Sentences on what a reader must know before believing a comparison."""
    found = [problem for plan in evidence.plans for problem in plan.problems]
    troubled = [slot for slot in evidence.slots if slot.trouble]
    if troubled:
        found.append(
            f"{len(troubled)} of {len(evidence.slots)} planned runs are missing from these numbers; "
            "the section on failed runs names each with its cause."
        )
    late = [plan for plan in evidence.plans if plan.registered.at and not plan.registered.is_before]
    found += [f"Plan {plan.name}: {_since(plan.registered)}" for plan in late]
    for study in evidence.studies:
        runs = [slot.run for slot in study.slots if slot.run and not slot.trouble]
        folders = {run.params.get("data_folder") for run in runs}  # a control of other data is told of by its contrast
        borrowed = [run for arm in study.arms if arm.borrowed_from for run in arm.runs]
        runs += [run for run in borrowed if run.params.get("data_folder") in folders]
        data = {run.manifest.get("data_fingerprint") for run in runs}
        code = versions_of_code(run.manifest for run in runs)
        for what, versions in (("data", len(data)), ("versions of the code", code)):
            if versions > 1:
                found.append(
                    f"The runs of {study.name} used {versions} different {what}: their differences may have "
                    "causes other than the arms. Run the batch again to repeat the outdated ones."
                )
        found += _learned_nothing(study)
        if wrong := not_applied(study):
            found.append(
                f"{study.name}: the gradient audit says that the objective was not applied in {'; '.join(wrong)}. What "
                "these arms show is about a mistake in the code, not about their objective."
            )
    return found


def _learned_nothing(study: Study) -> list[str]:
    """A sentence for each model of counts, on the arms whose cross entropy is no better than its."""
    names: dict[str, list[str]] = {}
    for arm in study.own_arms:
        if floor := arm.floor_not_beaten:
            names.setdefault(floor, []).append(arm.label)
    return [
        f"{study.name}: some runs of {'; '.join(labels)} ended no better than a {floor} model, which knows nothing but "
        f"{COUNTED[floor]}. Differences to such an arm say little about its objective."
        for floor, labels in names.items()
    ]
