"""Corpora: python -m pytest tests/test_corpora.py"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_data import REAL_DATA, needs_real_data

from nbutils.data import corpora, pydoc_corpus
from nbutils.data.corpora import Document, locate_corpus
from nbutils.data.sources import CorpusRequest
from nbutils.data.text_corpora import articles
from nbutils.foundation.errors import CorpusError

ARTICLES = {
    "train": " \n = First = \n \n Text . \n = = Part = = \n \n More . \n Pld \n = Played , W = \n Won . \n"
    " Key \n = Ties , L = \n \n = Goals ; A = \n Assists \n"
    " \n = Second = \n \n End . \n",
    "valid": " \n = Only one = \n \n Words . \n",
    "test": "\n = A = b = \n \n Equals signs inside . \n \n",
}


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    for split, text in ARTICLES.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    return tmp_path


def read_corpus(dataset_name: str, data_files: str = "", **limits: int) -> list[Document]:
    return corpora.read_corpus(CorpusRequest(dataset_name, data_files, **limits)).documents


def check_corpus(dataset_name: str, data_files: str = "") -> None:
    corpora.check_corpus(CorpusRequest(dataset_name, data_files))


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())


# ---- pydoc


def test_pydoc_documents_are_the_modules_docstrings() -> None:
    documents = {document.name: document.text for document in read_corpus("pydoc", max_documents=300)}
    name = next(name for name in documents if name in sys.stdlib_module_names and name != "antigravity")
    tree = ast.parse(Path(__import__(name).__file__).read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    assert sorted(documents[name].split()) == sorted(" ".join(filter(None, expected)).split())


def test_docstrings_come_in_the_order_of_the_source(tmp_path: Path) -> None:
    source = (
        '"""1"""\nclass A:\n  "2"\n  if 1:\n    async def f(self):\n      "3"\n      def g(): "4"\ndef h():\n  "5"\n'
    )
    (tmp_path / "module.py").write_text(source)
    assert pydoc_corpus._docstrings(tmp_path / "module.py") == ["1", "2", "3", "4", "5"]


def test_docstrings_can_be_encoded_and_unreadable_source_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "surrogate.py").write_text('"half a pair: \\ud800"')
    (tmp_path / "other_python.py").write_text('"""Kept?"""\nprint 1')
    assert pydoc_corpus._docstrings(tmp_path / "surrogate.py") == ["half a pair: ?"]
    assert pydoc_corpus._docstrings(tmp_path / "other_python.py") == []


def test_pydoc_is_a_fixed_sample_and_imports_no_package() -> None:
    script = (
        "import sys; from nbutils.data.corpora import CorpusRequest, read_corpus;"
        "documents = read_corpus(CorpusRequest('pydoc', max_documents=30)).documents;"
        "print(*(document.name for document in documents));"
        "print({'torch', 'numpy', 'pandas', 'matplotlib', 'nltk'} & set(sys.modules))"
    )
    outputs = []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.check_output([sys.executable, "-c", script], text=True, env=environment))
    assert outputs[0] == outputs[1]
    names, imported = outputs[0].splitlines()
    assert imported == "set()"
    sample, longer = names.split(), [document.name for document in read_corpus("pydoc", max_documents=60)]
    assert longer[:30] == sample and len(longer) == 60
    assert {name.split(".")[0] for name in longer} >= {"torch", "pandas"}  # not only what comes first by name


def test_pydoc_leaves_tests_out() -> None:
    modules = pydoc_corpus._module_files(*locate_corpus(CorpusRequest("pydoc"))[1].files)
    assert not [name for name in modules if "tests" in name.split(".")]
    assert {"statistics", "os", "json.decoder", "torch.nn.functional", "numpy", "nltk.tokenize"} <= modules.keys()
    assert modules["numpy"].name == "__init__.py"


def test_versions_are_those_of_the_documentation_not_of_the_build() -> None:
    versions = corpora.corpus_versions("pydoc")
    assert versions.keys() == {"python", *pydoc_corpus.PYDOC_PACKAGES}
    assert all(version.replace(".", "").isalnum() for version in versions.values())
    assert corpora.corpus_versions("text") == {}


def test_pydoc_without_one_of_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydoc_corpus, "PYDOC_PACKAGES", ("no_such_package",))
    with pytest.raises(CorpusError, match=r"needs the package 'no_such_package'.*pip install"):
        check_corpus("pydoc")


# ---- text, big_text


def test_text_reads_files_folders_and_globs_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, b="second", a=b"\xef\xbb\xbfmark dropped\r\nline ends kept")
    write(tmp_path / "sub", c="third")
    (tmp_path / "notes.md").write_text("not text")
    everything = [("a.txt", "mark dropped\r\nline ends kept"), ("b.txt", "second"), ("sub/c.txt", "third")]
    assert [(d.name, d.text) for d in read_corpus("text", str(tmp_path))] == everything
    assert [(d.name, d.text) for d in read_corpus("text", f"{tmp_path}/*.txt")] == everything[:2]
    assert [(d.name, d.text) for d in read_corpus("text", f"{tmp_path}/sub/c.txt")] == [("c.txt", "third")]
    assert [d.name for d in read_corpus("text", str(tmp_path), max_documents=1)] == ["a.txt"]


def test_relative_paths_start_at_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_corpus("big_text", "nbutils/data/corpora.py")[0].text == Path(corpora.__file__).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\0\0", "null bytes.*binary file or UTF-16"),
        ("Stra\xdfe".encode("latin-1"), "not UTF-8 text: byte 4 is 0xdf.*iconv"),
        (b" \n\n", "has no text.*one.txt is empty"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, one=content)
    with pytest.raises(CorpusError, match=message):
        read_corpus("text", str(tmp_path))


@pytest.mark.parametrize(
    ("dataset_name", "data_files", "message"),
    [
        ("pydocs", "", "Did you mean 'pydoc'"),
        ("pydoc", "a.txt", "reads no files.*Leave data_files empty"),
        ("text", "", "data_files is empty"),
        ("text", "nowhere/*.txt", "matches no file.*repository's root"),
        ("wikitext", "no_such_folder", "needs data_files to be a folder"),
    ],
)
def test_what_cannot_be_read_is_told_before_reading(dataset_name: str, data_files: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        check_corpus(dataset_name, data_files)


def test_empty_files_are_told_before_a_kernel_starts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match=r"has no text: .*empty.txt is empty. Point data_files at files"):
        corpora.check_corpus(CorpusRequest(dataset_name="text", data_files=str(tmp_path / "*.txt")))


def test_big_text_joins_the_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, a="one\n", c="no line end", b="two\r\nthree\n", d="\nlast")
    (document,) = read_corpus("big_text", str(tmp_path))
    assert (document.name, document.text) == ("4 files joined", "one\ntwo\r\nthree\nno line end\n\nlast")
    assert read_corpus("big_text", str(tmp_path / "a.txt")) == [Document("a.txt", "one\n")]


# ---- wikitext


def test_wikitext_regroups_lines_into_articles(wikitext: Path) -> None:
    documents = read_corpus("wikitext", str(wikitext))
    assert [(d.split, d.name) for d in documents] == [
        ("train", "train/0 First"),
        ("train", "train/1 Second"),  # sections and lines of a table's legend start no article
        ("validation", "validation/0 Only one"),
        ("test", "test/0 A = b"),
    ]
    for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert "".join(d.text for d in documents if d.split == split) == ARTICLES[file]


def test_the_cap_holds_for_each_given_split(wikitext: Path) -> None:
    assert [d.split for d in read_corpus("wikitext", str(wikitext), max_documents=1)] == ["train", "validation", "test"]


def test_articles_are_read_as_they_come() -> None:
    def endless() -> Iterator[str]:
        yield from (" \n", " = One = \n", " \n", " Text . \n", " \n", " = Two = \n", " \n")
        raise AssertionError("read on")

    stream = articles(endless(), "train", "here")
    assert next(stream).text == " \n = One = \n \n Text . \n \n"


def test_wikitext_folders_that_are_none(wikitext: Path) -> None:
    (wikitext / "wiki.test.tokens").write_text("no titles here\n")
    with pytest.raises(CorpusError, match=r"has no ` = Title = ` line"):
        read_corpus("wikitext", str(wikitext))
    (wikitext / "test.txt").write_text(ARTICLES["test"])
    with pytest.raises(CorpusError, match="both claim the test split"):
        check_corpus("wikitext", str(wikitext))
    for file in wikitext.glob("*test*"):
        file.unlink()
    with pytest.raises(CorpusError, match=r"has no file for test"):
        check_corpus("wikitext", str(wikitext))


@needs_real_data
def test_wikitext2_has_its_600_and_60_and_60_articles() -> None:
    documents = read_corpus("wikitext", f"{REAL_DATA}/wikitext2")
    assert [sum(d.split == split for d in documents) for split in corpora.SPLITS] == [600, 60, 60]
    texts = ["".join(d.text for d in documents if d.split == split) for split in corpora.SPLITS]
    words = [len(text.split()) + text.count("\n") for text in texts]  # published counts take line ends for words
    assert words == [2_088_628, 217_646, 245_569]
