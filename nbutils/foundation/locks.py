"""Locks between processes: files that the system lets go of when their holder ends, however it ends.

On NFS they need version 3 or later.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nbutils.foundation.errors import RunError
from nbutils.foundation.places import relative


def lock(file: IO[str], how: int, path: Path) -> None:
    """flock(2) on the open file at `path`. Raises BlockingIOError where `how` says not to wait and it is held.

    Raises RunError where the file system has no locks.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise RunError(
            f"{relative(path.parent)} lies on a file system that locks no files ({error.strerror}), so nothing would "
            "keep two runs from writing over each other. Have it mounted with flock (NFS: version 3 or later), or name "
            "a folder elsewhere with --out."
        ) from None


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, after waiting for whoever has it. Raises RunError where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        lock(file, fcntl.LOCK_EX, path)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock at `path` together with all who want no more. Raises RunError where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:  # on NFS one who shares a lock must be able to read
        lock(file, fcntl.LOCK_SH, path)
        yield


def is_held(path: Path, by_anyone: bool = False) -> bool:
    """Whether a living process holds the lock at `path`: exclusively, or `by_anyone`. None where there are none."""
    try:
        with path.open("r+b" if by_anyone else "rb") as file:
            fcntl.flock(file, (fcntl.LOCK_EX if by_anyone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not there, not ours to open, or on a file system without locks
        return False
    return False
