"""Benchmarks: time and memory of the chunked head beside the textbook form and other projects' losses."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "caches": ["Sizes", "cache_results", "cache_verdicts", "compare_caches"],
        "heads": ["CASES", "Problem", "compare", "growth", "results", "step_results", "verdicts"],
        "measuring": ["memory_by_positions"],
        "throughput": ["SavedModel", "compression_numbers", "training_steps"],
    },
)
