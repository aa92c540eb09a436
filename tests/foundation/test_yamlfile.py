"""YAML as people write it: what it means, and what is no YAML told by its line and without repeating the file."""

from __future__ import annotations

import pytest

from nbutils.foundation.errors import PlanError
from nbutils.foundation.yaml_files import read_yaml
from nbutils.runs.plans import load_plan


def test_yaml_means_what_people_write(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1e-4\nb: off\nc: 010\nd: 1:30\ne: true\nf: 2026-11-20\ng: &x {h: 1}\ni: {<<: *x, j: 2}\nk:\n")
    assert read_yaml(file) == {
        **{"a": 1e-4, "b": "off", "c": 10, "d": "1:30", "e": True, "f": "2026-11-20"},
        **{"g": {"h": 1}, "i": {"h": 1, "j": 2}, "k": None},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: quick\nstages: [a, b\n", "bad.yaml, line 3, column 1, is not YAML"),
        ("name: quick\nname: other\n", "line 2, column 1, is not YAML: 'name' stands here a second time"),
        ("name: \tquick", "line 1"),
        ("a: &x !!python/object:os.system {}", "line 1"),
        ("- a\n", "is \\['a'\\]. Give a mapping"),
        ("", "is None. Give a mapping"),
        (b"name: \xff\xfe", "is not UTF-8 text \\(byte 6\\)"),
        (b"name: \x00", "is not YAML"),
    ],
)
def test_what_is_no_yaml_is_told_by_line(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=words) as error:
        load_plan(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * 900, "Give a mapping with the keys name"),
        (f"name: quick\nstages: {'x' * 900}\n", "Give a list"),
        (f"name: quick\n{'x' * 900}: 1\n", "has no key"),
        (f"{'x' * 900}: 1\n" * 2, "stands here a second time"),
        (f"name: *{'x' * 900}\n", "found undefined alias"),
    ],
)
def test_an_error_does_not_repeat_the_file(tmp_path, text, words):
    (tmp_path / "long.yaml").write_text(text)
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "long.yaml")
    assert words in str(caught.value) and "x" * 101 not in str(caught.value)
