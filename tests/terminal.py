"""A script in a pseudo-terminal: what a person at a terminal would see of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from functools import partial


def in_a_terminal(code: str, columns: int, lines: int = 24, stop_at: str = "") -> tuple[int, str]:
    """The exit code of a script in a terminal of that size and what it showed; Ctrl-C soon after `stop_at`."""
    ours, theirs = os.openpty()
    variables = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": str(lines)}
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=variables, preexec_fn=heard
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if stop_at and stop_at.encode() in shown:
                stop_at = ""
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.returncode, shown.decode()
