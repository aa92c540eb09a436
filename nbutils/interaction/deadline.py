"""When a request to a server ends, however slowly its reply comes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


class Deadline:
    """The end of a request. At it the connection is closed, for httpx bounds each read alone and not their sum.

    `trace` is httpx's extension of that name: it tells of connections as they are made.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._stream: Any = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def trace(self, event: str, told: Mapping[str, Any]) -> None:
        """Remember the connection that was made."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._stream = told["return_value"]
            if self.passed:
                self._end()

    def _end(self) -> None:
        self.passed = True
        if self._stream is not None:
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(self._stream.get_extra_info("socket"), socket.SHUT_RDWR)
