"""The search at work: trials as child processes, watched while they train, stopped where they do badly."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nbutils.batch import DONE, REFUSED, summary
from nbutils.foundation import (
    SAVE_SECONDS,
    ParameterError,
    RunError,
    atomic_write,
    command,
    environment,
    exclusively,
    now,
    read_json,
    relative,
    stop_on_sigterm,
)
from nbutils.runs import Place, find_manifest
from nbutils.search.setting import Setting, prepare
from nbutils.search.space import Dimension
from nbutils.search.study import INDEX, MESSAGE, OBJECTIVE, PARAMS, SearchConfig, SharedStudy

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

TRIALS = "trials"  # the plan of all trials, and the folder of their runs beside the database
TICK_SECONDS = 0.5
STOP_SECONDS = SAVE_SECONDS + 15  # a run has to end its kernel and write its record; then it is killed
MOST_FAILURES = 3  # failures with not one success: what is wrong is not the values tried
WEIGHTS = ("model", "model_best", "checkpoints")


@dataclass
class AtWork:
    """A trial that this process takes care of. `process` is None while another process still holds its run folder."""

    trial: Trial
    place: Place
    process: subprocess.Popen | None = None
    started: str = ""
    reported: int = 0
    step: int = 0  # of the last evaluation reported
    stopped: float = 0.0  # when it was asked to stop, on the monotonic clock

    @property
    def index(self) -> int:
        return self.trial.user_attrs[INDEX]


class Search:
    """A search in the database at `path`: begun, or gone on with where one lies there.

    Raises RunError where that is the study of another search, ParameterError where `config` cannot be.
    """

    def __init__(self, path: Path, setting: Setting, space: Sequence[Dimension], config: SearchConfig) -> None:
        if config.trials < 1 or config.workers < 1:
            raise ParameterError(f"trials is {config.trials}, workers {config.workers}. Give at least 1 of each.")
        self.path, self.config = path, config
        self.setting = prepare(setting)
        self.shared = SharedStudy(path, self.setting, space, config)
        self.folder = path.parent / TRIALS
        self.plan_file = path.parent / f"{TRIALS}.yaml"
        self.at_work: list[AtWork] = []

    def run(self) -> None:
        """Run trials until the study has all of them, those of other processes included.

        Ctrl-C and SIGTERM stop the trials of this process; they wait in the study for whoever goes on with it. Raises
        RunError where a trial shows a mistake that every other would repeat.
        """
        with stop_on_sigterm():
            try:
                while self._fill() or self.at_work or self.shared.any_running():
                    time.sleep(TICK_SECONDS)
                    self.at_work = [each for each in self.at_work if not self._follow(each)]
            finally:
                self._stop_all()
                self.shared.close()

    def best(self) -> FrozenTrial:
        """The finished trial with the lowest loss. Raises RunError where none finished."""
        finished = [each for each in self.shared.counted() if each.state.name == "COMPLETE"]
        if not finished:
            told = next((each.user_attrs.get(MESSAGE) for each in self.shared.counted()), "no trial was run")
            raise RunError(f"No trial of {relative(self.path)} finished ({told}). Look at the runs in {self.folder}.")
        return min(finished, key=lambda trial: trial.value)

    def best_values(self) -> dict[str, Any]:
        """The values searched as the best trial ran with them. Raises RunError where none finished."""
        return self.best().user_attrs[PARAMS]

    def _fill(self) -> bool:
        """Start what there is to start; whether anything was."""
        began = len(self.at_work)
        while len(self.at_work) < self.config.workers and (trial := self.shared.claim()):
            self._write_plan()
            self.at_work.append(AtWork(trial, Place(self.folder, self._run_name(trial))))
            values = ", ".join(f"{name} {value}" for name, value in trial.user_attrs[PARAMS].items())
            print(f"trial {self.at_work[-1].index}: {values}", flush=True)
        return len(self.at_work) > began

    def _run_name(self, trial: Trial) -> str:
        """The run of the first trial with these values: what was run once is not run again."""
        equal = (each for each in self.shared.counted() if each.user_attrs.get(PARAMS) == trial.user_attrs[PARAMS])
        return trial_name(next(equal).user_attrs[INDEX])

    def _write_plan(self) -> None:
        """`trials.yaml` with a stage for each trial so far, so that check, status and run know them."""
        with exclusively(self.plan_file.with_name(f".{self.plan_file.name}.lock")):
            notebook = relative(self.setting.notebook)
            stages = [
                {
                    "name": trial_name(trial.user_attrs[INDEX]),
                    "notebook": notebook,
                    "params": self.setting.trial_params(trial.user_attrs[PARAMS]),
                }
                for trial in self.shared.counted()
                if INDEX in trial.user_attrs
            ]
            content = yaml.safe_dump({"name": TRIALS, "stages": stages}, sort_keys=False, allow_unicode=True)
            atomic_write(self.plan_file, f"# The trials of {self.path.name}, written by the search.\n{content}")

    def _follow(self, each: AtWork) -> bool:
        """Look at one trial: start, report, prune, or take its end in. Whether it has ended."""
        if each.process is None:
            if not each.place.is_locked():
                self._start(each)
            return False
        code = each.process.poll()
        for step, value in _evaluations(each)[each.reported :]:
            each.trial.report(value, step)
            each.reported, each.step = each.reported + 1, step
            if code is None and not each.stopped and (not math.isfinite(value) or each.trial.should_prune()):
                each.stopped = time.monotonic()
                each.process.terminate()
        if code is None:
            if each.stopped and time.monotonic() - each.stopped > STOP_SECONDS:
                each.process.kill()
            return False
        self._end(each, code)
        return True

    def _start(self, each: AtWork) -> None:
        each.started = now()
        words = ["run", self.setting.notebook, "--params", self.plan_file, "--variant", each.place.variant]
        threads = str(max(1, environment.cores() // self.config.workers))
        each.place.log.parent.mkdir(parents=True, exist_ok=True)
        with each.place.log.open("w") as log:
            each.process = subprocess.Popen(
                command([*words, "--out", self.folder]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops its trials in order
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )

    def _end(self, each: AtWork, code: int) -> None:
        """Tell the study how a trial ended."""
        from optuna.trial import TrialState

        value = lowest_loss(each.place.published) if code == DONE else math.nan
        if math.isfinite(value):
            self._told(each, f"{OBJECTIVE} {value:.4f}")
            self.shared.study.tell(each.trial, value)
        elif code == DONE or each.stopped:
            told = f"pruned at step {each.step}" if each.stopped else f"{OBJECTIVE} is not a number"
            each.trial.set_user_attr(MESSAGE, told)
            self._told(each, told)
            self.shared.study.tell(each.trial, state=TrialState.PRUNED)
        else:
            message = _failure(each.place)
            self._told(each, f"failed: {message}")
            if code == REFUSED:  # the study keeps it waiting for when that is mended
                raise RunError(f"Trial {each.index} was refused, as all others would be: {message}")
            each.trial.set_user_attr(MESSAGE, message)
            self.shared.study.tell(each.trial, state=TrialState.FAIL)
            self._check_failures(message)
        if not self.config.keep_models:
            for name in WEIGHTS:
                shutil.rmtree(each.place.published / name, ignore_errors=True)

    def _check_failures(self, message: str) -> None:
        ended = [trial.state.name for trial in self.shared.counted() if trial.state.is_finished()]
        if len(ended) == ended.count("FAIL") >= MOST_FAILURES:
            raise RunError(
                f"All {len(ended)} trials failed, the last with: {message} Mend it and begin anew, with another file "
                f"in `study` or without {relative(self.path)}."
            )

    def _told(self, each: AtWork, text: str) -> None:
        print(f"trial {each.index}: {text}", flush=True)

    def _stop_all(self) -> None:
        """Stop the trials that are still at work here; the study keeps them for later."""
        if not self.at_work:
            return
        left = [each for each in self.at_work if each.process and each.process.poll() is None]
        for each in left:
            each.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for each in left:
                each.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:  # also at a second Ctrl-C
            for each in left:
                if each.process.poll() is None:
                    each.process.kill()
            self.shared.abandon(each.trial.number for each in self.at_work)
            self.at_work = []


def trial_name(index: int) -> str:
    """The variant, and so the run folder, of a trial."""
    return f"trial-{index:04d}"


def lowest_loss(folder: Path) -> float:
    """The lowest validation loss of the run in `folder`, nan where it has none. No result of the test split is read."""
    values = [value for _, value in read_evaluations(folder / "metrics.csv")]
    result = folder / "result.json"
    if result.is_file():
        values.append(_number(validation_results(read_json(result)).get(OBJECTIVE)))
    return min((value for value in values if math.isfinite(value)), default=math.nan)


def validation_results(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a search may see of a result: the numbers of the validation split."""
    return {name: value for name, value in result.items() if name.startswith("eval_")}


