"""What the chunked head costs: extra peak memory over positions."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from nbutils.report import canvas, log_axis, look, styled


@styled()
def memory_by_positions(growth: pd.DataFrame) -> Figure:
    """Extra peak memory over positions, both axes logarithmic; a flat line does not pay for more positions.

    Columns as `nbutils.benchmarks.heads.growth` gives them: positions, case, side, mib.
    """
    figure, (axes,) = canvas(height=2.6)
    labels = growth["case"] + ", " + growth["side"]
    styles = look(list(dict.fromkeys(labels.sort_values(key=lambda s: ~s.str.endswith("textbook"), kind="stable"))))
    for label, style in styles.items():
        rows = growth[labels == label].sort_values("positions")
        line = axes.plot(
            rows["positions"], rows["mib"], color=style["color"], marker=style["marker"], markersize=4, label=label
        )[0]
        line.set_dashes(style["dash"] or (None, None))
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set(xlabel="positions in the batch", ylabel="extra peak memory (MiB)", xticks=sorted(set(growth["positions"])))
    figure.legend(loc="outside right upper", handlelength=3)
    return figure
