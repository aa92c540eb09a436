"""Minimal pairs: is the grammatical sentence of two more probable, as BabyLM's pipeline asks it.

    found = score_pairs(model, tokenizer, "data/blimp", items=200)
    found.numbers["blimp_acc"], found.items

A folder holds JSON Lines files with sentence_good and sentence_bad, as alexwarstadt/blimp has them; a paradigm is what
UID says or, without one, the file's name. The folder "embedded" stands for our own pairs of agreement
(agreement_pairs.py).

A sentence is tokenised as the tokenizer does by itself and scored by the sum of its tokens' log-probabilities; special
tokens are context alone, and so is a first token that nothing precedes. lm-eval puts an end token (or a begin token)
and a space before the sentence and scores its first token, too: never compare numbers of the two.
Source: babylm/evaluation-pipeline-2025, sentence_zero_shot (dataset.py, compute_results.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.evaluation.harness.agreement_pairs import agreement_pairs
from nbutils.evaluation.harness.evaluation import undisturbed
from nbutils.evaluation.harness.items import spread
from nbutils.evaluation.harness.settings import read_rows
from nbutils.foundation import ParameterError, relative, resolve

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
PAIRS_FILE = "minimal_pairs.parquet"
SENTENCES = ("sentence_good", "sentence_bad")
PARADIGM = re.compile(r"[A-Za-z0-9_.-]{1,100}")  # it becomes part of a number's name
COLUMNS = {
    "step": "int64",
    "paradigm": "str",
    "item": "str",
    "good_logp": "float64",
    "bad_logp": "float64",
    "correct": "bool",
}


@dataclass(frozen=True)
class Pair:
    """Two sentences, of which the first is grammatical."""

    paradigm: str
    good: str
    bad: str


@dataclass(frozen=True)
class PairScores:
    """What an evaluation found.

    paradigms: the share of pairs with good more probable than bad, in [0, 1]; NaN where the model gave no number.
    items: a row a pair, columns COLUMNS, log-probabilities in nats. skipped: pairs with more tokens than the model has
    positions. name: what the numbers begin with, "blimp", or "pairs" for the embedded ones.
    """

    name: str
    paradigms: dict[str, float]
    items: pandas.DataFrame
    skipped: int

    @property
    def accuracy(self) -> float:
        """The mean over paradigms, whatever their sizes."""
        return sum(self.paradigms.values()) / len(self.paradigms)

    @property
    def numbers(self) -> dict[str, float]:
        """<name>_acc and <name>_<paradigm>_acc."""
        each = {f"{self.name}_{paradigm}_acc": value for paradigm, value in self.paradigms.items()}
        return {f"{self.name}_acc": self.accuracy} | each


@dataclass(frozen=True)
class MinimalPairs:
    """What is asked: `folder` as above, empty for nothing; `items` of each paradigm, evenly spread, 0 for all."""

    folder: str = ""
    items: int = 0
    batch_size: int = 32  # sentences

    @property
    def columns(self) -> list[str]:
        """The number that stands for all paradigms, by name; none where nothing is asked."""
        return [f"{_name(self.folder)}_acc"] if self.folder else []

    def check(self) -> None:
        """Raises ParameterError as `check_pairs` does."""
        check_pairs(self.folder, self.items)

    def evaluate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int = 0) -> PairScores | None:
        """`score_pairs` with these settings; None where nothing is asked."""
        if not self.folder:
            return None
        return score_pairs(model, tokenizer, self.folder, self.items, self.batch_size, step)


def check_pairs(folder: str, items: int = 0) -> None:
    """Raise ParameterError where `folder`, if one is given, holds no pairs or they cannot be read."""
    if items < 0:
        raise ParameterError(f"blimp_items is {items}; give a number of pairs of each paradigm, or 0 for all.")
    if folder:
        read_pairs(folder, items)


def read_pairs(folder: str, items: int = 0) -> list[Pair]:
    """The pairs of `folder`, paradigms by name, `items` of each (0: all), evenly spread. Raises ParameterError."""
    if folder == EMBEDDED:
        return [Pair(name, *pair) for name, pairs in agreement_pairs(items).items() for pair in pairs]
    paradigms: dict[str, list[Pair]] = {}
    for path in _files(resolve(folder)):
        for pair in _pairs_of(path):
            paradigms.setdefault(pair.paradigm, []).append(pair)
    return [pairs[place] for _, pairs in sorted(paradigms.items()) for place in spread(len(pairs), items)]


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    items: int = 0,
    batch_size: int = 32,
    step: int = 0,
) -> PairScores:
    """Ask `model` the pairs of `folder`, `items` of each paradigm (0: all), `batch_size` sentences at a time.

    Equal log-probabilities are no right answer. `step` is written to the rows. The model's mode and all random states
    are as before afterwards. Raises ParameterError as `check_pairs` does, or where no pair of a paradigm fits the
    model's positions; ModelError where the chunked head does not know the model's.
    """
    pairs = read_pairs(folder, items)
    found = sentence_log_probs(model, tokenizer, [text for pair in pairs for text in (pair.good, pair.bad)], batch_size)
    scored = [pair for pair in pairs if pair.good in found and pair.bad in found]
    missing = sorted({pair.paradigm for pair in pairs} - {pair.paradigm for pair in scored})
    if missing:
        raise ParameterError(
            f"No pair of {', '.join(missing)} fits the model's {_positions(model)} positions. Train with a larger "
            "block_size, or leave blimp_folder empty."
        )
    skipped = len(pairs) - len(scored)
    if skipped:
        logger.warning("%d of %d pairs do not fit the model's %s positions", skipped, len(pairs), _positions(model))
    frame = _frame([_row(pair, found[pair.good], found[pair.bad], step) for pair in scored])
    known = frame["correct"].astype("float64").where(frame["good_logp"].notna() & frame["bad_logp"].notna())
    by_paradigm = known.groupby(frame["paradigm"]).apply(lambda each: float(each.mean(skipna=False)))
    return PairScores(_name(folder), by_paradigm.to_dict(), frame, skipped)


def sentence_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], batch_size: int = 32
) -> dict[str, float]:
    """The log-probability of each sentence in nats, summed over its tokens as above; without those too long to score.

    Right-padded batches of about one length, which a causal model scores as it does each alone.
    """
    import torch

    encoded: dict[str, tuple[list[int], list[bool]]] = {}
    for text in dict.fromkeys(sentences):
        tokens = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        if len(tokens["input_ids"]) <= _positions(model) + 1:  # the last token is only predicted
            encoded[text] = tokens["input_ids"], [not special for special in tokens["special_tokens_mask"]]
    order = sorted(encoded, key=lambda text: len(encoded[text][0]))
    found: dict[str, float] = {}
    with undisturbed(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            texts = order[start : start + batch_size]
            found |= zip(texts, _log_probs(model, [encoded[text] for text in texts]), strict=True)
    return found


def _log_probs(model: PreTrainedModel, batch: Sequence[tuple[list[int], list[bool]]]) -> list[float]:
    """Of each (tokens, which of them count): the sum over those that count, the first left out."""
    import torch

    from nbutils.data import IGNORE_INDEX
    from nbutils.models import head_matrices
    from nbutils.objectives import CrossEntropy, term_values

    width = max(2, *(len(tokens) for tokens, _ in batch))
    inputs = torch.zeros(len(batch), width - 1, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (tokens, counts) in enumerate(batch):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        following = torch.tensor(tokens[1:])
        targets[row, : len(tokens) - 1] = following.where(torch.tensor(counts[1:]).bool(), IGNORE_INDEX)
    hidden = model.base_model(input_ids=inputs.to(model.device), use_cache=False).last_hidden_state
    output, embeddings = head_matrices(model)
    flat = hidden.flatten(0, 1), output.weight, embeddings.weight, targets.flatten().to(model.device)
    values = term_values(*flat, {"ce": CrossEntropy()})["ce"]
    return (-values.view(inputs.shape).double().sum(1)).tolist()


def _positions(model: PreTrainedModel) -> float:
    return getattr(model.config, "max_position_embeddings", None) or float("inf")


def _name(folder: str) -> str:
    return "pairs" if folder == EMBEDDED else "blimp"


def _row(pair: Pair, good: float, bad: float, step: int) -> dict[str, Any]:
    item = hashlib.sha256(json.dumps([pair.good, pair.bad], ensure_ascii=False).encode()).hexdigest()[:16]
    likely = {"good_logp": good, "bad_logp": bad, "correct": good > bad}
    return {"step": step, "paradigm": pair.paradigm, "item": item} | likely


def _frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    cure = "Give the folder with BLiMP's .jsonl files, or set blimp_folder to 'embedded' for our own pairs."
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise ParameterError(f"blimp_folder: {relative(folder)} {what}. {cure}")
    if files := sorted(folder.glob("*.jsonl")):
        return files
    below = next((f" {relative(path.parent)} has some." for path in sorted(folder.glob("*/*.jsonl"))), "")
    raise ParameterError(f"blimp_folder: {relative(folder)} holds no .jsonl file.{below} {cure}")


def _pairs_of(path: Path) -> Iterator[Pair]:
    try:
        rows = read_rows(path)
    except UnicodeDecodeError:
        raise ParameterError(f"{relative(path)} is no UTF-8 text. Fetch it again.") from None
    if not rows:
        raise ParameterError(f"{relative(path)} holds no pair. Fetch it again, or take it out of blimp_folder.")
    for number, row in enumerate(rows, 1):
        found = [row.get(name) if isinstance(row, dict) else None for name in SENTENCES]
        if not all(isinstance(text, str) and text.strip() for text in found):
            raise ParameterError(
                f"{relative(path)}, pair {number}: {' and '.join(SENTENCES)} are two sentences, and are not here. Take "
                "files of other kinds out of blimp_folder."
            )
        paradigm = row.get("UID") or path.stem
        if not (isinstance(paradigm, str) and PARADIGM.fullmatch(paradigm)):
            raise ParameterError(
                f"{relative(path)}, pair {number}: its paradigm is {str(paradigm)[:100]!r}; a paradigm is named by up "
                "to 100 letters, digits, '_', '-' and '.'. Change the UID or, where there is none, the file's name."
            )
        yield Pair(paradigm, *found)
