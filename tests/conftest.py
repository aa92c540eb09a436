"""Fixtures shared by the tests of what reads runs."""

from __future__ import annotations

import pytest
from synthetic_runs import write_plan, write_runs


@pytest.fixture(scope="session")
def toy_evidence(tmp_path_factory):
    """A whole plan of made-up runs: three arms, five seeds, an A/A pair, four contrasts."""
    from nbutils.studies import gather

    folder = tmp_path_factory.mktemp("toy")
    return gather(write_runs(folder / "runs"), str(write_plan(folder)))
