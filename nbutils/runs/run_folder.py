"""The run folder: what one run leaves behind, written by a notebook, read by everybody after it.

    params.yaml  manifest.json  metrics.csv  result.json  per_document.parquet  samples.jsonl  notebook.ipynb  model/

In a notebook:

    run = start_run("04_cosine_mixing", globals())  # takes the notebook's parameters, checked, in their types
    ...
    run.write_result({"eval_loss": 3.2})

The runner decides where the folder lies and records how the run ended (manifest.py, attempts.py). A notebook
opened by hand keeps its own record, in runs/interactive/<notebook>.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.foundation import (
    DRIVEN_FOLDER,
    MANIFEST,
    RUNS,
    RunError,
    atomic_write,
    leave_quickly,
    read_json,
    relative,
    resolve,
    stop_at_once,
    write_json,
)
from nbutils.runs.attempts import ATTEMPTS, PREVIOUS, Place
from nbutils.runs.keys import made_of, run_key
from nbutils.runs.manifest import FINISHED, Manifest, begin, end, find_manifest, read_manifest
from nbutils.runs.params import RUN_FOLDER, find_notebook, read_schema
from nbutils.runs.plans import INTERACTIVE, Variant
from nbutils.training import CHECKPOINTS

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

RESULTS = ("metrics.csv", "result.json", "per_document.parquet", "samples.jsonl", "audit.csv", "calibration.csv")
RESULTS += ("answers.parquet", "answers.json", "harness.parquet", "minimal_pairs.parquet", "targets.json")
RESULTS += ("objective.json", "rounds.csv", "round_samples.jsonl", "round.npz", "judged.jsonl")


@dataclass(frozen=True)
class RunFolder:
    """Where the notebook that runs now writes. `params` are its parameters, each in its declared type."""

    path: Path
    params: dict[str, Any]
    driven: bool  # by a runner, which then keeps the record

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the folder atomically; returns its path."""
        atomic_write(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file of the folder atomically; returns its path."""
        write_json(self.path / name, content)
        return self.path / name

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """Write a JSON Lines file of the folder atomically, a record a line; returns its path."""
        return self.write_text(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def write_result(self, result: Mapping[str, float]) -> None:
        """Write the run's final numbers, the notebook's last act. Raises RunError where one is no number."""
        for name, value in result.items():
            number = value.item() if hasattr(value, "item") else value  # of NumPy or torch
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise RunError(f"result {name!r} is {value!r}. result.json holds numbers only.")
        self.write_json("result.json", result)
        if not self.driven:
            end(self.path, read_manifest(self.path), FINISHED, 0, None)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)


def start_run(notebook: str, parameters: Mapping[str, Any]) -> RunFolder:
    """The folder for the results of the notebook called `notebook`, which runs now.

    `parameters` may hold more than the notebook's parameters, as `globals()` does. Raises ParameterError where one is
    not what its declaration allows, RunError where the folder holds a result of a plan.
    """
    _show_log()
    path = find_notebook(notebook)
    schema = read_schema(path)
    params = schema.resolve({name: value for name, value in parameters.items() if name in schema.parameters})
    folder = resolve(params.pop(RUN_FOLDER, "") or RUNS / INTERACTIVE / path.stem)
    driven = os.environ.get(DRIVEN_FOLDER) == str(folder)
    if driven:
        stop_at_once(parameters)
        leave_quickly()
    else:
        _start_interactive(folder, Variant(folder.name, "", path, params))
    return RunFolder(folder, params, driven)


def _show_log() -> None:
    """What nbutils logs appears under the cell that caused it, as plain lines."""
    log = logging.getLogger("nbutils")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)


def _start_interactive(folder: Path, variant: Variant) -> None:
    if (folder / MANIFEST).is_file() and read_manifest(folder)["plan"] != INTERACTIVE:
        raise RunError(f"{relative(folder)} holds a result of a plan. Leave run_folder empty, or name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not _goes_on(folder, variant):
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in RESULTS:  # of an earlier try: half an old result beside half a new one would be neither
        (folder / name).unlink(missing_ok=True)
    begin(folder, INTERACTIVE, variant, earlier=[])


def _goes_on(folder: Path, variant: Variant) -> bool:
    """Whether the folder has checkpoints of this very run, not finished."""
    if not (folder / CHECKPOINTS).is_dir() or (manifest := find_manifest(folder)) is None:
        return False
    key = run_key(made_of(variant.notebook, variant.params))
    return manifest["status"] != FINISHED and manifest["key"] == key


def describe(run: RunFolder) -> str:
    """What this run is made from and on, in a few lines for the top of a notebook."""
    manifest = read_manifest(run.path)
    source, machine = manifest["source"], manifest["hardware"]
    commit = (source["git_commit"] or "no git commit")[:12] + (", with changes" if source["git_dirty"] else "")
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    # a driven run works in .attempts/<variant> and is moved when it ends
    folder = run.path.parents[1] / run.path.name if run.driven else run.path
    return (
        f"run     {manifest['plan']} / {manifest['variant']} -> {relative(folder)}\n"
        f"key     {manifest['key'][:12]}   data {(manifest['data_fingerprint'] or 'none yet')[:12]}   code {commit}\n"
        f"machine {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']} GiB, {gpus}"
    )


def _recorded(name: str) -> property:
    """A property of a run: one entry of its manifest."""
    return property(lambda run: run.manifest[name])


def _table(name: str) -> Callable[[Run], pd.DataFrame]:
    """A method of a run: the CSV or Parquet file `name`, an empty table where there is none."""

    def read(run: Run) -> pd.DataFrame:
        import pandas as pd

        path = run.folder / name
        if path.suffix == ".parquet":
            return pd.read_parquet(path) if path.is_file() else pd.DataFrame()
        lines = _whole_lines(path)
        return pd.read_csv(StringIO("\n".join(lines))) if lines else pd.DataFrame()

    return read


def _records(name: str) -> Callable[[Run], list[dict[str, Any]]]:
    """A method of a run: the records of the JSON Lines file `name`, none where there is no file."""
    return lambda run: [json.loads(line) for line in _whole_lines(run.folder / name)]


def _whole_lines(path: Path) -> list[str]:
    """The ended lines of a file: the last one of a killed run may hold 0.12 where 0.1234 was meant."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


@dataclass(frozen=True)
class Run:
    """One run as a reader sees it. `newer` is the manifest of a later attempt that replaced nothing (yet), or None.

    `status` is running, finished, failed, preempted or killed. Files that the run did not write read as empty.
    """

    folder: Path
    manifest: Manifest
    newer: Manifest | None = None

    plan = _recorded("plan")
    stage = _recorded("stage")
    variant = _recorded("variant")
    notebook = _recorded("notebook")
    params = _recorded("params")
    matrix = _recorded("matrix")
    status = _recorded("status")
    key = _recorded("key")

    metrics = _table("metrics.csv")  # one row a logged step
    audit = _table("audit.csv")  # the gradients of each term at a few steps
    calibration = _table("calibration.csv")  # tokens by the confidence of the prediction
    rounds = _table("rounds.csv")  # one row a round of samples that it learned from
    per_document = _table("per_document.parquet")  # sums by document
    answers = _table("answers.parquet")  # one row a generated answer, with its question and measures
    harness = _table("harness.parquet")  # one row a task's item at a step: correct, correct_norm, gold_bits, gold_bytes
    minimal_pairs = _table("minimal_pairs.parquet")  # one row a pair: paradigm, item, good_logp, bad_logp, correct
    samples = _records("samples.jsonl")  # one dictionary a sample
    round_samples = _records("round_samples.jsonl")  # a few samples of each round and what was said of them
    judged = _records("judged.jsonl")  # the finished student's responses with the score of each judge

    @property
    def attempt_folder(self) -> Path:
        """Where an attempt at it writes while it runs."""
        return self.folder.parent / ATTEMPTS / self.variant if self.newer else self.folder

    @cached_property
    def result(self) -> dict[str, float]:
        """The final numbers by name, NaN where a number was not finite."""
        numbers = self._json("result.json")
        return {name: math.nan if value is None else value for name, value in numbers.items()}

    def model_config(self) -> dict[str, Any]:
        """config.json of the trained model."""
        return self._json("model/config.json")

    def data_card(self) -> dict[str, Any]:
        """The card of the data it prepared or read."""
        given = self.manifest.get("inputs", {}).get("data_folder", {}).get("folder", "")
        return _read((resolve(given) if given else self.folder) / "data" / "card.json")

    def answer_signatures(self) -> dict[str, str]:
        """What decides each measure of the answers, by the measure's name."""
        told = self._json("answers.json")
        return {name: text for name, text in told.get("signatures", told).items() if isinstance(text, str)}

    def targets(self) -> list[dict[str, Any]]:
        """Examples of what was trained towards: gold, tokens, weights."""
        return self._json("targets.json") or []

    def _json(self, name: str) -> Any:
        return _read(self.folder / name)


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def load_runs(folder: Path) -> list[Run]:
    """All runs in `folder`: a run's folder, a plan's, or the folder of all plans; in the natural order of their names.

    A variant that was never published appears as the attempt at it that is running or was killed. A run whose manifest
    cannot be read is passed over with a warning.
    """
    folder = resolve(folder)
    if (folder / MANIFEST).is_file():
        return [Run(folder, read_manifest(folder))]
    plans = [folder, *sorted(each for each in folder.glob("[!.]*") if each.is_dir())]
    places = [Place(plan, name) for plan in plans for name in sorted(_variants(plan), key=_natural)]
    return [run for place in places if (run := _load(place)) is not None]


def _variants(plan_folder: Path) -> set[str]:
    """Names of the variants with a published run or an attempt."""
    folders = [plan_folder, *(plan_folder / hidden for hidden in (ATTEMPTS, PREVIOUS))]
    return {path.parent.name for folder in folders for path in folder.glob(f"[!.]*/{MANIFEST}")}


def _load(place: Place) -> Run | None:
    try:
        newer, result = place.unpublished(), place.result()
    except RunError as error:
        logger.warning("passed over: %s", error)
        return None
    if result is None:
        return Run(place.attempt, newer) if newer else None
    if newer and len(newer["attempts"]) <= len(result["attempts"]):
        newer = None  # it was published between the two looks
    return Run(place.result_folder(), result, newer)


def _natural(name: str) -> list[tuple[int, float, str]]:
    """A sort key that puts seed2 before seed10."""
    parts: Iterator[str] = iter(re.split(r"(\d+(?:\.\d+)?)", name))
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in parts]
