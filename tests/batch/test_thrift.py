"""An executed notebook stays small, however long the training was and however much its cells printed.

python -m pytest tests/test_thrift.py
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from kill_many import write_data
from tiny_notebooks import write_notebook

from nbutils.batch.runner import flat_variant, run_variant
from nbutils.batch.thrift import BUDGET, PRINTED, shorten_printed
from nbutils.foundation.files import read_json
from nbutils.runs.notebooks import find_notebook

LARGEST, MOST_OUTPUTS = 200_000, 40  # bytes of an executed notebook, and its outputs
SMALLEST_MODEL = {  # what remains is what a step costs besides
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    **{"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16},
    **{"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0},
}
SETTINGS = {"max_steps": 10_000, "logging_steps": 10, "eval_steps": 250, "per_device_train_batch_size": 1}
SETTINGS |= {"alpha": 0.0, "max_grad_norm": 0.0, "dropout": 0.0, "audit_blocks": 0, "samples": 1}


def thrifty(notebook: Path) -> nbformat.NotebookNode:
    """The executed notebook, which is no larger than it may be."""
    read = nbformat.read(notebook, as_version=4)
    nbformat.validate(read)
    assert notebook.stat().st_size < LARGEST
    assert sum(len(cell.get("outputs", ())) for cell in read.cells) <= MOST_OUTPUTS
    return read


@pytest.mark.slow
def test_a_training_of_ten_thousand_steps_leaves_a_small_notebook(tmp_path):
    """As a user has it who logs every tenth step, to metrics.csv, and evaluates forty times, which is a line each."""
    data = write_data(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMALLEST_MODEL))
    given = SETTINGS | {"data_folder": str(data), "model_name": str(model)}
    variant = flat_variant(find_notebook("04_cosine_mixing"), "long", given)
    outcome = run_variant(variant, "plan", tmp_path / "runs")
    assert outcome.status == "finished", outcome
    assert read_json(outcome.folder / "result.json")["steps"] == 10_000
    assert len((outcome.folder / "metrics.csv").read_text().splitlines()) == 1 + 1_000 + 40
    notebook = thrifty(outcome.folder / "notebook.ipynb")
    printed = [o.text for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "stream"]
    assert sum(text.count("| validation ce") for text in printed) == 40
    assert not (outcome.folder / PRINTED).exists()  # nothing had to be left out


# ---- what notebooks print ------------------------------------------------------------------------------------------

LOUD = """\
import sys
from tqdm.auto import tqdm
for step in tqdm(range(10_000)):
    print(f"step {step} loss {1 / (step + 1):.4f}")
    if step % 100 == 0:
        print("a warning at", step, file=sys.stderr)
"""
BARS = "from tqdm import tqdm\nfor bar in range(3):\n    for step in tqdm(range(10_000)): pass"


@pytest.mark.slow
def test_ten_thousand_printed_lines_and_a_bar_leave_a_small_notebook(tmp_path):
    variant = flat_variant(write_notebook(tmp_path / "loud.ipynb", "print('begin')", LOUD, BARS), "loud", {})
    outcome = run_variant(variant, "plan", tmp_path / "runs")
    assert outcome.status == "finished", outcome
    notebook = thrifty(outcome.folder / "notebook.ipynb")
    short, long = (next(o.text for o in cell.outputs if o.get("name") == "stdout") for cell in notebook.cells[3:5])
    assert short == "begin\n"
    assert long.startswith("step 0 loss 1.0000\n")
    assert long.endswith("step 9999 loss 0.0001\n")
    printed = (outcome.folder / PRINTED).read_text().splitlines()
    assert [line for line in printed if line.startswith("step ")] == [
        f"step {step} loss {1 / (step + 1):.4f}" for step in range(10_000)
    ]


FLUSHED = """\
import os, signal, sys, time
from IPython.display import display
for step in range(4_000):
    print(f"step {step} of a long training", "." * 150, flush=True)
    if step % 50 == 0:
        print("a warning at", step, file=sys.stderr, flush=True)
        display(step)
        time.sleep(0.02)  # of a queue that is full the kernel drops some
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_cell_whose_kernel_is_killed_leaves_a_small_notebook_too(tmp_path):
    """nbclient merges what a cell printed where the cell ends, which this one does not."""
    variant = flat_variant(write_notebook(tmp_path / "loud.ipynb", FLUSHED), "loud", {})
    outcome = run_variant(variant, "plan", tmp_path / "runs")
    assert outcome.status == "killed", outcome
    notebook = thrifty(outcome.folder / "notebook.ipynb")
    died = next(cell for cell in notebook.cells if cell.get("outputs"))
    assert [each.ename for each in died.outputs if each.output_type == "error"] == ["KernelDied"]
    texts = {each.name: each.text for each in died.outputs if each.output_type == "stream"}
    assert texts["stdout"].startswith("step 0 of")
    assert " lines are left out here" in texts["stdout"]
    printed = (outcome.folder / PRINTED).read_text()
    assert printed.startswith("step 0 of")
    steps = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(steps) > 1_000
    assert steps == sorted(steps)


def stream(name: str, text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name=name, text=text)


