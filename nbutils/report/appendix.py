"""The evidence behind a report: what failed and why, samples side by side, and what every run was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from IPython.display import HTML

from nbutils.foundation import escaped
from nbutils.report.evidence import Arm, Evidence, Study
from nbutils.report.page import by_study, details, frame_of, more_arms, name_of, side_by_side, stacked, table
from nbutils.runs import UNKNOWN

if TYPE_CHECKING:
    from nbutils.runs import Run

SAMPLES, FEWER = 5, 2  # prompts shown of one study, and of each of several
LONGEST_SAMPLE = 300  # characters of a continuation
SAMPLE_MEASURES = ("repetition", "similarity")  # of one sample; the table below has more, of all
AS_TRAINED = "as trained"  # the sampler that every run has; a run with one alone may not name it
SAMPLE_ARMS = 4  # columns that a page can hold
SHORT = 12  # characters of a hash: enough to find the run again
RUNS_CAPTION = "Hashes are cut to twelve characters; manifest.json has them whole."
PACKAGES = ("python", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy", "pandas", "papermill")


def failed_runs(evidence: Evidence) -> HTML:
    """Every planned run without a usable result and every failed later attempt, with cause and failing cell."""
    rows, absent, unplanned = [], [], []
    for plan in evidence.plans:
        for slot in plan.slots:
            if slot.run is None:
                absent.append(f"{plan.name}/{slot.variant}")
            elif slot.trouble:
                rows.append(_failure(slot.run.manifest, slot.trouble))
            elif slot.run.newer:
                later = slot.run.newer
                rows.append(_failure(later, f"{later['status']}; the earlier finished result stands"))
        unplanned += [f"{plan.name}/{run.variant}" for run in plan.unplanned]
    parts = []
    if rows:
        parts.append(table(frame_of(rows), "The cell is the one that raised the error.", text=rows[0]).data)
    parts += _named("planned runs have not been made yet", absent)
    parts += _named("runs in the folder are not in their plan and were left out", unplanned)
    return HTML("".join(parts) or "<p>None: every planned run finished.</p>")


def _failure(manifest: dict[str, Any], trouble: str) -> dict[str, str]:
    """One row of the table of failures."""
    error = manifest.get("error") or {}
    cause = ": ".join(str(error[key]) for key in ("type", "message") if error.get(key)) or UNKNOWN
    cell = error.get("cell")
    return {
        "Run": f"{manifest['plan']}/{manifest['variant']}",
        "What happened": trouble,
        "Cause": cause,
        "Cell": UNKNOWN if cell is None else str(cell),
        "Exit code": UNKNOWN if manifest.get("exit_code") is None else str(manifest["exit_code"]),
        "Attempts": str(len(manifest.get("attempts", []))),
    }


def _named(what: str, names: Sequence[str]) -> list[str]:
    """How many runs, their names to be opened."""
    if not names:
        return []
    return [details(f"{len(names)} {what}", f"<p>{', '.join(map(escaped, names))}</p>")]


def all_samples(evidence: Evidence) -> HTML:
    """`samples` of each study, of fewer prompts where there are several."""
    shown = SAMPLES if len(evidence.studies) == 1 else FEWER
    return by_study(evidence, lambda study: samples(study, shown))


def samples(study: Study, shown: int = SAMPLES) -> HTML:
    """The same prompts continued by every arm, beside the true continuation; of each arm the run with the first seed.

    A rule picks the prompts, no hand. Where similarity to the true continuation was measured: those that all arms
    continue most paraphrase-like, close in meaning and with few words of the truth; else the first that all share.
    """
    arms = _sampled_arms(study)
    texts = {arm.label: {s["prompt"]: s for s in _as_trained(arm)} for arm in arms}
    shared = [prompt for prompt in next(iter(texts.values()), {}) if all(prompt in own for own in texts.values())]
    if not shared:
        return HTML("<p>No prompt was continued by every arm.</p>")
    likeness = {prompt: [_paraphrase(own[prompt]) for own in texts.values()] for prompt in shared}
    measured = all(None not in values for values in likeness.values())
    if measured:
        shared.sort(key=lambda prompt: -sum(likeness[prompt]))
    rows = []
    for prompt in shared[:shown]:
        first = next(iter(texts.values()))[prompt]
        cells = [_escaped(own[prompt]["completion"]) + _told(own[prompt]) for own in texts.values()]
        rows.append((str(prompt), [_escaped(first["reference"]), *cells]))
    left_out = sum(bool(arm.runs) for arm in study.arms) - len(arms)
    rule = "closest in meaning to the truth with the fewest of its words" if measured else "the first all arms share"
    caption = (
        f"Shaded: the prompt, from the validation split, {rule}. One run an arm, the one with its first seed."
        f"{more_arms(left_out, 'not shown')} Repetition: share of word pairs that came before."
    )
    return side_by_side(["True continuation", *texts], rows, caption)


def _as_trained(arm: Arm) -> list[dict[str, Any]]:
    """What an arm's first run wrote as it was trained; un-smoothed samples have a section of their own."""
    return [sample for sample in arm.runs[0].samples() if sample.get("sampler", AS_TRAINED) == AS_TRAINED]


