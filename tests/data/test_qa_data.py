"""Questions and answers, from rows or docstrings to examples on disk: python -m pytest tests/test_qa_data.py"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas
import pytest
from real_data import REAL_DATA, needs_real_data

from nbutils.data import preparation
from nbutils.data.batches import UNLABELLED
from nbutils.data.corpora import SPLITS, Document
from nbutils.data.data_card import headline, left_out
from nbutils.data.packing import load_blocks, pack_examples, save_blocks, unigram_cross_entropy
from nbutils.data.preparation import DataConfig, PreparedData, prepare_data, small_questions
from nbutils.data.question_corpus import pair_document, prompt_of
from nbutils.data.question_preparation import encode_pairs, leakage_of_pairs, question_key, split_questions
from nbutils.data.tokenization import character_tokenizer, load_tokenizer, train_unigram
from nbutils.foundation import places
from nbutils.foundation.errors import CorpusError

WORDS = ("revenue", "cost", "margin", "asset", "debt", "income", "equity", "share", "tax", "cash", "loan", "lease")


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """90 questions, ten of them asked again in capitals, five with another answer."""
    choose = random.Random(0)
    asked = [f"What was the {' and the '.join(choose.sample(WORDS, 3))} in {year}?" for year in range(1900, 1990)]
    pairs = [(question, f"{choose.randint(1, 999)} million") for question in asked]
    again = [(question.upper().replace("?", " ?"), answer) for question, answer in pairs[:5]]
    return pairs + again + [(question.upper(), "another answer") for question, _ in pairs[5:10]]


@pytest.fixture(scope="module")
def config(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    file = tmp_path_factory.mktemp("rows") / "final_qa.csv"
    pandas.DataFrame(rows, columns=["asked", "reply"]).to_csv(file, index=False)
    fields = {"question_field": "asked", "answer_field": "reply"}
    return DataConfig("csv", str(file), task="qa", **fields, max_documents=0, vocab_size=300, block_size=96)


@pytest.fixture(scope="module")
def prepared(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_data(config, tmp_path_factory.mktemp("run"))


def pairs(*given: tuple[str, str]) -> list[Document]:
    return [pair_document(f"row {number}", question, answer) for number, (question, answer) in enumerate(given)]


# ---- examples on disk


def test_an_example_is_the_prompt_the_answer_and_the_end_token(prepared: PreparedData) -> None:
    tokenizer, end = prepared.tokenizer, prepared.tokenizer.eos_token_id
    table = prepared.documents.set_index("document")
    for split in SPLITS:
        assert len(prepared.blocks[split]) == (table["split"] == split).sum() > 5
        for row in prepared.blocks[split]:
            (number,) = set(row["document_ids"])
            question, answer = table.loc[number, ["question", "answer"]]
            assert tokenizer.decode(row["input_ids"]) == f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}"
            assert len(row["input_ids"]) == len(row["labels"]) == len(row["document_ids"]) <= 96
            scored = [label for label in row["labels"] if label != UNLABELLED]
            assert tokenizer.decode(scored) == f" {answer}{tokenizer.eos_token}"
            assert row["labels"][-len(scored) :] == row["input_ids"][-len(scored) :] == scored
            assert row["labels"][-1] == end and row["input_ids"].count(end) == 1
            prompt = len(row["labels"]) - len(scored)
            assert tokenizer.decode(row["input_ids"][:prompt]) == f"Question: {question}\nAnswer:"


def test_the_end_token_keeps_its_label_where_it_is_the_pad_token(prepared: PreparedData) -> None:
    assert prepared.tokenizer.pad_token_id == prepared.tokenizer.eos_token_id
    assert all(row["labels"][-1] == prepared.tokenizer.eos_token_id for row in prepared.blocks["train"])


def test_examples_of_any_length_come_back_as_they_were(tmp_path: Path) -> None:
    prompts = [np.arange(length, dtype=np.int32) for length in (3, 0, 1500)]
    answers = [np.arange(100, 100 + length, dtype=np.int32) for length in (2, 4, 1)]
    save_blocks(pack_examples(prompts, answers, [4, 7, 9], 99), tmp_path)
    rows = load_blocks(tmp_path)[:]
    assert rows["input_ids"] == [
        [*prompt, *answer, 99] for prompt, answer in zip(map(list, prompts), map(list, answers), strict=True)
    ]
    assert rows["labels"][0] == [-1, -1, -1, 100, 101, 99]
    assert [set(each) for each in rows["document_ids"]] == [{4}, {7}, {9}]


def test_the_card_counts_what_is_there(prepared: PreparedData, rows: list[tuple[str, str]]) -> None:
    card, table = prepared.card, prepared.documents
    assert card["task"] == card["config"]["task"] == "qa"
    assert card["prompt"] == "Question: {question}\nAnswer:"
    assert card["corpus"]["question_field"] == "asked" and "text_field" not in card["corpus"]
    assert [(stage["stage"], stage["documents"]) for stage in card["stages"]] == [
        ("read", 100),
        ("cleaned", 100),
        ("without duplicates", 95),
        ("split", 95),
        ("fit the block", 95),
    ]
    for split, row in card["splits"].items():
        documents = table[table["split"] == split]
        labels = [label for each in prepared.blocks[split]["labels"] for label in each]
        assert row["blocks"] == row["documents"] == row["end_tokens"] == len(documents)
        assert (
            row["answer_tokens"]
            == sum(label >= 0 for label in labels)
            == documents["answer_tokens"].sum() + len(documents)
        )
        assert row["tokens"] + row["end_tokens"] == len(labels)
        assert row["bytes"] == sum(len(f"{prompt_of(q)} {a}") for q, a in documents[["question", "answer"]].to_numpy())
        assert headline(card)[f"{'eval' if split == 'validation' else split}_answer_tokens"] == row["answer_tokens"]
    assert {each["split"] for each in card["examples"]} == set(SPLITS)
    assert all((each["question"], each["answer"]) in rows for each in card["examples"])
    assert left_out(card).startswith("Left out: 0 rows without a question or an answer, 0 of more tokens than a block")


def test_unigram_cross_entropy_is_that_of_the_answers(prepared: PreparedData) -> None:
    def answers(split: str) -> list[int]:
        return [label for row in prepared.blocks[split]["labels"] for label in row if label >= 0]

    counts = np.ones(len(prepared.tokenizer))
    for token in answers("train"):
        counts[token] += 1
    for split in SPLITS[1:]:
        expected = -np.mean([np.log(counts[token] / counts.sum()) for token in answers(split)])
        assert prepared.card["unigram_ce"][split] == pytest.approx(expected)
    prompts, token = [np.zeros(50, np.int32)] * 2, np.array([1], np.int32)
    totals = pack_examples(prompts, [token, token], [0, 1], 2).totals(3)
    assert unigram_cross_entropy(totals, totals) == pytest.approx(-np.log(3 / 7))  # 1, 2 seen twice, 0 never


def test_the_same_rows_give_the_same_data_and_other_labels_another_fingerprint(
    prepared: PreparedData, config: DataConfig, tmp_path: Path
) -> None:
    assert prepare_data(config, tmp_path).card == prepared.card
    from nbutils.data.data_card import _fingerprint

    def fingerprint(prompt: int) -> str:
        tokens = np.arange(4, dtype=np.int32)
        examples = pack_examples([tokens[:prompt]], [tokens[prompt:]], [0], 9)
        return _fingerprint({"train": examples.totals(10)}, prepared.tokenizer)

    assert len({fingerprint(1), fingerprint(2)}) == 2 and fingerprint(1) == fingerprint(1)


# ---- prompts and answers as tokens


def test_prompt_tokens_are_those_of_the_prompt_alone() -> None:
    """A tokenizer that joins the colon and the space would else make training prompts that no one ever asks."""
    documents = pairs(("Is it so?", "yes"), ("Größe?", "日本 3 %"))
    for tokenizer in (
        train_unigram(["Question: a\nAnswer: yes and so on"] * 50, 300),
        character_tokenizer([each.text for each in documents]),
        greedy_tokenizer(),
    ):
        encoded = encode_pairs(documents, tokenizer)
        for document, prompt, answer in zip(documents, encoded.prompts, encoded.answers, strict=True):
            assert prompt.tolist() == tokenizer(prompt_of(document.question))["input_ids"]
            assert tokenizer.decode(np.concatenate([prompt, answer])) == document.text


def greedy_tokenizer():
    """Single characters, but ": " is one token, across the end of the prompt."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("Question: \nAnswer: Is it so? yes Größe日本3%"))
    vocabulary = {token: number for number, token in enumerate([*characters, ": ", "<|end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False)


@needs_real_data
@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/llama3", "models/stories260k_llama"])
def test_published_tokenizers_split_prompt_and_answer_where_they_split_the_text(folder: str) -> None:
    tokenizer = load_tokenizer(f"{REAL_DATA}/{folder}")
    (document,) = pairs(("What was the change?", "$1,496.5 million"))
    encoded = encode_pairs([document], tokenizer)
    whole = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert encoded.joined()[0].tolist() == whole


# ---- splits


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is EBITDA?", "what is  ebitda"),
        ("Is it “so”, then?", 'is it "so" then?'),
        ("Größe\u00a0?", "GRÖSSE?"),
        ("\uff37hat is ﬁrst", "What is first"),
        ("What does a.b_c do?", "what does A b_c do"),
    ],
)
def test_near_identical_questions_have_one_key(one: str, other: str) -> None:
    assert question_key(one) == question_key(other) != ""


def test_other_questions_have_other_keys() -> None:
    different = ["What was it in 2018?", "What was it in 2019?", "What was it?", "???", "!!"]
    assert len({question_key(question) for question in different}) == len(different)


def test_one_question_never_stands_in_two_splits(prepared: PreparedData) -> None:
    table = prepared.documents.assign(key=prepared.documents["question"].str.lower().str.findall(r"\w+").str.join(" "))
    assert table["key"].duplicated().sum() == 5
    assert (table.groupby("key")["split"].nunique() == 1).all()


def test_hash_splits_are_70_15_15_and_the_same_everywhere() -> None:
    documents = pairs(*((f"What is {number}?", str(number)) for number in range(4000)))
    divided = split_questions(documents, "hash", (0, 0, 0))
    shares = [sum(document.split == split for document in divided) / 4000 for split in SPLITS]
    assert shares == pytest.approx([0.70, 0.15, 0.15], abs=0.025)  # 3.5 standard errors of the first
    for document in divided[:500]:
        key = document.question.lower().removesuffix("?")
        place = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        assert document.split == ("train" if place < 0.7 else "validation" if place < 0.85 else "test")
    some = {document.name: document.split for document in split_questions(documents[::3], "hash", (0, 0, 0))}
    assert all(document.split == some.get(document.name, document.split) for document in divided)


def test_counts_are_exact_and_keep_questions_together() -> None:
    documents = pairs(*((f"Question {number // 4}{'?' * (number % 4)}", str(number)) for number in range(80)))
    for counts in ((30, 10, 10), (29, 11, 7), (41, 1, 0)):
        divided = split_questions(documents, "counts", counts)
        assert [sum(document.split == split for document in divided) for split in SPLITS] == list(counts)
        owners = {question_key(document.question): set() for document in divided}
        for document in divided:
            owners[question_key(document.question)].add(document.split)
        assert all(len(splits) == 1 for splits in owners.values())
        assert [document.name for document in divided] == sorted(
            (document.name for document in divided), key=lambda name: int(name.split()[1])
        )
    with pytest.raises(
        CorpusError, match=r"asks for 79 \+ 1 \+ 1 = 81 examples, but 80 are left .* validation lacks 1"
    ):
        split_questions(documents, "counts", (79, 1, 1))
    with pytest.raises(CorpusError, match=r"equal questions stay together: test lacks 1"):
        split_questions(documents, "counts", (72, 5, 1))


def test_leakage_tells_answers_that_can_be_given_from_memory() -> None:
    eight = "one two three four five six seven eight"
    given = [("a?", "Yes"), ("b?", f"{eight} nine"), ("c?", "yes "), ("d?", "no"), ("e?", eight), ("A", "maybe")]
    splits = ("train", "train", "validation", "validation", "test", "test")
    documents = [replace(each, split=split) for each, split in zip(pairs(*given), splits, strict=True)]
    table = leakage_of_pairs(documents)
    assert (table["validation"]["seen_answers"], table["validation"]["answer_share"]) == (1, 0.5)
    assert (table["test"]["seen_answers"], table["test"]["seen_questions"]) == (0, 1)
    assert (table["test"]["ngrams"], table["test"]["seen_ngrams"]) == (2, 1)


# ---- lengths


def test_what_does_not_fit_a_block_is_left_out_and_counted(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    everything = prepare_data(replace(config, block_size=400), tmp_path)
    lengths = (everything.documents["tokens"] + 1).sort_values()
    limit = int(lengths.iloc[80])
    assert (lengths > limit).any()
    fitting = prepare_data(replace(config, block_size=limit), tmp_path)
    assert fitting.card["dropped"] == {
        "empty": 0,
        "too_long": int((lengths > limit).sum()),
        "longest_tokens": lengths.iloc[-1],
    }
    assert set(fitting.documents["question"]) == set(everything.documents["question"][lengths.sort_index() <= limit])
    assert max(len(row) for row in fitting.blocks["train"]["input_ids"]) <= limit
    assert fitting.documents["document"].tolist() == list(range(len(fitting.documents)))
    assert f"are longer than block_size {limit} (the longest has {lengths.iloc[-1]} tokens)" in caplog.text
    assert f"{(lengths > limit).sum()} of more tokens than a block has" in left_out(fitting.card)


def test_a_block_too_short_for_most_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"block_size 30 is too short: 85 of 95 .* the longest \d+, the middle one \d+"
    ):
        prepare_data(replace(config, block_size=30), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- for notebooks opened on their own


def test_small_questions_are_prepared_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(places, "RUNS", tmp_path)
    monkeypatch.setattr(preparation, "DataConfig", partial(DataConfig, max_documents=100, vocab_size=300))
    folder = small_questions()
    assert "Preparing a small set of 100 questions and answers once" in capsys.readouterr().out
    assert preparation.load_data(folder).card["task"] == "qa"
    assert small_questions() == folder == tmp_path / "interactive" / "questions-small"
    assert capsys.readouterr().out == ""


# ---- published data


@needs_real_data
def test_tatqa_is_read_whole(tmp_path: Path) -> None:
    """3,331 pairs of 3,279 questions; ten are copies of a pair with the same answer."""
    config = DataConfig(
        "csv",
        f"{REAL_DATA}/qa/tatqa.csv",
        task="qa",
        max_documents=0,
        tokenizer=f"{REAL_DATA}/tokenizers/gpt2",
        block_size=512,
    )
    data = prepare_data(config, tmp_path)
    assert data.card["stages"][0]["documents"] == 3331
    assert len(data.documents) == 3321 and data.card["dropped"]["too_long"] == 0
    assert data.card["duplicates"]["exact"] + data.card["duplicates"]["near"] == 10
    shares = [data.card["splits"][split]["documents"] / 3321 for split in SPLITS]
    assert shares == pytest.approx([0.70, 0.15, 0.15], abs=0.02)
    assert data.card["leakage"]["test"]["seen_questions"] == 0
    assert 0.1 < data.card["leakage"]["test"]["answer_share"] < 0.2  # "2019" answers many questions
