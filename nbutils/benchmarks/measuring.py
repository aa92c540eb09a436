"""How a benchmark takes time and memory, and how it is drawn.

Time: the steps take turns in one process, so that a busy machine slows all of them, and the median over the rounds
counts. Memory: on a GPU what CUDA's allocator counts; elsewhere a thread samples this process's resident memory each
millisecond, after freed memory went back to the system, so that a step cannot reuse unseen what an earlier one left.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import pandas as pd
import torch
from matplotlib.figure import Figure

from nbutils.report import canvas, log_axis, look, styled

SAMPLE_SECONDS = 0.001  # between two looks at the resident memory
MIB = 2**20

Step = Callable[[], Any]  # what is measured, done once; what it returns is alive when its memory is read
Key = TypeVar("Key", bound=Hashable)


def interleaved(steps: Mapping[Key, Step], rounds: int) -> dict[Key, float]:
    """The median seconds of each step over `rounds` rounds in which all of them take turns."""
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            _wait()
            seconds = time.perf_counter() - start
            if number:  # the first round warms up
                times[key].append(seconds)
    return {key: median(values) for key, values in times.items()}


def extra_memory(step: Step) -> float:
    """MiB held at the peak of `step` beyond what was held before it, its result included."""
    gc.collect()
    if torch.cuda.is_available():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _wait()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return _extra_resident(step)


def _extra_resident(step: Step) -> float:
    import psutil

    _return_freed_memory()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        result = step()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        thread.join()
    del result
    return (peak - before) / MIB


def _return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can: else a step would reuse it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@styled()
def memory_by_positions(growth: pd.DataFrame) -> Figure:
    """Extra peak memory over positions, both axes logarithmic; a flat line does not pay for more positions.

    Columns as `nbutils.benchmarks.heads.growth` gives them: positions, case, side, mib.
    """
    figure, (axes,) = canvas(height=2.6)
    labels = growth["case"] + ", " + growth["side"]
    styles = look(list(dict.fromkeys(labels.sort_values(key=lambda s: ~s.str.endswith("textbook"), kind="stable"))))
    for label, style in styles.items():
        rows = growth[labels == label].sort_values("positions")
        line = axes.plot(
            rows["positions"], rows["mib"], color=style["color"], marker=style["marker"], markersize=4, label=label
        )[0]
        line.set_dashes(style["dash"] or (None, None))
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set(xlabel="positions in the batch", ylabel="extra peak memory (MiB)", xticks=sorted(set(growth["positions"])))
    figure.legend(loc="outside right upper", handlelength=3)
    return figure
