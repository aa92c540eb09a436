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
from collections.abc import Iterable, Iterator, Mapping
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
    versions_line,
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

__all__ = ["Run", "RunFolder", "atomic_write", "describe", "load_runs", "start_run", "versions_line", "write_json"]

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


@dataclass(frozen=True)
class Run:
    """One run as a reader sees it. `newer` is the manifest of a later attempt that replaced nothing (yet), or None."""

    folder: Path
    manifest: Manifest
    newer: Manifest | None = None

    @property
    def plan(self) -> str:
        return self.manifest["plan"]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def variant(self) -> str:
        return self.manifest["variant"]

    @property
    def notebook(self) -> str:
        return self.manifest["notebook"]

    @property
    def params(self) -> dict[str, Any]:
        return self.manifest["params"]

    @property
    def matrix(self) -> dict[str, Any]:
        return self.manifest["matrix"]

    @property
    def status(self) -> str:
        """running, finished, failed, preempted or killed; killed also where the runner died without a word."""
        return self.manifest["status"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def attempt_folder(self) -> Path:
        """Where an attempt at it writes while it runs."""
        return self.folder.parent / ATTEMPTS / self.variant if self.newer else self.folder

    @cached_property
    def result(self) -> dict[str, float]:
        """The final numbers by name, NaN where a number was not finite; empty where the run wrote none."""
        path = self.folder / "result.json"
        numbers = read_json(path) if path.is_file() else {}
        return {name: math.nan if value is None else value for name, value in numbers.items()}

    def metrics(self) -> pd.DataFrame:
        """metrics.csv, one row a logged step; empty where there is none."""
        return self._csv("metrics.csv")

    def audit(self) -> pd.DataFrame:
        """audit.csv, the gradients of each term at a few steps; empty where there is none."""
        return self._csv("audit.csv")

    def calibration(self) -> pd.DataFrame:
        """calibration.csv, tokens by the confidence of the prediction; empty where there is none."""
        return self._csv("calibration.csv")

    def model_config(self) -> dict[str, Any]:
        """config.json of the trained model; empty where none was kept."""
        path = self.folder / "model" / "config.json"
        return read_json(path) if path.is_file() else {}

    def data_card(self) -> dict[str, Any]:
        """The card of the data it prepared or read; empty where that folder is gone."""
        given = self.manifest.get("inputs", {}).get("data_folder", {}).get("folder", "")
        path = (resolve(given) if given else self.folder) / "data" / "card.json"
        return read_json(path) if path.is_file() else {}

    def samples(self) -> list[dict[str, Any]]:
        """samples.jsonl, one dictionary a sample; empty where there is none."""
        return [json.loads(line) for line in self._whole_lines("samples.jsonl")]

    def rounds(self) -> pd.DataFrame:
        """rounds.csv, one row a round of samples that it learned from; empty where there is none."""
        return self._csv("rounds.csv")

    def round_samples(self) -> list[dict[str, Any]]:
        """round_samples.jsonl, a few samples of each round, what was said of them; empty where there is none."""
        return [json.loads(line) for line in self._whole_lines("round_samples.jsonl")]

    def judged(self) -> list[dict[str, Any]]:
        """judged.jsonl, the finished student's responses with the score of each judge; empty where there is none."""
        return [json.loads(line) for line in self._whole_lines("judged.jsonl")]

    def per_document(self) -> pd.DataFrame:
        """per_document.parquet; empty where there is none."""
        return self._parquet("per_document.parquet")

    def answers(self) -> pd.DataFrame:
        """answers.parquet, one row a generated answer with its question and measures; empty where there is none."""
        return self._parquet("answers.parquet")

    def answer_signatures(self) -> dict[str, str]:
        """What decides each measure of the answers, by the measure's name; empty where none was kept."""
        path = self.folder / "answers.json"
        told = read_json(path) if path.is_file() else {}
        return {name: text for name, text in told.get("signatures", told).items() if isinstance(text, str)}

    def harness(self) -> pd.DataFrame:
        """harness.parquet, one row a task's item at a step: correct, correct_norm, gold_bits, gold_bytes; or empty."""
        return self._parquet("harness.parquet")

    def minimal_pairs(self) -> pd.DataFrame:
        """minimal_pairs.parquet, one row a pair at a step: paradigm, item, good_logp, bad_logp, correct; or empty."""
        return self._parquet("minimal_pairs.parquet")

    def targets(self) -> list[dict[str, Any]]:
        """targets.json, examples of what was trained towards: gold, tokens, weights; empty where there is none."""
        path = self.folder / "targets.json"
        return read_json(path) if path.is_file() else []

    def _parquet(self, name: str) -> pd.DataFrame:
        import pandas as pd

        path = self.folder / name
        return pd.read_parquet(path) if path.is_file() else pd.DataFrame()

    def _csv(self, name: str) -> pd.DataFrame:
        """The whole lines of a CSV file, one row a line; empty where there is none."""
        import pandas as pd

        lines = self._whole_lines(name)
        return pd.read_csv(StringIO("\n".join(lines))) if lines else pd.DataFrame()

    def _whole_lines(self, name: str) -> list[str]:
        """The ended lines of a file: the last one of a killed run may hold 0.12 where 0.1234 was meant."""
        path = self.folder / name
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


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
