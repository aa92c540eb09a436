"""A student whose loss is known, for the tests of the search: its notebook, and how a search of it is made."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_notebooks import write_notebook, write_plan

from nbutils.search import Search, SearchConfig, read_space
from nbutils.search.study import PARAMS, SharedStudy

PARAMETERS = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
divergence: str = "forward"  # one of none, forward: what is trained on
learning_rate: float = 1e-3  # > 0
kl_weight: float = 0.5  # in [0, 1]
layers: int = 2  # at least 1
names: list[str] = []  # of anything
seconds: float = 0.0  # between evaluations, at least 0
evaluate_test: bool = True  # judge the test split too
seed: int = 0  # at least 0
"""
# The loss has its minimum, 1, at a learning rate of 1e-3 and a weight of 0.3; it falls over four evaluations.
TRAINING = """\
import json, math, os, time
floor = 1 + (math.log10(learning_rate) + 3) ** 2 + (kl_weight - 0.3) ** 2
if data_folder and not os.path.isfile(os.path.join(data_folder, "made")):
    raise OSError("no data")
with open(run_folder + "/metrics.csv", "w") as file:
    file.write("step,loss,eval_ce_loss\\n")
    for step in (10, 20, 30, 40):
        file.write(f"{step - 5},9,\\n{step},,{floor + 4 / step - 0.1 + (step == 40) * 0.05}\\n")
        file.flush()
        time.sleep(seconds)
os.mkdir(run_folder + "/model")
result = {"eval_ce_loss": floor + 0.05}
if evaluate_test:
    result["test_ce_loss"] = -5.0
json.dump(result, open(run_folder + "/result.json", "w"))
"""
SPACE = ["learning_rate: 1e-5..1e-1 log", "kl_weight: 0..1"]


PLAN = """\
name: study
stages:
  - {name: data, notebook: {here}/data.ipynb}
  - name: student
    notebook: {here}/student.ipynb
    needs: {data_folder: data}
    params: {layers: 4}
    matrix: {divergence: [none, forward], seed: [5, 6]}
"""


def write_student(folder: Path) -> Path:
    """The student's notebook."""
    return write_notebook(folder / "student.ipynb", TRAINING, parameters=PARAMETERS)


def write_study(folder: Path) -> str:
    """A plan with a stage that makes data and one that trains the student on them."""
    write_student(folder)
    write_notebook(folder / "data.ipynb", "open(run_folder + '/made', 'w').close()", parameters=PARAMETERS)
    return str(write_plan(folder / "study.yaml", PLAN))


@contextmanager
def refused(kind: type[Exception], text: str):
    """This error, whose message holds `text`."""
    with pytest.raises(kind) as caught:
        yield
    assert text in str(caught.value)


def loss(params) -> float:
    return 1 + (math.log10(params["learning_rate"]) + 3) ** 2 + (params["kl_weight"] - 0.3) ** 2


def search_for(path: Path, setting, lines=SPACE, **config) -> Search:
    return Search(path, setting, read_space(lines, setting), SearchConfig(**config))


def tried(shared: SharedStudy) -> list[dict]:
    return [trial.user_attrs[PARAMS] for trial in shared.counted()]
