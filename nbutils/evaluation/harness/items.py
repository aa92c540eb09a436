"""The items of a task as the harness expects them: with the Hub's columns, from the Hub or from local files.

`splits` is the one place that decides between the two. It is what the task files name as `custom_dataset`, so that no
loader writes a cache for local files and none asks a network.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data import UnreachableCorpusError
from nbutils.evaluation.harness.settings import SPELLING, TASKS, labels_file, local_file, read_rows
from nbutils.foundation import HUB_SECONDS, CorpusError, ParameterError, relative

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Row = dict[str, Any]
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+""")
COLUMNS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "winogrande_debiased": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
}
ORDINARY = "winogrande_xl"  # the set that the debiased one shares its validation items with


def splits(task: str, tasks_folder: str = "", items: int = 0, examples: str = "", **_: object) -> dict[str, Dataset]:
    """The splits of `task` that an evaluation reads.

    items: so many of the evaluated split, evenly spread, 0 for all; examples: the split few-shot examples are drawn
    from, empty for none. Further keywords are the harness's.
    Raises ParameterError, or CorpusError where the Hub cannot be reached or the items are not what they should be.
    """
    evaluated = "validation" if task in SPELLING else TASKS[task].evaluated
    names = dict.fromkeys([evaluated, *([examples] if examples else [])])
    read = _from_folder if tasks_folder else _from_hub
    found = {split: read(task, split, tasks_folder) for split in names}
    found[evaluated] = found[evaluated].select(spread(len(found[evaluated]), items))
    return found


def spread(count: int, items: int) -> list[int]:
    """The places of `items` of `count`, evenly spread; all of them where items is 0 or too many.

    Files are sorted by source (HellaSwag begins with all of ActivityNet), so their first items stand for nothing.
    """
    items = min(items or count, count)
    return [place * count // items for place in range(items)]


def check_debiased(debiased: list[Row], ordinary: list[Row]) -> None:
    """The debiased Winogrande has the ordinary set's validation items; its training items alone differ.

    Raises CorpusError where it has not: then accuracies of the two cannot be compared.
    """
    columns = COLUMNS["winogrande_debiased"]
    first, second = (sorted(tuple(row[name] for name in columns) for row in rows) for rows in (debiased, ordinary))
    if first != second:
        raise CorpusError(
            f"The validation items of winogrande_debiased ({len(first)}) are not those of the ordinary set "
            f"({len(second)}; {len(set(first) & set(second))} in common). Use files of one release."
        )


# ---- from files ------------------------------------------------------------------------------------------------------


def _from_folder(task: str, split: str, tasks_folder: str) -> Dataset:
    from datasets import Dataset

    if task in SPELLING:
        return Dataset.from_list(read_rows(Path(tasks_folder) / task / f"{split}.jsonl"))
    path = local_file(task, tasks_folder, split)
    rows = list(_with_hub_columns(task, path))
    if task == "winogrande_debiased" and path.parent.name == task and split == "validation":
        _check_beside(rows, path.parent.parent)
    return Dataset.from_list(rows)


def _check_beside(debiased: list[Row], folder: Path) -> None:
    """Where both sets lie in `folder`, they must have the same validation items."""
    for name in ("validation.jsonl", "validation.parquet"):
        if (ordinary := folder / TASKS["winogrande_debiased"].folder / name).is_file():
            check_debiased(debiased, read_rows(ordinary))


def _with_hub_columns(task: str, path: Path) -> Iterator[Row]:
    """The rows of a local file with the columns that the Hub's data set has."""
    rows = read_rows(path)
    if labels_file(path).is_file():
        rows = _with_labels(rows, labels_file(path))
    if not rows:
        raise ParameterError(f"{relative(path)} holds no item. Fetch it again.")
    for number, row in enumerate(rows, 1):
        converted = CONVERTED.get(task, dict)(row)
        if missing := [name for name in COLUMNS[task] if converted.get(name) is None]:
            raise ParameterError(
                f"{relative(path)}, item {number}: {', '.join(missing)} is missing among {', '.join(row)}. The columns "
                f"of {task} are those of {TASKS[task].hub_name} on the Hub."
            )
        yield {name: converted[name] for name in COLUMNS[task]}


def _with_labels(rows: list[Row], path: Path) -> list[Row]:
    labels = [int(line) for line in path.read_text().split()]
    if len(labels) != len(rows):
        raise ParameterError(f"{relative(path)} has {len(labels)} answers for {len(rows)} items. Fetch both again.")
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def _hellaswag(row: Row) -> Row:
    """A context in one piece is cut as the Hub's: ActivityNet's ends in a sentence begun, WikiHow's in a whole one.

    Files of that kind have lost the marks that some of WikiHow's endings begin with, for which the harness leaves a
    second space before them: of the Hub and of such files, compare no numbers.
    """
    row = row | {"label": str(row["label"])} if "label" in row else row
    if "ctx_a" in row or "ctx" not in row:
        return row
    begun = [end.end() for end in SENTENCE_END.finditer(row["ctx"])]
    cut = begun[-1] if begun and row["ctx"].rstrip()[-1] not in ".!?" else len(row["ctx"])
    return row | {"ctx_a": row["ctx"][:cut].rstrip(), "ctx_b": row["ctx"][cut:]}


def _arc(row: Row) -> Row:
    """A finished prompt and a list of choices are taken apart into the Hub's question and lettered choices."""
    if "question" in row or not {"query", "choices", "gold"} <= row.keys():
        return row
    letters = [chr(ord("A") + place) for place in range(len(row["choices"]))]
    return {
        "question": row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["gold"]],
    }


