"""A server on this machine that speaks the chat protocol as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Response:
    """What the server says to one request: a text as the chat protocol has it, or any bytes."""

    text: str | None = None
    tokens: Sequence[dict[str, Any]] | None = None
    finish_reason: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    endless: bool = False  # goes on and on, as a reply of 1e9 characters
    seconds: float = 0.0  # before it says anything
    drip: float = 0.0  # seconds between bytes

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        if self.finish_reason is not None:
            choice["finish_reason"] = self.finish_reason
        if self.tokens is not None:
            choice["logprobs"] = {"content": list(self.tokens)}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@dataclass
class ChatServer:
    """`answer` makes the response to a request's body; `requests` are the bodies, `headers` and `times` beside them."""

    answer: Callable[[dict[str, Any]], Response]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    written: int = 0  # bytes of endless replies that found a reader
    stopping: threading.Event = field(default_factory=threading.Event)


def told(*replies: Response | str) -> Callable[[dict[str, Any]], Response]:
    """These responses one after the other, the last one for ever."""
    left = [each if isinstance(each, Response) else Response(each) for each in replies]
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Response]) -> Iterator[ChatServer]:
    """A server while the block lasts."""
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.times.append(time.monotonic())
            try:
                self._respond(server.answer(body))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _respond(self, response: Response) -> None:
            server.stopping.wait(response.seconds)
            content = response.content()
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            if response.endless:
                self.close_connection = True
                self.end_headers()
                while not server.stopping.is_set():
                    self.wfile.write(b"7" * 65536)
                    server.written += 65536
                return
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if not response.drip:
                self.wfile.write(content)
                return
            for byte in content:
                if server.stopping.wait(response.drip):
                    return
                self.wfile.write(bytes([byte]))
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    server.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        running.shutdown()
        running.server_close()
        thread.join()
