"""A local Hub cache laid out as huggingface_hub lays it out: blobs, snapshots of links to them, and refs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow
import pyarrow.parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"

FINEPDFS_CARD = """---
configs:
- config_name: deu_Latn
  data_files:
  - split: train
    path: data/deu_Latn/train/*
- config_name: eng_Latn
  data_files:
  - split: train
    path: data/eng_Latn/train/*
  - split: test
    path: data/eng_Latn/test/*
---
# FinePDFs
"""
WIKITEXT_CARD = """---
dataset_info:
- config_name: wikitext-103-raw-v1
  features: [{name: text, dtype: string}]
- config_name: wikitext-2-raw-v1
  features: [{name: text, dtype: string}]
configs:
- config_name: wikitext-103-raw-v1
  data_files: [{split: train, path: wikitext-103-raw-v1/train-*}]
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
---
"""


def parquet_file(**columns: list[object]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def add_data_set(cache: Path, name: str, files: dict[str, bytes | str]) -> Path:
    """Puts `files` into the cache as the data set `name`; the folder of the snapshot."""
    repository = cache / f"datasets--{name.replace('/', '--')}"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    for path, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def add_finepdfs(cache: Path, documents: int = 30) -> Path:
    """The second configuration alone, as after a download of a part: `datasets` refuses the folder as it is."""
    texts = [f"Document {number} of a PDF about word {number * number}." for number in range(documents)]
    half = documents // 2
    return add_data_set(
        cache,
        "HuggingFaceFW/finepdfs",
        {
            "README.md": FINEPDFS_CARD,
            "data/eng_Latn/train/000_00000.parquet": parquet_file(text=texts[:half], id=list(range(half))),
            "data/eng_Latn/train/000_00001.parquet": parquet_file(text=texts[half:], id=list(range(half, documents))),
            "data/eng_Latn/test/000_00000.parquet": parquet_file(text=["Held out."], id=[0]),
        },
    )


def wikitext_rows(text: str) -> list[str]:
    """The lines of a WikiText file as its Hub data set has them: a blank line is an empty row."""
    return [line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]


def add_wikitext(cache: Path, texts: dict[str, str], name: str = "Salesforce/wikitext") -> Path:
    files: dict[str, bytes | str] = {"README.md": WIKITEXT_CARD}
    for split, text in texts.items():
        path = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        files[path] = parquet_file(text=wikitext_rows(text))
    return add_data_set(cache, name, files)
