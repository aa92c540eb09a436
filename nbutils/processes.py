"""Processes that end when the one that started them does, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """What a new process calls first so that it gets signal `number` when its parent ends; on Linux alone.

    Made before the fork: after it nothing may be loaded. SIGKILL is heard in compiled code, too.
    """
    parent = os.getpid()
    control = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def ask() -> None:
        if control:
            control(DIE_WITH_PARENT, number)
            if os.getppid() != parent:  # it has ended already
                os._exit(1)

    return ask
