"""In which of their numbers two runs differ and by how much, file by file of the run folder.

What a clock or a meter of memory read is left out (nbutils/runs/metric_labels.py): no two runs share it. The size of a
difference is relative: to the larger of the two numbers, in weights to the largest weight of the tensor.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from nbutils.data import MODELS
from nbutils.foundation import MANIFEST, RunError, file_sha256, read_json, relative
from nbutils.runs import RESULTS, is_of_the_machine

if TYPE_CHECKING:
    import torch

Columns = Mapping[str, Sequence[Any]]
SHORT = 12  # digits of a hash


@dataclass(frozen=True)
class FileDifference:
    """One file of two runs: how much was `compared` (of `what`), and the names of what is `differing` in it.

    largest: the largest relative difference, infinite where one of the two is no number; `where` says which it is.
    added: names that the second run alone has, which are no difference of the first one's numbers.
    """

    file: str
    what: str
    compared: int
    differing: tuple[str, ...] = ()
    largest: float = 0.0
    where: str = ""
    added: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether all that the first run has is in the second, bit for bit."""
        return not self.differing


def compare_runs(first: Path, second: Path) -> list[FileDifference]:
    """Every file with numbers that run folder `first` has, beside the same of `second`.

    Raises RunError where a file cannot be read.
    """
    found = []
    for file in RESULTS:
        what, read = READERS[Path(file).suffix]
        here, there = (_read(folder / file, read) for folder in (first, second))
        if here:
            found.append(compare_columns(file, what, here, there))
    made = _data_fingerprint(first)
    if made:
        found.append(compare_columns("data/", "fingerprint", made, _data_fingerprint(second)))
    return found + [_compare_weights(first, second, file) for file in _weights(first)]


def compare_columns(file: str, what: str, first: Columns, second: Columns) -> FileDifference:
    """What differs between two tables, by column; a column of one value is a number with a name."""
    differing, largest, where = [], 0.0, ""
    for name, values in first.items():
        others = second.get(name)
        size, place = _column_difference(values, others)
        if place:
            differing.append(name)
        if place and (size > largest or not where):
            largest, where = size, f"{name}{place}"
    added = tuple(name for name in second if name not in first)
    return FileDifference(file, what, len(first), tuple(differing), largest, where, added)


def relative_difference(first: Any, second: Any) -> float:
    """0 where both are the same, infinity where they differ and one is no number; of lists and mappings the largest."""
    if first == second or (_is_nan(first) and _is_nan(second)):
        return 0.0
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return max(map(relative_difference, first, second))
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return max(relative_difference(first[name], second[name]) for name in first)
    numbers = [_number(first), _number(second)]
    if None in numbers or not all(map(math.isfinite, numbers)):
        return math.inf
    return abs(numbers[0] - numbers[1]) / max(map(abs, numbers)) if numbers[0] != numbers[1] else 0.0


def _column_difference(values: Sequence[Any], others: Sequence[Any] | None) -> tuple[float, str]:
    """(largest relative difference, where and from what to what it is), the latter empty where there is none."""
    if others is None:
        return math.inf, " is missing"
    if len(values) != len(others):
        return math.inf, f" has {len(others):,} rows, not {len(values):,}"
    sizes = enumerate(map(relative_difference, values, others))
    differences = [(size, row) for row, size in sizes if size > 0]
    if not differences:
        return 0.0, ""
    size, row = max(differences, key=lambda each: (each[0], -each[1]))
    in_row = f", row {row + 1}" if len(values) > 1 else ""
    return size, f"{in_row}: {_shown(values[row])} → {_shown(others[row])}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _number(value: Any) -> float | None:
    """Text is none: what a model wrote is another text where it wrote 0.10 for 0.1."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 24 else text[:23] + "…"


def _read(path: Path, read: Callable[[Path], Columns]) -> Columns:
    """The columns of a file but those of the machine; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        columns = read(path)
    except (OSError, ValueError, AttributeError, TypeError, BadZipFile) as error:  # cut, or edited by hand
        raise RunError(
            f"{relative(path)} cannot be read ({type(error).__name__}: {error}). Copy the run folder again."
        ) from None
    return {name: values for name, values in columns.items() if not is_of_the_machine(name)}


def _json(path: Path) -> Columns:
    """Of a mapping every entry, of a list of records every name in them."""
    content = read_json(path)
    return _of_records(content) if isinstance(content, list) else {name: [value] for name, value in content.items()}


def _csv(path: Path) -> Columns:
    """The cells by their value: 0.10 is 0.1."""
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    cells = [[_value(cell) for cell in row] for row in rows]
    return dict(zip(names, map(list, zip(*cells, strict=True)), strict=True)) if rows else {name: [] for name in names}


def _value(cell: str) -> Any:
    """The number a cell holds, else its text."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _parquet(path: Path) -> Columns:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()


def _lines(path: Path) -> Columns:
    return _of_records([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line])


def _of_records(records: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _arrays(path: Path) -> Columns:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: np.atleast_1d(arrays[name]).tolist() for name in arrays.files}


# by the suffix: what is counted in a file, and how it is read
READERS: dict[str, tuple[str, Callable[[Path], Columns]]] = {
    ".json": ("entries", _json),
    ".csv": ("columns", _csv),
    ".parquet": ("columns", _parquet),
    ".jsonl": ("columns", _lines),
    ".npz": ("arrays", _arrays),
}


def _data_fingerprint(folder: Path) -> Columns:
    """The fingerprint of the data that a run has made, by the run's record: the data themselves may be elsewhere."""
    made = (folder / "data" / "card.json").is_file()
    content = read_json(folder / MANIFEST).get("fingerprint") if made else None
    return {"fingerprint": [content[:SHORT]]} if content else {}


def _weights(folder: Path) -> list[str]:
    """The files of weights, relative to the run folder."""
    files = [path for name in MODELS for path in sorted((folder / name).glob("*.safetensors"))]
    return [path.relative_to(folder).as_posix() for path in files]


def _compare_weights(first: Path, second: Path, file: str) -> FileDifference:
    """Two files of weights: equal bytes are equal weights, else tensor by tensor."""
    if not (second / file).is_file():
        return FileDifference(file, "tensors", 0, (file,), math.inf, "is missing")
    if file_sha256(first / file) == file_sha256(second / file):
        return FileDifference(
            file, f"bytes, SHA-256 {file_sha256(first / file)[:SHORT]}", (first / file).stat().st_size
        )
    from safetensors import safe_open

    with safe_open(first / file, "pt") as here, safe_open(second / file, "pt") as there:
        names, others = sorted(here.keys()), set(there.keys())
        sizes = {
            name: _tensor_difference(here.get_tensor(name), there.get_tensor(name)) if name in others else math.inf
            for name in names
        }
    differing = tuple(name for name, size in sizes.items() if size > 0)
    where = max(differing, key=sizes.__getitem__, default="")
    added = tuple(sorted(others - set(names)))
    return FileDifference(file, "tensors", len(names), differing, sizes.get(where, 0.0), where, added)


def _tensor_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors relative to the largest number in them."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return math.inf
    first, second = first.double(), second.double()
    apart = (first != second) & ~(first.isnan() & second.isnan())
    if not apart.any():
        return 0.0
    size = ((first - second).abs()[apart].max() / max(first.abs().max(), second.abs().max())).item()
    return math.inf if math.isnan(size) else size
