"""How endings are judged for the comparison with papermill, and two of them played."""

from __future__ import annotations

import pytest
from endings_beside_papermill import ENDINGS, OURS, PAPERMILL, Scene, Told

ALL = frozenset({1, 2, 3})


@pytest.mark.parametrize(
    ("code", "completed", "done", "status", "right"),
    [
        (0, ALL, ALL, "finished", True),
        (1, ALL, ALL, "", False),  # it finished, and says it did not
        (138, {1}, {1}, "killed", True),
        (138, {1}, {1}, "finished", False),
        (138, ALL, {1}, "", False),  # cells are called completed that did not end
        (0, {1}, {1}, "", False),  # exit code 0 of what did not finish
        (1, None, {1}, "", False),  # what it saved cannot be read
        (143, set(), {1}, "", True),  # less is claimed than was done
    ],
)
def test_who_is_right(code, completed, done, status, right):
    claimed = None if completed is None else frozenset(completed)
    assert Told(code, claimed, frozenset(done), kept=True, status=status).is_right == right


@pytest.mark.soak
def test_a_cell_that_leaves_by_sys_exit_is_told_by_ours_alone(tmp_path):
    (ending,) = (each for each in ENDINGS if "sys.exit" in each.name)
    theirs, ours = (Scene(tool, ending, tmp_path / tool).play() for tool in (PAPERMILL, OURS))
    assert (theirs.exit_code, theirs.is_right, theirs.kept) == (0, False, False)
    assert (ours.exit_code, ours.status, ours.is_right, ours.kept) == (1, "failed", True, True)
    assert "| **no**" in theirs.cells() and ours.cells().startswith("1 | failed: SystemExit: ")
