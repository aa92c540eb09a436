"""What judges and teachers may cost: words, seconds, tries; and what they have cost so far."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbutils.foundation import ParameterError

logger = logging.getLogger(__name__)
# Probability of any allowed number. Instruct models that were told to reply so have nearly all of it there; with less
# than a tenth, nine replies in ten would be no grade, and the rest follow the digits' base rates.
LITTLE_MASS = 0.1


@dataclass(frozen=True)
class JudgeLimits:
    """Limits of one judge or teacher in one run.

    batch_size: texts a model takes at a time, and requests a server answers at a time (at most AT_ONCE of the chat
    client); timeout_seconds: of one request; retries: after the first try, where a server is busy, broken or silent;
    most_words: teacher words; most_seconds: spent asking; both 0 for no limit. A limit of seconds makes what is scored
    depend on the machine: leave it 0 where a run is to be repeated bit for bit. least_number_mass: how probable it has
    to be, for each aspect, that a model in memory writes an allowed number at all, in [0, 1]; where it is less, that is
    a failure. With 0 whatever it would write of numbers is a grade, though it may say little.
    """

    batch_size: int = 16
    timeout_seconds: float = 60.0
    retries: int = 4
    most_words: int = 0
    most_seconds: float = 0.0
    least_number_mass: float = LITTLE_MASS

    def check(self) -> JudgeLimits:
        """Itself; raises ParameterError where a value cannot be."""
        if self.batch_size < 1:
            raise ParameterError(f"The batch size of a judge is {self.batch_size}. Set it to 1 or more.")
        if not 0 < self.timeout_seconds < math.inf:
            raise ParameterError(f"A judge's time-out is {self.timeout_seconds} seconds. Give a number above 0.")
        if self.retries < 0:
            raise ParameterError(f"A judge is to be asked again {self.retries} times. Give 0 or more.")
        for name, value in (("words", self.most_words), ("seconds", self.most_seconds)):
            if not 0 <= value < math.inf:
                raise ParameterError(f"A judge may spend {value} {name}. Give 0 for no limit, or a number above it.")
        if not 0 <= self.least_number_mass <= 1:
            raise ParameterError(f"least_number_mass is {self.least_number_mass}; give a number in [0, 1].")
        return self


class Budget:
    """Words and seconds spent. A run that goes on sets `words` to what its ledger says was spent before."""

    def __init__(self, limits: JudgeLimits, name: str) -> None:
        self.limits, self.name = limits, name
        self.words = 0
        self.seconds = 0.0
        self._began: float | None = None
        self._told: set[str] = set()

    def affordable(self, number: int, words_each: int) -> int:
        """How many of `number` texts the words left pay for, at `words_each`; the log tells once where not for all."""
        if not self.limits.most_words:
            return number
        left = max(0, self.limits.most_words - self.words) // words_each
        if left < number:
            self.tell_once("words", f"has spent its {self.limits.most_words} words: what is not paid for is not asked")
        return min(number, left)

    def seconds_left(self) -> float:
        """Seconds until the limit, infinity where there is none; the log tells once where there are none left."""
        if not self.limits.most_seconds:
            return math.inf
        running = time.monotonic() - self._began if self._began is not None else 0.0
        left = self.limits.most_seconds - self.seconds - running
        if left <= 0:
            self.tell_once("seconds", f"has spent its {self.limits.most_seconds:g} seconds: the rest is not asked")
        return max(0.0, left)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Seconds inside count as spent."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - self._began
            self._began = None

    def tell_once(self, what: str, text: str) -> None:
        """A warning that names the judge, the first time that there is `what` to tell."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s %s.", self.name, text)
