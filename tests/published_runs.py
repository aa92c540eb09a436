"""Short notebooks that write what real ones do, and a reader of published runs that trusts none of our own.

What a run must have written follows from its parameters alone, so that a result that is there is also known to be the
right one, whatever was killed and resumed on the way to it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_notebooks import write_notebook

from nbutils.runs.attempts import PREVIOUS

STEPS, SAVED_EVERY = 8, 3
ROWS = 500
MODEL_BYTES = 1 << 18
MODULUS = 2**31
FILES = {"manifest.json", "params.yaml", "notebook.ipynb", "result.json", "metrics.csv", "per_document.parquet"}
FOLDERS = {"model"}
PARAMETERS = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # an earlier run
seed: int = 0  # at least 0
generation: int = 0  # which edition of the parameters this is, at least 0
pause: float = 0.03  # seconds in a step, at least 0
"""
SETTINGS = "notebook, resumes, steps, saved_every, modulus, model_bytes, length = {!r}\n"
BEGIN = """\
import json, os, random, time
import pyarrow, pyarrow.parquet
from nbutils.foundation.files import atomic_write
from nbutils.foundation.places import resolve
from nbutils.runs.run_folder import start_run
run = start_run(notebook, globals())
upstream = json.loads((resolve(data_folder) / "result.json").read_text())["state"] if data_folder else 0
"""
TRAIN = """\
checkpoints = run.path / "checkpoints"
state, first, rows = (generation * 1009 + seed * 31 + upstream) % modulus, 0, ["step,state"]
saved = sorted(checkpoints.glob("step-*.json"))
if saved:
    state, first, rows = json.loads(saved[-1].read_text()).values()
with open(run.path / "metrics.csv", "w") as file:
    file.write("\\n".join(rows) + "\\n")
    for step in range(first + 1, steps + 1):
        time.sleep(pause)
        state = (state * 1103515245 + 12345 + step) % modulus
        rows.append(f"{step},{state}")
        file.write(rows[-1] + "\\n")
        file.flush()
        if resumes and step % saved_every == 0:
            checkpoints.mkdir(exist_ok=True)
            content = {"state": state, "step": step, "rows": rows}
            atomic_write(checkpoints / f"step-{step}.json", json.dumps(content))
"""
SAVE = """\
(run.path / "model").mkdir()
(run.path / "model" / "weights.bin").write_bytes(random.Random(state).randbytes(model_bytes))
table = pyarrow.table({"number": range(length), "value": [(state + each) % 997 for each in range(length)]})
pyarrow.parquet.write_table(table, run.path / "per_document.parquet")
"""
END = 'run.write_result({"state": state, "upstream": upstream, "resumed_from": first})\nprint("state", state)'


class Damaged(AssertionError):
    """A published run is not what it must be."""


@dataclass(frozen=True)
class Published:
    """A run as it lies in its place. `digest`: of all that it wrote but for its record."""

    variant: str
    status: str
    attempts: int
    generation: int
    digest: str
    state: int = 0
    upstream: int = 0
    resumed: bool = False


def write_study(folder: Path, name: str, resumes: bool) -> Path:
    """A notebook of a quarter of a second's work in `STEPS` parts; one that `resumes` goes on from what it saved."""
    path = folder / f"{name}.ipynb"
    settings = SETTINGS.format((str(path), resumes, STEPS, SAVED_EVERY, MODULUS, MODEL_BYTES, ROWS))
    return write_notebook(path, settings + BEGIN, TRAIN, SAVE, END, parameters=PARAMETERS)


def trained(seed: int, generation: int, upstream: int) -> list[int]:
    """The state after each step."""
    state, states = (generation * 1009 + seed * 31 + upstream) % MODULUS, []
    for step in range(1, STEPS + 1):
        state = (state * 1103515245 + 12345 + step) % MODULUS
        states.append(state)
    return states


