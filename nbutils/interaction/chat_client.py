"""Asking a server that speaks OpenAI's chat protocol (vLLM and others): a few requests at a time, each bounded.

    WORKBOOK_JUDGE_URL=http://localhost:8000/v1  WORKBOOK_JUDGE_MODEL=meta-llama/Llama-3.1-8B-Instruct
    WORKBOOK_JUDGE_KEY=...                       where the server wants one

The key goes into one header of requests to that URL and nowhere else: no redirect is followed, no proxy is asked for a
server on this machine, and what a server says is shown without it. A reply is read up to MOST_BYTES and not beyond, and
a request ends at its time-out, however slowly its reply drips in.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from nbutils.foundation import ModelError, ParameterError, shortened, visible
from nbutils.interaction.deadline import Deadline
from nbutils.interaction.replies import Budget, JudgeLimits

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
URL, KEY, MODEL = "WORKBOOK_JUDGE_URL", "WORKBOOK_JUDGE_KEY", "WORKBOOK_JUDGE_MODEL"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AT_ONCE = 8  # requests, at most
MOST_BYTES = 1 << 20  # of a reply: a judge's with all its log-probabilities has a tenth of it
FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0  # seconds before a request is sent again; it doubles each time
SHORTEST_SECRET = 8  # characters of a key; shorter ones are stand-ins, as "EMPTY", and may be words of a reply
FAILURES_IN_A_ROW = 32  # then the rest of a call is not asked: the server is out of order
WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
OPTIONS = {  # what a server may refuse by name, and what goes with it
    "logprobs": ("logprobs", "top_logprobs"),
    "seed": ("seed",),
    "continue_final_message": ("continue_final_message", "add_generation_prompt"),
}
WITHOUT = {  # what follows where it gets no more of them
    "logprobs": "its grades are whole numbers and no expected values",
    "seed": "it may say something else another time",
    "continue_final_message": "its answers begin as it likes",
}
MISTAKES = {
    401: f"Check {KEY}",
    403: f"Check {KEY}, and that it may use the model in {MODEL}",
    404: f"Check {URL}, which should end as in http://localhost:8000/v1, and the model in {MODEL}",
    405: f"Check {URL}, which should end as in http://localhost:8000/v1",
}


@dataclass(frozen=True)
class ServerSettings:
    """Where a server is and which of its models is asked."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """The settings in the environment. Raises ParameterError that names the variable, never what the key is."""
        url, model, key = (os.environ.get(name, "").strip() for name in (URL, MODEL, KEY))
        for name, value, example in ((URL, url, "http://localhost:8000/v1"), (MODEL, model, "its name on the server")):
            if not value:
                raise ParameterError(f"A server is to judge, and {name} is not set. Set it, as to {example}.")
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            usable = False
        if not usable:
            raise ParameterError(f"{URL} is no address of a server. Set it as to http://localhost:8000/v1.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ParameterError(f"{URL} holds more than an address. Put the key into {KEY} and leave the rest out.")
        if not all(33 <= ord(character) <= 126 for character in key):
            raise ParameterError(f"{KEY} holds a space or a character that no key has. Set it again.")
        return cls(url.rstrip("/").removesuffix("/chat/completions"), model, key)


@dataclass(frozen=True)
class Answer:
    """What came of one request: the JSON that the server sent, or the reason why there is none.

    named: the OPTIONS of the request that stand in the server's refusal.
    """

    content: Any = None
    failure: str = ""
    status: int | None = None
    asked: bool = True
    connected: bool = True
    named: frozenset[str] = frozenset()

    @property
    def text(self) -> str | None:
        """The first choice's text, None where there is none."""
        match self.content:
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return text.encode("utf-8", "replace").decode()  # no tokenizer takes half characters
        return None

    @property
    def is_error(self) -> bool:
        """Whether the server says that something went wrong, which some do with status 200."""
        return isinstance(self.content, dict) and "error" in self.content and "choices" not in self.content

    @property
    def ended(self) -> bool:
        """Whether the server says that the first choice's text ended by itself."""
        match self.content:
            case {"choices": [{"finish_reason": "stop"}, *_]}:
                return True
        return False

    @property
    def tokens(self) -> Any:
        """What the first choice tells of its tokens, None where it tells nothing."""
        match self.content:
            case {"choices": [{"logprobs": {"content": list(tokens)}}, *_]}:
                return tokens
        return None


