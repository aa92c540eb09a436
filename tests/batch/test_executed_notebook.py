"""An executed notebook stays small, however much its cells printed, and the rest is kept beside it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from one_run import run

from nbutils.batch.executed_notebook import BUDGET, PRINTED, shorten_printed

FLUSHED = """\
import os, signal, sys, time
for step in range(4_000):
    print(f"step {step} of a long training", "." * 150, flush=True)
    if step % 50 == 0:
        print("a warning at", step, file=sys.stderr, flush=True)
        time.sleep(0.02)  # of a queue that is full the kernel drops some
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def stream(name: str, text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name=name, text=text)


def shortened(folder: Path, *cells: list[nbformat.NotebookNode]) -> list[list[nbformat.NotebookNode]]:
    """The outputs of the cells of a notebook, shortened."""
    made = [nbformat.v4.new_code_cell("work()", outputs=outputs) for outputs in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / "notebook.ipynb")
    shorten_printed(folder / "notebook.ipynb")
    read = nbformat.read(folder / "notebook.ipynb", as_version=4)
    nbformat.validate(read)
    return [cell.outputs for cell in read.cells]


@pytest.mark.soak
@pytest.mark.slow
def test_a_cell_whose_kernel_is_killed_leaves_a_small_notebook_too(tmp_path):
    """nbclient merges what a cell printed where the cell ends, which this one does not."""
    outcome, _ = run(tmp_path / "runs", FLUSHED)
    assert outcome.status == "killed", outcome
    notebook = outcome.folder / "notebook.ipynb"
    assert notebook.stat().st_size < 2 * BUDGET
    died = next(cell for cell in nbformat.read(notebook, as_version=4).cells if cell.get("outputs"))
    assert [each.ename for each in died.outputs if each.output_type == "error"] == ["KernelDied"]
    (text,) = [each.text for each in died.outputs if each.get("name") == "stdout"]
    assert text.startswith("step 0 of") and " are left out here; printed.txt has all" in text
    assert len((outcome.folder / PRINTED).read_text().splitlines()) > 1_000


def test_pieces_are_merged_and_a_bar_keeps_its_last_state(tmp_path):
    pieces = [stream("stderr", f"\r{n}%") for n in range(100)] + [stream("stdout", "done\r\n"), stream("stderr", "\n")]
    (outputs,) = shortened(tmp_path, pieces)
    assert [(each.name, each.text) for each in outputs] == [("stderr", "99%\n"), ("stdout", "done\r\n")]
    assert not (tmp_path / PRINTED).exists()


def test_long_texts_are_shortened_and_kept_whole_beside(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(20_000))
    given = ("short\n" * 100, lines, "é" * 300_000, lines)
    short, many, one, again = (
        outputs[0].text for outputs in shortened(tmp_path, *([stream("stdout", t)] for t in given))
    )
    assert short == given[0] and many == again
    head, _, rest = many.partition("[... ")
    count, _, tail = rest.partition(" characters are left out here; printed.txt has all ...]\n")
    assert lines.startswith(head) and lines.endswith(tail)
    assert len(head) + int(count.replace(",", "")) + len(tail) == len(lines)
    assert one.startswith("ééé")
    assert sum(map(len, (short, many, one, again))) < 1.1 * BUDGET
    assert (tmp_path / PRINTED).read_text(encoding="utf-8") == "".join(given)


def test_a_notebook_is_as_it_was_where_the_rest_cannot_be_kept(tmp_path):
    (tmp_path / PRINTED).mkdir()
    with pytest.raises(OSError):
        shortened(tmp_path, [stream("stdout", "a line\n" * 50_000)])
    assert len(nbformat.read(tmp_path / "notebook.ipynb", as_version=4).cells[0].outputs[0].text) == 350_000
