"""One ending of the comparison with papermill, played with both."""

from __future__ import annotations

import pytest
from endings_beside_papermill import ENDINGS, OURS, PAPERMILL, Scene


@pytest.mark.soak
def test_a_cell_that_leaves_by_sys_exit_is_told_by_ours_alone(tmp_path):
    (ending,) = (each for each in ENDINGS if "sys.exit" in each.name)
    theirs, ours = (Scene(tool, ending, tmp_path / tool).play() for tool in (PAPERMILL, OURS))
    assert (theirs.exit_code, theirs.is_right, theirs.kept) == (0, False, False)
    assert (ours.exit_code, ours.status, ours.is_right, ours.kept) == (1, "failed", True, True)
    assert "| **no**" in theirs.cells() and ours.cells().startswith("1 | failed: SystemExit: ")