def shown(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("display_data", {"text/plain": text, "text/html": f"<b>{text}</b>"})


def written(path: Path, *cells: list[nbformat.NotebookNode]) -> Path:
    """A notebook whose cells have these outputs."""
    made = [nbformat.v4.new_code_cell("work()", outputs=outputs) for outputs in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def test_many_small_pieces_become_one_for_each_stream(tmp_path):
    texts = [f"piece {n} {'x' * 60}\n" for n in range(2_000)]
    pieces = [stream(("stdout", "stderr")[number % 2], text) for number, text in enumerate(texts)]
    notebook = written(tmp_path / "notebook.ipynb", pieces)
    before = notebook.stat().st_size
    assert shorten_printed(notebook)
    assert thrifty(notebook) and notebook.stat().st_size < before / 3
    (cell,) = nbformat.read(notebook, as_version=4).cells
    assert [each.name for each in cell.outputs] == ["stdout", "stderr"]
    assert cell.outputs[1].text.startswith(texts[1] + texts[3])
    assert (tmp_path / PRINTED).read_text() == "".join(texts)  # as they came


def test_pieces_that_fit_are_merged_and_a_bar_keeps_its_last_state(tmp_path):
    pieces = [stream("stderr", f"\r{n}%") for n in range(100)] + [stream("stdout", "done\r\n"), stream("stderr", "\n")]
    notebook = written(tmp_path / "notebook.ipynb", pieces)
    assert not shorten_printed(notebook)
    (cell,) = nbformat.read(notebook, as_version=4).cells
    assert [(each.name, each.text) for each in cell.outputs] == [("stderr", "99%\n"), ("stdout", "done\r\n")]
    assert [path.name for path in tmp_path.iterdir()] == ["notebook.ipynb"]


def test_no_text_becomes_longer(tmp_path):
    """Five hundred cells with a line each: the line that says what is left out would take more."""
    notebook = written(tmp_path / "notebook.ipynb", *([stream("stdout", "e" * 250)] for _ in range(500)))
    before = notebook.read_bytes()
    assert not shorten_printed(notebook)
    assert notebook.read_bytes() == before


@pytest.mark.parametrize(("given", "kept"), [(30, 30), (31, 31), (37, 37), (38, 38), (39, 38)])
def test_figures_that_are_few_enough_all_stay(tmp_path, given, kept):
    notebook = written(tmp_path / "notebook.ipynb", [shown(f"figure {n}") for n in range(given)])
    assert shorten_printed(notebook) == (kept < given)
    assert len(thrifty(notebook).cells[0].outputs) == kept


def test_of_a_flood_of_tables_the_first_and_last_stay_and_every_error(tmp_path):
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="diverged")
    flood = [stream("stdout", "begin\n"), *(shown(f"table {n}") for n in range(200)), error]
    flood += [shown(f"late {n}") for n in range(200)]
    few = [shown(f"figure {n}") for n in range(3)]
    large = [shown("large " + "x" * 20_000) for _ in range(50)]
    notebook = written(tmp_path / "notebook.ipynb", few, flood, large)
    assert shorten_printed(notebook)
    calm, thinned, small = (cell.outputs for cell in thrifty(notebook).cells)
    assert calm == few
    assert sum(each == error for each in thinned) == 1
    told = [each.data["text/plain"] for each in thinned if "data" in each]
    assert (told[0], told[-1]) == ("table 0", "late 199")
    assert f"[... {400 - (len(told) - 1)} outputs are left out here ...]" in told
    assert 3 <= len(small) < 10
    printed = (tmp_path / PRINTED).read_text()
    assert "table 199\nlate 0\n" in printed
    assert "<b>" not in printed


def executed(path: Path, *printed: str) -> Path:
    """A notebook whose cells printed these texts."""
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in printed]
    cells = [nbformat.v4.new_code_cell("print()", outputs=[each]) for each in outputs]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def texts(path: Path) -> list[str]:
    return [cell.outputs[0].text for cell in nbformat.read(path, as_version=4).cells]


def test_what_fits_stays_as_it_is(tmp_path):
    notebook = executed(tmp_path / "notebook.ipynb", "a\n" * 5_000, "b" * 10_000)
    before = notebook.read_bytes()
    assert not shorten_printed(notebook)
    assert notebook.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["notebook.ipynb"]


def test_the_long_outputs_are_shortened_and_kept_whole_beside(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(20_000))
    given = ("short\n" * 100, lines, "é" * 300_000, lines)
    notebook = executed(tmp_path / "notebook.ipynb", *given)
    assert shorten_printed(notebook)
    short, many, one, again = texts(notebook)
    assert short == given[0]
    assert many == again
    head, told, tail = many.partition("[... ")
    count, _, tail = tail.partition(" lines are left out here; printed.txt beside this notebook has all ...]\n")
    assert told
    assert lines.startswith(head)
    assert lines.endswith(tail)
    assert head.count("\n") + int(count.replace(",", "")) + tail.count("\n") == 20_000
    assert min(head.count("\n"), tail.count("\n")) > 500
    assert one.startswith("ééé")
    assert "characters are left out here" in one
    assert 0.8 * BUDGET < notebook.stat().st_size < 1.05 * BUDGET
    assert (tmp_path / PRINTED).read_text(encoding="utf-8") == "".join(given)
    assert not shorten_printed(notebook)


def test_a_notebook_is_as_it_was_where_the_rest_cannot_be_kept(tmp_path):
    notebook = executed(tmp_path / "notebook.ipynb", "a line\n" * 50_000)
    (tmp_path / PRINTED).mkdir()
    before = notebook.read_bytes()
    with pytest.raises(OSError):
        shorten_printed(notebook)
    assert notebook.read_bytes() == before
