"""What a person sees of a batch: a live table in a terminal, one line an event in a log, and a final table."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

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

    def steps(self) -> tuple[int, int] | None:
        """(step, of how many), None where the run writes no progress.json or has not begun."""
        return read_steps(self.folder)

    def seconds_by_steps(self) -> float | None:
        """Seconds to its last step at its pace so far, None where most of those so far were of its start."""
        step, steps = self.steps() or (0, 0)
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


class Display(Protocol):
    """Shows a batch while it runs."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def started(self, running: Running, tally: Tally) -> None: ...

    def ended(self, outcome: Outcome, tally: Tally) -> None: ...

    def put_off(self, variant: str, status: str, message: str, tally: Tally) -> None: ...

    def stopping(self, tally: Tally) -> None: ...

    def tick(self, tally: Tally) -> None: ...


class LogDisplay:
    """One line an event, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __enter__(self) -> LogDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.flush()

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.stream, flush=True)

    def started(self, running: Running, tally: Tally) -> None:
        self._say(f"start    {running.variant}")

    def ended(self, outcome: Outcome, tally: Tally) -> None:
        if not outcome.skipped:
            told = f": {outcome.message}" if outcome.message else f" in {duration(outcome.seconds)}"
            self._say(f"{outcome.status:8} {outcome.variant}{told} [{tally.headline()}]")

    def put_off(self, variant: str, status: str, message: str, tally: Tally) -> None:
        self._say(f"{status:8} {variant}: {message} [{tally.headline()}]")

    def stopping(self, tally: Tally) -> None:
        self._say(_stopping(tally))

    def tick(self, tally: Tally) -> None:
        """Nothing: a log is not redrawn."""


class LiveDisplay:
    """A table of the running variants under a headline and a bar, redrawn in place."""

    def __init__(self, title: str) -> None:
        from rich.live import Live

        self.title = title
        self.live = Live(refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def started(self, running: Running, tally: Tally) -> None:
        self.tick(tally)

    def ended(self, outcome: Outcome, tally: Tally) -> None:
        if outcome.status != FINISHED:
            self._say(f"{outcome.status} {outcome.variant}: {outcome.message}", "red")
        self.tick(tally)

    def put_off(self, variant: str, status: str, message: str, tally: Tally) -> None:
        self._say(f"{status} {variant}: {message}", "yellow")
        self.tick(tally)

    def stopping(self, tally: Tally) -> None:
        self._say(_stopping(tally), "yellow")

    def _say(self, text: str, style: str) -> None:
        self.live.console.print(text, markup=False, highlight=False, style=style)

    def tick(self, tally: Tally) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(1, tally.total), completed=len(tally.ended), width=60))
        table = Table.grid(padding=(0, 2))
        for each in tally.running:
            steps = each.steps()
            told = f"step {steps[0]} of {steps[1]}" if steps else ""
            table.add_row(Text(f"  {each.variant}"), Text(told, style="cyan"), Text(duration(each.elapsed)))
        for each in tally.retrying:
            table.add_row(Text(f"  {each.variant}"), Text(each.told(), style="yellow"), Text(""))
        self.live.update(Group(Text(f"{self.title}: {tally.headline()}", style="bold"), bar, table))


def make_display(title: str) -> Display:
    """A live display where standard output is a terminal, plain lines elsewhere."""
    return LiveDisplay(title) if sys.stdout.isatty() else LogDisplay(sys.stdout)


def _stopping(tally: Tally) -> str:
    return f"asked {len(tally.running)} running variants to stop; a training saves its state first. Ask again to kill."


def read_steps(folder: Path) -> tuple[int, int] | None:
    """(step, of how many) from the progress.json of a run that goes on in `folder`, None where there is none."""
    try:
        progress = read_json(folder / "progress.json")
        return int(progress["step"]), int(progress["steps"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or half written
        return None


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
