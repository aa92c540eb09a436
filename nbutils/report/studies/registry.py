"""The kinds of study that the report knows, in the order in which it shows them."""

from __future__ import annotations

from pathlib import Path

from IPython.display import HTML

from nbutils.report.evidence import Evidence, Judged, Study
from nbutils.report.page import stacked
from nbutils.report.studies.description import Description, Params
from nbutils.report.studies.distillation import DISTILLATION
from nbutils.report.studies.interaction import INTERACTION
from nbutils.report.studies.mixing import MIXING
from nbutils.report.studies.prefix import PREFIX_SMOOTHING

STUDIES = (MIXING, DISTILLATION, PREFIX_SMOOTHING, INTERACTION)


def described(params: Params) -> Description | None:
    """The description of the study that a run with these parameters is of."""
    return next((each for each in STUDIES if each.parameter in params), None)


def study_sections(evidence: Evidence, folder: Path) -> HTML:
    """What the report shows of one kind of study alone, figures saved in `folder`; nothing of kinds without runs."""
    return stacked(*(each.sections(evidence, folder) for each in STUDIES))


def cautions(judged: Judged, study: Study) -> list[str]:
    """Sentences that this verdict must be read with, by what its study is about."""
    return [sentence for each in STUDIES for told in each.cautions for sentence in told(judged, study)]