class ChatClient:
    """A server that answers chats. `refused`: the OPTIONS that it does not know and gets no more."""

    def __init__(self, settings: ServerSettings, limits: JudgeLimits, budget: Budget) -> None:
        self.settings, self.limits, self.budget = settings, limits, budget
        self.refused: set[str] = set()
        self._heard_of = False  # whether it ever answered
        self._in_a_row = 0
        self._stop = threading.Event()
        self._spellings = _spellings(settings.key)
        host = urlsplit(settings.url)
        self._is_here = host.hostname in LOOPBACK
        if settings.key and host.scheme == "http" and not self._is_here:
            logger.warning("The key for %s goes over http, where others on the way can read it.", host.hostname)

    def answers(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Answer]]:
        """The answer to each request (without its model), by index, as they come.

        Raises ModelError where the server cannot be reached at all, or says that key, model or address are wrong.
        """
        import httpx

        logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
        self._stop.clear()
        self._in_a_row = 0
        workers = min(AT_ONCE, self.limits.batch_size, len(requests))
        fresh = httpx.Limits(max_keepalive_connections=0)  # a connection for each request, which may be closed
        with httpx.Client(follow_redirects=False, limits=fresh, trust_env=not self._is_here) as client:
            pool = ThreadPoolExecutor(workers)
            try:
                jobs = {pool.submit(self._answer, client, request): index for index, request in enumerate(requests)}
                for job in as_completed(jobs):
                    answer = job.result()
                    self._check(answer)
                    yield jobs[job], answer
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _check(self, answer: Answer) -> None:
        """Mistakes of the user's stop everything; what may pass is counted."""
        if answer.status is not None:
            self._heard_of = True
        cure = MISTAKES.get(answer.status or 0)
        if answer.status is not None and 300 <= answer.status < 400:
            cure = f"Set {URL} to the address it redirects to; redirects are not followed, they would carry the key on"
        if cure:
            raise ModelError(f"The judge's server at {self.settings.url} says: {answer.failure}. {cure}.")
        if not answer.connected and not self._heard_of:
            unreached = f"The judge's server at {self.settings.url} cannot be reached ({answer.failure})"
            raise ModelError(f"{unreached}. Start it, or set {URL} to where it is.")

    def _answer(self, client: httpx.Client, request: Mapping[str, Any]) -> Answer:
        """One request, sent again while that is worth it."""
        answer = Answer(failure="not asked: the time is spent", asked=False)
        if self._in_a_row >= FAILURES_IN_A_ROW:
            self.budget.tell_once("order", f"failed {FAILURES_IN_A_ROW} times in a row: the call's rest is not asked")
            return Answer(failure="not asked: the server is out of order", asked=False)
        wait: float | None = 0.0
        for attempt in range(self.limits.retries + 1):
            left = self.budget.seconds_left()
            if not left or self._stop.is_set():
                break
            answer, wait = self._try(client, request, min(left, self.limits.timeout_seconds))
            if wait is None:
                break
            wait = max(wait, FIRST_WAIT * 2**attempt)
            if attempt == self.limits.retries or wait > min(LONGEST_WAIT, left) or self._stop.wait(wait):
                break
        self._in_a_row = 0 if wait is None else self._in_a_row + 1
        return answer

    def _try(self, client: httpx.Client, request: Mapping[str, Any], seconds: float) -> tuple[Answer, float | None]:
        """The answer, and seconds that the server wants to be left alone where another try is worth it.

        What a refusal names is left out, as little of it as will do, and for good once an answer comes without it: the
        name may be no more than a word of the text, which some servers repeat.
        """
        deadline = time.monotonic() + seconds
        ways, refusal = [frozenset(self.refused)], None
        for left_out in ways:
            left = deadline - time.monotonic()
            if refusal and left <= 0:
                break
            answer, wait = self._send(client, _without(request, left_out), left)
            if not answer.named:
                if answer.status == 200:
                    self._leave_out(left_out)
                return answer, wait
            refusal = refusal or answer
            ways += [way for option in sorted(answer.named) if (way := left_out | {option}) not in ways]
        return refusal, None

    def _leave_out(self, options: frozenset[str]) -> None:
        for option in sorted(options - self.refused):
            self.budget.tell_once(option, f"does not take {option} and gets it no more: {WITHOUT[option]}")
        self.refused |= options

    def _send(self, client: httpx.Client, request: Mapping[str, Any], seconds: float) -> tuple[Answer, float | None]:
        import httpx

        body = {"model": self.settings.model} | request
        deadline = Deadline(seconds)
        try:
            with deadline:
                status, headers, content = self._post(client, body, seconds, deadline)
        except httpx.ConnectError as error:
            return Answer(failure=self._shown(f"no connection: {error}"), connected=False), 0.0
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            status, late = None, deadline.passed or isinstance(error, httpx.TimeoutException)
            failure = self._shown(f"{type(error).__name__}: {error}")
        else:
            late = deadline.passed  # a reply without a length seems whole where it was cut off
        if late or status is None:
            return Answer(failure=f"no whole reply in {seconds:.3g} seconds" if late else failure), 0.0
        if status != 200:
            return self._refusal(status, headers, content or "", body)
        if content is None:
            return Answer(failure=f"a reply of more than {MOST_BYTES} bytes, which was not read", status=status), None
        try:
            answer = Answer(self._read(content), status=status)
        except (ValueError, RecursionError):
            return Answer(failure=f"no JSON: {self._shown(content)}", status=status), None
        return (Answer(failure=self._shown(content), status=status), 0.0) if answer.is_error else (answer, None)

    def _post(
        self, client: httpx.Client, body: Mapping[str, Any], seconds: float, deadline: Deadline
    ) -> tuple[int, Any, str | None]:
        """Status, headers, and the content without the key; None where it is too long."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        url, content = f"{self.settings.url}/chat/completions", bytearray()
        sent = json.dumps(body).encode()  # half characters as escapes
        given = {"content": sent, "headers": headers, "timeout": seconds, "extensions": {"trace": deadline.trace}}
        with client.stream("POST", url, **given) as response:
            for chunk in response.iter_raw():  # as it comes: unpacking could make it any size
                content += chunk
                if len(content) > MOST_BYTES:
                    return response.status_code, response.headers, None
        return response.status_code, response.headers, self._without_key(content.decode("utf-8", "replace"))

    def _refusal(self, status: int, headers: Any, content: str, body: Mapping[str, Any]) -> tuple[Answer, float | None]:
        named = frozenset(option for option in OPTIONS if option in body and option in content)
        named = named if status in (400, 422) else frozenset()
        failure = f"HTTP {status}: {self._shown(content)}".rstrip(": ")
        wait = _retry_after(headers.get("retry-after", "")) if status in WORTH_ANOTHER_TRY else None
        return Answer(failure=failure, status=status, named=named), wait

    def _read(self, content: str) -> Any:
        """The JSON of a reply, without the key, be it spelled by escapes."""
        return json.loads(self._without_key(json.dumps(json.loads(content), ensure_ascii=False)))

    def _shown(self, text: str) -> str:
        return shortened(visible(self._without_key(text[:2000])), 200)

    def _without_key(self, text: str) -> str:
        for spelling in self._spellings:
            text = text.replace(spelling, "[key]")
        return text


def _without(request: Mapping[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """The request without these; a beginning that the server cannot go on with is not sent either."""
    left_out = {name for option in options for name in OPTIONS[option]}
    body = {name: value for name, value in request.items() if name not in left_out}
    if "continue_final_message" in left_out:
        body["messages"] = [turn for turn in body["messages"] if turn["role"] != "assistant"]
    return body


def _spellings(key: str) -> tuple[str, ...]:
    """How a server may write the key: as it is, in JSON, in an address, in HTML."""
    if len(key) < SHORTEST_SECRET:
        return ()
    in_json = json.dumps(key)[1:-1]
    return tuple(dict.fromkeys((key, in_json, in_json.replace("/", r"\/"), quote(key, safe=""), escape(key))))


def _retry_after(value: str) -> float:
    """Seconds that a server wants to be left alone: a number or a date, 0 where it says neither."""
    try:
        return max(0.0, float(value))  # NaN gives 0
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0
