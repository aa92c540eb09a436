"""Processes that a search starts: they end with it, and two searches never do the same work at once."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def command(words: Iterable[object]) -> list[str]:
    """The command line that runs `python -m nbutils` with `words`, for a child that ends when this process does."""
    return [sys.executable, "-m", "nbutils.search", str(os.getpid()), *map(str, words)]


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, after waiting for whoever has it; the system releases it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock at `path`."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