def _escaped(value: object) -> str:
    return escaped(str(value).strip(), LONGEST_SAMPLE)


def _told(sample: dict[str, Any]) -> str:
    """What was measured of a sample, in small print; empty where nothing was."""
    found = [f"{name.replace('_', '-')} {_share(sample[name])}" for name in SAMPLE_MEASURES if name in sample]
    return f"<br><small>{escaped(', '.join(found))}</small>" if found else ""


def _share(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else UNKNOWN


def _paraphrase(sample: dict[str, Any]) -> float | None:
    """Similarity in meaning less the share of the truth's words that recur; None where it was not measured."""
    similarity = sample.get("similarity")
    if not isinstance(similarity, int | float):
        return None
    truth, said = (set(str(sample[name]).lower().split()) for name in ("reference", "completion"))
    return similarity - len(truth & said) / max(1, len(truth))


def _sampled_arms(study: Study) -> list[Arm]:
    """The arms with samples that fit on a page: the control, then those a contrast asks about, then the others."""
    sampled = tuple(arm for arm in study.arms if arm.runs and arm.runs[0].samples())
    control = study.control if study.control in sampled else None
    return list(replace(study, arms=sampled, control=control).foremost(SAMPLE_ARMS).arms)


def manifest(evidence: Evidence) -> HTML:
    """What the runs were made from and on: what all share, then what those of a stage share, then a row a run."""
    runs = [slot.run for slot in evidence.slots if slot.run]
    if not runs:
        return HTML("<p>No runs.</p>")
    shared, parts = _alike(runs), []
    if shared:
        common = frame_of([{"Fact": name, "Value": _facts(runs[0])[name]} for name in shared])
        all_alike = table(common, "The same for every run.", text=common.columns)
        parts.append(details(f"What all {len(runs)} runs share", all_alike.data))
    parts.append(details(f"{len(runs)} runs, one by one", _one_by_one(evidence, shared).data))
    parts.append(details("Parameters", _parameters(evidence).data))
    return HTML("".join(parts))


def _one_by_one(evidence: Evidence, shared: Sequence[str]) -> HTML:
    """A row a stage with what all its runs have in common and not all runs have, then a row a run with the rest."""
    several, stages = len(evidence.plans) > 1, {}
    for slot in (slot for slot in evidence.slots if slot.run):
        stages.setdefault(f"{slot.run.plan}/{slot.stage}" if several else slot.stage, []).append(slot.run)
    alike = [_alike(runs) for runs in stages.values()]
    own = [name for name in _facts(next(iter(stages.values()))[0]) if not all(name in found for found in alike)]
    rows = [
        {"Run": f"{run.plan}/{run.variant}" if several else run.variant} | {name: _facts(run)[name] for name in own}
        for runs in stages.values()
        for run in runs
    ]
    each = table(frame_of(rows), RUNS_CAPTION, text=rows[0])
    between = [name for name in alike[0] if name not in {*shared, *own}]
    rows = [{"Stage": stage} | {name: _facts(runs[0])[name] for name in between} for stage, runs in stages.items()]
    return stacked(table(frame_of(rows), "What all runs of a stage share.", text=rows[0]) if between else None, each)


def _alike(runs: Sequence[Run]) -> list[str]:
    """The facts that all runs share, hashes whole."""
    first, *others = (_facts(run, None) for run in runs)
    return [name for name, value in first.items() if all(other[name] == value for other in others)]


def _facts(run: Run, characters: int | None = SHORT) -> dict[str, str]:
    """What identifies a run and its surroundings, as text, with so many characters of each hash."""
    content = run.manifest
    source, machine = content.get("source", {}), content.get("hardware", {})
    attempts = content.get("attempts", [])
    packages = content.get("packages", {})
    commit = str(source.get("git_commit") or UNKNOWN)[:characters]
    return {
        "Notebook": run.notebook.split("/")[-1].removesuffix(".ipynb"),
        "Status": run.status,
        "Key": run.key[:characters],
        "Data": str(content.get("data_fingerprint") or UNKNOWN)[:characters],
        "Commit": commit + (" with changes" if source.get("git_dirty") else ""),
        "Code": str(source.get("nbutils_sha256") or UNKNOWN)[:characters],
        "Finished (UTC)": finished_at(run)[:16].replace("T", " ") or UNKNOWN,
        "Minutes": _minutes(attempts[-1]) if attempts else UNKNOWN,
        "Attempts": str(len(attempts)),
        "Machine": ", ".join([*_machine(machine), *machine.get("gpus", [])]) or UNKNOWN,
        "Packages": ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages) or UNKNOWN,
    }


