"""Replies of judges and teachers: what they may cost, and the cache that keeps what was paid for.

An SQLite file with one row a reply, by a hash of everything that decided it; so it holds neither prompts nor keys of
servers. Several processes may use one file: each batch is one transaction, whole or not there. Its journal is a plain
file, which works on network file systems, where SQLite's write-ahead log does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbutils.foundation import ParameterError, RunError, exclusively, relative

# Probability of any allowed number. Instruct models that were told to reply so have nearly all of it there; with less
# than a tenth, nine replies in ten would be no grade, and the rest follow the digits' base rates.
LITTLE_MASS = 0.1

logger = logging.getLogger(__name__)
FILE = "replies.sqlite"
BUSY_SECONDS = 60.0  # to wait for another process that writes
ASKED_AT_ONCE = 500  # keys of one SELECT; SQLite takes at least 999
SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"


class ReplyCache:
    """The replies in `folder`. A damaged file is set aside, and the log says so.

    Raises RunError where the folder cannot be written. What cannot be kept later (a full disk) is used all the same.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusively(folder / f".{FILE}.lock"):  # of two who find it damaged, one sets it aside
                self._open()
        except (OSError, sqlite3.OperationalError) as error:
            raise RunError(
                f"Replies of judges cannot be kept in {relative(folder)} ({error}). Make the folder writable."
            ) from None

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """The replies there are, by key; rows that are no JSON count as not there."""
        found: dict[str, Any] = {}
        damaged = []
        with self._told("read"), self._connected() as connection, connection:
            for start in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[start : start + ASKED_AT_ONCE]
                marks = ",".join("?" * len(some))
                for key, reply in connection.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", some):
                    try:
                        found[key] = json.loads(reply)
                    except ValueError:
                        damaged.append((key, reply))
            if damaged:
                logger.warning("Replies in %s are damaged; they are asked for again.", relative(self.path))
                connection.executemany("DELETE FROM replies WHERE key = ? AND reply = ?", damaged)
        return found

    def put(self, replies: Mapping[str, Any]) -> None:
        """Keep replies that JSON can hold, all or none. The first reply to a key stands: others may have read it."""
        rows = [(key, json.dumps(reply)) for key, reply in replies.items()]
        with self._told("kept"), self._connected() as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?)", rows)

    def _open(self) -> None:
        for attempt in (1, 2):
            try:
                with self._connected() as connection, connection:
                    connection.execute(SCHEMA)
                    connection.execute("SELECT key, reply FROM replies LIMIT 1").fetchone()
                return
            except sqlite3.OperationalError:  # not writable, or locked: no damage
                raise
            except sqlite3.DatabaseError as error:
                if attempt == 2:
                    raise sqlite3.OperationalError(str(error)) from None
                self._set_aside(error)

    def _set_aside(self, error: sqlite3.Error) -> None:
        number = 1
        while (aside := self.path.with_name(f"{FILE}.damaged-{number}")).exists():
            number += 1
        self.path.rename(aside)
        logger.warning("%s is damaged (%s). It is now %s; replies are kept anew.", FILE, error, relative(aside))

    def _connected(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS))

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """A cache that fails inside costs no run its replies, only their keeping; the log tells once."""
        try:
            yield
        except sqlite3.Error as error:
            if not self._failed:
                logger.warning("Replies of judges cannot be %s in %s (%s).", what, relative(self.path), error)
            self._failed = True


def reply_key(*parts: Any) -> str:
    """A hash of what decides a reply: anything JSON can hold, half characters included."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
