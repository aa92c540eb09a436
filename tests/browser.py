"""A real browser for tests: what a page does when it is opened, read over Chromium's own debugging pipe.

    with Trap() as trap, Browser(find_browser(), trap.port) as browser:
        seen = browser.open(page)

Whatever the page or the browser asks any host for ends in the trap, a server on this machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # a loaded machine opens a large page slowly
CLOSING_SECONDS = 10
QUIET_SECONDS = 0.3  # what a page would start on its own has started by then
# Traffic of the browser's own, which would end in the trap too.
SILENT = (
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync"),
    *("--disable-domain-reliability", "--disable-client-side-phishing-detection", "--disable-extensions", "--no-pings"),
    *(
        "--no-first-run",
        "--no-default-browser-check",
        "--metrics-recording-only",
        "--disable-breakpad",
        "--disable-gpu",
    ),
    "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter,Translate",
)
# What it asks its maker for all the same is found nowhere; every other host is the trap.
OWN_HOSTS = ("*.google.com", "*.googleapis.com", "*.gvt1.com")
# What a reader might do: point at, click, focus, open and type into everything.
PROVOKE = """(() => {
  const kinds = ["mouseover", "mouseenter", "pointerdown", "click", "dblclick", "contextmenu", "focus", "blur",
    "toggle", "input", "change", "keydown", "wheel", "scroll", "error", "load", "animationstart", "transitionend",
    "submit", "copy"];
  for (const element of document.querySelectorAll("*")) {
    if (element.tagName === "DETAILS") element.open = true;
    if (element.focus) element.focus();
    for (const kind of kinds) element.dispatchEvent(new Event(kind, {bubbles: false}));
    if (element.tagName !== "A" && element.click) element.click();
  }
  for (const element of document.querySelectorAll("details")) element.open = false;
})()"""
READ = """(() => {
  const all = [...document.querySelectorAll("*")];
  const told = element => element.textContent;
  const styles = all.map(element => getComputedStyle(element));
  const first = document.querySelector("h2");
  const after = all.filter(element => first && first.compareDocumentPosition(element) & 4);
  let section = "";
  const tables = [];
  for (const element of document.querySelectorAll("h2, table")) {
    if (element.tagName === "H2") section = told(element);
    else tables.push({section, rows: [...element.rows].map(row => [...row.cells].map(told))});
  }
  return {
    title: document.title, marks: Object.keys(window).filter(name => name.startsWith("owned")),
    markup: document.documentElement.outerHTML,
    text: document.body ? told(document.body) : "",
    tags: all.map(element => element.tagName.toLowerCase()),
    events: all.flatMap(e => [...e.attributes].filter(a => a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value))
      .map(a => e.tagName + " " + a.name)),
    skeleton: after.map(element => element.tagName.toLowerCase()).filter(tag => tag !== "br" && tag !== "small"),
    headings: [...document.querySelectorAll("h1, h2, h3, h4")].map(h => [h.tagName.toLowerCase(), told(h)]),
    tables,
    pictures: [...document.images].map(image => [image.alt, image.complete ? image.naturalWidth : 0]),
    strong: [...document.querySelectorAll("strong")].map(told),
    paragraphs: [...document.querySelectorAll("p")].map(told),
    lifted: styles.filter(s => s.position !== "static").length,
    backgrounds: styles.filter(s => s.backgroundImage !== "none").length,
    width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  };
})()"""
PARSE = """source => new DOMParser().parseFromString(source, "text/html").documentElement.outerHTML"""


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Trap:
    """A server on 127.0.0.1 that answers everything and keeps the first bytes of whoever connects in `heard`."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        heard = self.heard

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(5)
                first = b""
                with suppress(OSError):
                    first = self.request.recv(4096)
                heard.append(first)
                with suppress(OSError):
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nno")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def __enter__(self) -> Trap:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Seen:
    """What a page did and is. `source` is its markup as parsed where no script can run; `read` is what READ returns."""

    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # of the browser: refused by policy, an exception, a message
    windows: list[str] = field(default_factory=list)
    source: str = ""
    read: dict[str, Any] = field(default_factory=dict)

    @property
    def did(self) -> dict[str, list[str]]:
        """Everything active, by its kind; empty for a page that did nothing."""
        told = {"dialogs": self.dialogs, "requests": self.requests, "complaints": self.complaints}
        told |= {"windows": self.windows, "marks": self.read["marks"], "events": self.read["events"]}
        if self.read["markup"] != self.source:
            told["markup"] = ["the page is not what its file says"]
        return {name: each for name, each in told.items() if each}


