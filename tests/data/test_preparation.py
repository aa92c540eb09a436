"""Preparation: python -m pytest tests/test_preparation.py"""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nbutils.data import data_card as datacard
from nbutils.data import preparation
from nbutils.data.corpora import SPLITS
from nbutils.data.data_card import headline
from nbutils.data.packing import Blocks
from nbutils.data.preparation import DataConfig, PreparedData, check_config, load_data, prepare_data, small_data
from nbutils.data.tokenization import character_tokenizer
from nbutils.foundation import places
from nbutils.foundation.errors import CorpusError, ModelError, ParameterError
from nbutils.runs.params import RUN_FOLDER, find_notebook, read_schema

WORDS = [
    f"{start}{end}" for start in ("train", "token", "block", "model", "loss") for end in ("s", "ed", "ing", "er", "")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 text files of 40 to 80 words, the last one a copy of the first."""
    folder = tmp_path_factory.mktemp("corpus")
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(40, 80))) for _ in range(59)]
    for number, text in enumerate([*texts, texts[0]]):
        (folder / f"{number:02d}.txt").write_text(text.replace(" ", "  ", 3) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> DataConfig:
    return DataConfig(dataset_name="text", data_files=str(folder), max_documents=0, vocab_size=300, block_size=32)


@pytest.fixture(scope="module")
def prepared(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_data(config, tmp_path_factory.mktemp("run"))


def flat(data: PreparedData, split: str, column: str = "input_ids") -> np.ndarray:
    return np.array(data.blocks[split][:][column]).reshape(-1)


# ---- what is in the folder


def test_blocks_decode_to_the_documents_in_order(prepared: PreparedData, folder: Path) -> None:
    texts = {file.name: " ".join(file.read_text().split()) for file in folder.iterdir()}
    end = prepared.tokenizer.eos_token
    for split in SPLITS:
        rows = prepared.documents[prepared.documents["split"] == split]
        assert len(rows) > 2 and rows["name"].is_monotonic_increasing
        running = "".join(texts[name] + end for name in rows["name"])
        decoded = prepared.tokenizer.decode(flat(prepared, split))
        assert running.startswith(decoded)
        assert len(running) - len(decoded) < 32 * 8
        owners = flat(prepared, split, "document_ids")
        for number, name in zip(rows["document"][:-1], rows["name"], strict=False):
            assert prepared.tokenizer.decode(flat(prepared, split)[owners == number]) == texts[name] + end


def test_splits_share_no_document(prepared: PreparedData) -> None:
    owners = [set(flat(prepared, split, "document_ids").tolist()) for split in SPLITS]
    assert sum(map(len, owners)) == len(set().union(*owners))
    table = prepared.documents.set_index("document")["split"]
    assert all((table.loc[list(numbers)] == split).all() for numbers, split in zip(owners, SPLITS, strict=True))


def test_card_counts_agree_with_the_folder(prepared: PreparedData) -> None:
    card = prepared.card
    assert [(stage["stage"], stage["documents"]) for stage in card["stages"]] == [
        ("read", 60),
        ("cleaned", 60),
        ("without duplicates", 59),
        ("split", 59),
    ]
    assert (card["duplicates"]["exact"], card["duplicates"]["near"]) == (1, 0)
    assert card["duplicates"]["examples"] == [{"dropped": "59.txt", "kept": "00.txt", "similarity": 1.0, "exact": True}]
    for split, row in card["splits"].items():
        documents = prepared.documents[prepared.documents["split"] == split]
        assert row["documents"] == row["end_tokens"] == len(documents)
        for unit in ("characters", "bytes", "tokens"):
            assert row[unit] == documents[unit].sum()
        assert row["blocks"] == len(prepared.blocks[split])
        assert row["tokens"] + row["end_tokens"] - row["dropped_tokens"] == row["blocks"] * 32
    assert card["vocab_size"] == len(prepared.tokenizer)
    assert card["end_token_id"] == prepared.tokenizer.eos_token_id
    assert card["block_size"] == 32
    assert "your files" in card["seen_by_base_model"]
    example = card["cleaning_example"]
    assert "  " in example["before"] and example["after"].startswith(" ".join(example["before"].split()[:-1]))


def test_headline_has_the_names_of_results(prepared: PreparedData) -> None:
    numbers, card = headline(prepared.card), prepared.card
    assert numbers["eval_documents"] == card["splits"]["validation"]["documents"]
    assert numbers["train_tokens"] == card["splits"]["train"]["tokens"]
    assert numbers["unigram_test_ce_loss"] == card["unigram_ce"]["test"]
    assert numbers["eval_leaked_ngram_share"] == card["leakage"]["validation"]["ngram_share"]
    without_test = {**card, "splits": {"train": card["splits"]["train"]}, "leakage": {}, "unigram_ce": {}}
    names = {"vocab_size", "block_size", "train_documents", "train_tokens", "train_blocks"}
    assert headline(without_test).keys() == names


def test_unigram_cross_entropy_is_between_the_limits(prepared: PreparedData) -> None:
    tokens = flat(prepared, "train")
    shares = np.bincount(tokens)[np.unique(tokens)] / len(tokens)
    entropy = -(shares * np.log(shares)).sum()
    for value in prepared.card["unigram_ce"].values():
        assert value == pytest.approx(entropy, rel=0.1)
    assert prepared.card["unigram_ce"].keys() == {"validation", "test"}


def test_the_tokenizer_knows_the_train_split_alone_and_running_text_has_no_end_token(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab " * 300 + "Ω" * 40)
    config = DataConfig("big_text", str(tmp_path / "text.txt"), clean="none", dedup="off", split="contiguous")
    data = prepare_data(replace(config, tokenizer="characters", block_size=10), tmp_path)
    assert data.tokenizer.convert_ids_to_tokens(range(3)) == [" ", "a", "b"] and len(data.tokenizer) == 5
    assert [row["unknown_tokens"] for row in data.card["splits"].values()] == [0, 36]
    assert [row["end_tokens"] for row in data.card["splits"].values()] == [0, 0]
    assert data.card["end_token_id"] not in flat(data, "train")
    assert data.tokenizer.decode(flat(data, "train")) == ("ab " * 300)[:840]


# ---- determinism


def test_same_configuration_same_folder(prepared: PreparedData, config: DataConfig, tmp_path: Path) -> None:
    again = prepare_data(config, tmp_path)
    assert again.card == prepared.card
    one, other = (
        {file.relative_to(data): file.read_bytes() for file in data.rglob("*") if file.is_file()}
        for data in (prepared.folder / "data", tmp_path / "data")
    )
    assert one == other


def test_preparing_again_leaves_equal_data_alone_and_replaces_other(config: DataConfig, tmp_path: Path) -> None:
    first = prepare_data(config, tmp_path)
    card = tmp_path / "data" / "card.json"
    inode = card.stat().st_ino
    assert prepare_data(config, tmp_path).card == first.card
    assert card.stat().st_ino == inode
    other = prepare_data(replace(config, block_size=16), tmp_path)
    assert other.card["fingerprint"] != first.card["fingerprint"]
    assert len(other.blocks["train"][0]["input_ids"]) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 301},
        {"block_size": 31},
        {"max_documents": 50},
        {"split": "contiguous"},
        {"tokenizer": "characters"},
    ],
)
def test_what_changes_the_data_changes_the_fingerprint(
    prepared: PreparedData, config: DataConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    assert prepare_data(replace(config, **change), tmp_path).card["fingerprint"] != prepared.card["fingerprint"]


def test_the_fingerprint_covers_tokens_owners_and_vocabulary(prepared: PreparedData) -> None:
    def fingerprint(tokens: int = 1, owners: int = 2, tokenizer: object = prepared.tokenizer) -> str:
        arrays = (np.full((3, 4), value, np.int32) for value in (tokens, owners))
        return datacard._fingerprint({"train": Blocks(*arrays, dropped_tokens=0).totals(1000)}, tokenizer)

    other = character_tokenizer(["abc"])
    found = [fingerprint(), fingerprint(tokens=9), fingerprint(owners=9), fingerprint(tokenizer=other)]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]


@pytest.mark.parametrize(
    ("fails", "error", "told"),
    [
        ("write_json", OSError("Gone"), "Gone"),
        (
            "save_blocks",
            OSError(errno.ENOSPC, "No space left on device"),
            r"disk is full: .* needs about \d+ MiB .* [\d,]+ MiB are free\. What stood",
        ),
    ],
)
def test_a_failure_is_told_and_keeps_the_old_data(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, error: OSError, told: str
) -> None:
    card = prepare_data(config, tmp_path).card
    monkeypatch.setattr(preparation, fails, lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(CorpusError if error.errno else OSError, match=told):
        prepare_data(replace(config, block_size=16), tmp_path)
    assert load_data(tmp_path).card == card
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---- rows, given splits, fallbacks


def test_a_fallback_heads_the_card_and_is_in_the_result(tmp_path: Path, hub_cache: Path) -> None:
    config = DataConfig("HuggingFaceFW/finepdfs", fallback_datasets=["pydoc"], max_documents=90, vocab_size=300)
    hash(config)  # plans give lists, and preflight keeps what it has checked
    card = prepare_data(config, tmp_path).card
    assert card["fallback_taken"] == "HuggingFaceFW/finepdfs cannot be reached: pydoc was read in its place."
    assert card["dataset_name"] == card["corpus"]["dataset_name"] == "pydoc"
    assert card["config"]["dataset_name"] == "HuggingFaceFW/finepdfs"
    assert card["corpus_versions"] and "Almost certainly seen" in card["seen_by_base_model"]
    assert headline(card)["fallback_taken"] == 1
    written = (tmp_path / "data" / "card.json").stat().st_ino
    prepare_data(config, tmp_path)
    assert (tmp_path / "data" / "card.json").stat().st_ino == written  # a list reads back as it was written


def test_rows_of_files_become_blocks(folder: Path, tmp_path: Path) -> None:
    texts = [file.read_text() for file in sorted(folder.iterdir())]
    rows = [json.dumps({"body": text, "id": number}) for number, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = DataConfig("jsonl", str(tmp_path / "rows.jsonl"), text_field="body", vocab_size=300, block_size=32)
    from_rows = prepare_data(config, tmp_path)
    from_texts = prepare_data(replace(config, dataset_name="text", data_files=str(folder)), tmp_path / "text")
    assert from_rows.card["fingerprint"] == from_texts.card["fingerprint"]
    assert from_rows.card["fallback_taken"] == "" and "fallback_taken" not in headline(from_rows.card)


# ---- small data


def test_small_data_is_prepared_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(places, "RUNS", tmp_path)
    monkeypatch.setattr(preparation, "DataConfig", partial(DataConfig, max_documents=90, vocab_size=300))
    folder = small_data()
    assert "Preparing a small corpus of 90 documents once" in capsys.readouterr().out
    data = load_data(folder)
    assert data.card["dataset_name"] == "pydoc" and len(data.blocks["train"]) > 1000
    written = (folder / "data" / "card.json").stat().st_mtime_ns
    assert small_data() == folder
    assert capsys.readouterr().out == ""
    assert (folder / "data" / "card.json").stat().st_mtime_ns == written

    card = json.loads((folder / "data" / "card.json").read_text())
    card["config"]["vocab_size"] = 999  # as if the defaults had been others when it was made
    (folder / "data" / "card.json").write_text(json.dumps(card))
    assert load_data(small_data()).card == data.card
    assert [path.name for path in (tmp_path / "interactive").iterdir()] == ["data-small"]


@pytest.mark.soak
def test_small_data_in_two_processes_at_once(tmp_path: Path, config: DataConfig) -> None:
    script = (
        "from pathlib import Path; from nbutils.foundation import places; from nbutils.data import preparation;"
        f"places.RUNS = Path({str(tmp_path)!r});"
        f"config = preparation.DataConfig(**{vars(config)!r}); preparation.DataConfig = lambda: config;"
        "print(preparation.load_data(preparation.small_data()).card['fingerprint'])"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert all("Preparing a small corpus" in lines[0] for lines in outputs)
    assert outputs[0][-1] == outputs[1][-1] == load_data(tmp_path / "interactive" / "data-small").card["fingerprint"]
    assert [path.name for path in (tmp_path / "interactive").iterdir()] == ["data-small"]


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clean": "standart"}, ParameterError, "clean is 'standart'. Did you mean 'standard'"),
        ({"dedup": "minhash"}, ParameterError, "dedup is 'minhash'. Valid names: exact, near, off"),
        ({"split": "continuous"}, ParameterError, "split is 'continuous'. Did you mean 'contiguous'"),
        ({"block_size": 1}, ParameterError, "block_size is 1, but must be at least 2"),
        ({"max_tokens": -1}, ParameterError, "max_tokens is -1, but must be at least 0"),
        ({"max_documents": -1}, ParameterError, "max_documents is -1, but must be at least 0"),
        ({"split": "counts", "subset_train": 5}, ParameterError, "needs subset_train and subset_val of at least 1"),
        ({"subset_val": 5}, ParameterError, "split is 'hash'. Set split to one of the two, or leave them 0"),
        ({"dataset_name": "wikitxt"}, CorpusError, "Did you mean 'wikitext'"),
        ({"data_files": "no/such/*.txt"}, CorpusError, "matches no file"),
        ({"vocab_size": 100}, ModelError, "vocab_size 100 is too small"),
        ({"tokenizer": "/no/such/folder"}, ModelError, "is not a tokenizer folder"),
    ],
)
def test_bad_configurations_are_told_before_any_work(
    config: DataConfig, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_config(replace(config, **change))


def test_corpus_too_small_for_one_block(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"The validation split has \d+ tokens in 4 documents: too few .* block_size 2000"
    ):
        prepare_data(replace(config, block_size=2000, split="counts", subset_train=55, subset_val=4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_test_split_is_empty_only_where_the_split_says_so(config: DataConfig, tmp_path: Path) -> None:
    counts = replace(config, split="counts", subset_train=40, subset_val=10)
    assert prepare_data(counts, tmp_path).blocks.keys() == {"train", "validation"}
    with pytest.raises(CorpusError, match=r"The test split has .* too few"):
        prepare_data(replace(counts, subset_test=1, block_size=600), tmp_path)


def test_folders_without_prepared_data(tmp_path: Path, prepared: PreparedData) -> None:
    with pytest.raises(CorpusError, match=r"holds no prepared data.*Run 01_data_prep first"):
        load_data(tmp_path)
    shutil.copytree(prepared.folder / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "blocks" / "test")
    with pytest.raises(CorpusError, match=r"is incomplete.*Run 01_data_prep again"):
        load_data(tmp_path)
    (tmp_path / "data" / "card.json").write_text('{"vocab_size": 3')
    with pytest.raises(CorpusError, match="missing or damaged"):
        load_data(tmp_path)


# ---- the notebook


def test_the_notebook_has_the_same_parameters_and_defaults() -> None:
    parameters = read_schema(find_notebook("01_data_prep")).parameters
    assert {name: each.default for name, each in parameters.items() if name != RUN_FOLDER} == DataConfig().parameters()
