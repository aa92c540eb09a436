"""When a run is the same run: what changes its key and what does not."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial

import pytest
from tiny_notebooks import write_notebook

from nbutils.foundation.errors import CorpusError
from nbutils.foundation.places import ROOT
from nbutils.interaction import prompts
from nbutils.runs import keys
from nbutils.runs.keys import code_hashes, made_of, read_inputs, run_key, what_changed
from nbutils.runs.manifest import begin
from nbutils.runs.params import find_notebook
from nbutils.runs.plans import Variant


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "study.ipynb", "x = 1")


def key(notebook, **params):
    return run_key(made_of(notebook, params))


def test_the_key_is_of_parameters_and_source(notebook):
    base = key(notebook, alpha=0.5, seed=1)
    assert base == key(notebook, seed=1, alpha=0.5)
    assert base == key(notebook, seed=1, alpha=0.5, run_folder="somewhere/else")
    assert base != key(notebook, alpha=0.5, seed=2)
    assert base != key(notebook, alpha=0.5)
    write_notebook(notebook, "x = 2")
    assert base != key(notebook, alpha=0.5, seed=1)


PACKAGE = {
    "__init__.py": "",
    "objectives/__init__.py": "import lazy_loader\n\n__getattr__, __dir__, __all__ = lazy_loader.attach(\n"
    '    __name__, submod_attrs={"head": ["Head"], "whole": ["run"], "terms.cosine": ["Cosine"]}\n)\n',
    "objectives/head.py": "from nbutils.models import products\n",
    "objectives/terms/__init__.py": "",
    "objectives/terms/cosine.py": "from nbutils.objectives.head import Head\n",
    "objectives/terms/mine.py": "@register('my_penalty')\nclass Mine: ...\n",
    "objectives/whole.py": "",
    "models/__init__.py": "",
    "models/products.py": "from nbutils.foundation.files import now\n",
    "evaluation/harness/__init__.py": "from nbutils.evaluation.harness.run import tasks\n",
    "evaluation/harness/run.py": "",
    "evaluation/harness/tasks/one.yaml": "a: 1\n",
    "interaction/__init__.py": "",
    "interaction/rounds.py": "from nbutils.objectives.head import Head\n",
    "foundation/files.py": "",
    "report/figures.py": "from nbutils.interaction import rounds\n",
    "batch/batch.py": "",
}
STUDY = """%matplotlib inline
from typing import TYPE_CHECKING
from nbutils.objectives import Cosine
from nbutils.report import figures
def later():
    from nbutils.evaluation.harness import tasks