CONVERTED: dict[str, Callable[[Row], Row]] = {"hellaswag": _hellaswag, "arc_easy": _arc}


# ---- from the Hub ----------------------------------------------------------------------------------------------------


def check_reachable(tasks: Iterable[str]) -> None:
    """Raise UnreachableCorpusError for the first of `tasks` on the Hub that neither the Hub nor a local cache may have.

    Reads no item, and asks for at most HUB_SECONDS: a cache is taken at its word.
    """
    from huggingface_hub import HfApi

    for name in dict.fromkeys(TASKS[task].hub_name for task in tasks if task in TASKS):
        try:
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        except Exception as error:  # whatever the Hub's HTTP client raises, the cause and the cure are the same
            if not _may_be_cached(name):
                raise _unreadable(name, error) from None


def _may_be_cached(name: str) -> bool:
    """Whether the cache of `datasets`, whose import takes a second, has a folder for data sets of that owner."""
    from huggingface_hub import constants

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    owner = f"{name.partition('/')[0]}___".lower()
    return folder.is_dir() and any(each.name.lower().startswith(owner) for each in folder.iterdir())


def _from_hub(task: str, split: str, _: str) -> Dataset:
    source = TASKS[task]
    found = _hub_split(source.hub_name, source.config, split)
    if task == "winogrande_debiased" and split == source.evaluated:
        check_debiased(found.to_list(), _hub_split(source.hub_name, ORDINARY, split).to_list())
    return found


def _hub_split(name: str, config: str | None, split: str) -> Dataset:
    """One split; from the cache of `datasets` where the Hub does not answer."""
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the Hub's HTTP client raises, the cause and the cure are the same
        with _offline():
            try:
                found = datasets.load_dataset(name, config, split=split)
            except Exception:  # not in the cache, or not whole: the Hub's silence is the cause to tell
                raise _unreadable(name, error) from None
        logger.warning("%s is read from the local cache: the Hub cannot be reached", name)
        return found
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the Hub, of the file system, of a damaged file
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UnreachableCorpusError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UnreachableCorpusError(
        f"The task data set {name!r} cannot be read from the Hub ({reason}). Check the network, or set tasks_folder to "
        "a folder with the tasks' files."
    )


@contextmanager
def _offline() -> Iterator[None]:
    """`datasets` looks into its cache alone; on its own it would ask a Hub that is not there for half a minute."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
