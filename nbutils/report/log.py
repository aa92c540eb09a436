"""The results log for people, `results.md` beside the report, and for programs, `metrics.json` beside the runs.

    write_log(evidence, Path("reports"))     # reports/results.md
    write_metrics(evidence)                  # runs/<plan>/metrics.json, one a plan

Both hold only what the runs left behind: the same runs give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbutils.foundation import LONGEST_PARAGRAPH, LONGEST_TEXT, atomic_write, shortened, visible, write_json
from nbutils.report import judging, statistics
from nbutils.report.arms import mean_of, number
from nbutils.report.evidence import Arm, Evidence, PlanEvidence, Slot, Study, is_folder_name
from nbutils.report.headline import shared_results
from nbutils.report.studies.mixing import MIXING, NEITHER, TRADE_OFF, UNDECIDED, WIN, composite, mixes
from nbutils.report.studies.registry import described
from nbutils.report.studies.rounds import WORDS
from nbutils.report.studies.teachers import no_better
from nbutils.report.tables import exploratory_lines
from nbutils.report.weekly import summary
from nbutils.runs import UNKNOWN, Measure, measure

LOG = "results.md"
METRICS = "metrics.json"
SPLITS = {"Eval": "eval_", "Test": "test_"}
OTHERS = {"Before fine-tuning": "before_", "Teacher": "teacher_"}  # of the runs that have them
COMPARED = (
    "perplexity",
    "ce_loss",
    "unsmoothed_bits_per_byte",
    "token_acc",
    "cosine",
    "kl_to_teacher",
    "agreement",
    "bleu",
    "corpus_bleu",
    "chrf",
    "judge_score",
    "second_judge_score",
    "story_judge_score",
    "story_second_judge_score",
)
NO_CONTRAST = "Nothing to conclude: no contrast was planned. Next: write the question down, then run."
CONCLUSIONS = {
    WIN: "Pursue: an arm is a win under the study's rule. Next: the same contrasts with a larger model or other data.",
    TRADE_OFF: "Pursue only where the proxy counts more than the perplexity given up for it. Next: smaller weights.",
    UNDECIDED: "Not decided. Next: more pairs, registered before they run and judged more strictly; no other arm yet.",
    judging.INTERIM: "Not decided: registered pairs are not in yet. Next: those, and nothing else.",
    judging.SUPPORTED: "Pursue: the contrast holds. Next: the same with a larger model or other data.",
    judging.TOO_SMALL: "Do not pursue: the gain is real and smaller than what would matter. Next: another target.",
    judging.NOT_SUPPORTED: "Do not pursue this setting. Next: another target or another weight, or none.",
    NEITHER: "Do not pursue these settings: no arm is a win or a trade-off. Next: another target, or none.",
}
# Signs that markdown or HTML act on, and what readers make links of.
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$!&@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
USUAL_NAME = re.compile(r"\w+", re.ASCII)


def write_log(evidence: Evidence, folder: Path, name: str = LOG) -> Path:
    """Write results.md in `folder`, or under another name; returns its path."""
    atomic_write(folder / name, results_log(evidence))
    return folder / name


def write_metrics(evidence: Evidence) -> list[Path]:
    """Write metrics.json into the folder of every plan that has runs; returns the paths."""
    paths = []
    for plan in evidence.plans:
        folder = evidence.folder / plan.name
        if is_folder_name(plan.name) and folder.is_dir():
            write_json(folder / METRICS, plan_metrics(evidence, plan))
            paths.append(folder / METRICS)
    return paths


def plan_metrics(evidence: Evidence, plan: PlanEvidence) -> dict[str, Any]:
    """A plan's numbers, ready for JSON: results by run, means by arm, verdicts, and the rule's outcomes."""
    told = summary(Evidence(evidence.folder, (plan,)), "")
    usable = {slot.variant: slot.run for slot in plan.slots if slot.run and not slot.trouble}
    return {
        "plan": plan.name,
        "runs": {name: {"matrix": run.matrix, "result": run.result} for name, run in usable.items()},
        "missing": {slot.variant: slot.trouble for slot in plan.slots if slot.trouble},
        "arms": told["arms"],
        "verdicts": told["verdicts"],
        "composite": {study.name: {each.arm.label: each.result for each in composite(study)} for study in plan.studies},
    }


def results_log(evidence: Evidence) -> str:
    """The whole log as markdown: a section a run, then for each study the comparisons, observations, a conclusion."""
    parts = ["# Results", "", "Written by `python -m nbutils report` from the run folders; do not edit.", ""]
    for plan in evidence.plans:
        for study in plan.teachers:
            parts += _run_sections(plan, study)
        for study in plan.studies:
            parts += _run_sections(plan, study)
            parts += [*_comparison(study), *_observations(study), *_conclusion(study)]
    if len(parts) == 4:
        parts.append("There are no finished runs yet.")
    return visible("\n".join(parts).rstrip() + "\n")


def text(value: object, longest: int = LONGEST_TEXT) -> str:
    """`value` for a line of markdown: short, no line breaks, nothing that markdown or HTML would act on."""
    return MARKDOWN.sub(r"\\\1", shortened(visible(" ".join(str(value)[: 2 * longest].split())), longest))


def _run_sections(plan: PlanEvidence, study: Study) -> list[str]:
    usable = [slot for slot in study.slots if slot.run and not slot.trouble]
    return [line for slot in usable for line in _run_section(plan, slot)]


def _run_section(plan: PlanEvidence, slot: Slot) -> list[str]:
    """One run, in the form the study has kept its runs from the start."""
    run, card = slot.run, slot.run.data_card()
    config, params, result = card.get("config", {}), run.params, run.result
    dataset = " / ".join(text(config[name]) for name in ("dataset_name", "dataset_config_name") if config.get(name))
    field = f" (field: {text(config['text_field'])})" if config.get("text_field") else ""
    batch = "/".join(_value(params, f"per_device_{which}_batch_size") for which in ("train", "eval"))
    lines = [
        f"## Run: {text(f'runs/{plan.name}/{run.variant}')}",
        f"- Model: {_value(params, 'model_name')}",
        f"- Dataset: {dataset or text(card.get('dataset_name', UNKNOWN))}{field}",
        f"- Block size: {text(card.get('block_size', UNKNOWN))} | {_objective(params)}",
        f"- Train steps: {text(result.get('steps', UNKNOWN))} | Epochs: {_value(params, 'num_train_epochs')} | "
        f"LR: {_value(params, 'learning_rate')} | BS train/eval: {batch}",
        f"- Seed: {_value(params, 'seed')}",
    ]
    if card.get("fallback_taken"):
        lines.append(f"- Another data set than planned: {text(card['fallback_taken'])}")
    for title, prefix in (SPLITS | OTHERS).items():
        names = [name for name in result if name.startswith(prefix) and name not in WORDS]
        if names or title in SPLITS:
            numbers = ", ".join(f'"{_name(name)}": {json.dumps(_plain(result[name]))}' for name in names)
            lines.append(f"- {title} metrics: {{{numbers}}}")
    if words := [
        f"{measure(name).label} {measure(name).number(number(result[name]))}" for name in WORDS if name in result
    ]:
        lines.append(f"- Words: {'; '.join(words)}")
    return [*lines, ""]


def _objective(params: dict[str, Any]) -> str:
    """The settings of a run's objective."""
    if "expected_before" in params:
        return "Fine-tuned as a teacher"
    told = (described(params) or MIXING).settings(params)
    return " | ".join(f"{title}: {text(value)}" for title, value in told.items())


