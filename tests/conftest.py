"""Fixtures shared by the tests of what reads runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import their helpers by name

from synthetic_runs import write_plan, write_runs

from nbutils.studies import Evidence, gather


@pytest.fixture(scope="session")
def toy_evidence(tmp_path_factory) -> Evidence:
    """A whole plan of made-up runs: three arms, five seeds, an A/A pair, four contrasts."""
    folder = tmp_path_factory.mktemp("toy")
    return gather(write_runs(folder / "runs"), str(write_plan(folder)))
