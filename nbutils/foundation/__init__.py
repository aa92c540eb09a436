"""Foundation: what every room stands on.

Errors that say cause and cure, places, files that are whole or not there, locks, being asked to stop, text that is
safe to show. It imports nothing of ours.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "environment": ["memory_kills", "versions_line"],
        "errors": [
            "CorpusError",
            "LockedRunError",
            "ModelError",
            "ParameterError",
            "PlanError",
            "Preempted",
            "RankKilled",
            "RunError",
            "Unreachable",
            "UnreachableModelError",
            "WorkbookError",
            "did_you_mean",
            "nearest",
        ],
        "files": [
            "MANIFEST",
            "atomic_write",
            "exclusively",
            "file_sha256",
            "flush_tree",
            "is_held",
            "lock",
            "now",
            "read_json",
            "sha256_of_hashes",
            "shared",
            "tree_sha256",
            "write_json",
        ],
        "hub": ["HUB_SECONDS", "locate", "unusable"],
        "places": ["FIGURES", "NOTEBOOKS", "PARAMS", "REPORTS", "ROOT", "RUNS", "relative", "resolve", "typed"],
        "plaintext": [
            "LONGEST_PARAGRAPH",
            "LONGEST_QUOTED",
            "LONGEST_TEXT",
            "escape",
            "escaped",
            "shortened",
            "visible",
        ],
        "processes": ["FROM_OUTSIDE", "adopt_orphans", "end_with_parent"],
        "stopping": [
            "AGAIN",
            "CELL_TIMEOUT",
            "DRIVEN_FOLDER",
            "Resources",
            "SAVE_SECONDS",
            "StopRequest",
            "Stopped",
            "WITH_PARENT",
            "Watch",
            "command",
            "kernel_stopped",
            "leave_quickly",
            "noted",
            "read_resources",
            "stop_at_once",
            "stop_on_sigterm",
            "stop_with_parent",
        ],
        "yaml_files": ["PlainLoader", "read_yaml"],
    },
)
