"""Published corpora as published: token counts, splits, and one text from the Hub and from a folder.

python -m pytest tests/test_published_corpora.py; without WORKBOOK_REAL_DATA all are skipped
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prepared_hub import add_wikitext
from real_data import REAL_DATA, needs_real_data

from nbutils.data.corpora import SPLITS, read_corpus
from nbutils.data.preparation import DataConfig, PreparedData, prepare_data
from nbutils.data.sources import CorpusRequest
from nbutils.data.tokenization import tokenize

pytestmark = needs_real_data
AS_PUBLISHED = {"max_documents": 0, "clean": "none", "dedup": "off", "split": "contiguous"}


def tokens_of(data: PreparedData, split: str) -> np.ndarray:
    return np.array(data.blocks[split][:]["input_ids"]).reshape(-1)


@pytest.mark.soak
def test_wikitext2_has_the_published_gpt2_token_counts(tmp_path: Path) -> None:
    """Articles tokenised one by one and joined are the whole file tokenised."""
    data = prepare_data(
        DataConfig(
            **AS_PUBLISHED,
            dataset_name="wikitext",
            data_files=f"{REAL_DATA}/wikitext2",
            tokenizer=f"{REAL_DATA}/tokenizers/gpt2",
            block_size=1024,
        ),
        tmp_path,
    )
    rows = data.card["splits"]
    assert [rows[name]["tokens"] for name in SPLITS] == [2_448_382, 258_659, 295_877]
    assert [rows[name]["end_tokens"] for name in SPLITS] == [0, 0, 0]
    perplexities = [np.exp(data.card["unigram_ce"][name]) for name in SPLITS[1:]]
    assert perplexities == pytest.approx([769.9, 710.6], rel=0.01)  # of a Witten-Bell unigram model
    (whole,) = tokenize([Path(REAL_DATA, "wikitext2/valid.txt").read_text(encoding="utf-8")], data.tokenizer)
    assert (tokens_of(data, "validation") == whole[: len(whole) // 1024 * 1024]).all()


def test_tinyshakespeare_as_nanogpt_splits_it(tmp_path: Path) -> None:
    file = Path(REAL_DATA, "tinyshakespeare/input.txt")
    data = prepare_data(
        DataConfig(
            **AS_PUBLISHED,
            dataset_name="big_text",
            data_files=str(file),
            tokenizer="characters",
            block_size=64,
        ),
        tmp_path,
    )
    rows = data.card["splits"]
    assert rows.keys() == {"train", "validation"}
    assert (rows["train"]["tokens"], rows["validation"]["tokens"]) == (1_003_854, 111_540)
    assert data.card["vocab_size"] == 65 + 2 and rows["validation"]["unknown_tokens"] == 0
    text = file.read_text(encoding="utf-8")
    for split, part in (("train", text[:1_003_854]), ("validation", text[1_003_854:])):
        assert data.tokenizer.decode(tokens_of(data, split)) == part[: len(part) // 64 * 64]
    assert data.card["unigram_ce"]["validation"] == pytest.approx(3.347, abs=0.001)  # the order-1 floor measured on it


def test_wikitext_of_the_hub_is_wikitext_of_the_folder(hub_cache: Path) -> None:
    folder = Path(REAL_DATA, "wikitext2")
    files = {"validation": "valid", "test": "test", "train": "valid"}
    add_wikitext(hub_cache, {split: (folder / f"{file}.txt").read_text() for split, file in files.items()})
    corpus = read_corpus(CorpusRequest("wikitext", dataset_config_name="wikitext-2-raw-v1"))
    local = read_corpus(CorpusRequest("wikitext", str(folder)))
    for split in ("validation", "test"):
        of_the_hub, of_the_folder = (
            [(document.name, document.text) for document in each.documents if document.split == split]
            for each in (corpus, local)
        )
        assert of_the_hub == of_the_folder and len(of_the_hub) == 60
