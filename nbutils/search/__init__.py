"""Search: Optuna chooses settings, the runner trains them, each trial is a run folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "confirmation": ["Confirmation", "best_plan", "check_confirmation"],
        "figures": ["search_history", "search_importances", "search_slices"],
        "setting": ["read_setting"],
        "space": ["read_space"],
        "study": ["SearchConfig", "importances", "study_path", "trial_table"],
        "work": ["Search"],
    },
)
