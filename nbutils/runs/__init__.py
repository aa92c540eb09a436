"""Runs: what a run is.

A plan names variants and contrasts; the parameters cell of a notebook is the schema; a run folder keeps what one
variant left; its key says when it need not run again.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attempts": ["ATTEMPTS", "LOCKS", "LOGS", "Place"],
        "contrasts": [
            "Comparison",
            "Contrast",
            "Registration",
            "contrasts_sha256",
            "planned_pairs",
            "record_contrasts",
            "registrations",
        ],
        "keys": ["CodeOf", "made_of", "nbutils_sha256", "read_inputs", "run_key", "what_changed"],
        "manifest": [
            "FAILED",
            "FINISHED",
            "KILLED",
            "Manifest",
            "PREEMPTED",
            "RUNNING",
            "begin",
            "end",
            "find_manifest",
            "read_manifest",
            "versions_of_code",
            "was_made_of",
        ],
        "metric_labels": ["Measure", "TASKS", "UNKNOWN", "is_of_the_machine", "measure", "p_text", "percent"],
        "params": ["RUN_FOLDER", "Schema", "find_notebook", "read_schema"],
        "plans": ["INTERACTIVE", "PLAN_FILE", "Plan", "SLUG", "Stage", "Variant", "find_plan", "load_plan"],
        "run_folder": ["RESULTS", "Run", "RunFolder", "describe", "load_runs", "start_run"],
    },
)
