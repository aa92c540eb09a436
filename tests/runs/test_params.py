"""The parameters cell as a schema: what it says, what it takes, what it refuses and in which words."""

from __future__ import annotations

import json
import math

import pytest
from tiny_notebooks import write_notebook

from nbutils.foundation.errors import ParameterError
from nbutils.foundation.places import NOTEBOOKS
from nbutils.runs.params import read_schema, source_sha256

CELL = """\
# the objective
alpha: float = 0.5  # weight of the cosine term, in [0, 1]
temperature: float = 1  # divides the logits, > 0
beta: float = 0.9  # of AdamW, in [0, 1)
max_steps: int = 0  # optimiser steps, at least 0; 0 means by epochs
lengths: list[int] = [8, 16]  # block lengths, >= 2
split: str = "hash"  # one of hash, given, or contiguous: how documents are divided
bits: int = 16  # one of 8, 16
from_scratch: bool = True  # random weights
text_field: str = "text # not a comment"  # column to read
names: list[str] = []  # of anything
layers: int = (
    2  # of the model
)
"""


@pytest.fixture
def schema(tmp_path):
    return read_schema(write_notebook(tmp_path / "05_study.ipynb", parameters=CELL))


def test_every_line_is_read(schema):
    read = {p.name: (p.type, p.default) for p in schema.parameters.values()}
    assert read["alpha"] == ("float", 0.5)
    assert read["temperature"] == ("float", 1.0)
    assert isinstance(read["temperature"][1], float)
    assert read["lengths"] == ("list[int]", [8, 16])
    assert read["text_field"] == ("str", "text # not a comment")
    assert read["layers"] == ("int", 2)
    assert schema.parameters["split"].help == "one of hash, given, or contiguous: how documents are divided"
    assert schema.parameters["layers"].help == "of the model"
    assert list(read)[:3] == ["alpha", "temperature", "beta"]


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_papermill_explains_every_parameter_of_every_notebook(notebook):
    """A second `=` in a line, as in `>= 1`, and papermill leaves the line out: `at least 1` says the same."""
    from papermill import inspect_notebook

    theirs = inspect_notebook(str(notebook))
    assert {name: p.help for name, p in read_schema(notebook).parameters.items()} == {
        name: parameter["help"] for name, parameter in theirs.items()
    }
    assert all(parameter["help"] for parameter in theirs.values())


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("alpha", "1e-4", 1e-4),
        ("alpha", 1, 1.0),
        ("alpha", 0, 0.0),
        ("max_steps", 1000.0, 1000),
        ("max_steps", "1e3", 1000),
        ("max_steps", "12", 12),
        ("max_steps", str(2**60 + 1), 2**60 + 1),
        ("from_scratch", "true", True),
        ("from_scratch", "False", False),
        ("from_scratch", "off", False),
        ("split", "given", "given"),
        ("split", "contiguous", "contiguous"),
        ("bits", "8", 8),
        ("lengths", ["4", 8.0], [4, 8]),
        ("names", [], []),
    ],
)
def test_values_arrive_in_the_declared_type(schema, name, given, expected):
    value = schema.convert({name: given})[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("alpha", "half", "must be a float; given 'half' (str)"),
        ("alpha", 1.5, "must be >= 0 and <= 1; given 1.5 (float)"),
        ("alpha", math.nan, "must be a float that is finite; given nan"),
        ("alpha", "1e999", "finite"),
        ("alpha", 10**400, "must be a float"),
        ("alpha", True, "must be a float; given True (bool)"),
        ("alpha", None, "must be a float; given None"),
        ("alpha", [0.5], "must be a float"),
        ("beta", 1.0, "must be >= 0 and < 1"),
        ("temperature", 0, "must be > 0"),
        ("max_steps", 1.5, "must be an int; given 1.5"),
        ("max_steps", True, "must be an int"),
        ("max_steps", -1, "must be at least 0"),
        ("from_scratch", 1, "must be true or false; given 1 (int)"),
        ("from_scratch", "maybe", "must be true or false"),
        ("split", "hsah", "must be one of hash, given, contiguous. Did you mean 'hash'?"),
        ("split", False, "must be text: put it in quotes; given False (bool)"),
        ("bits", 4, "must be one of 8, 16"),
        ("lengths", 8, "must be a list[int], written [a, b]"),
        ("lengths", [8, 1], "must be >= 2"),
        ("lengths", [8, "x"], "must be an int"),
    ],
)
def test_what_does_not_fit_is_refused_with_cause(schema, name, given, words):
    with pytest.raises(ParameterError) as error:
        schema.convert({name: given})
    message = str(error.value)
    assert message.startswith(f"05_study: parameter {name!r} ")
    assert words in message


def test_unknown_names_get_the_nearest(schema):
    with pytest.raises(ParameterError, match=r"05_study has no parameter 'alhpa' \(given 0.5 \(float\)\). .*'alpha'\?"):
        schema.convert({"alhpa": 0.5})


@pytest.mark.parametrize("key", ["import os; x", "alpha\nimport os", "", "alpha ", 3, None, "__class__"])
def test_keys_that_are_no_parameter_never_reach_the_notebook(schema, key):
    """papermill pastes keys into the notebook as they are: `import os; os.system(...); x = 1` would run."""
    with pytest.raises(ParameterError, match="has no parameter"):
        schema.convert({key: 1})


def test_resolve_fills_in_defaults_and_leaves_them_alone(schema):
    values = schema.resolve({"alpha": "0.25"})
    assert (values["alpha"], values["max_steps"]) == (0.25, 0)
    assert values.keys() == schema.parameters.keys()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("alpha = 0.5", r"`alpha = 0.5` is not of the form"),
        ("alpha: float", "is not of the form"),
        ("import os", "is not of the form"),
        ("alpha: dict = {}", r"has no type that is known here: int, float, bool, str, or list"),
        ("alpha: float = 1 / 2", "needs a plain value"),
        ("alpha: float = 2.0  # in [0, 1]", "has a default that its own line refuses: it must be >= 0 and <= 1"),
        ("alpha: int = 'a'", "must be an int"),
        ("alpha: int = 1\nalpha: int = 2", "stands there twice"),
        ("alpha: float = ", "is not Python"),
        ("%matplotlib inline", "is not Python"),
    ],
)
def test_a_cell_that_is_no_schema_is_refused(tmp_path, cell, words):
    with pytest.raises(ParameterError, match=words):
        read_schema(write_notebook(tmp_path / "a.ipynb", parameters=cell))


def test_a_notebook_without_the_tag_is_refused(tmp_path):
    """papermill then injects at the top and the notebook's own values win: every variant would be the default."""
    path = write_notebook(tmp_path / "a.ipynb", "alpha = 1", parameters=None)
    with pytest.raises(ParameterError, match=r"0 cells tagged 'parameters' and needs one"):
        read_schema(path)
    cells = json.loads(write_notebook(path, "x: int = 1").read_text())
    cells["cells"][2]["metadata"]["tags"] = ["parameters"]
    path.write_text(json.dumps(cells))
    with pytest.raises(ParameterError, match="2 cells tagged"):
        read_schema(path)


def test_outputs_metadata_and_prose_do_not_change_the_source_hash(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "x = 1")
    before = source_sha256(path)
    content = json.loads(path.read_text())
    content["cells"][0]["source"] = "# Other words"
    content["cells"][2] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}], "execution_count": 7}
    content["metadata"]["papermill"] = {"exception": None}
    path.write_text(json.dumps(content))
    assert source_sha256(path) == before
    content["cells"][2]["source"] = ["x = ", "2"]
    path.write_text(json.dumps(content))
    assert source_sha256(path) != before