if TYPE_CHECKING:
    from nbutils.interaction.rounds import Round
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small nbutils with rooms, a door, a term that nobody imports, and tasks beside their reader."""
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    for name, text in PACKAGE.items():
        path = tmp_path / "nbutils" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "nbutils"


def test_only_what_the_notebook_imports_and_decides_numbers_is_in_the_key(package, tmp_path):
    study = write_notebook(tmp_path / "study.ipynb", STUDY)
    decides = {
        "objectives/head.py",
        "objectives/terms/cosine.py",
        "models/products.py",
        "evaluation/harness/run.py",
        "evaluation/harness/tasks/one.yaml",
    }
    assert code_hashes(study).keys() == {f"nbutils/{name}" for name in decides}
    before = made_of(study, {"seed": 1})
    (package / "objectives" / "new.py").write_text("x = 1")
    for name in PACKAGE.keys() - decides:
        (package / name).write_text(PACKAGE[name] + "\n# edited")
    assert made_of(study, {"seed": 1}) == before
    for name in decides:
        (package / name).write_text(PACKAGE[name] + "# edited")
        assert what_changed(before, made_of(study, {"seed": 1})) == f"code: {name}"
        (package / name).write_text(PACKAGE[name])


def test_a_term_that_the_parameters_name_is_in_the_key(package, tmp_path):
    study = write_notebook(tmp_path / "study.ipynb", STUDY)
    plain = code_hashes(study)
    named = code_hashes(study, {"terms": ["cosine 0.5", "my_penalty 0.1"]})
    assert named.keys() - plain.keys() == {"nbutils/objectives/terms/mine.py"}
    own = tmp_path / "own.py"
    own.write_text("from nbutils.interaction import rounds\n")
    params = {"terms": [f"{own} 0.1"]}
    before = code_hashes(study, params)
    assert before.keys() - plain.keys() == {"own.py", "nbutils/interaction/rounds.py"}
    own.write_text("from nbutils.interaction import rounds  # edited\n")
    assert code_hashes(study, params)["own.py"] != before["own.py"]


def test_of_a_room_that_is_imported_whole_only_what_is_taken_from_it_counts(package, tmp_path):
    study = write_notebook(tmp_path / "study.ipynb", "from nbutils import objectives as o\no.run()")
    assert code_hashes(study).keys() == {"nbutils/objectives/whole.py"}


def test_what_changed_is_said_by_name(notebook, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    params = {"dataset_name": "text", "data_files": str(text), "alpha": 0.5}
    before = made_of(notebook, params)
    assert what_changed(before, made_of(notebook, params)) == ""
    assert what_changed(before, made_of(notebook, params | {"alpha": 0.7})) == "alpha was 0.5 and is 0.7"
    text.write_text("two")
    assert what_changed(before, made_of(notebook, params)) == "the corpus: files"
    assert "earlier version" in what_changed(None, before)


@pytest.mark.parametrize(("edited", "stale"), [("objectives/head.py", True), ("interaction/rounds.py", False)])
def test_an_edit_of_the_real_head_is_named_and_of_another_study_is_not(tmp_path, monkeypatch, edited, stale):
    shutil.copytree(ROOT / "nbutils", tmp_path / "nbutils", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    study = find_notebook("04_cosine_mixing")
    before = made_of(study, {})
    path = tmp_path / "nbutils" / edited
    path.write_text(path.read_text() + "# edited\n")
    (tmp_path / "nbutils" / "objectives" / "terms" / "brand_new.py").write_text("")
    assert what_changed(before, made_of(study, {})) == (f"code: {edited}" if stale else "")


def test_the_key_is_of_the_content_of_data_files(notebook, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    params = {"dataset_name": "text", "data_files": str(tmp_path / "*.txt")}
    base = key(notebook, **params)
    text.write_text("two")
    assert key(notebook, **params) != base
    text.write_text("one")
    os.utime(text, (1, 1))
    assert key(notebook, **params) == base
    (tmp_path / "b.txt").write_text("three")
    assert key(notebook, **params) != base
    with pytest.raises(CorpusError, match="matches no file"):
        key(notebook, dataset_name="text", data_files=str(tmp_path / "*.md"))


def test_the_key_is_of_what_lies_in_a_folder_and_not_of_where_it_lies(notebook, tmp_path):
    for name, fingerprint in (("one", "abc"), ("two", "abc"), ("three", "def")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "card.json").write_text(json.dumps({"fingerprint": fingerprint}))
    one, two, three = (key(notebook, data_folder=str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three
    model = tmp_path / "teacher" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"1")
    params = {"model_name": str(tmp_path / "teacher")}  # a folder under a name that does not end in _folder
    base = key(notebook, **params)
    (model / "model.safetensors").write_bytes(b"2")
    assert key(notebook, **params) != base
    assert read_inputs({"model_name": "distilgpt2", "text": "a/b"}) == {}


@pytest.mark.parametrize("who", ["judge", "correcting_teacher"])
def test_the_model_of_a_server_is_part_of_the_key_and_the_manifest_says_it(notebook, tmp_path, monkeypatch, who):
    params = {"rubric": "weekly", "judge": "rule", "second_judge": "rule_plain", "correcting_teacher": "human"}
    found = []
    for model, url in (("judge-8b", "http://a/v1"), ("judge-8b", "http://b/v1"), ("judge-70b", "http://a/v1")):
        monkeypatch.setenv("WORKBOOK_JUDGE_MODEL", model)
        monkeypatch.setenv("WORKBOOK_JUDGE_URL", url)
        found.append((key(notebook, **params), key(notebook, **params | {who: "server"})))
    assert len({without for without, _ in found}) == 1
    served = [each for _, each in found]
    assert served[0] == served[1] != served[2]
    variant = Variant("variant", "stage", notebook, params | {who: "server"})
    (tmp_path / "run").mkdir()
    told = begin(tmp_path / "run", "plan", variant, [])["prompts"]
    assert told["server_model"] == "judge-70b" and len(told["rubric"]) == 64


@pytest.mark.parametrize(
    ("file", "word"),
    [("judge-weekly", "careful"), ("judge-story", "strict"), ("story", "magical"), ("correction", "relevant")],
)
def test_the_key_is_of_every_prompt_that_is_asked_not_only_of_the_rubric_learned_by(
    notebook, tmp_path, monkeypatch, file, word
):
    folder = shutil.copytree(prompts.FOLDER, tmp_path / "prompts")
    for name in ("read_rubric", "read_correction", "read_story"):
        monkeypatch.setattr(prompts, name, partial(getattr(prompts, name), folder=folder))
    params = {"rubric": "weekly", "judge": "rule"}
    before = key(notebook, **params)
    path = folder / f"{file}.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text("# a remark\n" + text, encoding="utf-8")
    assert key(notebook, **params) == before
    assert word in text
    path.write_text(text.replace(word, "other"), encoding="utf-8")
    assert key(notebook, **params) != before
