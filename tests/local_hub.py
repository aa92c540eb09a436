"""A Hub on this machine: what of its HTTP interface `huggingface_hub` and `datasets` need to stream a data set."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from prepared_hub import COMMIT

API = re.compile(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+)(?:/(.*))?)?)?")
FILE = re.compile(r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.*)")


@dataclass
class LocalHub:
    """`sets` are the files of each data set, `cards` their metadata, `sent` the bytes sent of each file."""

    sets: dict[str, dict[str, bytes]]
    cards: dict[str, dict[str, object]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The address of the Hub, for HF_ENDPOINT."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()

    def entries(self, name: str, folder: str = "", recursive: bool = True) -> list[dict[str, object]]:
        files = self.sets[name]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        found = [{"type": "directory", "path": path, "oid": "1" * 40, "size": 0} for path in sorted(folders)]
        found += [{"type": "file", "path": path, "oid": "2" * 40, "size": len(files[path])} for path in files]
        inside = [each for each in found if not folder or each["path"].startswith(f"{folder}/")]
        return [each for each in inside if recursive or str(PurePosixPath(each["path"]).parent) in (folder, ".")]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """A test's output is its own."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        if match := FILE.fullmatch(path):
            self._file(match[1], match[3])
        elif match := API.fullmatch(path):
            self._api(match[1], match[2] or "info", match[4] or "", parse_qs(url.query), body)
        else:
            self._send(404, b"{}")

    do_HEAD = do_POST = do_GET

    def _api(self, name: str, call: str, folder: str, query: dict[str, list[str]], body: str) -> None:
        hub = self.hub
        if name not in hub.sets:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif call in ("info", "revision"):
            told = {"id": name, "sha": COMMIT, "gated": "manual" if name in hub.gated else False, "siblings": []}
            self._json({**told, "cardData": hub.cards.get(name, {}), "private": False, "downloads": 0, "likes": 0})
        elif call == "auth-check":
            self._gated() if name in hub.gated else self._json({})
        elif call == "tree":
            self._json(hub.entries(name, folder, query.get("recursive", ["false"])[0].lower() == "true"))
        else:
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self._json([each for each in hub.entries(name) if each["path"] in wanted])

    def _file(self, name: str, path: str) -> None:
        content = self.hub.sets.get(name, {}).get(path)
        if name in self.hub.gated:
            self._gated()
        elif content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            status, headers = (
                200,
                {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"},
            )
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                begin, end = int(asked[1]), int(asked[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
                status, content = 206, content[begin : end + 1]
            if self.command != "HEAD":
                self.hub.sent[path] += len(content)
            self._send(status, content, headers)

    def _gated(self) -> None:
        self._send(403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
