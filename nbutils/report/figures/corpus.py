"""What the prepared data looks like: sizes of the splits, lengths of documents, leakage into validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nbutils.report.figures.style import canvas, empty, log_axis, look, styled

SPLITS = ("train", "validation", "test")


@styled()
def documents_per_split(card: dict[str, Any]) -> Figure:
    """Documents and tokens of each split of a data card, as bars with their numbers written on them."""
    splits = list(card["splits"])
    figure, panels = canvas(2, height=1.6, columns=2)
    for axes, what in zip(panels, ("documents", "tokens"), strict=True):
        _bars(axes, splits, [card["splits"][split][what] for split in splits], "{:,.0f}")
        axes.set(xlabel=what, ylabel="")
    panels[1].tick_params(labelleft=False)
    return figure


@styled()
def document_lengths(documents: pd.DataFrame) -> Figure:
    """How long the documents of each split are: share of documents by tokens, on a log axis.

    `documents` has columns split and tokens, one row a document. Splits drawn by chance look alike here.
    """
    lengths = documents[documents["tokens"] > 0]
    if lengths.empty:
        return empty("No document has a token.")
    splits = [split for split in SPLITS if (lengths["split"] == split).any()]
    styles = look(splits)
    figure, (axes,) = canvas(height=2.2)
    edges = np.geomspace(lengths["tokens"].min(), lengths["tokens"].max() + 1, 31)
    for split in splits:
        tokens = lengths.loc[lengths["split"] == split, "tokens"]
        look_of = {"color": styles[split]["color"], "label": f"{split} ({len(tokens):,})"}
        sns.histplot(x=tokens, stat="percent", bins=edges, element="step", fill=False, ax=axes, **look_of)
        axes.lines[-1].set_dashes(styles[split]["dash"] or (None, None))
    log_axis(axes, "x")
    axes.set(xlabel="length of a document (tokens)", ylabel="documents (% of the split)")
    axes.legend(title="split (documents)", alignment="left")
    return figure


@styled()
def leakage(card: dict[str, Any]) -> Figure:
    """How much of validation and test stands in train word for word, as measured for a data card.

    Of questions and answers also how many of the answers do; of a sample of the runs, their share alone.
    """
    table = card["leakage"]
    if not table:
        return empty("There is no split to measure leakage into.")
    columns = {
        "ngram_share": f"{card.get('leakage_words', 13)}-word runs also in train (%)",
        "document_share": "documents with at least one such run (%)",
    }
    if any("answer_share" in row for row in table.values()):
        columns = {"ngram_share": columns["ngram_share"], "answer_share": "answers that a train answer equals (%)"}
    columns = {name: label for name, label in columns.items() if all(name in row for row in table.values())}
    figure, panels = canvas(len(columns), height=1.3, columns=2)
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        _bars(axes, list(table), [100 * row[column] for row in table.values()], "{:.2f} %")
        axes.set(xlabel=label, ylabel="")
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=None))
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    return figure


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], text: str) -> None:
    """Horizontal bars from 0, each with its value at its end."""
    styles = look([split for split in SPLITS if split in names])
    palette = {name: styles[name]["color"] for name in names}
    sns.barplot(x=list(values), y=list(names), hue=list(names), palette=palette, legend=False, ax=axes)
    for place, value in enumerate(values):
        axes.annotate(text.format(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.2 * max(values) or 1)
    axes.grid(axis="y", visible=False)
