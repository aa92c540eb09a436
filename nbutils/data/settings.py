"""The parameters of the data preparation notebook, and what can be known of them before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nbutils.data.corpora import CorpusRequest, check_corpus
from nbutils.data.documents import CLEAN, DEDUP, HELD_OUT_SHARE, SPLIT
from nbutils.data.mds_blocks import require_streaming
from nbutils.data.sources import TASKS
from nbutils.data.tokenization import check_tokenizer
from nbutils.foundation import ParameterError, did_you_mean

STORAGE = ("arrow", "mds", "auto")
STREAMED = {"task": ("lm",), "dedup": ("exact", "off"), "split": ("hash", "given")}  # what a stream allows
TRAINED = ("train", "unigram", "characters")  # tokenizers made from the train split


@dataclass(frozen=True)
class DataConfig:
    """The parameters of the data preparation notebook, which explains each; its defaults are these."""

    dataset_name: str = "pydoc"
    data_files: str = ""
    dataset_config_name: str = ""
    dataset_revision: str = ""
    text_field: str = "text"
    task: str = "lm"
    question_field: str = "question"
    answer_field: str = "answer"
    skip_non_text: bool = False
    fallback_datasets: Sequence[str] = ()
    max_documents: int = 400
    max_tokens: int = 0
    streamed: bool = False
    clean: str = "standard"
    ascii_only: bool = False
    minimum_characters: int = 128
    dedup: str = "near"
    split: str = "hash"
    held_out_share: float = HELD_OUT_SHARE
    subset_train: int = 0
    subset_val: int = 0
    subset_test: int = 0
    tokenizer: str = "train"
    vocab_size: int = 1024
    block_size: int = 128
    storage: str = "arrow"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fallback_datasets", tuple(self.fallback_datasets))  # a plan gives a list

    def parameters(self) -> dict[str, Any]:
        """The values as the notebook and JSON have them."""
        return asdict(self) | {"fallback_datasets": list(self.fallback_datasets)}


def check_config(config: DataConfig) -> None:
    """What can be known before a kernel starts, in well under a second (5 s where the Hub must be asked).

    Raises ParameterError, CorpusError or ModelError, each with cause and cure.
    """
    choices = {"task": TASKS, "clean": CLEAN, "dedup": DEDUP, "split": SPLIT, "storage": STORAGE}
    for name, valid in choices.items():
        if (given := getattr(config, name)) not in valid:
            raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, valid)}")
    smallest = {"max_documents": 0, "max_tokens": 0, "minimum_characters": 0, "block_size": 2}
    smallest |= {"subset_train": 0, "subset_val": 0, "subset_test": 0}
    for name, least in smallest.items():
        if (given := getattr(config, name)) < least:
            raise ParameterError(f"{name} is {given}, but must be at least {least}.")
    _check_splits(config)
    _check_streamed(config)
    if config.storage == "mds":
        require_streaming()
    if config.task == "qa" and config.split == "contiguous":
        raise ParameterError(
            "split=contiguous is for running text, not for task qa. Set split to hash, counts or given."
        )
    if config.task == "qa" and config.question_field == config.answer_field:
        raise ParameterError(
            f"question_field and answer_field are both {config.answer_field!r}. Name the column of each."
        )
    check_corpus(CorpusRequest.of(asdict(config)))
    check_tokenizer(config.tokenizer, config.vocab_size)


def _check_splits(config: DataConfig) -> None:
    subsets = (config.subset_train, config.subset_val, config.subset_test)
    if config.split == "counts" and 0 in subsets[:2]:
        raise ParameterError("split=counts needs subset_train and subset_val of at least 1: numbers of documents.")
    if config.split not in ("counts", "given") and any(subsets):
        raise ParameterError(
            f"subset_train, subset_val and subset_test are numbers of documents for split=counts and limits for "
            f"split=given, but split is {config.split!r}. Set split to one of the two, or leave them 0."
        )
    if not 0 < config.held_out_share < 0.5:
        raise ParameterError(f"held_out_share is {config.held_out_share}, but must be above 0 and below 0.5.")
    if config.held_out_share != HELD_OUT_SHARE and (config.split != "hash" or config.task == "qa"):
        raise ParameterError(
            f"held_out_share is for split=hash of running text, but split is {config.split!r} and task "
            f"{config.task!r}. Leave it {HELD_OUT_SHARE}, or set split to hash and task to lm."
        )


def _check_streamed(config: DataConfig) -> None:
    """A stream is read once, and no more than a few of its documents are ever held."""
    if not config.streamed:
        return
    for name, allowed in STREAMED.items():
        if (given := getattr(config, name)) not in allowed:
            raise ParameterError(
                f"{name} is {given!r}, which needs all documents in memory, but streamed is true. Set {name} to "
                f"{' or '.join(allowed)}, or streamed to false."
            )
    if config.subset_train or config.subset_val or config.subset_test:
        raise ParameterError(
            "subset_train, subset_val and subset_test choose among all documents, but streamed is true. Leave them 0 "
            "(max_documents and max_tokens end the stream), or set streamed to false."
        )
    if config.tokenizer in TRAINED:
        raise ParameterError(
            f"tokenizer {config.tokenizer!r} is made from the train split before that is tokenised, but streamed is "
            "true. Name a published tokenizer or its folder; one of your own is in data/tokenizer of a run of "
            "01_data_prep on a part of the corpus (max_documents)."
        )
