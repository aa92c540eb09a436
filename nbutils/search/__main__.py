"""`python -m nbutils.search PARENT COMMAND ...` is `python -m nbutils COMMAND ...` that ends when process PARENT does.

A kernel that is killed cannot stop the runs it started. So a thread of each run looks whether its parent is still
there, and otherwise asks its own process to stop as SIGTERM does: the run ends its kernel and writes its record.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LOOK_SECONDS = 0.5


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch, args=(int(sys.argv[1]),), daemon=True).start()
    from nbutils.__main__ import main

    sys.exit(main(sys.argv[2:]))
