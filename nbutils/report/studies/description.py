"""What the report knows of a kind of study: one description each, in a file of its own; `registry` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from IPython.display import HTML

from nbutils.report.evidence import Evidence, Judged, Study
from nbutils.runs import UNKNOWN

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """What the runs of a report have: the names of their results, and every value of each parameter."""

    results: frozenset[str]
    values: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Formula:
    """A definition for the method section, in HTML, shown where `shown` holds of what the runs have."""

    name: str
    text: str
    shown: Callable[[Known], bool] = lambda known: True


def reports(*endings: str) -> Callable[[Known], bool]:
    """Whether any result's name ends so."""
    return lambda known: any(name.endswith(endings) for name in known.results)


def has(parameter: str, *values: str) -> Callable[[Known], bool]:
    """Whether any run has one of these values of a parameter."""
    return lambda known: bool(known.values.get(parameter, frozenset()) & {*values})


Sentences = Callable[[Judged, Study], list[str]]


@dataclass(frozen=True)
class Description:
    """A kind of study, known by a `parameter` that the runs of its notebook alone have.

    formulas: what it minimises and measures, for the method section.
    settings: a run's objective by title, for a line of results.md.
    sections: all that the report shows of such studies alone, headings included; figures are saved in the folder.
    cautions: each gives sentences that a verdict of such a study must be read with.
    """

    name: str
    parameter: str
    formulas: tuple[Formula, ...]
    settings: Callable[[Params], dict[str, object]]
    sections: Callable[[Evidence, Path], HTML]
    cautions: tuple[Sentences, ...] = ()


def settings_of(titles: Mapping[str, str]) -> Callable[[Params], dict[str, object]]:
    """What a run's parameters say, by title: `titles` gives each parameter's name."""
    return lambda params: {title: params.get(name, UNKNOWN) for title, name in titles.items()}
