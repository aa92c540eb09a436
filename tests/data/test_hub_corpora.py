"""Hub data sets, from a prepared cache and from a Hub made up here: python -m pytest tests/test_hub_corpora.py"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from local_hub import LocalHub
from prepared_hub import COMMIT, FINEPDFS_CARD, add_data_set, add_finepdfs, add_wikitext, parquet_file
from tiny_notebooks import write_notebook

from nbutils.data import corpora
from nbutils.data.corpora import Corpus, check_corpus
from nbutils.data.sources import CorpusRequest
from nbutils.foundation.errors import CorpusError, ParameterError
from nbutils.runs.keys import made_of, run_key

FINEPDFS = CorpusRequest("HuggingFaceFW/finepdfs", dataset_config_name="eng_Latn")
ARTICLES = {
    "train": " \n = First = \n \n Text . \n = = Part = = \n \n More . \n = Played , W = \n Won . \n"
    " \n = Second = \n \n .\n",
    "validation": " \n = Only one = \n \n Words . \n",
    "test": " \n = A = b = \n \n Equals signs inside . \n \n",
}


def answers(monkeypatch: pytest.MonkeyPatch, answer: object, access: Exception | None = None) -> list[str]:
    """The Hub answers with `answer`, or raises it; the names that it was asked for."""
    import huggingface_hub

    asked = []

    def give(outcome: object) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    class Hub:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> object:
            asked.append(name)
            return give(answer(name) if callable(answer) else answer)

        def auth_check(self, name: str, repo_type: str) -> None:
            give(access)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return asked


def info(gated: bool = False, **card: object) -> SimpleNamespace:
    return SimpleNamespace(sha=COMMIT, gated=gated, card_data=SimpleNamespace(to_dict=lambda: card))


def http_error(kind: str) -> Exception:
    import huggingface_hub
    from huggingface_hub.utils import httpx

    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/api"))
    return getattr(huggingface_hub.errors, kind)("401 Client Error", response=response)


def request(dataset_name: str, config: str = "", **others: object) -> CorpusRequest:
    return CorpusRequest(dataset_name, dataset_config_name=config, **others)


def endless_rows() -> Iterator[dict[str, str]]:
    number = 0
    while True:
        yield {"text": f"row {number}"}
        number += 1


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents]


# ---- from the cache


def test_a_part_of_finepdfs_in_the_cache_is_streamed(hub_cache: Path) -> None:
    add_finepdfs(hub_cache)
    check_corpus(FINEPDFS)
    corpus = corpora.read_corpus(FINEPDFS)
    assert texts(corpus) == [f"Document {number} of a PDF about word {number * number}." for number in range(30)]
    assert [document.name for document in corpus.documents[:2]] == ["train/0", "train/1"]
    assert {document.split for document in corpus.documents} == {""}
    assert corpus.origin["revision"] == COMMIT and corpus.origin["dataset_config_name"] == "eng_Latn"
    assert corpus.fallback_taken == ""
    few = replace(FINEPDFS, max_documents=20)
    assert texts(corpora.read_corpus(few)) == texts(corpus)[:20]


def test_in_a_process_of_its_own_with_the_environment_alone(tmp_path: Path) -> None:
    """HF_HOME and HF_HUB_OFFLINE, as a user sets them: nothing of the Hub's client is replaced."""
    add_finepdfs(tmp_path / "hub")
    script = (
        f"from nbutils.data.corpora import CorpusRequest, read_corpus;print(len(read_corpus({FINEPDFS!r}).documents))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    assert subprocess.check_output([sys.executable, "-c", script], text=True, env=environment).strip() == "30"


def test_only_what_is_wanted_is_read(hub_cache: Path) -> None:
    """The second file is broken, and 15 documents do not need it."""
    snapshot = add_finepdfs(hub_cache)
    (snapshot / "data/eng_Latn/train/000_00001.parquet").resolve().write_bytes(b"PAR1 broken PAR1")
    assert len(texts(corpora.read_corpus(replace(FINEPDFS, max_documents=15)))) == 15
    with pytest.raises(CorpusError, match=r"HuggingFaceFW/finepdfs cannot be read .*hf cache rm dataset/Hugging"):
        corpora.read_corpus(FINEPDFS)


@pytest.mark.parametrize("name", ["Salesforce/wikitext", "wikitext"])
def test_wikitext_is_regrouped_into_articles_with_its_splits(hub_cache: Path, name: str) -> None:
    add_wikitext(hub_cache, ARTICLES, name)
    for asked in ("wikitext", "Salesforce/wikitext"):
        for split in ("given", "hash", "contiguous"):
            corpus = corpora.read_corpus(request(asked, "wikitext-2-raw-v1", split=split))
            titles = ["train/0 First", "train/1 Second", "validation/0 Only one", "test/0 A = b"]
            assert [document.name for document in corpus.documents] == titles
            for each, text in ARTICLES.items():
                joined = "".join(document.text for document in corpus.documents if document.split == each)
                assert joined.split() == text.split() and joined.count("\n") == text.count("\n")
    capped = corpora.read_corpus(request("wikitext", "wikitext-2-raw-v1", split="given", max_documents=1))
    assert [document.split for document in capped.documents] == ["train", "validation", "test"]


def test_given_splits_and_their_names(hub_cache: Path) -> None:
    splits = {"train": "a", "val": "b", "test": "c", "unlabelled": "d"}
    rows = {f"data/{split}-00000-of-00001.jsonl": f'{{"body": "{text}"}}\n' for split, text in splits.items()}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - {{split: {split}, path: 'data/{split}-*'}}\n" for split in splits
    )
    add_data_set(hub_cache, "owner/set", {"README.md": card + "---\n", **rows})
    given = corpora.read_corpus(request("owner/set", text_field="body", split="given"))
    assert [(each.split, each.text) for each in given.documents] == [("train", "a"), ("validation", "b"), ("test", "c")]
    counts = corpora.read_corpus(request("owner/set", text_field="body", split="counts"))
    assert texts(counts) == ["a"]


