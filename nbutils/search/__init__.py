"""Hyper-parameter search: Optuna chooses, the runner trains, each trial is a run folder like any other.

    setting = read_setting("04_cosine_mixing", fixed=["max_steps: 60"])
    space = read_space(["learning_rate: 1e-4..1e-2 log", "alpha: 0..1"], setting)
    search = Search(Path("study.db"), setting, space, SearchConfig(trials=20, workers=2))
    search.run()
    best_plan(search, Confirmation(control="alpha: 0"))

Beside the database lie `trials.yaml`, a plan with a stage for each trial, and `trials/`, their runs. The search judges
by validation loss alone and reads nothing of the test split.
"""

from nbutils.search.confirmation import Confirmation, best_plan, check_confirmation
from nbutils.search.setting import Setting, prepare, read_setting
from nbutils.search.space import Dimension, read_space
from nbutils.search.study import SearchConfig, importances, study_path, trial_table
from nbutils.search.work import Search

__all__ = [
    "Confirmation",
    "Dimension",
    "Search",
    "SearchConfig",
    "Setting",
    "best_plan",
    "check_confirmation",
    "importances",
    "prepare",
    "read_setting",
    "read_space",
    "study_path",
    "trial_table",
]
