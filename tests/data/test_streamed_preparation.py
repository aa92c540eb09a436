"""Streamed preparation: python -m pytest tests/test_streamed_preparation.py"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from local_hub import LocalHub
from prepared_hub import parquet_file

from nbutils.data import data_card as datacard
from nbutils.data import streamed_measures, streamed_preparation
from nbutils.data.corpora import SPLITS, Document
from nbutils.data.data_card import check_ascii, headline
from nbutils.data.documents import measure_leakage, split_documents
from nbutils.data.packing import Blocks
from nbutils.data.preparation import DataConfig, check_config, load_data, prepare_data
from nbutils.data.streamed_measures import LeakageSample, SeenTexts
from nbutils.data.tokenization import character_tokenizer, train_byte_level_bpe
from nbutils.foundation.errors import CorpusError, ParameterError

WORDS = [f"{start}{end}" for start in ("town", "river", "naïve", "light") for end in ("s", "ed", "ing", "er", "")]


def texts(number: int, seed: int = 0) -> list[str]:
    """Texts of 30 to 60 words, some with letters outside ASCII; every tenth is a copy of one before."""
    choose = random.Random(seed)
    found: list[str] = []
    for _ in range(number):
        copied = len(found) % 10 == 9
        found.append(choose.choice(found) if copied else " ".join(choose.choices(WORDS, k=choose.randint(30, 60))))
    return found


def write_rows(path: Path, rows: list[str], **columns: list[object]) -> Path:
    path.write_bytes(parquet_file(text=rows, **columns))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([" ".join(WORDS)] * 3, 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> DataConfig:
    file = write_rows(tmp_path_factory.mktemp("corpus") / "rows.parquet", texts(400))
    settings = {"dataset_name": "parquet", "data_files": str(file), "max_documents": 0, "ascii_only": True}
    return DataConfig(**settings, dedup="exact", tokenizer=tokenizer, block_size=32, streamed=True)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks and tables go over the ends of batches, of which there are many."""
    monkeypatch.setattr(streamed_preparation, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(streamed_preparation, "TABLE_ROWS", 50)


def same(one: object, other: object) -> None:
    """Two sets of prepared data agree in everything but how they were asked for."""
    for split in SPLITS:
        for column in ("input_ids", "document_ids"):
            assert one.blocks[split][:][column] == other.blocks[split][:][column]
    pd.testing.assert_frame_equal(one.documents, other.documents, check_dtype=False)
    assert {**one.card, "config": {}} == {**other.card, "config": {}}


# ---- the same data


@pytest.mark.parametrize("change", [{}, {"clean": "none", "dedup": "off", "ascii_only": False}, {"max_documents": 90}])
def test_a_stream_gives_the_data_that_memory_gives(config: DataConfig, tmp_path: Path, change: dict) -> None:
    config = replace(config, **change)
    streamed = prepare_data(config, tmp_path / "streamed")
    held = prepare_data(replace(config, streamed=False), tmp_path / "held")
    same(streamed, held)
    assert len(streamed.blocks["train"]) > 50 and streamed.card["near_copies"] == "not measured"
    assert bool(streamed.card["duplicates"]["exact"]) == (config.dedup == "exact")


def test_splits_of_the_corpus_are_kept(tmp_path: Path, config: DataConfig) -> None:
    with pytest.raises(CorpusError, match="splits of its own, but the document 'rows"):
        prepare_data(replace(config, split="given"), tmp_path)
    for split in ("train", "valid", "test"):
        titled = "".join(f" \n = {split} {n} = \n \n {text} \n" for n, text in enumerate(texts(30, len(split))))
        (tmp_path / f"{split}.txt").write_text(titled + " \n")
    wikitext = replace(config, dataset_name="wikitext", data_files=str(tmp_path), split="given")
    streamed = prepare_data(wikitext, tmp_path / "streamed")
    same(streamed, prepare_data(replace(wikitext, streamed=False), tmp_path / "held"))
    assert streamed.card["splits"]["validation"]["documents"] == 30


def test_the_held_out_share_is_that_of_documents_by_their_hash(config: DataConfig, tmp_path: Path) -> None:
    shares = (
        prepare_data(replace(config, held_out_share=0.25), tmp_path).documents["split"].value_counts(normalize=True)
    )
    assert shares["train"] == pytest.approx(0.5, abs=0.08) and shares["test"] == pytest.approx(0.25, abs=0.07)
    some = [Document(str(n), str(n)) for n in range(3000)]
    at = {share: {d.name: d.split for d in split_documents(some, held_out_share=share)} for share in (0.1, 0.001)}
    assert Counter(at[0.1].values())["validation"] == pytest.approx(300, abs=60)
    assert {n for n, s in at[0.001].items() if s == "test"} < {n for n, s in at[0.1].items() if s == "test"}


def test_jsonl_files_and_a_hub_give_the_same_blocks(config: DataConfig, tmp_path: Path) -> None:
    """The Hub runs in this process, the preparation in one of its own, with HF_ENDPOINT alone."""
    rows = [json.dumps({"text": text}) for text in texts(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    from_lines = replace(config, dataset_name="jsonl", data_files=str(tmp_path / "rows.jsonl"))
    wanted = prepare_data(config, tmp_path / "parquet").card["fingerprint"]
    assert prepare_data(from_lines, tmp_path / "lines").card["fingerprint"] == wanted
    name, half = "HuggingFaceFW/fineweb-edu", texts(400)
    files = {f"sample/10BT/{n}.parquet": parquet_file(text=half[200 * n : 200 * n + 200]) for n in range(2)}
    card = {"configs": [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]}
    readme = (
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    hub = LocalHub({name: {"README.md": readme.encode(), **files}}, {name: card})
    on_hub = replace(config, dataset_name=name, dataset_config_name="sample-10BT", data_files="")
    script = (
        "from pathlib import Path; from nbutils.data.preparation import DataConfig, prepare_data;"
        f"data = prepare_data(DataConfig(**{on_hub.parameters()!r}), Path({str(tmp_path / 'hub')!r}));"
        "print(data.card['fingerprint'])"
    )
    with hub.serve() as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert told.stdout.split()[-1:] == [wanted], told.stderr


# ---- what it holds and leaves


PREPARE = """
import sys
from pathlib import Path
from nbutils.data import streamed_measures, streamed_preparation
from nbutils.data.preparation import DataConfig, prepare_data
streamed_measures.LARGEST_SAMPLE = 10_000
streamed_preparation.BATCH_CHARACTERS = 1 << 18
config = DataConfig(dataset_name="jsonl", data_files=sys.argv[1], max_documents=0, dedup="exact", tokenizer=sys.argv[2],
                    block_size=64, streamed=sys.argv[4] == "streamed", storage=sys.argv[5])
prepare_data(config, Path(sys.argv[3]))
from nbutils.training.tracking import memory_mib
print(memory_mib())  # getrusage counts what the process was forked from, too
"""


def write_lines(file: Path, number: int) -> Path:
    choose = random.Random(0)
    with file.open("w") as lines:
        for _ in range(number):
            lines.write(json.dumps({"text": " ".join(choose.choices(WORDS[:10], k=300))}) + "\n")
    return file


@pytest.mark.soak
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: str) -> None:
    """Peak memory of a process, MiB, for 1 MB of text and for 9 MB; in memory the texts, tokens and runs add up."""
    peaks = {}
    for number in (500, 4500):
        file = write_lines(tmp_path / f"{number}.jsonl", number)
        for how in ("streamed", "held")[: 1 + (number == 4500)]:
            command = [sys.executable, "-c", PREPARE, file, tokenizer, tmp_path / f"{number}{how}", how, "arrow"]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            peaks[number, how] = float(told.stdout.split()[-1])
    grown = peaks[4500, "streamed"] - peaks[500, "streamed"]
    assert grown < 15 < 45 < peaks[4500, "held"] - peaks[500, "streamed"], peaks


@pytest.mark.soak
def test_a_killed_stream_starts_again_and_the_old_data_stay_until_it_ends(tmp_path: Path, tokenizer: str) -> None:
    file, run = write_lines(tmp_path / "rows.jsonl", 1000), tmp_path / "run"
    before = prepare_data(DataConfig(max_documents=90, vocab_size=300), run).card
    command = [sys.executable, "-c", PREPARE, file, tokenizer, run, "streamed", "arrow"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((run / ".data-streamed").glob("blocks/*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / ".data-streamed").is_dir() and load_data(run).card == before
    config = DataConfig(dataset_name="jsonl", data_files=str(file), max_documents=0, dedup="exact", tokenizer=tokenizer)
    config = replace(config, block_size=64, streamed=True)
    data = prepare_data(config, run)
    assert not (run / ".data-streamed").exists()
    same(data, prepare_data(replace(config, streamed=False), tmp_path / "held"))


def test_texts_seen_before_are_known_whatever_their_number() -> None:
    choose = random.Random(0)
    hashes = [0, 1, *(choose.getrandbits(64) for _ in range(100_000))]
    hashes += [1 << 63 | number << 20 for number in range(1000)]  # all in one slot: they must part
    seen = SeenTexts()
    numbers = [seen.first(hashed, number) for number, hashed in enumerate(hashes)]
    assert numbers == [0, 0, *range(2, len(hashes))]  # 0 and 1 are taken for one
    assert [seen.first(hashed, -1) for hashed in hashes] == numbers


# ---- leakage


def test_leakage_is_exact_while_it_fits_and_an_estimate_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of each held-out text stands in train; a sample of a tenth of the runs finds that share."""
    choose = random.Random(1)
    fresh = iter(range(10**6))
    documents = [Document("", " ".join(f"w{next(fresh)}" for _ in range(60)), "train") for _ in range(600)]
    for split in ("validation", "test"):
        for number in range(300):
            copied = documents[choose.randrange(600)].text.split()[:40] if number % 2 else []
            own = [f"w{next(fresh)}" for _ in range(60 - len(copied))]
            documents.append(Document("", " ".join([*copied, *own]), split))
    exact = measure_leakage(documents)

    def measured() -> dict:
        sample = LeakageSample()
        for document in choose.sample(documents, len(documents)):
            sample.add(document.text, document.split)
        return sample.table()

    assert measured() == exact
    monkeypatch.setattr(streamed_measures, "LARGEST_SAMPLE", 4000)
    monkeypatch.setattr(streamed_measures, "MOST_WORDS", 500)
    for split, row in measured().items():
        assert row["ngrams"] == exact[split]["ngrams"] and row["documents"] == 300
        assert 500 < row["sampled_ngrams"] <= 4000 and "document_share" not in row
        assert row["ngram_share"] == pytest.approx(exact[split]["ngram_share"], abs=0.05)


def test_the_figure_and_the_headline_of_a_sample(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    from nbutils.report import figures

    monkeypatch.setattr(streamed_measures, "LARGEST_SAMPLE", 500)
    card = prepare_data(config, tmp_path).card
    assert card["leakage"]["test"]["sampled_ngrams"] > 0
    assert len(figures.leakage(card).axes) == 1
    numbers = headline(card)
    assert "test_leaked_ngram_share" in numbers and "test_leaked_document_share" not in numbers
    assert "near copies were not measured" in datacard.copies_dropped(card)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dedup": "near"}, "dedup is 'near', which needs all documents in memory.*Set dedup to exact or off"),
        ({"split": "contiguous"}, "split is 'contiguous'.*Set split to hash or given, or streamed to false"),
        ({"task": "qa", "clean": "none"}, "task is 'qa'.*Set task to lm"),
        ({"split": "given", "subset_val": 3}, "subset_val and subset_test choose among all documents"),
        ({"tokenizer": "train"}, "tokenizer 'train' is made from the train split .*Name a published tokenizer"),
        ({"held_out_share": 0.5}, "held_out_share is 0.5, but must be above 0 and below 0.5"),
        ({"held_out_share": 0.2, "split": "given"}, "held_out_share is for split=hash .* split is 'given'"),
        ({"storage": "parquet"}, "storage is 'parquet'. Valid names: "),
    ],
)
def test_bad_configurations_are_told_before_any_work(config: DataConfig, change: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        check_config(replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minimum_characters": 10_000}, "Cleaning left no document: the longest has [0-9]+ characters"),
        ({"block_size": 30_000}, "The train split has [0-9]+ tokens in [0-9]+ documents: too few"),
        ({"max_documents": 1}, "split=hash of 1 documents leaves .* empty"),
        ({"text_field": "body"}, "no column for text_field 'body'"),
    ],
)
def test_a_corpus_that_is_too_small_leaves_nothing(
    config: DataConfig, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        prepare_data(replace(config, **change), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".data-streamed.lock"])


@pytest.mark.parametrize("streamed", [True, False])
def test_non_ascii_left_in_an_ascii_set_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """The texts arrive with letters that cleaning should have dropped."""
    from nbutils.data import documents

    def forgetful(text: str, clean: str, ascii_only: bool) -> str:
        return documents.clean_text(text)

    assert prepare_data(replace(config, streamed=streamed), tmp_path / "whole").card["splits"]
    for module in (documents, streamed_preparation):
        monkeypatch.setattr(module, "tidy_text", forgetful)
    with pytest.raises(
        CorpusError, match=r"Non-ASCII is left in an ASCII set.*the train split has [\d,]+ tokens.*take"
    ):
        prepare_data(replace(config, streamed=streamed), tmp_path)


def test_every_token_with_a_byte_beyond_ascii_is_found_and_no_other() -> None:
    tokenizer = character_tokenizer(["ab \x7fé"])
    ids = tokenizer.get_vocab()
    for character, refused in (("a", False), ("\x7f", False), ("é", True)):
        tokens = np.full((2, 3), ids[character])
        totals = {"validation": Blocks(tokens, tokens, 0).totals(len(ids))}
        if refused:
            with pytest.raises(CorpusError, match=rf"validation split has 6 tokens.*token {ids['é']}, 6 times"):
                check_ascii(totals, tokenizer)
        else:
            check_ascii(totals, tokenizer)
