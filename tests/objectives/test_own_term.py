"""What docs/own_term.md promises: a term is one file, which trains, is checked, and is named by the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from small_training import config, trained

from nbutils.foundation import write_json
from nbutils.foundation.places import ROOT
from nbutils.objectives.check import compare_with_textbook
from nbutils.objectives.registry import objective_from
from nbutils.objectives.term import REGISTERED
from nbutils.report.method_section import _of_terms

TERM = ROOT / "nbutils" / "objectives" / "terms" / "confidence_penalty.py"
DOCUMENTATION = ROOT / "docs" / "own_term.md"


def quoted() -> str:
    return DOCUMENTATION.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_the_documentation_quotes_the_file_which_is_short():
    assert quoted() == TERM.read_text(encoding="utf-8")
    assert len(quoted().splitlines()) <= 60


@pytest.fixture
def own_term(tmp_path: Path) -> Path:
    """The documented term under another name, in a file that is no part of the workbook."""
    path = tmp_path / "mine.py"
    path.write_text(quoted().replace("confidence_penalty", "mine").replace("confidence penalty", "my own penalty"))
    yield path
    REGISTERED.pop("mine", None)


def test_a_term_from_a_file_elsewhere_is_checked_trained_and_reported(own_term, tmp_path):
    objective = objective_from(["cross_entropy 0.9", f"{own_term} 0.1"])
    assert max(compare_with_textbook(objective).values()) < 1e-8
    trained(config(tmp_path / "run", objective=objective, audit_blocks=1))
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"mine_loss", "eval_mine_loss"} <= set(columns)
    audited = (tmp_path / "run" / "audit.csv").read_text()
    assert "parameters,mine,0.1" in audited
    write_json(tmp_path / "run" / "objective.json", objective.described())  # as `train` does
    run = SimpleNamespace(folder=tmp_path / "run", params={"terms": []})
    said = dict(_of_terms(SimpleNamespace(slots=[SimpleNamespace(run=run)])))
    assert said["My own penalty"] == "L = −H(p) = Σₖ pₖ log pₖ, in nats (Pereyra et al. 2017, arXiv 1701.06548)"


def test_a_wrong_gradient_is_seen_by_the_check(own_term):
    own_term.write_text(own_term.read_text().replace("log_p + entropy", "log_p - entropy"))
    objective = objective_from([f"{own_term} 1"])
    assert compare_with_textbook(objective)["d hidden"] > 1e-3
