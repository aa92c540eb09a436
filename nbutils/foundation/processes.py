"""Processes that end when the one that started them does, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # end a process that is not at fault
DIE_WITH_PARENT, ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of Linux's prctl
_control = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up now: after a fork nothing is loaded


def end_with_parent(parent: int) -> Callable[[], None]:
    """What a child of process `parent` calls first so that it is killed when that ends; on Linux alone."""

    def ask() -> None:
        if _control:
            _control(DIE_WITH_PARENT, signal.SIGKILL)  # heard in compiled code, too
            if os.getppid() != parent:  # it has ended already
                os._exit(1)

    return ask


def adopt_orphans() -> None:
    """From now on descendants whose parents end become this process's children, and not init's; on Linux alone.

    So they are found, whatever session they have made for themselves. Children do not inherit it.
    """
    if _control:
        _control(ADOPT_ORPHANS, 1, 0, 0, 0)
