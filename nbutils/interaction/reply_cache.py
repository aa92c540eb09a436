"""Replies of judges and teachers, kept on disk: what was paid for is not asked again.

An SQLite file with one row a reply, by a hash of everything that decided it; so it holds neither prompts nor keys of
servers. Several processes may use one file: each batch is one transaction, whole or not there. Its journal is a plain
file, which works on network file systems, where SQLite's write-ahead log does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from nbutils.foundation import RunError, exclusively, relative

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
