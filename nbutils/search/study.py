"""The study: an Optuna study in an SQLite file that any number of processes on one machine share.

Optuna draws by the tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization",
NeurIPS 2011). Here are the rules it leaves open: how many trials there are in all, what becomes of the trials of a
process that died, and what a continued study must have in common with what it was begun with.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.foundation import ParameterError, RunError, exclusively, is_held, relative, resolve
from nbutils.runs import RunFolder
from nbutils.search.setting import Setting
from nbutils.search.space import Dimension, values_of

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial, Trial

OBJECTIVE = "eval_ce_loss"  # lowest over a trial's evaluations, in nats a token of the validation split
DATABASE = "study.db"
STUDIES = ".studies"  # beside the run folders of a plan: a new attempt begins with an empty run folder, a study goes on
PRUNERS = ("median", "halving", "none")
WAIT_SECONDS = 60  # for another process to end its transaction
ENOUGH_FOR_IMPORTANCE = 4  # finished trials; the best half of fewer says nothing
INDEX, PARAMS, WORKER, MESSAGE = "index", "params", "worker", "message"  # what a trial carries with it


@dataclass(frozen=True)
class SearchConfig:
    """How to search. `trials` is their number in all, by all who share the study; `workers` run at a time here.

    The first `startup_trials` are drawn at random; no trial is pruned before `pruning_startup` have finished.
    """

    trials: int = 20
    workers: int = 1
    startup_trials: int = 10
    pruner: str = "median"
    pruning_startup: int = 4
    seed: int = 42
    keep_models: bool = False

    def make_pruner(self) -> BasePruner:
        """The pruner called `pruner`: the median rule, or successive halving (Li et al., arXiv:1810.05934)."""
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

        if self.pruner not in PRUNERS:
            raise ParameterError(f"pruner is {self.pruner!r}. Give one of {', '.join(PRUNERS)}.")
        if self.pruner == "median":
            return MedianPruner(n_startup_trials=self.pruning_startup)
        return SuccessiveHalvingPruner(reduction_factor=3) if self.pruner == "halving" else NopPruner()


def study_path(run: RunFolder, given: str = "") -> Path:
    """Where the database of notebook run `run` lies: at `given`, else in its folder.

    A runner empties the run folder before every attempt, so there the study lies beside it and outlives the attempt.
    """
    if given:
        return resolve(given)
    if not run.driven:
        return run.path / DATABASE
    return run.path.parents[1] / STUDIES / run.path.name / DATABASE


class SharedStudy:
    """The study in one database as this process sees it, alive until `close`."""

    def __init__(self, path: Path, setting: Setting, space: Sequence[Dimension], config: SearchConfig) -> None:
        """Open or begin the study. Raises RunError where the file is no study, or one of another search."""
        self.path, self.space, self.config = path, tuple(space), config
        self.name = uuid.uuid4().hex
        self._lock = path.with_name(f".{path.name}.lock")
        self._workers = path.with_name(f".{path.name}.workers")
        with exclusively(self._lock):
            self.study = _open(path, config.make_pruner())
            _check_same(path, self.study, _description(setting, space))
        self._alive = ExitStack()
        self._alive.enter_context(exclusively(self._workers / self.name))

    def close(self) -> None:
        """Leave the study: trials of this process that are still running are free for others."""
        self._alive.close()
        (self._workers / self.name).unlink(missing_ok=True)

    def claim(self) -> Trial | None:
        """A trial for this process to run, None where the study has all it was asked for.

        What is drawn depends on the seed, the trial's place and the trials before it alone: a study that was
        interrupted goes on as if it had not been.
        """
        with exclusively(self._lock):
            self._free_orphans()
            if len(self.counted()) >= self.config.trials:
                return None
            index = self._free_index()
            self.study.sampler = self._sampler(index)
            trial = self.study.ask({each.name: each.distribution() for each in self.space})
            trial.set_user_attr(WORKER, self.name)
            trial.set_user_attr(PARAMS, values_of(self.space, trial.params))
            if INDEX not in trial.user_attrs:
                trial.set_user_attr(INDEX, index)
            return trial

    def abandon(self, numbers: Iterable[int]) -> None:
        """Give up these trials, which were interrupted: each waits to be run again with the same values."""
        with exclusively(self._lock):
            for trial in self.trials():
                if trial.number in set(numbers) and not trial.state.is_finished():
                    self._abandon(trial)

    def trials(self) -> list[FrozenTrial]:
        """All trials, abandoned ones included, in the order in which they were begun."""
        return self.study.get_trials(deepcopy=False)

    def counted(self) -> list[FrozenTrial]:
        """The trials that are running or have ended by themselves, by their index."""
        from optuna.trial import TrialState

        held = [each for each in self.trials() if each.state != TrialState.WAITING and not _is_abandoned(each)]
        return sorted(held, key=lambda trial: trial.user_attrs.get(INDEX, trial.number))

    def any_running(self) -> bool:
        """Whether a trial of any process is running."""
        from optuna.trial import TrialState

        return any(trial.state == TrialState.RUNNING for trial in self.trials())

    def _sampler(self, index: int) -> optuna.samplers.BaseSampler:
        import numpy as np
        from optuna.samplers import TPESampler

        seed = int(np.random.SeedSequence([self.config.seed, index]).generate_state(1)[0])
        return TPESampler(seed=seed, n_startup_trials=self.config.startup_trials)

    def _free_orphans(self) -> None:
        """Abandon the trials whose process is gone. Needs the lock."""
        from optuna.trial import TrialState

        for trial in self.trials():
            if trial.state == TrialState.RUNNING and not is_held(self._workers / trial.user_attrs.get(WORKER, "none")):
                self._abandon(trial)

    def _abandon(self, trial: FrozenTrial) -> None:
        from optuna.trial import TrialState

        complete = len(trial.params) == len(self.space) and INDEX in trial.user_attrs  # else its values were never used
        later = [each.user_attrs.get(INDEX) for each in self.trials() if each.number > trial.number]
        if complete and trial.user_attrs[INDEX] not in later:  # else whoever did this before us died in the middle
            self.study.enqueue_trial(trial.params, user_attrs={INDEX: trial.user_attrs[INDEX]})
        self.study.tell(trial.number, state=TrialState.FAIL)

    def _free_index(self) -> int:
        taken = {each.user_attrs.get(INDEX) for each in self.trials() if not _is_abandoned(each)}
        return next(index for index in itertools.count() if index not in taken)


def _is_abandoned(trial: FrozenTrial) -> bool:
    """Whether a trial was interrupted: one that failed by itself has a message."""
    return trial.state.name == "FAIL" and MESSAGE not in trial.user_attrs


def _open(path: Path, pruner: BasePruner) -> optuna.Study:
    import optuna
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    try:
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}})
        return optuna.create_study(
            storage=storage, study_name="search", direction="minimize", load_if_exists=True, pruner=pruner
        )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise RunError(
            f"{relative(path)} is no study that can be opened ({cause}). Name another file in `study`, or delete it."
        ) from None


def _description(setting: Setting, space: Iterable[Dimension]) -> dict[str, Any]:
    searched = {each.name: str(each) for each in space}
    params = {name: value for name, value in setting.params.items() if name not in searched}
    return {"notebook": relative(setting.notebook), **params, **searched}


def _check_same(path: Path, study: optuna.Study, description: dict[str, Any]) -> None:
    """Raise RunError where the study was begun as another search: their losses could not be compared."""
    begun = study.user_attrs.get("setting")
    if begun is None:
        study.set_user_attr("setting", description)
        return
    for name in [*description, *begun]:
        if name in description and name not in begun:
            continue  # a parameter the notebook has got since: its default changes nothing
        if begun[name] != description.get(name):
            raise RunError(
                f"{relative(path)} was begun with another setting: {name} was {begun[name]!r}, now it is "
                f"{description.get(name)!r}. Go on with the former, or begin anew: name another file in `study`."
            )


def trial_table(shared: SharedStudy) -> pd.DataFrame:
    """One row a trial, by index: trial, state (finished, pruned, failed, running), value, the values tried, message."""
    import pandas as pd

    states = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
    rows = [
        {
            "trial": trial.user_attrs.get(INDEX, trial.number),
            "state": states[trial.state.name],
            "value": trial.value,
            **trial.user_attrs.get(PARAMS, {}),
            "evaluations": len(trial.intermediate_values),
            "message": trial.user_attrs.get(MESSAGE, ""),
        }
        for trial in shared.counted()
    ]
    columns = ["trial", "state", "value", *(each.name for each in shared.space), "evaluations", "message"]
    return pd.DataFrame(rows, columns=columns)


def importances(shared: SharedStudy) -> dict[str, float]:
    """The share of each parameter in reaching the better trials, sum 1, largest first; {} for too few finished trials.

    PED-ANOVA (Watanabe et al., arXiv:2304.10255) on the best tenth, or the best five where that is more.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    finished = len(shared.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if finished < ENOUGH_FOR_IMPORTANCE:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / finished)))
    return get_param_importances(shared.study, evaluator=evaluator)
