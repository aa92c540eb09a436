"""Training: transformers' Trainer with an objective.

Verified checkpoints, resume bit for bit, metrics.csv, several processes, and the gradient audit.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["make_deterministic"],
        "checkpoints": ["CHECKPOINTS"],
        "launching": ["launch"],
        "notebook_teacher": ["small_teacher"],
        "rows": ["evaluation_rows", "open_data", "plain_rows"],
        "run_checks": ["functional_check", "stability"],
        "tracking": ["memory_mib", "reset_peak_memory"],
        "trainer": ["ObjectiveTrainer", "TrainingConfig", "train"],
    },
)
