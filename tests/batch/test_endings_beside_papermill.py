"""How endings are judged for the comparison with papermill: python tests/endings_beside_papermill.py makes it."""

from __future__ import annotations

import nbformat
import pytest
from endings_beside_papermill import Claim, Told, holds_good, read_claim, shortened

ALL = frozenset({1, 2, 3})


@pytest.mark.parametrize(
    ("code", "completed", "done", "status", "right"),
    [
        (0, ALL, ALL, "", True),
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
    claim = Claim(None if completed is None else frozenset(completed))
    assert Told(code, claim, frozenset(done), kept=True, status=status).is_right == right


def test_what_a_notebook_claims(tmp_path):
    statuses = ["completed", "failed", "running", "pending"]
    cells = [nbformat.v4.new_code_cell("x", metadata={"papermill": {"status": status}}) for status in statuses]
    parameters = nbformat.v4.new_code_cell(
        "y = 1", metadata={"tags": ["parameters"], "papermill": {"status": "completed"}}
    )
    metadata = {"papermill": {"exception": True}}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("z"), parameters, *cells], metadata=metadata
    )
    nbformat.write(notebook, tmp_path / "saved.ipynb")
    assert read_claim(tmp_path / "saved.ipynb") == Claim(frozenset({1}), running=1, exception=True)
    assert not holds_good(tmp_path / "saved.ipynb")
    (tmp_path / "half.ipynb").write_bytes((tmp_path / "saved.ipynb").read_bytes()[:200])
    assert read_claim(tmp_path / "half.ipynb").completed is None
    assert not holds_good(tmp_path / "half.ipynb")
    assert not read_claim(tmp_path / "none.ipynb").saved


def test_messages_are_shortened_to_their_first_sentence():
    assert shortened("A: it took 0.05 minutes (full). Make room.") == "A: it took 0.05 minutes (full)"
    assert len(shortened("x" * 200)) == 90