def _machine(machine: dict[str, Any]) -> list[str]:
    """Processor, cores in use and memory."""
    found = [str(machine[key]) for key in ("machine", "processor") if machine.get(key)]
    found += [f"{machine['cores']} cores"] if machine.get("cores") else []
    return found + ([f"{machine['memory_gib']} GiB"] if machine.get("memory_gib") else [])


def finished_at(run: Run) -> str:
    """When the last attempt ended, ISO 8601 in UTC; empty where it has not."""
    attempts = run.manifest.get("attempts") or [{}]
    return attempts[-1].get("end") or ""


def _minutes(attempt: dict[str, Any]) -> str:
    """How long an attempt took, start-up included."""
    if not (attempt.get("start") and attempt.get("end")):
        return UNKNOWN
    taken = datetime.fromisoformat(attempt["end"]) - datetime.fromisoformat(attempt["start"])
    return f"{taken.total_seconds() / 60:.1f}"


def _parameters(evidence: Evidence) -> HTML:
    """Every parameter: the value of most stages, below it each other value with the stages that have it."""
    stages = {name_of(study, evidence): _values(study) for study in [*evidence.studies, *evidence.teachers]}
    rows = []
    for name in dict.fromkeys(name for own in stages.values() for name in own):
        found: dict[str, list[str]] = {}
        for stage, own in stages.items():
            if name in own:
                found.setdefault(own[name], []).append(stage)
        (most, _), *others = sorted(found.items(), key=lambda pair: -len(pair[1]))
        rows.append({"Parameter": name, "Value": most, "Otherwise in": ""})
        rows += [{"Parameter": "", "Value": value, "Otherwise in": ", ".join(at)} for value, at in others]
    if not rows:
        return HTML("<p>No runs.</p>")
    frame = frame_of(rows)
    frame = frame if frame["Otherwise in"].any() else frame.drop(columns="Otherwise in")
    return table(
        frame, "As resolved: defaults, then the plan's values. Of several, that of most stages first.", text=frame
    )


def _values(study: Study) -> dict[str, str]:
    """A stage's parameters, each with its value, or all its values where the matrix varies it."""
    runs = [slot.run for slot in study.slots if slot.run]
    names = dict.fromkeys(name for run in runs for name in run.params)
    return {name: ", ".join(dict.fromkeys(str(run.params.get(name, UNKNOWN)) for run in runs)) for name in names}