def read_evaluations(metrics: Path) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation in a metrics.csv that may still be written; a loss may be nan or infinite."""
    try:
        lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # the last line may be half there
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = csv.DictReader(lines)
    return [(int(float(row["step"])), _number(row[OBJECTIVE])) for row in rows if row.get(OBJECTIVE)]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # null: it was not finite
        return math.nan


def _evaluations(each: AtWork) -> list[tuple[int, float]]:
    """What the run of a trial has logged since it was started here: a former attempt's lines are not its own."""
    for folder in (each.place.attempt, each.place.published):
        try:
            manifest = find_manifest(folder)
        except RunError:
            continue
        if manifest and manifest["attempts"][-1]["start"] >= each.started:
            return read_evaluations(folder / "metrics.csv")
    if each.process.poll() == DONE:  # it was finished before
        return read_evaluations(each.place.published / "metrics.csv")
    return []


def _failure(place: Place) -> str:
    """Why a run failed, in a line."""
    manifest = place.unpublished() or place.result()
    told = summary(manifest) if manifest and manifest["error"] else ""
    if not told:
        lines = place.log.read_text(encoding="utf-8").strip().splitlines() if place.log.is_file() else []
        told = lines[-1] if lines else "it ended without a word"
    return told if told.endswith((".", "!", "?")) else f"{told}."
