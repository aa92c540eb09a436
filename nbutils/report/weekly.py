"""What belongs to a week: the dates it covers, what changed since the last report, and a note written by hand.

Beside each HTML file stands a JSON file of its name with the report's numbers: `<ISO week>.json`, of one plan's report
`<ISO week>-<plan>.json`. The next report compares itself with the newest earlier one. The note is `notes/<ISO week>.md`
in the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from IPython.display import HTML

from nbutils.foundation import LONGEST_PARAGRAPH, escaped, read_json, visible, write_json
from nbutils.report import judging
from nbutils.report.appendix import finished_at
from nbutils.report.evidence import Arm, Evidence, Judged, Study
from nbutils.report.headline import HEADLINE
from nbutils.report.html_export import clean
from nbutils.report.page import code, details, frame_of, table
from nbutils.runs import UNKNOWN, measure

WEEK = re.compile(r"(\d{4})-W(\d{2})")
WEEK_LENGTH = len("2026-W47")
FINISHED = "finished"


def week_of(evidence: Evidence) -> str:
    """The ISO week of the newest usable run, as 2026-W47; empty where there is none."""
    ends = _ends(evidence)
    return f"{datetime.fromisoformat(ends[-1]):%G-W%V}" if ends else ""


def dates(week: str) -> str:
    """The days of an ISO week, "16 to 22 November 2026"; empty where `week` is none."""
    match = WEEK.fullmatch(week)
    try:
        first, last = (date.fromisocalendar(int(match[1]), int(match[2]), day) for day in (1, 7)) if match else ("", "")
    except ValueError:  # there is no week 60
        return ""
    if not match:
        return ""
    start = f"{first.day} {first:%B}" if first.month != last.month else f"{first.day}"
    return f"{start}{f' {first.year}' * (first.year != last.year)} to {last.day} {last:%B %Y}"


def period(evidence: Evidence, week: str = "") -> HTML:
    """The week of the report (that of the newest run unless given), its dates, and how much has run.

    Above it a warning where a run's data are not those its plan asked for.
    """
    ends = _ends(evidence)
    if not ends:
        return HTML("")
    week = week or week_of(evidence)
    plans = ", ".join(plan.name for plan in evidence.plans)
    text = (
        f"Week {week}{f', {dates(week)}' * bool(dates(week))}. {len(ends)} of {len(evidence.slots)} planned runs "
        f"({plans}), finished from {ends[0][:10]} to {ends[-1][:10]}."
    )
    return HTML(fallback_warning(evidence) + f'<p class="lead">{escaped(text, LONGEST_PARAGRAPH)}</p>')


def fallback_warning(evidence: Evidence) -> str:
    """A warning for each fallback data set that was taken, as HTML; empty where none was."""
    cards = [(slot.run, slot.run.data_card()) for slot in evidence.slots if slot.run]
    taken = dict.fromkeys((run.plan, str(card["fallback_taken"])) for run, card in cards if card.get("fallback_taken"))
    sentences = (
        f"<p><strong>Another data set than planned.</strong> Plan {code(plan)}: {escaped(what)}</p>"
        for plan, what in taken
    )
    return f'<div class="warning">{"".join(sentences)}</div>' if taken else ""


def summary(evidence: Evidence, week: str) -> dict[str, Any]:
    """A report's numbers, ready for JSON: every run's state, every arm's means, every verdict."""
    runs = {
        f"{plan.name}/{slot.variant}": {
            "state": slot.trouble or FINISHED,
            "finished": finished_at(slot.run) if slot.run and not slot.trouble else None,
        }
        for plan in evidence.plans
        for slot in plan.slots
    }
    arms = {
        study.name: {arm.label: _means(study, arm) for arm in study.own_arms if arm.runs}
        for study in [*evidence.studies, *evidence.teachers]
    }
    judged = [(study.plan, each) for study in evidence.studies for each in study.judged]
    verdicts = {f"{plan}: {each.contrast.name}": _verdict(each) for plan, each in judged}
    return {"week": week, "runs": runs, "arms": arms, "verdicts": verdicts}


def write_summary(evidence: Evidence, folder: Path, week: str, name: str = "") -> Path:
    """Write `<name>.json`, or `<week>.json`, in `folder`, for the reports to come; returns its path."""
    path = folder / f"{name or week}.json"
    write_json(path, summary(evidence, week))
    return path


