"""Every number of verdicts and arms again, from result.json and per_document.parquet with pandas and scipy alone.

python -m pytest tests/report/test_recomputed.py

Nothing here is shared with the report but the texts it is compared with.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml
from synthetic_runs import write_plan, write_runs

UNITS = {"test_ce_loss": (1, 4), "test_cosine": (1, 4), "test_token_acc": (100, 2), "test_perplexity": (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("again")
    write_runs(where / "runs")
    write_plan(where)
    return where


@pytest.fixture(scope="module")
def results(folder) -> pd.DataFrame:
    """A row a run: its matrix and its numbers."""
    rows = []
    for path in (folder / "runs" / "toy").glob("*/manifest.json"):
        matrix = json.loads(path.read_text())["matrix"]
        rows.append(matrix | json.loads((path.parent / "result.json").read_text()) | {"folder": path.parent})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def page(folder):
    from nbutils import report
    from nbutils.report.evidence import gather

    evidence = gather(folder / "runs", str(folder / "toy.yaml"))
    (study,) = evidence.studies
    tables = {"verdicts": report.verdict_table, "arms": report.headline_table, "documents": report.document_table}
    return {name: rows_of(show(study).data) for name, show in tables.items()}


def rows_of(html: str) -> list[dict[str, list[str]]]:
    """The rows of a table: the lines of each cell by the first line of its column's title."""
    head = [lines(cell)[0] for cell in re.findall(r"<th[^>]*>(.*?)</th>", html)]
    body = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", html)]
    return [dict(zip(head, map(lines, cells), strict=True)) for cells in body if cells]


def lines(cell: str) -> list[str]:
    return [unescape(re.sub("<[^>]+>", "", line)) for line in cell.split("<br>")]


def number(value: float, metric: str, sign: str = "") -> str:
    scale, digits = UNITS[metric]
    return f"{scale * value:{sign}.{digits}f}".replace("-", "−")


def differences(results: pd.DataFrame, contrast: dict) -> np.ndarray:
    sides = []
    for side in ("treatment", "control"):
        of_side = results
        for name, value in contrast[side].items():
            of_side = of_side[of_side[name] == value]
        sides.append(of_side.set_index("seed")[contrast["metric"]].sort_index())
    return (sides[0] - sides[1]).to_numpy()


def test_verdicts(folder, results, page):
    contrasts = yaml.safe_load((folder / "toy.yaml").read_text())["contrasts"]
    tested = []
    for contrast in contrasts:
        worse = 1 if contrast["better"] == "lower" else -1
        boundary = worse * contrast["smallest_effect"] if contrast["claim"] == "no worse" else 0
        own = differences(results, contrast)
        tested.append((contrast, own, scipy.stats.ttest_1samp(own, boundary).pvalue))
    secondary = sorted((p, contrast["name"]) for contrast, _, p in tested if not contrast.get("primary"))
    levels, failed = {}, False
    for rank, (p, name) in enumerate(secondary):
        levels[name] = levels[secondary[rank - 1][1]] if failed else 0.04 / (len(secondary) - rank)
        failed = failed or p > levels[name]
    for contrast, own, p in tested:
        (row,) = [row for row in page["verdicts"] if row["Contrast"][0] == contrast["name"]]
        level, metric = levels.get(contrast["name"], 0.04), contrast["metric"]
        low, high = scipy.stats.t.interval(1 - level, len(own) - 1, own.mean(), scipy.stats.sem(own))
        assert row["Difference"][0] == number(own.mean(), metric, "+")
        assert row["Difference"][1] == f"[{number(low, metric, '+')}, {number(high, metric, '+')}]"
        assert row["Difference"][2] == f"({100 * (1 - level):.3g} %)"
        shown = row["p"][0]
        assert float(shown.lstrip("< ")) == pytest.approx(p, abs=6e-4) or (shown.startswith("<") and p < 0.001)
        assert row["Pairs"] == [str(len(own))]
        gains = sorted((-low, -high) if contrast["better"] == "lower" else (low, high))
        assert row["Verdict"] == [outcome(contrast["claim"], contrast["smallest_effect"], *gains)]


def outcome(claim: str, effect: float, worst: float, best: float) -> str:
    if claim == "no worse":
        return "supported" if worst > -effect else "not supported" if best < -effect else "undecided"
    if best < effect:
        return "real but too small" if worst > 0 else "not supported"
    return "supported" if worst > 0 else "undecided"


def test_arms(results, page):
    shown = results[results["noise_seed"] == 0]
    for alpha, own in shown.groupby("alpha"):
        (row,) = [row for row in page["arms"] if row["Arm"][0] == f"alpha {alpha}"]
        for title, metric in (("test cross entropy (nats per token)", "test_ce_loss"),):
            values = own[metric]
            low, high = scipy.stats.t.interval(0.95, len(values) - 1, values.mean(), scipy.stats.sem(values))
            cell = next(cell for name, cell in row.items() if name.startswith(title.split(" (")[0]))
            assert cell[0] == number(values.mean(), metric)
            assert cell[1] == f"[{number(low, metric)}, {number(high, metric)}]"
        assert row["Seeds"] == [str(len(own))]


def test_documents(results, page):
    for alpha, own in results[results["noise_seed"] == 0].groupby("alpha"):
        frames = pd.concat(pd.read_parquet(folder / "per_document.parquet") for folder in own["folder"])
        sums = frames[frames["split"] == "test"].groupby("document")[["ce_sum", "tokens"]].mean()
        value = np.exp(sums["ce_sum"].sum() / sums["tokens"].sum())
        (row,) = [row for row in page["documents"] if row["Arm"] == [f"alpha {alpha}"]]
        assert row["Perplexity"] == [f"{value:.2f}"] and row["Documents"] == [str(len(sums))]