def read_published(folder: Path) -> Published:
    """The run in `folder`, every file of it read and compared with what it must hold. Raises Damaged, or OSError where
    the folder is moved meanwhile."""
    manifest = _json(folder / "manifest.json")
    told = (manifest["variant"], manifest["status"], len(manifest["attempts"]), manifest["params"]["generation"])
    if manifest["status"] != "finished":
        if (folder / "notebook.ipynb").exists():
            _notebook(folder / "notebook.ipynb", whole=False)
        return Published(*told, digest="")
    names = {path.name for path in folder.iterdir()}
    _must(names == FILES | FOLDERS, folder, f"holds {sorted(names)}")
    result = _json(folder / "result.json")
    states = trained(manifest["params"]["seed"], manifest["params"]["generation"], result["upstream"])
    _must(result["state"] == states[-1], folder / "result.json", f"is {result}, not {states[-1]}")
    lines = (folder / "metrics.csv").read_text()
    rows = list(csv.reader(lines.splitlines()))
    wanted = [["step", "state"], *([str(n), str(state)] for n, state in enumerate(states, 1))]
    _must(lines.endswith("\n") and rows == wanted, folder / "metrics.csv", f"is {rows}, not {wanted}")
    weights = (folder / "model" / "weights.bin").read_bytes()
    _must(weights == random.Random(states[-1]).randbytes(MODEL_BYTES), folder / "model", "has other weights")
    _parquet(folder / "per_document.parquet", states[-1])
    _notebook(folder / "notebook.ipynb", whole=True)
    digest = hashlib.sha256(b"".join(_contents(folder))).hexdigest()
    return Published(*told, digest, result["state"], result["upstream"], result["resumed_from"] > 0)


def _contents(folder: Path) -> Iterator[bytes]:
    for name in sorted(FILES - {"manifest.json"}):
        yield (folder / name).read_bytes()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"{path} is no JSON: {error}") from None


def _parquet(path: Path, state: int) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, use_threads=False)
    except pyarrow.ArrowException as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    wanted = {"number": [*range(ROWS)], "value": [(state + each) % 997 for each in range(ROWS)]}
    _must(table.to_pydict() == wanted, path, "holds other rows")


def _notebook(path: Path, whole: bool) -> None:
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
        raise Damaged(f"{path} is no notebook: {error}") from None
    if whole:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        _must(all(cell.execution_count for cell in cells), path, "has a cell that was never run")
        errors = [each for cell in cells for each in cell.outputs if each.output_type == "error"]
        _must(not errors, path, f"tells of {errors}")


def _must(holds: bool, path: Path, told: str) -> None:
    if not holds:
        raise Damaged(f"{path} {told}")


# ---- over time -------------------------------------------------------------------------------------------------------


class Fault(AssertionError):
    """Something that must not happen."""


@dataclass
class Looker:
    """Reads every published run as often as it changes and remembers what was there."""

    folder: Path
    names: list[str]
    last: dict[str, Published] = field(default_factory=dict)
    seen: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    def look(self) -> None:
        """Raise Fault where a run that was finished is gone, other or half."""
        for name in self.names:
            stamp = self._stamp(self.folder / name)
            if stamp is None or stamp != self.seen.get(name):
                self._read(name)
                self.seen[name] = stamp

    def _read(self, name: str) -> None:
        """A run may be moved while it is read: what counts is one that is the same before and after."""
        for _ in range(200):
            places = [self.folder / name, self.folder / PREVIOUS / name]
            place = next((each for each in places if each.is_dir()), None)
            stamp = self._stamp(place) if place else None
            try:
                now = read_published(place) if stamp else None
            except (OSError, Damaged) as error:
                if stamp == self._stamp(place):
                    raise Fault(f"{name} is half: {type(error).__name__}: {error}") from error
                continue
            if now is None and name in self.last:
                time.sleep(0.005)
                continue
            self._compare(name, now)
            return
        raise Fault(f"{name} was {self.last[name]} and is lost")

    def _compare(self, name: str, now: Published | None) -> None:
        before = self.last.get(name)
        if now is None or now == before:
            return
        if before and before.status == "finished":
            better = now.status == "finished" and now.attempts > before.attempts and now.generation >= before.generation
            if not better:
                raise Fault(f"{name} was {before} and is {now}")
            self.counts["replaced"] += 1
        self.counts[now.status] += 1
        self.counts["resumed"] += now.resumed
        self.last[name] = now

    @staticmethod
    def _stamp(folder: Path) -> tuple[int, int] | None:
        try:
            status = (folder / "manifest.json").stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_ino, status.st_mtime_ns
