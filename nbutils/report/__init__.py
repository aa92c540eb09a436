"""The weekly report: run folders become sentences and tables, the executed notebook one safe HTML file.

    evidence = gather(resolve("runs"))                          # nbutils.report.studies
    report.verdicts(evidence)                                   # in a notebook cell
    report.export(Path("executed.ipynb"), Path("report.html"))  # afterwards, from outside

It reads files that runs left behind and starts nothing.
"""

from nbutils.report.appendix import all_samples, failed_runs, manifest, samples
from nbutils.report.budget import budget_table
from nbutils.report.diagnostics import (
    audit_findings,
    audit_table,
    audited,
    calibration_table,
    has_proxy,
    proxy_table,
    sample_table,
    stability_table,
)
from nbutils.report.distillation import distillation
from nbutils.report.export import ReportError, export
from nbutils.report.interaction import interaction
from nbutils.report.log import write_log, write_metrics
from nbutils.report.method import method
from nbutils.report.page import behind, by_study, figure_by_study, section, stacked
from nbutils.report.prefix import prefix_smoothing
from nbutils.report.tables import cost_table, document_table, headline_table
from nbutils.report.verdicts import contrasts_changed, has_contrasts, verdict_table, verdicts
from nbutils.report.weekly import note, period, since_last, week_of, write_summary
from nbutils.report.win_rule import mixes
from nbutils.report.win_table import composite_table

__all__ = [
    "ReportError",
    "all_samples",
    "audit_findings",
    "audit_table",
    "audited",
    "behind",
    "budget_table",
    "by_study",
    "calibration_table",
    "composite_table",
    "contrasts_changed",
    "cost_table",
    "distillation",
    "document_table",
    "export",
    "failed_runs",
    "figure_by_study",
    "has_contrasts",
    "has_proxy",
    "headline_table",
    "interaction",
    "manifest",
    "method",
    "mixes",
    "note",
    "period",
    "prefix_smoothing",
    "proxy_table",
    "sample_table",
    "samples",
    "section",
    "since_last",
    "stability_table",
    "stacked",
    "verdict_table",
    "verdicts",
    "week_of",
    "write_log",
    "write_metrics",
    "write_summary",
]
