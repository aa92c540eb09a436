"""What can be put beside something else: a report by the numbers it left, or the runs of a plan or of several.

read_side(Path("reports/2026-W46.html"))    its numbers are in reports/2026-W46.json
read_side(Path("runs/quick"))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbutils.batch import listed
from nbutils.foundation import MANIFEST, WorkbookError, read_json, relative, resolve, typed
from nbutils.report.evidence import Arm, Evidence, Judged, gather
from nbutils.report.html_export import ReportError
from nbutils.report.weekly import FINISHED, summary
from nbutils.runs import ATTEMPTS, INTERACTIVE, PLAN_FILE, Manifest, load_runs

WHAT_FITS = (
    "Give a report (reports/<week>.html or .json), a plan's folder of runs (runs/<plan>), or one of plans (runs)."
)
LONGEST_PLANS = 40  # characters of their names in a line
RUN, ARM, VERDICT = "{}/", "{}-", "{}: "  # how the plan begins a name among a report's numbers


@dataclass(frozen=True)
class Side:
    """One of two things to compare: `numbers` as in a report's JSON, `evidence` what runs show, None of a report.

    left_out: the one plan whose name is left out of all names, as two sides may call it otherwise.
    """

    path: Path
    numbers: Mapping[str, Any]
    evidence: Evidence | None = None
    left_out: str = ""

    @property
    def name(self) -> str:
        """A short name: the report's week, or the folder's name."""
        return self.path.name if self.evidence else self.path.stem

    @property
    def plans(self) -> list[str]:
        """The names of its plans."""
        return list(dict.fromkeys(name.split("/", 1)[0] for name in self.numbers["runs"]))

    @property
    def runs(self) -> dict[str, str]:
        """The state of every planned run, by name."""
        return {self._short(RUN, name): str(run.get("state")) for name, run in self.numbers["runs"].items()}

    @property
    def finished(self) -> list[str]:
        """The names of the runs whose numbers count."""
        return [name for name, state in self.runs.items() if state == FINISHED]

    @property
    def means(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Every arm's means, by study, arm and measure."""
        return {self._short(ARM, study): arms for study, arms in self.numbers["arms"].items()}

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        """The numbers of every planned contrast's verdict, by the contrast."""
        return {self._short(VERDICT, name): verdict for name, verdict in self.numbers["verdicts"].items()}

    @property
    def arms(self) -> dict[tuple[str, str], Arm]:
        """The arms themselves, by study and arm; of a report none."""
        studies = [*self.evidence.studies, *self.evidence.teachers] if self.evidence else []
        return {(self._short(ARM, study.name), arm.label): arm for study in studies for arm in study.own_arms}

    @property
    def judged(self) -> dict[str, Judged]:
        """The planned contrasts themselves, as in `verdicts`; of a report none."""
        studies = self.evidence.studies if self.evidence else []
        named = [(f"{study.plan}: {each.contrast.name}", each) for study in studies for each in study.judged]
        return {self._short(VERDICT, name): each for name, each in named}

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The records of the runs whose numbers count, by name; of a report none."""
        slots = [(plan.name, slot) for plan in self.evidence.plans for slot in plan.slots] if self.evidence else []
        usable = [(f"{plan}/{slot.variant}", slot.run) for plan, slot in slots if slot.run and not slot.trouble]
        return {self._short(RUN, name): run.manifest for name, run in usable}

    def told(self) -> str:
        """What it is, in a line."""
        what = "runs of" if self.evidence else f"report of week {self.numbers['week']}, of"
        plans = listed(self.plans, LONGEST_PLANS) or "no plan"
        return f"{relative(self.path)}: {what} {plans}; {len(self.finished)} of {len(self.runs)} runs finished"

    def _short(self, kind: str, name: str) -> str:
        return name.removeprefix(kind.format(self.left_out)) if self.left_out else name


def read_sides(first: Path, second: Path) -> tuple[Side, Side]:
    """Both sides. Raises ReportError where one is nothing that can be compared, or both are the same."""
    sides = read_side(first), read_side(second)
    if sides[0].path == sides[1].path:
        raise ReportError(f"Both sides are {relative(sides[0].path)}. Name two different ones.")
    if all(len(side.plans) == 1 for side in sides):
        return replace(sides[0], left_out=sides[0].plans[0]), replace(sides[1], left_out=sides[1].plans[0])
    return sides


def read_side(path: Path) -> Side:
    """One side, from here or from the repository's root. Raises ReportError where it is none."""
    path = next((each for each in (typed(path), resolve(path)) if each.exists()), typed(path))
    if path.is_dir():
        return _of_runs(path)
    if not path.exists():
        raise ReportError(f"There is no {relative(path)}. {WHAT_FITS}")
    if path.suffix not in (".html", ".json"):
        raise ReportError(f"{relative(path)} is neither a report nor a folder of runs. {WHAT_FITS}")
    return _of_report(path)


def _of_report(path: Path) -> Side:
    numbers = path.with_suffix(".json")
    if not numbers.is_file():
        raise ReportError(
            f"{relative(path)} has no numbers beside it: {numbers.name} is not there. Make the report again "
            "(python -m nbutils report), or compare the folders of its runs."
        )
    try:
        content = read_json(numbers)
    except (OSError, ValueError) as error:
        raise ReportError(f"{relative(numbers)} cannot be read ({error}). Make the report again.") from None
    if not _is_summary(content):
        raise ReportError(f"{relative(numbers)} does not hold the numbers of a report. {WHAT_FITS}")
    return Side(numbers, content)


def _is_summary(content: Any) -> bool:
    """Whether this is what `weekly.summary` writes, in all that is read from it."""
    if not (isinstance(content, dict) and isinstance(content.get("week"), str)):
        return False
    runs, arms, verdicts = (content.get(name) for name in ("runs", "arms", "verdicts"))
    if not all(_is_table(each) for each in (runs, arms, verdicts)):
        return False
    return all(_is_table(each) for each in arms.values()) and all("/" in name for name in runs)


def _is_table(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(each, dict) for each in content.values())


def _of_runs(folder: Path) -> Side:
    if (folder / MANIFEST).is_file():
        raise ReportError(
            f"{relative(folder)} is one run. Give the folder of its plan, {relative(folder.parent)}; to make a run "
            "again and compare its numbers: python -m nbutils run --from .../manifest.json"
        )
    evidence = _evidence(folder)
    if not evidence.plans:
        raise ReportError(f"{relative(folder)} holds no runs. {WHAT_FITS}")
    return Side(folder, summary(evidence, ""), evidence)


def _evidence(folder: Path) -> Evidence:
    """What the runs show: of a plan's folder by the plan kept in it, where that can be read."""
    own = any(next(folder.glob(f"{place}[!.]*/{MANIFEST}"), None) for place in ("", f"{ATTEMPTS}/"))
    if own and (folder / PLAN_FILE).is_file():
        try:
            return gather(folder, str(folder / PLAN_FILE))
        except WorkbookError:  # its notebooks have changed since: every run is then an arm of its own matrix values
            return gather(folder)
    names = {run.plan for run in load_runs(folder)} if own else set()
    return gather(folder, INTERACTIVE if names == {INTERACTIVE} else "")