def test_a_set_without_a_card(hub_cache: Path) -> None:
    add_data_set(hub_cache, "owner/plain", {"train.csv": "text\nfirst\nsecond\n", "test.csv": "text\nthird\n"})
    assert texts(corpora.read_corpus(request("owner/plain"))) == ["first", "second"]
    with pytest.raises(CorpusError, match=r"split=given needs .* has (train, test|test, train)\. Set split to hash or"):
        corpora.read_corpus(request("owner/plain", split="given"))


# ---- the Hub itself


def test_over_http_one_file_of_four_is_enough(tmp_path: Path) -> None:
    """huggingface_hub and datasets as installed, in a process of its own, with a Hub on this machine."""
    names = ("HuggingFaceFW/finepdfs", "owner/gated", "owner/none")
    shards = {f"data/eng_Latn/train/{n}.parquet": parquet_file(text=[f"{n} {m}" for m in range(60)]) for n in range(4)}
    hub = LocalHub(
        sets={names[0]: {"README.md": FINEPDFS_CARD.encode(), **shards}, names[1]: {}},
        cards={names[0]: next(yaml.safe_load_all(FINEPDFS_CARD))},
        gated={names[1]},
    )
    hub.sets[names[0]] |= {
        f"data/{other}/0.parquet": parquet_file(text=["?"]) for other in ("deu_Latn/train", "eng_Latn/test")
    }
    script = (
        "from nbutils.data.corpora import CorpusRequest, read_corpus\n"
        "from nbutils.foundation.errors import CorpusError\n"
        f"for name, config in zip({names!r}, ('eng_Latn', '', '')):\n"
        "    try:\n"
        "        corpus = read_corpus(CorpusRequest(name, dataset_config_name=config, max_documents=50))\n"
        "        print(len(corpus.documents), corpus.documents[-1].text, corpus.origin['revision'])\n"
        "    except CorpusError as error:\n"
        "        print(error)\n"
    )
    with hub.serve() as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        output = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment, timeout=300)
    streamed, gated, unknown = output.splitlines()
    assert streamed == f"50 0 49 {COMMIT}"
    assert "'owner/gated' is gated" in gated and "no data set 'owner/none'" in unknown
    assert {path for path in hub.sent if path.endswith(".parquet")} == {"data/eng_Latn/train/0.parquet"}


