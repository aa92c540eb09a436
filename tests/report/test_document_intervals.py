"""Documents: their effective number, clusters, and the interval of a difference if others had been drawn.

python -m pytest tests/report/test_document_intervals.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from page_structure import text_of
from synthetic_runs import write_plan, write_runs

from nbutils import report
from nbutils.report.documents import paired_interval
from nbutils.report.evidence import gather

DOCUMENTS, SEEDS = 40, range(1, 6)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """Documents in ten packages that have a difference each, and lengths that are not alike."""
    folder = tmp_path_factory.mktemp("documents")
    runs, file, data = write_runs(folder / "runs"), write_plan(folder), folder / "prepared" / "data"
    data.mkdir(parents=True)
    names = [f"package{number % 10}.module{number}" for number in range(DOCUMENTS)]
    pd.DataFrame({"document": range(DOCUMENTS), "name": names}).to_parquet(data / "documents.parquet")
    for path in runs.glob("toy/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["inputs"] = {"data_folder": {"folder": str(data.parent), "fingerprint": "f"}}
        path.write_text(json.dumps(manifest))
        sums(manifest["matrix"]).to_parquet(path.parent / "per_document.parquet")
    return gather(runs, str(file))


def sums(matrix: dict) -> pd.DataFrame:
    tokens = np.arange(1, DOCUMENTS + 1) * 10.0
    shift = 0.05 * np.random.default_rng(0).normal(size=10)[np.arange(DOCUMENTS) % 10] * (matrix["alpha"] == 0.5)
    frame = {"split": "test", "document": range(DOCUMENTS), "tokens": tokens, "ce_sum": tokens * (4 + shift)}
    return pd.DataFrame(frame)


def test_the_table_has_the_effective_number(evidence):
    tokens = np.arange(1, DOCUMENTS + 1) * 10.0
    told = text_of(report.document_table(evidence.studies[0]))
    assert f"test40{tokens.sum() ** 2 / (tokens**2).sum():.1f}" in told.replace(" ", "")


def test_the_interval_of_a_difference_is_that_of_packages_drawn_whole(evidence):
    (study,) = evidence.studies
    asked = next(each for each in study.judged if each.contrast.name == "mixing-perplexity")
    found = paired_interval(asked, study)
    frames = [sums({"alpha": alpha}).assign(package=np.arange(DOCUMENTS) % 10) for alpha in (0.5, 0.0)]
    packages = [frame.groupby("package")[["ce_sum", "tokens"]].sum() for frame in frames]
    difference, tokens = packages[0]["ce_sum"] - packages[1]["ce_sum"], packages[0]["tokens"]
    reference = scipy.stats.bootstrap(
        (difference.to_numpy(), tokens.to_numpy()), lambda d, n, axis=-1: d.sum(axis) / n.sum(axis),
        paired=True, vectorized=True, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.002)
    assert (found.documents, found.clusters) == (40, 10)
    told = text_of(report.verdicts(evidence))
    assert "40 documents in 10 clusters" in told and "the verdict is about other seeds alone" in told


def test_other_metrics_have_no_such_interval(evidence):
    (study,) = evidence.studies
    asked = next(each for each in study.judged if each.contrast.name == "mixing-proxy")
    assert paired_interval(asked, study) is None
    assert paired_interval(study.judged[0], replace(study, arms=study.arms[:1])) is None
