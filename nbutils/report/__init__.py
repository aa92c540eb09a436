"""Report: run folders become one HTML file.

Evidence is gathered, contrasts are judged on seed pairs, and each study's description says which tables and
figures it brings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "appendix": ["all_samples", "failed_runs", "manifest", "samples"],
        "comparison": ["compare"],
        "budget": ["budget_table"],
        "diagnostics": [
            "audit_findings",
            "audit_table",
            "audited",
            "calibration_table",
            "sample_table",
            "stability_table",
        ],
        "figures.style": ["COLOURS", "INK", "canvas", "empty", "log_axis", "look", "show", "styled"],
        "html_export": ["ReportError", "export"],
        "log": ["write_log", "write_metrics"],
        "method_section": ["method"],
        "planned_power": ["power_lines"],
        "page": ["behind", "by_study", "figure_by_study", "section", "stacked"],
        "evidence": ["gather", "is_folder_name", "one_run"],
        "headline": ["headline_table"],
        "documents": ["document_table"],
        "tables": ["cost_table"],
        "verdict_sentences": ["has_contrasts", "verdict_table", "verdicts"],
        "warnings": ["contrasts_registered"],
        "weekly": ["note", "period", "since_last", "week_of", "write_summary"],
        "studies.registry": ["study_sections"],
    },
)