def _value(params: dict[str, Any], name: str) -> str:
    return text(params.get(name, UNKNOWN))


def _name(name: str) -> str:
    """A result's name in a JSON string; marked off, last of all, where it is none that a notebook of ours gives."""
    return name if USUAL_NAME.fullmatch(name) else text(json.dumps(name, ensure_ascii=False)[1:-1])


def _plain(value: object) -> float | None:
    """A result for JSON; None where it is no finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _comparison(study: Study) -> list[str]:
    """Each arm against the control: means, seed-paired differences, and a takeaway from the intervals alone."""
    lines = []
    for arm in study.arms:
        if study.control is None or arm is study.control or not arm.runs:
            continue
        lines.append(f"## {text(study.name)}: {text(arm.label)} against {text(study.control.label)}")
        for metric in (f"{prefix}{name}" for prefix in ("eval_", "test_") for name in COMPARED):
            if arm.results(metric) and study.control.results(metric):
                lines.append(_compared(study, arm, metric))
        lines += [f"- Takeaway: {_takeaway(study, arm)}", ""]
    return lines


def _compared(study: Study, arm: Arm, metric: str) -> str:
    """Both means and the difference with its 95 % interval."""
    quantity = measure(metric)
    ours = quantity.number(mean_of(shared_results(study, arm, metric), quantity))
    of_arm = replace(study, control=arm)
    theirs = quantity.number(mean_of(shared_results(of_arm, study.control, metric), quantity))
    paired, interval = exploratory_lines(study, arm, metric)
    pairs = len(study.differences(arm, metric))
    return f"- {quantity.axis}: control {theirs}, arm {ours} (Δ = {paired}, 95 % {interval}, {pairs} seed pairs)"


def _takeaway(study: Study, arm: Arm) -> str:
    """What the seed-paired intervals support, and no more."""
    result = next((each.result for each in composite(study) if each.arm is arm), None)
    metric = study.final("ce_loss")
    differences = study.differences(arm, metric) if metric else []
    if len(differences) < 2:
        return f"{len(differences)} seed pairs support no statement on a difference; an interval needs 2."
    low, high = statistics.mean_interval(differences)
    quantity = measure(metric)
    if low > 0 or high < 0:
        told = f"{quantity.label} is {'higher' if low > 0 else 'lower'} in this arm"
    else:
        detectable = statistics.minimum_detectable_effect(differences)
        told = f"no difference in {quantity.label} was seen; {_with_unit(quantity, detectable)} would have been"
    rule = f"; under the study's rule: {result}" if result else ""
    planned = "" if study.asked(arm, metric) else " (exploratory)"
    return f"{told[0].upper()}{told[1:]}{planned}{rule}."


def _with_unit(quantity: Measure, value: float) -> str:
    return f"{quantity.number(value)} {quantity.difference_unit}".rstrip()


def _observations(study: Study) -> list[str]:
    """A line for each planned contrast: the verdict and the numbers it was read from."""
    return [f"## {text(study.name)}: Observations", *_observed(study), ""]


def _observed(study: Study) -> Iterator[str]:
    if not study.judged:
        yield "- No contrast was planned, so every difference is exploratory."
    for judged in study.judged:
        verdict, quantity = judged.verdict, measure(judged.contrast.metric)
        numbers = ""
        told = "".join(f" {text(each, LONGEST_PARAGRAPH)}" for each in no_better(judged, study))
        if verdict.outcome != judging.NOT_JUDGED and verdict.pairs:
            interval = quantity.difference_interval(verdict.low, verdict.high)
            difference = f"{quantity.difference(verdict.difference)} {interval}"
            detectable = _with_unit(quantity, verdict.minimum_detectable)
            numbers = (
                f" {text(quantity.label)}, Δ = {difference} at level {verdict.alpha:.3g}, {verdict.pairs} of "
                f"{verdict.planned} planned seed pairs, detectable {detectable}."
            )
        numbers += f" {text(verdict.note, LONGEST_PARAGRAPH)}" * bool(verdict.note)
        primary = " (primary)" * judged.contrast.primary
        yield f"- {verdict.outcome.capitalize()}{primary}: {text(judged.contrast.question)}{numbers}{told}"


def _conclusion(study: Study) -> list[str]:
    """Pursue or not, and what next: the rule's best outcome among the arms asked about, if the primary contrast holds.

    Where the primary contrast could not be seen nothing is decided; where it is refuted an arm cannot be called a win.
    Of a study that the rule is not made for, its foremost contrast decides.
    """
    title = f"## {text(study.name)}: Conclusion"
    if not study.judged:
        return [title, f"- {NO_CONTRAST}", ""]
    asked = [study.sides(judged.contrast)[0] for judged in study.judged]
    results = {each.result for each in composite(study) if each.arm in asked}
    best = next((result for result in (WIN, TRADE_OFF, UNDECIDED, NEITHER) if result in results), UNDECIDED)
    primary = next((judged.verdict.outcome for judged in study.judged if judged.contrast.primary), None)
    if not mixes(study):
        foremost = study.judged[0]  # the primary one where the study has it
        best = foremost.verdict.outcome if foremost.verdict.outcome in CONCLUSIONS else UNDECIDED
        told = f" The contrast {text(foremost.contrast.name)}: {foremost.verdict.outcome}."
        return [title, f"- {CONCLUSIONS[best]}{told}", ""]
    if primary in (judging.UNDECIDED, judging.INTERIM, judging.NOT_JUDGED):
        best = judging.INTERIM if primary == judging.INTERIM else UNDECIDED
    elif primary == judging.NOT_SUPPORTED and best == WIN:
        best = TRADE_OFF
    told = f" The primary contrast: {primary}." if primary else ""
    return [title, f"- {CONCLUSIONS[best]}{told}", ""]
