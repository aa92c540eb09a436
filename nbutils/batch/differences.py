"""How two runs differ: in which numbers and by how much, file by file, and in what they were made from and on.

What a clock or a meter of memory read is left out (nbutils/runs/metric_labels.py): no two runs share it. The size of a
difference is relative: to the larger of the two numbers, in weights to the largest weight of the tensor.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from nbutils.data import MODELS
from nbutils.foundation import MANIFEST, RunError, file_sha256, read_json, relative
from nbutils.runs import RESULTS, Manifest, is_of_the_machine

if TYPE_CHECKING:
    import torch

Columns = Mapping[str, Sequence[Any]]
SHORT = 12  # digits of a hash: enough to find it again
ABSENT = "–"  # a fact that one side does not have
MOST_VALUES = 3  # of one fact, told of several runs
PACKAGE = "package "  # what such a fact is called begins so
MOST_PACKAGES = 5  # of another version that are named, where there are few lines
NAMED = 30  # characters of the names of packages that one side alone has


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
        what = {".json": "entries", ".npz": "arrays"}.get(Path(file).suffix, "columns")
        if here := _read(first / file):
            found.append(compare_columns(file, what, here, _read(second / file)))
    if made := _data_fingerprint(first):
        found.append(compare_columns("data/", "fingerprint", made, _data_fingerprint(second)))
    weights = [path for name in MODELS for path in sorted((first / name).glob("*.safetensors"))]
    return found + [_compare_weights(first, second, path.relative_to(first).as_posix()) for path in weights]


def compare_columns(file: str, what: str, first: Columns, second: Columns) -> FileDifference:
    """What differs between two tables, by column; a column of one value is a number with a name."""
    differing, largest, where = [], 0.0, ""
    for name, values in first.items():
        size, place = _column_difference(values, second.get(name))
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
    numbers = [each for each in (first, second) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return math.inf
    return abs(numbers[0] - numbers[1]) / max(map(abs, numbers))


def _column_difference(values: Sequence[Any], others: Sequence[Any] | None) -> tuple[float, str]:
    """(largest relative difference, where and from what to what it is), the latter empty where there is none."""
    if others is None:
        return math.inf, " is missing"
    if len(values) != len(others):
        return math.inf, f" has {len(others):,} rows, not {len(values):,}"
    sizes = [relative_difference(*pair) for pair in zip(values, others, strict=True)]
    size = max(sizes, default=0.0)
    if size == 0:
        return 0.0, ""
    row = sizes.index(size)
    in_row = f", row {row + 1}" if len(values) > 1 else ""
    return size, f"{in_row}: {_shown(values[row])} → {_shown(others[row])}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 24 else text[:23] + "…"


def _read(path: Path) -> Columns:
    """The columns of a file but those of the machine; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        columns = READERS[path.suffix](path)
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
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return {name: list(map(_value, cells)) for name, cells in zip(names, columns, strict=True)}


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


READERS: dict[str, Callable[[Path], Columns]] = {
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _lines,
    ".npz": _arrays,
}


def _data_fingerprint(folder: Path) -> Columns:
    """The fingerprint of the data that a run has made, by the run's record: the data themselves may be elsewhere."""
    made = (folder / "data" / "card.json").is_file()
    content = read_json(folder / MANIFEST).get("fingerprint") if made else None
    return {"fingerprint": [content[:SHORT]]} if content else {}


def _compare_weights(first: Path, second: Path, file: str) -> FileDifference:
    """Two files of weights: equal bytes are equal weights, else tensor by tensor."""
    if not (second / file).is_file():
        return FileDifference(file, "tensors", 0, (file,), math.inf, "is missing")
    digest = file_sha256(first / file)
    if digest == file_sha256(second / file):
        return FileDifference(file, f"bytes, SHA-256 {digest[:SHORT]}", (first / file).stat().st_size)
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


