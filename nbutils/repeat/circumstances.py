"""What a run was made from and on, fact by fact, and in which facts runs differ: what may explain other numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nbutils.manifest import Manifest

SHORT = 12  # digits of a hash: enough to find it again
ABSENT = "–"  # a fact that one side does not have
MOST_VALUES = 3  # of one fact, told of several runs


@dataclass(frozen=True)
class Change:
    """A fact that is not the same on both sides."""

    what: str
    first: str
    second: str


def circumstances(manifest: Manifest) -> dict[str, str]:
    """The facts of one run: code, packages, machine, parameters and the content of the folders it read."""
    source, machine = manifest.get("source", {}), manifest.get("hardware", {})
    commit = str(source.get("git_commit") or ABSENT)[:SHORT] + " with changes" * bool(source.get("git_dirty"))
    facts: dict[str, Any] = {
        "git commit": commit,
        "notebook's code": str(source.get("notebook_sha256") or ABSENT)[:SHORT],
        "nbutils' code": str(source.get("nbutils_sha256") or ABSENT)[:SHORT],
        **{f"package {name}": version for name, version in manifest.get("packages", {}).items()},
        "processor": machine.get("processor"),
        "GPU": ", ".join(machine.get("gpus") or []) or "none",
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
    }
    inputs = manifest.get("inputs", {})
    told = {name: value for name, value in manifest.get("params", {}).items() if name not in inputs}
    facts |= {f"parameter {name}": value for name, value in told.items()}
    facts |= {f"content of {name}": each["fingerprint"][:SHORT] for name, each in inputs.items()}
    return {name: ABSENT if value is None else str(value) for name, value in facts.items()}


def changes(first: Iterable[Manifest], second: Iterable[Manifest]) -> list[Change]:
    """The facts in which the runs of two sides differ; of several runs a side, the values that any of them has."""
    sides = [[circumstances(manifest) for manifest in side] for side in (first, second)]
    names = dict.fromkeys(name for side in sides for facts in side for name in facts)
    found = []
    for name in names:
        values = [tuple(dict.fromkeys(facts.get(name, ABSENT) for facts in side)) for side in sides]
        if set(values[0]) != set(values[1]):
            found.append(Change(name, _together(*values), _together(*reversed(values))))
    return sorted(
        found, key=lambda change: ABSENT in (change.first, change.second)
    )  # what has changed, then what is new


def _together(values: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The values of one side, those first that the other has not."""
    ordered = sorted(values, key=lambda value: value in others)
    more = len(ordered) - MOST_VALUES
    return ", ".join(ordered[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")
