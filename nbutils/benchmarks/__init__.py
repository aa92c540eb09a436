"""Benchmarks: time and memory of the chunked head beside the textbook form and other projects' losses."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "caches": ["Sizes", "cache_results", "cache_verdicts", "compare_caches"],
        "comparisons": [
            "DISTILLATION",
            "DISTILLATION_BARS",
            "HEADS",
            "HEAD_BARS",
            "PREFIX_BARS",
            "answers_only",
            "compare",
            "compare_prefixes",
            "disagreements",
            "growth",
        ],
        "measuring": ["judge", "memory_by_positions", "results", "slug"],
        "sides": ["Problem"],
        "throughput": ["SavedModel", "compression_numbers", "step_results", "training_steps"],
    },
)
