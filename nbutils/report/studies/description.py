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
Sentences = Callable[[Judged, Study], list[str]]


@dataclass(frozen=True)
class Description:
    """A kind of study, known by a `parameter` that the runs of its notebook alone have.

    formulas: (name, definition) of what it minimises and measures, in HTML, for the method section.
    settings: a run's objective by title, for a line of results.md.
    sections: all that the report shows of such studies alone, headings included; figures are saved in the folder.
    cautions: each gives sentences that a verdict of such a study must be read with.
    """

    name: str
    parameter: str
    formulas: tuple[tuple[str, str], ...]
    settings: Callable[[Params], dict[str, object]]
    sections: Callable[[Evidence, Path], HTML]
    cautions: tuple[Sentences, ...] = ()


def settings_of(titles: Mapping[str, str]) -> Callable[[Params], dict[str, object]]:
    """What a run's parameters say, by title: `titles` gives each parameter's name."""
    return lambda params: {title: params.get(name, UNKNOWN) for title, name in titles.items()}