class Browser:
    """A headless Chromium with a profile of its own in which every host is the trap at `port`."""

    def __init__(self, executable: str, port: int) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", *SILENT]
        hosts = [*(f"MAP {host} ~NOTFOUND" for host in OWN_HOSTS), f"MAP * 127.0.0.1:{port}"]
        flags += [f"--host-resolver-rules={', '.join(hosts)}", "--no-proxy-server", "--window-size=1200,900"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        self._start([executable, *flags, "about:blank"])
        self.number, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def _start(self, command: list[str]) -> None:
        """Start the browser in a process group of its own; it reads commands from 3 and answers on 4."""
        to_read, self.to_browser = os.pipe()
        self.from_browser, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_read, to_write)]
        actions = [(os.POSIX_SPAWN_OPEN, place, os.devnull, os.O_WRONLY, 0) for place in (1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(ends, (3, 4), strict=True)]
        self.process = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setpgroup=0)
        for end in (to_read, to_write, *ends):
            os.close(end)

    def __enter__(self) -> Browser:
        self.call("Browser.getVersion")
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, TimeoutError):
            self.call("Browser.close")
        end = time.monotonic() + CLOSING_SECONDS
        while os.waitpid(self.process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(self.process, signal.SIGKILL)
            time.sleep(0.05)
        os.close(self.to_browser)
        os.close(self.from_browser)
        self.profile.cleanup()

    def open(self, page: Path) -> Seen:
        """Open a file, do what a reader might, and tell what happened."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Target.setDiscoverTargets", discover=True)
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        self.events.clear()
        self.call("Page.navigate", session, url=page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        self.call("Runtime.evaluate", session, expression=PROVOKE)
        self._listen(QUIET_SECONDS)
        read = self.call("Runtime.evaluate", session, expression=READ, returnByValue=True)["result"]["value"]
        source = page.read_text(encoding="utf-8")
        if page.suffix == ".html":
            call = {"functionDeclaration": PARSE, "arguments": [{"value": source}], "returnByValue": True}
            whole = self.call("Runtime.evaluate", session, expression="document")["result"]["objectId"]
            source = self.call("Runtime.callFunctionOn", session, objectId=whole, **call)["result"]["value"]
        else:
            source = read["markup"]
        self._listen(0)
        seen = self._told(page.resolve().as_uri(), target)
        seen.read, seen.source = read, source
        self.call("Target.closeTarget", targetId=target)
        return seen

    def _told(self, address: str, target: str) -> Seen:
        seen = Seen()
        for event in self.events:
            name, about = event["method"], event.get("params", {})
            if name == "Page.javascriptDialogOpening":
                seen.dialogs.append(about["message"])
            elif name == "Network.requestWillBeSent":
                seen.requests.append(about["request"]["url"])
            elif name == "Log.entryAdded":
                seen.complaints.append(about["entry"]["text"])
            elif name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                seen.complaints.append(json.dumps(about)[:300])
            elif name in (
                "Page.windowOpen",
                "Page.downloadWillBegin",
                "Page.frameAttached",
                "Page.frameScheduledNavigation",
            ):
                seen.windows.append(f"{name} {about.get('url', '')}")
            elif name == "Target.targetCreated" and about["targetInfo"].get("openerId") == target:
                seen.windows.append(about["targetInfo"]["url"])
        own = [address, *(url for url in seen.requests if url.startswith("data:image/png;base64,") or url == "data:,")]
        seen.requests = [url for url in seen.requests if url not in own]
        return seen

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Send a command; returns its result. Raises TimeoutError, or RuntimeError where the browser refuses it."""
        self.number += 1
        number = self.number
        self._send({"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {}))
        for message in self._messages(SECONDS):
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
        raise TimeoutError(f"{method}: no answer from the browser in {SECONDS} s")

    def _send(self, message: dict[str, Any]) -> None:
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self.to_browser, rest) :]

    def _wait_for(self, method: str) -> None:
        if any(event["method"] == method for event in self.events):
            return
        if not any(message.get("method") == method for message in self._messages(SECONDS)):
            raise TimeoutError(f"no {method} from the browser in {SECONDS} s")

    def _listen(self, seconds: float) -> None:
        for _ in self._messages(seconds):
            pass

    def _messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What the browser says, for so long; events are kept, and dialogs, which stop a page, are closed."""
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.buffer:
                raw, self.buffer = self.buffer.split(b"\0", 1)
                message = json.loads(raw)
                if "method" in message:
                    self.events.append(message)
                if message.get("method") == "Page.javascriptDialogOpening":
                    self.number += 1
                    answer = {"id": self.number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                    self._send(answer | {"sessionId": message["sessionId"]})
                yield message
            left = end - time.monotonic()
            if not select.select([self.from_browser], [], [], max(0.0, left))[0]:
                return
            read = os.read(self.from_browser, 1 << 20)
            if not read:
                raise TimeoutError("the browser has ended")
            self.buffer += read
