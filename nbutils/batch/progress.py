"""What a person sees of a batch: one line an event, the time left, in a terminal a table of what runs."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nbutils.batch.runner import Outcome
from nbutils.foundation import read_json, visible
from nbutils.runs import FINISHED

if TYPE_CHECKING:
    from nbutils.batch.retries import Retry

BLOCKED = "blocked"  # what a variant is whose needed run failed
PACE_SECONDS, PACE_SHARE = 60.0, 0.2  # after so long, or such a share of the steps, a start-up of seconds counts little


@dataclass(frozen=True)
class Running:
    """A variant at work. `folder` is where its notebook writes, `start` a `time.monotonic` reading."""

    variant: str
    stage: str
    folder: Path
    start: float

    @property
    def elapsed(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.start

    def told(self) -> str:
        """`step 7 of 50`, empty where it writes no progress.json or has not begun."""
        return steps_told(self.folder)

    def seconds_by_steps(self) -> float | None:
        """Seconds to its last step at its pace so far, None where most of those so far were of its start."""
        step, steps = read_steps(self.folder) or (0, 0)
        if step <= 0 or (self.elapsed < PACE_SECONDS and step < PACE_SHARE * steps):
            return None
        return self.elapsed * (steps - step) / step


@dataclass
class Tally:
    """Where a batch stands: what ended how, what runs, what waits."""

    total: int
    workers: int
    ended: list[Outcome] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # the stage of each variant that waits
    known: dict[str, list[float]] = field(default_factory=dict)  # seconds that variants of a stage took
    retrying: list[Retry] = field(default_factory=list)  # of those that wait

    def time_left(self) -> str:
        """`about 3 min left`, by the mean of each stage's ended variants, else by the steps of the running ones.

        `at least` where a stage that runs or waits has shown no time yet.
        """
        means = {stage: sum(seconds) / len(seconds) for stage, seconds in self.known.items()}
        expected = dict(means)
        left = []
        for each in self.running:
            by_mean, by_steps = means.get(each.stage, 0.0) - each.elapsed, each.seconds_by_steps()
            if by_mean <= 0 and by_steps is not None:
                left.append(by_steps)
                expected.setdefault(each.stage, each.elapsed + by_steps)
            elif each.stage in means:
                left.append(max(0.0, by_mean))
        shown = [stage for stage in self.waiting if stage in expected]
        if not left and not shown:
            return "time left not known yet"
        later = [each.seconds_left() + expected.get(each.stage, 0) for each in self.retrying]
        seconds = max([(sum(left) + sum(expected[stage] for stage in shown)) / self.workers, *left, *later])
        complete = len(left) == len(self.running) and len(shown) == len(self.waiting)
        return f"{'about' if complete else 'at least'} {duration(seconds)} left"

    def counts(self) -> str:
        """`7 of 21 finished, 1 failed`."""
        counts = Counter(outcome.status for outcome in self.ended)
        others = [f"{number} {status}" for status, number in counts.items() if status != FINISHED]
        if self.retrying:
            others.append(f"{len(self.retrying)} to be tried again")
        return ", ".join([f"{counts[FINISHED]} of {self.total} finished", *others])

    def headline(self) -> str:
        """`7 of 21 finished, 1 failed, about 3 min left`."""
        return f"{self.counts()}, {self.time_left()}" if self.running or self.waiting else self.counts()


class Display:
    """Shows a batch while it runs: a line an event, in a terminal also a table of what runs, redrawn in place."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream, self._live = title, stream or sys.stdout, None
        if self.stream.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def started(self, running: Running, tally: Tally) -> None:
        """A variant has begun."""
        if not self._live:
            self._say(f"start    {running.variant}")

    def ended(self, outcome: Outcome, tally: Tally) -> None:
        """A variant has ended for good; what is finished is not worth a line above the table."""
        told = f": {outcome.message}" if outcome.message else f" in {duration(outcome.seconds)}"
        if not outcome.skipped and not (self._live and outcome.status == FINISHED):
            self._event(outcome.status, f"{outcome.variant}{told}", tally)

    def put_off(self, variant: str, status: str, message: str, tally: Tally) -> None:
        """A variant will be tried again, or waits for somebody else's runner."""
        self._event(status, f"{variant}: {message}", tally)

    def stopping(self, tally: Tally) -> None:
        """All that runs was asked to stop."""
        number = len(tally.running)
        self._say(f"asked {number} running variants to stop; a training saves its state first. Ask again to kill.")

    def tick(self, tally: Tally) -> None:
        """Redraw the table; a log is not redrawn."""
        if not self._live:
            return
        from rich.text import Text

        rows = [(each.variant, each.told(), duration(each.elapsed)) for each in tally.running]
        rows += [(each.variant, each.told(), "") for each in tally.retrying]
        shown = f"{self.title}: {tally.headline()}\n{text_table(('variant', 'at', 'time'), rows)}"
        self._live.update(Text(shown, no_wrap=True, overflow="ellipsis"))

    def _event(self, status: str, text: str, tally: Tally) -> None:
        self._say(f"{status:8} {text}" + ("" if self._live else f" [{tally.headline()}]"))

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {visible(text)}"
        if self._live:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def read_steps(folder: Path) -> tuple[int, int] | None:
    """(step, of how many) from the progress.json of a run that goes on in `folder`, None where there is none."""
    try:
        progress = read_json(folder / "progress.json")
        return int(progress["step"]), int(progress["steps"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or half written
        return None


def steps_told(folder: Path) -> str:
    """`step 7 of 50` of a run that goes on in `folder`, empty where it does not say."""
    steps = read_steps(folder)
    return f"step {steps[0]} of {steps[1]}" if steps else ""


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is, None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Columns padded to their widest entry; lines longer than `width` are cut."""
    cells = [[visible(each).replace("\n", " ") for each in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(most) for cell, most in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines)
