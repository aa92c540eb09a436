"""How well the documents of a test split stand for others: measurement error, which no verdict is read from.

Documents that come in clusters, modules of a package or chapters of a book, are drawn cluster by cluster: what a name
holds before its first dot, slash or colon is its cluster, where that gives at least LEAST_CLUSTERS.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from IPython.display import HTML

from nbutils.foundation import resolve
from nbutils.report import statistics
from nbutils.report.evidence import Arm, Judged, Study
from nbutils.report.page import frame_of, table
from nbutils.runs import measure

LEAST_CLUSTERS = 5
SPLITS = {"test": "test_", "validation": "eval_"}  # as per_document.parquet calls them, the better one first
CAPTION = (
    "No comparison of arms can be read from it: they share the documents. Effective: as many documents of one length "
    "as weigh alike, (Σ n)² / Σ n² over their tokens n."
)


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval over documents, what was drawn, and how many documents of one length weigh as much."""

    low: float
    high: float
    documents: int
    clusters: int
    effective: float

    @property
    def drawn(self) -> str:
        """What was resampled: "50 documents", or "50 documents in 14 clusters"."""
        return f"{self.documents:,} documents" + f" in {self.clusters:,} clusters" * (self.clusters < self.documents)


def document_table(study: Study) -> HTML:
    """How far other documents would move each arm's perplexity: bootstrap over the documents it was judged on."""
    rows, perplexity = [], measure("perplexity")
    for arm in study.arms:
        split = next((name for name in SPLITS if len(_sums(arm, name))), None)
        if split is None:
            continue
        sums = _sums(arm, split)
        interval = _interval(sums, arm)
        row = {"Arm": arm.label, "Split": split, "Documents": f"{len(sums):,}"}
        row["Effective"] = f"{interval.effective:.1f}"
        row["Perplexity"] = perplexity.number(math.exp(sums["ce_sum"].sum() / sums["tokens"].sum()))
        row["95 % interval over documents"] = perplexity.interval(*np.exp([interval.low, interval.high]))
        rows.append(row)
    if not rows:
        return HTML("<p>No run has kept its sums per document.</p>")
    return table(frame_of(rows), CAPTION)


def paired_interval(judged: Judged, study: Study) -> Interval | None:
    """The interval of a contrast's difference in cross entropy if other documents had been drawn, nats per token.

    Over the seeds that both sides have. None for other metrics, and where runs kept no sums per document.
    """
    contrast = judged.contrast
    split = next((name for name, prefix in SPLITS.items() if contrast.metric == f"{prefix}ce_loss"), None)
    treatment, control = study.sides(contrast)
    if split is None or contrast.control_metric or treatment is None or control is None:
        return None
    shared = [run.matrix.get("seed") for run in treatment.runs]
    shared = [run.matrix.get("seed") for run in control.runs if run.matrix.get("seed") in shared]
    ours, theirs = (_sums(arm, split, shared) for arm in (treatment, control))
    both = ours.join(theirs, rsuffix="_control", how="inner") if len(ours) and len(theirs) else pd.DataFrame()
    if len(both) < 2:
        return None
    return _interval(both.assign(ce_sum=both["ce_sum"] - both["ce_sum_control"]), treatment)


def document_sentence(judged: Judged, study: Study) -> list[str]:
    """What other documents would do to a difference in cross entropy; not part of the verdict."""
    found = paired_interval(judged, study)
    if found is None or not math.isfinite(found.low):
        return []
    shown = measure(judged.contrast.metric).difference_interval(found.low, found.high)
    return [
        f"With other documents of the kind it would lie in {shown} (95 %, {found.drawn}, which weigh as much as "
        f"{found.effective:.1f} of one length); the verdict is about other seeds alone."
    ]


def _sums(arm: Arm, split: str, seeds: list | None = None) -> pd.DataFrame:
    """ce_sum and tokens by document, means over an arm's runs, of those seeds if given; empty where none kept them."""
    frames = [run.per_document() for run in arm.runs if seeds is None or run.matrix.get("seed") in seeds]
    frames = [frame[frame["split"] == split] for frame in frames if len(frame)]
    if not any(map(len, frames)):
        return pd.DataFrame(columns=["ce_sum", "tokens"])
    return pd.concat(frames).groupby("document")[["ce_sum", "tokens"]].mean()


def _interval(sums: pd.DataFrame, arm: Arm) -> Interval:
    clusters = _clusters(sums, arm)
    drawn = sums.groupby(clusters)[["ce_sum", "tokens"]].sum()
    low, high = statistics.document_interval(drawn["ce_sum"], drawn["tokens"])
    tokens = sums["tokens"].to_numpy(dtype=float)
    return Interval(low, high, len(sums), len(drawn), float(tokens.sum() ** 2 / np.square(tokens).sum()))


def _clusters(sums: pd.DataFrame, arm: Arm) -> np.ndarray:
    """The cluster of each document, by its name in the prepared data; its own where names say nothing."""
    folder = arm.runs[0].manifest.get("inputs", {}).get("data_folder", {}).get("folder")
    file = resolve(folder) / "data" / "documents.parquet" if folder else None
    if file is None or not file.is_file():
        return np.arange(len(sums))
    names = pd.read_parquet(file, columns=["document", "name"]).set_index("document")["name"]
    found = [re.split(r"[./:]", str(names.get(document, document)))[0] for document in sums.index]
    return np.array(found) if LEAST_CLUSTERS <= len({*found}) < len(found) else np.arange(len(sums))
