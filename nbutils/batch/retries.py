"""The retry rule of a batch: what is tried again, when, and how often.

What was stopped or killed from outside is tried again (`Outcome.again`), a mistake never. The first retry comes after
`backoff_seconds`, each next one after twice the time. A retry counts against the limit, but for a preemption on an
engine whose places come and go: that is tried again without limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nbutils.batch.progress import duration
from nbutils.batch.runner import Outcome
from nbutils.runs import PREEMPTED

LONGEST_BACKOFF_SECONDS = 600.0


@dataclass(frozen=True)
class Retry:
    """A variant to be tried again at `time.monotonic` reading `at`, for the `number`-th of `limit` times at most."""

    variant: str
    stage: str
    at: float
    number: int
    limit: int | None  # None: this one does not count

    def seconds_left(self) -> float:
        """Until then; 0 where that time has come."""
        return max(0.0, self.at - time.monotonic())

    def told(self) -> str:
        """`retry in 20 s (1 of 3)`."""
        counted = "" if self.limit is None else f" ({self.number} of {self.limit})"
        return f"retry in {duration(self.seconds_left())}{counted}"


def next_try(
    outcome: Outcome, stage: str, made: int, limit: int, backoff_seconds: float, counts_preemption: bool
) -> Retry | None:
    """When a variant of `stage` that ended so is tried again, after `made` retries that counted; None: it is not."""
    counts = counts_preemption or outcome.status != PREEMPTED
    if not outcome.again or (counts and made == limit):
        return None
    at = time.monotonic() + min(backoff_seconds * 2**made, LONGEST_BACKOFF_SECONDS)
    return Retry(outcome.variant, stage, at, made + counts, limit if counts else None)
