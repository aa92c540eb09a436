"""The composite rule in the report: which arm is a win, which a trade-off, which neither."""

from __future__ import annotations

from IPython.display import HTML

from nbutils.report.page import frame_of, table
from nbutils.report.studies import Study
from nbutils.report.tables import difference_lines
from nbutils.report.win_rule import RULE, composite
from nbutils.runs import UNKNOWN, measure

TUNED = {True: "yes", False: "not shown", None: UNKNOWN}


def composite_table(study: Study) -> HTML:
    """Every arm's outcome under the rule, with the differences it was read from; or what it lacks."""
    outcomes = composite(study)
    if not outcomes:
        return HTML("<p>The rule needs a planned contrast's control, a cross entropy and a cosine proxy.</p>")
    metrics = [metric for metric in map(study.final, ("ce_loss", "token_acc", "cosine")) if metric]
    rows = []
    for outcome in outcomes:
        row = {"Arm": outcome.arm.label, "Outcome": outcome.result}
        for metric in metrics:
            quantity = measure(metric)
            unit = f"\n({quantity.difference_unit})" if quantity.difference_unit else ""
            row[f"Δ {quantity.label}{unit}"] = "\n".join(difference_lines(study, outcome.arm, metric))
        if study.reports(f"{metrics[-1]}_tuned"):
            row["Above the\ntuned control"] = TUNED[outcome.beats_tuned]
        rows.append(row | {"Pairs": str(outcome.pairs)})
    return table(frame_of(rows), RULE, text=("Arm", "Outcome"))
