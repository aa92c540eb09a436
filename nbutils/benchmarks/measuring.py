"""How a benchmark takes time and memory, judges their ratios by bars, and is drawn.

Time: the steps take turns in one process, so that a busy machine slows all of them, and the median over the rounds
counts. Memory: on a GPU what CUDA's allocator counts; elsewhere a thread samples this process's resident memory each
millisecond, after freed memory went back to the system, so that a step cannot reuse unseen what an earlier one left.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import pandas as pd
import torch
from matplotlib.figure import Figure

from nbutils.report import canvas, log_axis, look, styled

SAMPLE_SECONDS = 0.001  # between two looks at the resident memory
MIB = 2**20
OURS, LIMIT = "chunked", "matrix_products"  # our side, and the products that no exact head can do without

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


def measure(steps: Mapping[tuple[str, str], Step], rounds: int) -> pd.DataFrame:
    """A row for each (case, side): columns case, side, seconds (median of turns), mib (extra at the peak)."""
    seconds = interleaved(steps, rounds)
    rows = [(*key, seconds[key], extra_memory(step)) for key, step in steps.items()]
    return pd.DataFrame(rows, columns=["case", "side", "seconds", "mib"])


@dataclass(frozen=True)
class Bar:
    """Our seconds or mib in `case` are at most `limit` times those of `against`, or of the best other side."""

    case: str
    resource: str
    limit: float
    against: tuple[str, str] | None = None


def judge(measured: pd.DataFrame, bars: Iterable[Bar]) -> pd.DataFrame:
    """`verdict_table` of what `measure` found. The bare matrix products are no other side."""
    table = measured.set_index(["case", "side"])
    rows = []
    for bar in bars:
        values = table[bar.resource]
        others = values[[case == bar.case and side not in (OURS, LIMIT) for case, side in values.index]]
        case, side = against = bar.against or others.idxmin()
        whose = side if case == bar.case else f"{side}, {case}"
        rows.append((bar.case, bar.resource, values[bar.case, OURS], values[against], whose, bar.limit))
    return verdict_table(rows)


def verdict_table(rows: Iterable[tuple[str, str, float, float, str, float]]) -> pd.DataFrame:
    """A row for each bar: case, resource, ours, theirs, whose, bar, and of these ratio and "within the bar"."""
    table = pd.DataFrame(rows, columns=["case", "resource", "ours", "theirs", "whose", "bar"])
    table["ratio"] = table["ours"] / table["theirs"]
    table["within the bar"] = table["ratio"] <= table["bar"]
    return table


def results(measured: pd.DataFrame, judged: pd.DataFrame) -> dict[str, float]:
    """What result.json keeps: {case}_{side}_{seconds or mib} and {case}_{time, memory or loss}_{ratio or bar}."""
    names = {"seconds": "time", "mib": "memory"}
    sides = {f"{row.case} {row.side} {what}": getattr(row, what) for row in measured.itertuples() for what in names}
    ratios = {
        f"{row.case} {names.get(row.resource, row.resource)} {what}": getattr(row, what)
        for row in judged.itertuples()
        for what in ("ratio", "bar")
    }
    return {slug(name): value for name, value in (sides | ratios).items()}


def slug(name: str) -> str:
    """`name` in lower case, with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


@styled()
def memory_by_positions(growth: pd.DataFrame) -> Figure:
    """Extra peak memory over positions, both axes logarithmic; a flat line does not pay for more positions.

    Columns as `nbutils.benchmarks.growth` gives them: positions, case, side, mib.
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
