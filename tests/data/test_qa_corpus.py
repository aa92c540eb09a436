"""Questions and answers from rows and docstrings: python -m pytest tests/test_qa_corpus.py"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from prepared_hub import add_data_set, parquet_file

from nbutils.data.corpora import Document, read_corpus
from nbutils.data.data_card import left_out
from nbutils.data.preparation import DataConfig, check_config, prepare_data
from nbutils.data.pydoc_corpus import first_sentence, module_questions
from nbutils.data.question_corpus import pair_document
from nbutils.data.question_preparation import clean_pairs, question_key, remove_pair_copies
from nbutils.data.sources import CorpusRequest
from nbutils.foundation.errors import CorpusError, ParameterError

WRITE = {
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "csv": lambda table, path: table.to_csv(path, index=False),
    "parquet": lambda table, path: table.to_parquet(path),
}


def pairs(*given: tuple[str, str]) -> list[Document]:
    return [pair_document(f"row {number}", question, answer) for number, (question, answer) in enumerate(given)]


# ---- rows


@pytest.mark.parametrize("kind", WRITE)
def test_rows_are_pairs_whatever_the_file(kind: str, tmp_path: Path) -> None:
    table = pandas.DataFrame({"question": ["Who?", "When?"], "more": [1, 2], "answer": ["A, b.", "2019"]})
    WRITE[kind](table, tmp_path / f"a.{kind}")
    found = read_corpus(CorpusRequest(kind, str(tmp_path), task="qa")).documents
    assert [(each.name, each.question, each.answer) for each in found] == [
        (f"a.{kind}:1", "Who?", "A, b."),
        (f"a.{kind}:2", "When?", "2019"),  # in a CSV it reads as a number
    ]
    assert found[1].text == "Question: When?\nAnswer: 2019"
    assert len(read_corpus(CorpusRequest(kind, str(tmp_path), task="qa", max_documents=1)).documents) == 1


def test_numbers_are_answers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "How many?", "answer": 3}\n{"question": "Much?", "answer": 0.5}')
    found = read_corpus(CorpusRequest("jsonl", str(tmp_path), task="qa")).documents
    assert [each.answer for each in found] == ["3", "0.5"]


@pytest.mark.parametrize(
    ("row", "lacks"),
    [
        ({"question": "Who?", "answer": None}, "answer is null"),
        ({"question": "Who?", "answer": " \n"}, "answer is empty"),
        ({"question": "Who?", "answer": True}, "answer is a bool, 'True'"),
        ({"question": "Who?", "answer": ["I", "you"]}, "answer is a list"),
        ({"question": "", "answer": "I"}, "question is empty"),
        ({"question": 7, "answer": "I"}, "question is a int, '7'"),
        ({"answer": "I"}, "question is null"),
    ],
)
def test_rows_that_are_no_pair_are_refused_by_name_or_counted(row: dict, lacks: str, tmp_path: Path) -> None:
    good = [{"question": f"Number {number}?", "answer": f"It is {number}."} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(each) for each in [*good, row, row]))
    config = DataConfig("jsonl", str(tmp_path), task="qa", vocab_size=300)
    with pytest.raises(CorpusError, match=rf"in a\.jsonl:41 {lacks}.*of the 1 other rows .* 1 are no pairs.*skip_non_"):
        prepare_data(config, tmp_path)
    data = prepare_data(replace(config, skip_non_text=True), tmp_path)
    assert data.card["dropped"]["empty"] == 2 and len(data.documents) == 40
    assert "2 rows without a question or an answer" in left_out(data.card)


def test_empty_cells_of_a_csv_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nWho?,me\nWhy?,\n")
    with pytest.raises(CorpusError, match=r"in a\.csv:2 answer is null"):
        read_corpus(CorpusRequest("csv", str(tmp_path), task="qa"))


def test_a_corpus_without_a_single_pair(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n" + "Why?,\n" * 1500)
    config = DataConfig("csv", str(tmp_path), task="qa", skip_non_text=True, max_documents=0)
    with pytest.raises(CorpusError, match=r"in a\.csv:1000 answer is null, and of the 1499 other rows"):
        prepare_data(config, tmp_path)
    with pytest.raises(CorpusError, match="None of the 400 rows read has a question and an answer"):
        prepare_data(replace(config, max_documents=400), tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"question_field": "query"}, CorpusError, r"no column for question_field 'query'. Valid names: asked, reply"),
        ({"answer_field": "replies"}, CorpusError, r"no column for answer_field 'replies'. Valid names: asked, reply"),
        ({"answer_field": "asked"}, ParameterError, "question_field and answer_field are both 'asked'"),
        ({"task": "question"}, ParameterError, "task is 'question'. Valid names: lm, qa"),
        ({"split": "contiguous"}, ParameterError, "split=contiguous is for running text"),
        ({"split": "counts"}, ParameterError, "needs subset_train and subset_val of at least 1"),
        ({"dataset_name": "text"}, CorpusError, "'text' is running text without questions .* take pydoc, jsonl, csv"),
        ({"dataset_name": "babylm"}, CorpusError, "'babylm' is running text without questions"),
    ],
)
def test_bad_configurations_are_told_before_any_work(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    (tmp_path / "a.csv").write_text("asked,reply\nWho?,me\n")
    config = DataConfig("csv", str(tmp_path), task="qa", question_field="asked", answer_field="reply")
    with pytest.raises(error, match=message):
        check_config(replace(config, **change))


def test_a_fallback_names_both_columns(hub_cache: Path) -> None:
    config = DataConfig("owner/name", task="qa", fallback_datasets=["pydoc"])
    check_config(config)
    with pytest.raises(
        ParameterError, match=r"holds 'a/b:text'. Write name or name:configuration:question_field:answe"
    ):
        check_config(replace(config, fallback_datasets=["a/b:text"]))


def test_a_hub_data_set_keeps_its_splits_and_tells_what_leaks(tmp_path: Path, hub_cache: Path) -> None:
    asked = {"train": range(40), "validation": range(40, 50), "test": range(39, 45)}  # number 39 stands in train too
    files = {
        f"data/{split}-00000.parquet": parquet_file(
            question=[f"Number {number}?" for number in numbers], reply=[f"It is {number}." for number in numbers]
        )
        for split, numbers in asked.items()
    }
    add_data_set(hub_cache, "owner/pairs", files)
    config = DataConfig("owner/pairs", task="qa", answer_field="reply", split="given", dedup="off", vocab_size=300)
    data = prepare_data(config, tmp_path)
    assert {split: row["documents"] for split, row in data.card["splits"].items()} == {
        split: len(numbers) for split, numbers in asked.items()
    }
    assert data.documents["name"].tolist()[:2] == ["train/0", "train/1"]
    assert (data.card["leakage"]["test"]["seen_questions"], data.card["leakage"]["test"]["seen_answers"]) == (1, 1)
    with pytest.raises(CorpusError, match=r"data set owner/pairs has no column for answer_field 'answer'"):
        prepare_data(replace(config, answer_field="answer"), tmp_path)


# ---- cleaning and copies


def test_copies_are_one_question_with_one_answer() -> None:
    documents = pairs(("Is it?", "1.5"), ("is IT", "1.5"), ("Is it?", "15"), ("Is it?", "1.5"), ("Is it?", "-1.5"))

    def kept(dedup: str) -> tuple[list[str], list[tuple[str, str, bool]]]:
        unique, duplicates = remove_pair_copies(documents, dedup)
        return [each.name[-1] for each in unique], [
            (each.dropped[-1], each.kept[-1], each.exact) for each in duplicates
        ]

    assert kept("near") == (["0", "2", "4"], [("1", "0", False), ("3", "0", True)])
    assert kept("exact") == (["0", "1", "2", "4"], [("3", "0", True)])
    assert kept("off") == (["0", "1", "2", "3", "4"], [])


def test_cleaning_puts_a_question_on_one_line() -> None:
    documents = pairs(("What\n is  it?", " a\n\n b \n"), ("日本", "x"))
    standard, _ = clean_pairs(documents, "standard", False)
    assert (standard.question, standard.answer) == ("What is it?", "a\nb")
    assert standard.text == "Question: What is it?\nAnswer: a\nb"
    newlines, _ = clean_pairs(documents, "newlines", False)
    assert (newlines.question, newlines.answer) == ("What  is  it?", " a   b  ")
    assert clean_pairs(documents, "none", False) == documents
    assert [each.name for each in clean_pairs(documents, "none", True)] == ["row 0"]


# ---- docstrings

SOURCE = '''
def median(data): """Return the median (middle value) of numeric data.\\n\\n    Longer."""
def _private(): """Return what nobody may ask about."""
def bare(): pass
class Counter:
    """Dict subclass for counting hashable items.  Sometimes called a bag."""
    def total(self):
        """Sum of all the counts."""
        def inner(): """Not to be seen from outside at all."""
    @property
    def size(self): """The number of :class:`~a.Item` that ``Counter`` holds."""
'''


def test_questions_are_about_what_is_public() -> None:
    assert list(module_questions("pack.stats", ast.parse(SOURCE))) == [
        ("What does pack.stats.median do?", "Return the median (middle value) of numeric data."),
        ("What is pack.stats.Counter?", "Dict subclass for counting hashable items."),
        ("What does pack.stats.Counter.total do?", "Sum of all the counts."),
        ("What is pack.stats.Counter.size?", "The number of a.Item that Counter holds."),
    ]
    assert not list(module_questions("pack._stats", ast.parse(SOURCE)))


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Joins\n    the parts, e.g. All of them. Then more.", "Joins the parts, e.g. All of them."),
        ("Return version 2.0 of it.", "Return version 2.0 of it."),
        ("sum(iterable, /, start=0)", ""),
        ("no capital stands at the front.", ""),
        ("No full stop at the end", ""),
        ("Too short.", ""),
        ("Use this::", ""),
        ("Deprecated since version 3, use that one instead.", ""),
        ("Return the value of the formula $x^2$ here.", ""),
        (" ".join(["word"] * 60).capitalize() + ".", ""),
        ("", ""),
    ],
)
def test_answers_are_sentences(docstring: str, answer: str) -> None:
    assert first_sentence(docstring) == answer


def test_embedded_questions_are_many_deterministic_and_without_copies() -> None:
    found = read_corpus(CorpusRequest("pydoc", task="qa", max_documents=300)).documents
    again = read_corpus(CorpusRequest("pydoc", task="qa", max_documents=300)).documents
    assert found == again and len(found) == 300
    assert len({question_key(each.question) for each in found}) == len({each.answer.lower() for each in found}) == 300
    assert len({each.name.split(".")[0] for each in found}) > 5
    assert not any("._" in each.question for each in found)
