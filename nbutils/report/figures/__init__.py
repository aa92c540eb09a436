"""Every plot of the workbook. Each function returns a matplotlib Figure; `show` saves it and puts it into a notebook.

    figures.show(figures.loss_curves(study), "loss", "Training loss over steps, mean and 95 % band over seeds.")

Figures are made without pyplot: nothing stays open, and the reader's own style is left alone.
"""

from nbutils.report.figures.contrasts import contrast_forest, heat_map
from nbutils.report.figures.corpus import document_lengths, documents_per_split, leakage
from nbutils.report.figures.diagnostics import gradient_audit, reliability
from nbutils.report.figures.distillation import distance_to_teacher, loss_terms, overfitting
from nbutils.report.figures.style import show
from nbutils.report.figures.training import cost_quality, loss_curves, perplexity_curves, proxy

__all__ = [
    "contrast_forest",
    "cost_quality",
    "distance_to_teacher",
    "document_lengths",
    "documents_per_split",
    "gradient_audit",
    "heat_map",
    "leakage",
    "loss_curves",
    "loss_terms",
    "overfitting",
    "perplexity_curves",
    "proxy",
    "reliability",
    "show",
]
