"""Locks between processes: files that the system lets go of when their holder ends, however it ends.

On NFS they need version 3 or later.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, after waiting for whoever has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock at `path` together with all who want no more than that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:  # on NFS one who shares a lock must be able to read
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_held(path: Path, by_anyone: bool = False) -> bool:
    """Whether a living process holds the lock at `path`: exclusively, or `by_anyone`."""
    try:
        with path.open("r+b" if by_anyone else "rb") as file:
            fcntl.flock(file, (fcntl.LOCK_EX if by_anyone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, PermissionError):
        return False
    return False
