"""Processes that a search starts: they end with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from nbutils.foundation import WITH_PARENT


def command(words: Iterable[object]) -> list[str]:
    """The command line that runs `python -m nbutils` with `words`, for a child that ends when this process does."""
    return [sys.executable, "-m", "nbutils", WITH_PARENT, str(os.getpid()), *map(str, words)]