def since_last(evidence: Evidence, folder: Path, week: str = "", plan: str = "") -> HTML:
    """What is new, repeated, failed or decided otherwise than in the newest earlier report in `folder`.

    plan: given where the report is of one plan, by name or file: what else an earlier one has is passed over.
    """
    week = week or week_of(evidence)
    earlier = _newest_before(folder, week, evidence.plans[0].name if plan and evidence.plans else "")
    if earlier is None:
        return HTML('<p class="note">There is no earlier report to compare with.</p>')
    now = summary(evidence, week)
    then_runs, runs = _records(earlier, "runs"), now["runs"]
    done = {name for name, run in runs.items() if run["state"] == FINISHED}
    done_then = {name for name, run in then_runs.items() if run.get("state") == FINISHED}
    failed = {name for name in runs.keys() - done if runs[name]["state"] != "not run yet"}
    told = {
        "new": done - done_then,
        "made again": {n for n in done & done_then if runs[n]["finished"] != then_runs[n].get("finished")},
        "failed": {name for name in failed if then_runs.get(name, {}).get("state") != runs[name]["state"]},
        "gone": done_then - done - failed,
    }
    counts = ", ".join(f"{len(names)} {what}" for what, names in told.items() if names) or "none new, none failed"
    parts = [f"<p>Runs since the report of week {escaped(earlier.get('week'))}: {counts}.</p>"]
    for what, names in told.items():
        if names:
            parts.append(details(f"Runs {what}", f"<p>{', '.join(map(escaped, sorted(names)))}</p>"))
    rows = [*_changed_verdicts(_records(earlier, "verdicts"), now["verdicts"])]
    rows += _changed_means(_records(earlier, "arms"), now["arms"])
    if rows:
        parts.append(table(frame_of(rows), "What reads otherwise than then.", text=("What", "Measure")).data)
    else:
        parts.append("<p>Every verdict and every mean that both reports have is the same.</p>")
    return HTML("".join(parts))


def note(folder: Path, week: str) -> HTML:
    """The note for `week`, `notes/<week>.md` in `folder`, as cleaned HTML; or where to write one."""
    path = folder / "notes" / f"{week}.md"
    if not WEEK.fullmatch(week) or not path.is_file():
        return HTML(f'<p class="note">No note for this week; one in {code(f"notes/{week}.md")} would stand here.</p>')
    return HTML(_rendered(path.read_text(encoding="utf-8", errors="replace")))


def _rendered(markdown: str) -> str:
    """Markdown as HTML on the report's allow-list, its headings below those of the report."""
    from nbconvert.filters.markdown_mistune import InvalidNotebook, IPythonRenderer, MarkdownWithMath

    markdown, renderer = visible(markdown), IPythonRenderer(escape=False, exclude_anchor_links=True)
    try:
        page = clean(MarkdownWithMath(renderer=renderer).render(markdown))
    except InvalidNotebook:  # it shows a picture kept in a notebook's cell, which a file has not
        page = f"<pre>{escaped(markdown, len(markdown))}</pre>"
    return re.sub(r"<(/?)h[1-4]>", r"<\1h4>", page)


def _ends(evidence: Evidence) -> list[str]:
    """When the usable runs ended, the newest last."""
    runs = [slot.run for slot in evidence.slots if slot.run and not slot.trouble]
    return sorted(filter(None, map(finished_at, runs)))


def _newest_before(folder: Path, week: str, plan: str) -> dict[str, Any] | None:
    """The newest summary of an earlier week that can be read; of `plan`, where given, that plan's runs in it."""
    files = [path for path in folder.glob("*.json") if WEEK.fullmatch(path.stem.removesuffix(f"-{plan}"))]
    for path in sorted([path for path in files if path.stem[:WEEK_LENGTH] < week], key=lambda path: path.stem)[::-1]:
        try:
            content = read_json(path)
        except (OSError, ValueError):  # cut or edited by hand: the one before it will do
            continue
        if not isinstance(content, dict):
            continue
        if not plan:
            return content
        runs = {name: run for name, run in _records(content, "runs").items() if name.startswith(f"{plan}/")}
        if runs:
            return content | {"runs": runs}
    return None


def _records(content: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The mappings by name in `content[name]`; what an edit by hand made of others is left out."""
    found = content.get(name)
    return {key: each for key, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def _means(study: Study, arm: Arm) -> dict[str, float]:
    """An arm's mean in every headline measure, and in what contrasts ask about."""
    metrics = [metric for metric in map(study.final, HEADLINE) if metric]
    metrics += [each.contrast.metric for each in study.judged]
    return {metric: arm.mean(metric) for metric in dict.fromkeys(metrics) if arm.results(metric)}


def _verdict(judged: Judged) -> dict[str, Any]:
    """A verdict's numbers, by name."""
    verdict = judged.verdict
    numbers = {name: getattr(verdict, name) for name in ("difference", "low", "high", "p_value", "pairs")}
    return {"outcome": verdict.outcome, "metric": judged.contrast.metric, **numbers}


def _changed_verdicts(then: dict, now: dict) -> Iterable[dict[str, str]]:
    """Rows for contrasts that are judged otherwise, or for the first time."""
    for name, verdict in now.items():
        before = then.get(name, {}).get("outcome", UNKNOWN)
        if before != verdict["outcome"] and {before, verdict["outcome"]} != {UNKNOWN, judging.NOT_JUDGED}:
            yield {"What": name, "Measure": "verdict", "Then": before, "Now": verdict["outcome"], "Δ": ""}


def _changed_means(then: dict, now: dict) -> Iterable[dict[str, str]]:
    """Rows for means that both reports have and that differ as written."""
    for study, arms in now.items():
        for arm, means in arms.items():
            for metric, value in means.items():
                before, quantity = _records(then, study).get(arm, {}).get(metric), measure(metric)
                if isinstance(before, int | float) and quantity.number(before) != quantity.number(value):
                    yield {
                        "What": f"{study}, {arm}",
                        "Measure": quantity.axis,
                        "Then": quantity.number(before),
                        "Now": quantity.number(value),
                        "Δ": quantity.difference(value - before),
                    }
