"""How the numbers of two runs are compared, and how what else is different is told in few lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nbutils.batch.differences import changes, compare_columns, compare_runs, in_few, listed, relative_difference
from nbutils.runs.run_folder import RESULTS

SIZES = [
    (1, 1.0, 0),
    (None, None, 0),
    (float("nan"), float("nan"), 0),
    (2.0, 1.0, 0.5),
    ("0.10", "0.1", float("inf")),
    (0.0, 1e-9, 1.0),
    ([1, 4], [1, 3], 0.25),
    ([1], [1, 2], float("inf")),
    ([1, float("nan")], [1, float("nan")], 0),
    ({"a": [float("nan")], "b": 4}, {"a": [float("nan")], "b": 3}, 0.25),
    ({"a": 1}, {"b": 1}, float("inf")),
    (None, 1.0, float("inf")),
    ("a", "b", float("inf")),
    (float("inf"), 1.0, float("inf")),
    (True, False, float("inf")),
]


@pytest.mark.parametrize(("first", "second", "size"), SIZES)
def test_the_size_of_a_difference(first, second, size):
    assert relative_difference(first, second) == size


def test_missing_and_shorter_columns_are_differences():
    difference = compare_columns("f", "columns", {"a": [1, 2], "b": [1], "c": [0.0]}, {"a": [1], "c": [0.0], "d": [1]})
    assert difference.differing == ("a", "b") and difference.added == ("d",) and not difference.same
    assert difference.where == "a has 1 rows, not 2"


def test_numbers_are_compared_by_value(tmp_path):
    for side, cells in (("one", "0.10,5,nan,a"), ("other", "0.1,5.0,nan,a")):
        (tmp_path / side).mkdir()
        (tmp_path / side / "manifest.json").write_text("{}")
        (tmp_path / side / "metrics.csv").write_text(f"loss,steps,lost,split\n{cells}\n")
        (tmp_path / side / "samples.jsonl").write_text('{"curve": [NaN, 1.0], "text": "a\u2028b"}\n')
    metrics, samples = compare_runs(tmp_path / "one", tmp_path / "other")
    assert metrics.same and metrics.compared == 4 and samples.same and samples.compared == 2
    (tmp_path / "other" / "samples.jsonl").write_text('{"curve": [NaN, 2.0], "text": "a\u2028b"}\n')
    assert compare_runs(tmp_path / "one", tmp_path / "other")[1].largest == 0.5


def write_table(file: Path, number: float) -> None:
    """A file with one number in the form that its name says."""
    if file.suffix == ".parquet":
        pd.DataFrame({"number": [number]}).to_parquet(file)
    elif file.suffix == ".npz":
        np.savez(file, number=np.array(number))
    elif file.suffix == ".csv":
        file.write_text(f"number\n{number}\n")
    else:
        file.write_text(json.dumps({"number": number}) + "\n")


@pytest.mark.parametrize("name", RESULTS)
def test_every_file_that_a_run_may_leave_is_compared(tmp_path, name):
    for side, number in (("one", 1.0), ("same", 1.0), ("other", 2.0), ("none", None)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "manifest.json").write_text("{}")
        if number:
            write_table(tmp_path / side / name, number)
    (same,) = compare_runs(tmp_path / "one", tmp_path / "same")
    (other,) = compare_runs(tmp_path / "one", tmp_path / "other")
    (gone,) = compare_runs(tmp_path / "one", tmp_path / "none")
    assert (same.file, same.compared, same.same) == (name, 1, True)
    assert (other.largest, other.where) == (0.5, "number: 1.0 → 2.0") and gone.where == "number is missing"


def test_weights_are_compared_bit_by_bit(tmp_path):
    import torch
    from safetensors.torch import save_file

    for side, last in (("one", 1.0), ("same", 1.0), ("other", 0.75)):
        (tmp_path / side / "model").mkdir(parents=True)
        (tmp_path / side / "manifest.json").write_text("{}")
        weights = {"head": torch.tensor([0.5, last]), "body": torch.ones(2)}
        save_file(weights, tmp_path / side / "model" / "model.safetensors")
    (same,) = compare_runs(tmp_path / "one", tmp_path / "same")
    (other,) = compare_runs(tmp_path / "one", tmp_path / "other")
    assert same.same and same.what.startswith("bytes, SHA-256")
    assert (other.differing, other.largest, other.where) == (("head",), 0.25, "head")


def test_few_lines_tell_parameters_first_and_packages_last():
    packages = {f"both{number}": "1" for number in range(8)}
    first = {"params": {"alpha": 0.5}, "packages": packages | {"old": "1"}, "hardware": {"cores": 2}}
    now = {name: "2" for name in packages} | {f"new-package-{number}": "1" for number in range(9)}
    second = {"params": {"alpha": 1.0, "task": "lm"}, "packages": now, "hardware": {"cores": 4}}
    rows, more = in_few(changes([first], [second]), 20)
    assert [row.what for row in rows] == [
        "parameter alpha",
        "parameter task",
        "cores",
        *(f"package both{number}" for number in range(5)),
        "further packages",
        "packages of one side alone",
    ]
    assert (rows[-2].first, more) == ("3 of another version", 0)
    assert (rows[-1].first, rows[-1].second) == ("1 (old)", "9 (new-package-0 and 8 more)")
    rows, more = in_few(changes([first], [second]), 1)
    assert (rows[0].what, rows[1].what, more) == ("parameter alpha", "package both0", 2)


def test_lists_of_names_end_at_a_name():
    names = ["alpha", "beta", "gamma"]
    assert listed(names, 18) == "alpha, beta, gamma" and listed(names, 17) == "alpha and 2 more"
    assert listed(["a" * 30, "b"], 20) == "aaaaaaaa… and 1 more"
    assert listed([], 10) == ""
