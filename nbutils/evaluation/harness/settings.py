"""Which tasks there are, where their items lie, and what can be known before anything heavy is imported.

Items come from the Hugging Face Hub or from a local folder:

    tasks/hellaswag/hellaswag_val.jsonl
    tasks/piqa/valid.jsonl, valid-labels.lst
    tasks/winogrande/validation.jsonl
    tasks/arc_easy/test.jsonl, train.jsonl

Any of them may also be called train, validation or test, with .jsonl or .parquet, and have the Hub's columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbutils.foundation import ParameterError, did_you_mean, relative, resolve


@dataclass(frozen=True)
class TaskSource:
    """Where a task's items are: a data set of the Hub, or a folder of that name; `evaluated` is the split scored.

    `task_file` is the harness's own, below its folder of tasks, or one of ours by its bare name.
    """

    hub_name: str
    config: str | None
    folder: str
    evaluated: str
    task_file: str


TASKS = {
    "hellaswag": TaskSource("Rowan/hellaswag", None, "hellaswag", "validation", "hellaswag/hellaswag.yaml"),
    "piqa": TaskSource("baber/piqa", None, "piqa", "validation", "piqa/piqa.yaml"),
    "winogrande_debiased": TaskSource(
        "allenai/winogrande", "winogrande_debiased", "winogrande", "validation", "winogrande_debiased.yaml"
    ),
    "arc_easy": TaskSource("allenai/ai2_arc", "ARC-Easy", "arc_easy", "test", "arc/arc_easy.yaml"),
}
SPELLING = ("spelling_count", "spelling_first_index", "spelling_character")
SPELLING_SHOTS = 24  # items of the probe that serve as examples alone
NUMBERS = ("acc", "acc_norm", "gold_bits_per_byte")
SUFFIXES = (".jsonl", ".parquet")
STEMS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The tasks in `tasks`, a list or words apart by commas or spaces; `spelling` stands for its three.

    Raises ParameterError for a name that is no task.
    """
    words = re.split(r"[,\s]+", tasks) if isinstance(tasks, str) else list(tasks)
    names: list[str] = []
    for word in filter(None, words):
        if word not in (*TASKS, *SPELLING, "spelling"):
            raise ParameterError(f"tasks names {word!r}. {did_you_mean(word, (*TASKS, *SPELLING, 'spelling'))}")
        names += SPELLING if word == "spelling" else (word,)
    return list(dict.fromkeys(names))


def number_names(tasks: str | Sequence[str]) -> list[str]:
    """The names of the numbers that an evaluation of `tasks` gives, in order."""
    names = task_names(tasks)
    numbers = [f"{task}_{number}" for task in names for number in NUMBERS]
    together = ("spelling_acc", "spelling_gold_bits_per_byte") if set(SPELLING) <= set(names) else ()
    return [*numbers, *together]


def check_tasks(tasks: str | Sequence[str], tasks_folder: str = "", few_shot: int = 0, items: int = 0) -> None:
    """What can be known of an evaluation before it starts. No task, nothing to check.

    tasks_folder: local files in the layout above, or empty for the Hub; few_shot: solved examples in each prompt;
    items: how many items of a task, evenly spread over its file, 0 for all.
    Raises ParameterError: a task that does not exist, a folder or file that is missing, too few examples.
    """
    names = task_names(tasks)
    if few_shot < 0 or items < 0:
        raise ParameterError(
            f"few_shot is {few_shot} and items is {items}. Neither can be negative; 0 means none, and all."
        )
    for name in names:
        if name in TASKS and tasks_folder:
            evaluated = local_file(name, tasks_folder, TASKS[name].evaluated)
            _, path = example_file(name, tasks_folder)
            most = _rows(path) if path != evaluated else min(items or _rows(path), _rows(path)) - 1
            _check_examples(name, few_shot, most, relative(path))
        elif name in SPELLING:
            _check_examples(name, few_shot, SPELLING_SHOTS, "the probe")


def local_folder(task: str, tasks_folder: str | Path) -> Path:
    """The folder of a task's local files. Raises ParameterError where there is none."""
    base = resolve(tasks_folder)
    if not base.is_dir():
        raise ParameterError(
            f"tasks_folder: there is no folder {relative(base)}. Give one with {', '.join(_folders())} in it, or leave "
            "tasks_folder empty to read the tasks from the Hub."
        )
    for name in (task, TASKS[task].folder):
        if (base / name).is_dir():
            return base / name
    raise ParameterError(
        f"tasks_folder {relative(base)} has no folder {TASKS[task].folder!r}, which holds the items of {task}. "
        f"Put it there, or take {task} out of tasks."
    )


def local_file(task: str, tasks_folder: str | Path, split: str, needed: bool = True) -> Path | None:
    """The local file of one split; where it is not `needed`, None if it is not there. Raises ParameterError."""
    folder = local_folder(task, tasks_folder)
    names = [f"{stem}{suffix}" for stem in _stems(folder.name, split) for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not needed:
        return None
    raise ParameterError(
        f"{relative(folder)} has no {split} items of {task}: none of {', '.join(names)} is there. Put one of them "
        f"there, or take {task} out of tasks."
    )


def labels_file(items: Path) -> Path:
    """Where the answers stand that the file of `items` lacks: one a line, as PIQA publishes them."""
    return items.with_name(f"{items.stem}-labels.lst")


def example_file(task: str, tasks_folder: str | Path) -> tuple[str, Path]:
    """The split, and its file, that solved examples are drawn from: train, or that evaluated where there is no train.

    Raises ParameterError where neither is there.
    """
    train = local_file(task, tasks_folder, "train", needed=False)
    evaluated = TASKS[task].evaluated
    return ("train", train) if train else (evaluated, local_file(task, tasks_folder, evaluated))


def _check_examples(task: str, few_shot: int, most: int, where: str) -> None:
    if few_shot > most:
        raise ParameterError(
            f"few_shot is {few_shot}, but {where} has {max(0, most)} examples for {task}, the item itself left out. "
            "Lower few_shot."
        )


def _rows(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _stems(folder: str, split: str) -> Iterable[str]:
    yield from STEMS[split]
    yield from (f"{folder}_{stem}" for stem in STEMS[split])


def _folders() -> list[str]:
    return sorted({source.folder for source in TASKS.values()})


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines or Parquet file. Raises ParameterError that names the line where it is damaged."""
    if path.suffix == ".parquet":
        import pyarrow

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ParameterError(f"{relative(path)} is no Parquet file ({error}). Fetch it again.") from None
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ParameterError(f"{relative(path)}, line {number}: not JSON ({error}). Fetch it again.") from None
            if row is not None:
                rows.append(row)
    return rows
