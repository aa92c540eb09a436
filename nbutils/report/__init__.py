"""The weekly report: run folders become sentences and tables, the executed notebook one safe HTML file.

    evidence = gather(resolve("runs"))                          # nbutils.studies
    report.verdicts(evidence)                                   # in a notebook cell
    report.export(Path("executed.ipynb"), Path("report.html"))  # afterwards, from outside

It reads files that runs left behind and starts nothing.
"""

from nbutils.report.appendix import failed_runs, manifest, samples
from nbutils.report.export import ReportError, export
from nbutils.report.page import by_study, figure_by_study
from nbutils.report.tables import cost_table, document_table, headline_table
from nbutils.report.verdicts import contrasts_changed, period, verdict_table, verdicts

__all__ = [
    "ReportError",
    "by_study",
    "contrasts_changed",
    "cost_table",
    "document_table",
    "export",
    "failed_runs",
    "figure_by_study",
    "headline_table",
    "manifest",
    "period",
    "samples",
    "verdict_table",
    "verdicts",
]