def test_the_hub_is_asked_once_and_its_commit_is_streamed(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    opened = []

    def load_dataset(name: str, config: str | None, *, revision: str, streaming: bool) -> object:
        opened.append((name, config, revision, streaming))
        return {"train": datasets.IterableDataset.from_generator(endless_rows)}

    asked = answers(monkeypatch, info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    few = replace(FINEPDFS, max_documents=7)
    assert texts(corpora.read_corpus(few)) == [f"row {number}" for number in range(7)]
    assert asked == ["HuggingFaceFW/finepdfs"]
    assert opened == [("HuggingFaceFW/finepdfs", "eng_Latn", COMMIT, True)]


@pytest.mark.parametrize(
    ("answer", "access", "message"),
    [
        ("RepositoryNotFoundError", None, r"no data set 'HuggingFaceFW/finepdfs', or it is private\. Check the name"),
        ("RevisionNotFoundError", None, "has no revision 'v9'. Leave dataset_revision empty"),
        ("GatedRepoError", None, "is gated: its owner grants access. Ask for it at .*finepdfs, log in"),
        (info(gated=True), "GatedRepoError", "is gated: its owner grants access"),
        (OSError("Name or service not known"), None, r"the Hub cannot be reached \(Name or .* known\)\. .*hf download"),
        (info(configs=[{"config_name": "eng_Lat"}, {"config_name": "x"}]), None, "'eng_Latn'. Did you mean 'eng_Lat'"),
        (
            info(dataset_info=[{"config_name": "eng_Latn", "features": [{"name": "texts", "dtype": "string"}]}]),
            None,
            "no column for text_field 'text'. Did you mean 'texts'",
        ),
        (
            info(configs=[{"config_name": "eng_Latn", "data_files": [{"split": "train", "path": "t*"}]}]),
            None,
            "split=given needs a train and a validation split, but .* has train",
        ),
    ],
)
def test_what_the_hub_says_is_told_before_reading(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, answer: object, access: str | None, message: str
) -> None:
    answer = http_error(answer) if isinstance(answer, str) else answer
    answers(monkeypatch, answer, http_error(access) if access else None)
    with pytest.raises(CorpusError, match=message):
        check_corpus(replace(FINEPDFS, split="given", dataset_revision="v9"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request("HuggingFaceFW/finepdfs"), "cannot be had: the Hub cannot be reached .*offline mode.*hf download"),
        (request("bookcorpusopen"), "the-eye.eu, took them down. Public-domain books"),
        (request("a b/c"), "'a b/c' is no Hub name"),
        (request("owner/set", data_files="a.txt"), "is a Hub data set, but data_files is 'a.txt'. Leave data_files"),
        (request("a/b", fallback_datasets=("bookcorpusopen:text",)), "'bookcorpusopen' can no longer be had"),
        (request("a/b", fallback_datasets=("pydox",)), "'pydox' is not a known corpus. Did you mean 'pydoc'"),
    ],
)
def test_names_that_cannot_be_had(hub_cache: Path, asked: CorpusRequest, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        check_corpus(asked)


@pytest.mark.parametrize("entry", ["", "a/b:", "a/b:c:d:e"])
def test_fallbacks_that_cannot_be_read(hub_cache: Path, entry: str) -> None:
    with pytest.raises(ParameterError, match="Write name, name:field or name:configuration:field"):
        check_corpus(request("a/b", fallback_datasets=(entry,)))


def test_configurations_must_be_chosen_where_none_is_the_default(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [{"config_name": f"lang{number:04d}"} for number in range(1800)]
    answers(monkeypatch, info(configs=configs))
    with pytest.raises(CorpusError, match=r"1800 configurations .* Set dataset_config_name.*lang0019 and 1780 more"):
        check_corpus(request("owner/set"))
    answers(monkeypatch, info(configs=[*configs, {"config_name": "main", "default": True}]))
    assert corpora.locate_corpus(request("owner/set"))[1].config == "main"


def test_rows_of_a_hub_set_that_are_no_text_and_a_field_that_is_not_there(hub_cache: Path) -> None:
    add_data_set(hub_cache, "owner/set", {"train.parquet": parquet_file(text=["a", None, "c"], body=["d", "e", "f"])})
    with pytest.raises(CorpusError, match=r"train/1 \(null\) is the first, and of the 1 rows looked at after it 0 are"):
        corpora.read_corpus(request("owner/set"))
    assert texts(corpora.read_corpus(request("owner/set", skip_non_text=True))) == ["a", "c"]
    with pytest.raises(CorpusError, match=r"owner/set has no column for text_field 'txt'. Did you mean 'text'"):
        corpora.read_corpus(request("owner/set", text_field="txt"))


def test_a_hub_set_without_text(hub_cache: Path) -> None:
    add_data_set(hub_cache, "owner/set", {"train.parquet": parquet_file(text=["", " "])})
    with pytest.raises(CorpusError, match=r"'owner/set' has no text: owner/set is empty. Set text_field"):
        corpora.read_corpus(request("owner/set"))


def test_a_full_disk_while_downloading(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device", "/small/cache")

    answers(monkeypatch, info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CorpusError, match=r"disk is full while reading .*finepdfs \(/small/cache\).*HF_HOME"):
        corpora.read_corpus(FINEPDFS)


# ---- fallbacks


def test_the_first_fallback_that_can_be_had_is_taken_and_told(hub_cache: Path) -> None:
    add_data_set(hub_cache, "ccdv/arxiv-summarization", {"train.parquet": parquet_file(article=["An article."])})
    entries = ("owner/none:text", "ccdv/arxiv-summarization:article", "pydoc")
    corpus = corpora.read_corpus(replace(FINEPDFS, fallback_datasets=entries))
    assert texts(corpus) == ["An article."]
    assert corpus.origin["dataset_name"] == "ccdv/arxiv-summarization" and corpus.origin["text_field"] == "article"
    assert corpus.fallback_taken == (
        "HuggingFaceFW/finepdfs eng_Latn cannot be reached and owner/none cannot be reached: "
        "ccdv/arxiv-summarization was read in its place."
    )


def test_a_gated_set_falls_back_and_a_wrong_name_does_not(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(FINEPDFS, fallback_datasets=("pydoc",), max_documents=1)
    answers(monkeypatch, http_error("GatedRepoError"))
    assert corpora.read_corpus(asked).fallback_taken == (
        "HuggingFaceFW/finepdfs eng_Latn is gated: pydoc was read in its place."
    )
    answers(monkeypatch, http_error("RepositoryNotFoundError"))
    with pytest.raises(CorpusError, match="The Hub has no data set"):
        corpora.read_corpus(asked)


def test_where_no_fallback_can_be_had_either_all_are_named(hub_cache: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"'HuggingFaceFW/finepdfs' cannot be had.* none can be had either: a/b c, d/e\."
    ):
        check_corpus(replace(FINEPDFS, fallback_datasets=("a/b:c:text", "d/e")))


# ---- the key


def test_the_key_is_of_name_configuration_and_commit(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = write_notebook(tmp_path / "study.ipynb", "x = 1")
    params = {"dataset_name": "owner/set", "data_files": "", "dataset_config_name": "", "fallback_datasets": ["pydoc"]}

    def key(**changes: object) -> str:
        return run_key(made_of(notebook, params | changes, {}))

    fallback = key()
    answers(monkeypatch, info())
    base = key()
    assert base == key() != fallback
    assert base != key(dataset_config_name="other")
    answers(monkeypatch, SimpleNamespace(sha="f" * 40, gated=False, card_data=None))
    assert base != key()
