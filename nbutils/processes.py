"""Processes that end when the one that started them does, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_parent(parent: int) -> Callable[[], None]:
    """What a child of process `parent` calls first so that it is killed when that ends; on Linux alone.

    Made before a fork: after it nothing may be loaded.
    """
    control = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def ask() -> None:
        if control:
            control(DIE_WITH_PARENT, signal.SIGKILL)  # heard in compiled code, too
            if os.getppid() != parent:  # it has ended already
                os._exit(1)

    return ask
