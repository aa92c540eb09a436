"""What a run was made from and on, fact by fact, and in which facts runs differ: what may explain other numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nbutils.runs import Manifest

SHORT = 12  # digits of a hash: enough to find it again
ABSENT = "–"  # a fact that one side does not have
MOST_VALUES = 3  # of one fact, told of several runs
PACKAGE = "package "  # what such a fact is called begins so
MOST_PACKAGES = 5  # named of those that both sides have, where there are few lines
NAMED = 30  # characters of the names of those that one side alone has


@dataclass(frozen=True)
class Change:
    """A fact that is not the same on both sides."""

    what: str
    first: str
    second: str


def circumstances(manifest: Manifest) -> dict[str, str]:
    """The facts of one run: parameters, the content of the folders it read, code, machine, and packages."""
    source, machine = manifest.get("source", {}), manifest.get("hardware", {})
    commit = str(source.get("git_commit") or ABSENT)[:SHORT] + " with changes" * bool(source.get("git_dirty"))
    inputs = manifest.get("inputs", {})
    told = {name: value for name, value in manifest.get("params", {}).items() if name not in inputs}
    facts: dict[str, Any] = {f"parameter {name}": value for name, value in told.items()}
    facts |= {f"content of {name}": each["fingerprint"][:SHORT] for name, each in inputs.items()}
    facts |= {
        "git commit": commit,
        "notebook's code": str(source.get("notebook_sha256") or ABSENT)[:SHORT],
        "nbutils' code": str(source.get("nbutils_sha256") or ABSENT)[:SHORT],
        "processor": machine.get("processor"),
        "GPU": ", ".join(machine.get("gpus") or []) or "none",
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
    }
    facts |= {f"{PACKAGE}{name}": version for name, version in manifest.get("packages", {}).items()}
    return {name: ABSENT if value is None else str(value) for name, value in facts.items()}


def changes(first: Iterable[Manifest], second: Iterable[Manifest]) -> list[Change]:
    """The facts in which the runs of two sides differ, parameters first, packages last; of several runs all values."""
    sides = [[circumstances(manifest) for manifest in side] for side in (first, second)]
    names = dict.fromkeys(name for side in sides for facts in side for name in facts)
    found = []
    for name in names:
        values = [tuple(dict.fromkeys(facts.get(name, ABSENT) for facts in side)) for side in sides]
        if set(values[0]) != set(values[1]):
            found.append(Change(name, _together(*values), _together(*reversed(values))))
    return sorted(found, key=lambda change: (_is_package(change), not _is_given(change), _is_new(change)))


def in_few(found: Sequence[Change], most: int) -> tuple[list[Change], int]:
    """What can be told in few lines, and how many changes that leaves out: `most` facts, and a few lines of packages.

    Packages that one side alone has are together in one line.
    """
    facts = [each for each in found if not _is_package(each)]
    changed = [each for each in found if _is_package(each) and not _is_new(each)]
    new = [each for each in found if _is_package(each) and _is_new(each)]
    rows = facts[:most] + changed[:MOST_PACKAGES]
    if len(changed) > MOST_PACKAGES:
        rows.append(Change("further packages", *[f"{len(changed) - MOST_PACKAGES} of another version"] * 2))
    if new:
        gone, come = [each for each in new if each.second == ABSENT], [each for each in new if each.first == ABSENT]
        rows.append(Change("packages of one side alone", _counted(gone), _counted(come)))
    return rows, max(0, len(facts) - most)


def _counted(packages: Sequence[Change]) -> str:
    names = [each.what.removeprefix(PACKAGE) for each in packages]
    return str(len(names)) + f" ({listed(names, NAMED)})" * bool(names)


def listed(names: Sequence[str], width: int) -> str:
    """As many whole names as `width` characters hold, and how many more there are; the first one may be cut."""
    for shown in range(len(names), 0, -1):
        more = f" and {len(names) - shown} more" * (shown < len(names))
        text = ", ".join(names[:shown])
        if len(text + more) <= width:
            return text + more
    return text[: width - len(more) - 1] + "…" + more if names else ""


def _is_package(change: Change) -> bool:
    return change.what.startswith(PACKAGE)


def _is_given(change: Change) -> bool:
    """Whether it is of what the run was asked to do and given to read."""
    return change.what.startswith(("parameter ", "content of "))


def _is_new(change: Change) -> bool:
    return ABSENT in (change.first, change.second)


def _together(values: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The values of one side, those first that the other has not."""
    ordered = sorted(values, key=lambda value: value in others)
    more = len(ordered) - MOST_VALUES
    return ", ".join(ordered[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")