# ---- what else is different ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A fact that is not the same on both sides."""

    what: str
    first: str
    second: str

    @property
    def is_package(self) -> bool:
        """Whether it is the version of a package."""
        return self.what.startswith(PACKAGE)

    @property
    def is_new(self) -> bool:
        """Whether one side alone has such a fact."""
        return ABSENT in (self.first, self.second)


def _facts(manifest: Manifest) -> dict[str, str]:
    """What a run was made from and on: parameters, the content of the folders it read, code, machine, packages."""
    source, machine, inputs = (manifest.get(name, {}) for name in ("source", "hardware", "inputs"))
    commit = str(source.get("git_commit") or ABSENT)[:SHORT] + " with changes" * bool(source.get("git_dirty"))
    given = {name: value for name, value in manifest.get("params", {}).items() if name not in inputs}
    facts: dict[str, Any] = {f"parameter {name}": value for name, value in given.items()}
    facts |= {f"content of {name}": each["fingerprint"][:SHORT] for name, each in inputs.items()}
    facts |= {
        "git commit": commit,
        "notebook's code": str(source.get("notebook_sha256") or ABSENT)[:SHORT],
        "nbutils' code": str(source.get("nbutils_sha256") or ABSENT)[:SHORT],
        "processor": machine.get("processor"),
        "GPU": ", ".join(machine.get("gpus") or []) or "none",
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
    }
    facts |= {f"{PACKAGE}{name}": version for name, version in manifest.get("packages", {}).items()}
    return {name: ABSENT if value is None else str(value) for name, value in facts.items()}


def changes(first: Iterable[Manifest], second: Iterable[Manifest]) -> list[Change]:
    """The facts in which the runs of two sides differ, parameters first, packages last; of several runs all values."""
    sides = [[_facts(manifest) for manifest in side] for side in (first, second)]
    names = dict.fromkeys(name for side in sides for facts in side for name in facts)
    found = []
    for name in names:
        values = [tuple(dict.fromkeys(facts.get(name, ABSENT) for facts in side)) for side in sides]
        if set(values[0]) != set(values[1]):
            found.append(Change(name, _together(*values), _together(*reversed(values))))
    given = ("parameter ", "content of ")
    return sorted(found, key=lambda change: (change.is_package, not change.what.startswith(given), change.is_new))


def in_few(found: Sequence[Change], most: int) -> tuple[list[Change], int]:
    """What can be told in few lines, and how many changes that leaves out: `most` facts, and a few lines of packages.

    Packages that one side alone has are together in one line.
    """
    facts = [each for each in found if not each.is_package]
    changed = [each for each in found if each.is_package and not each.is_new]
    rows = facts[:most] + changed[:MOST_PACKAGES]
    if len(changed) > MOST_PACKAGES:
        rows.append(Change("further packages", *[f"{len(changed) - MOST_PACKAGES} of another version"] * 2))
    new = [each for each in found if each.is_package and each.is_new]
    if new:
        sides = [each for each in new if each.second == ABSENT], [each for each in new if each.first == ABSENT]
        rows.append(Change("packages of one side alone", *map(_counted, sides)))
    return rows, max(0, len(facts) - most)


def listed(names: Sequence[str], width: int) -> str:
    """As many whole names as `width` characters hold, and how many more there are; the first one may be cut."""
    for shown in range(len(names), 0, -1):
        more = f" and {len(names) - shown} more" * (shown < len(names))
        text = ", ".join(names[:shown])
        if len(text + more) <= width:
            return text + more
    return text[: width - len(more) - 1] + "…" + more if names else ""


def _counted(packages: Sequence[Change]) -> str:
    names = [each.what.removeprefix(PACKAGE) for each in packages]
    return str(len(names)) + f" ({listed(names, NAMED)})" * bool(names)


def _together(values: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The values of one side, those first that the other has not."""
    ordered = sorted(values, key=lambda value: value in others)
    more = len(ordered) - MOST_VALUES
    return ", ".join(ordered[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")
