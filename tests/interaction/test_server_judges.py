"""A judge on a server: what goes over the wire, what comes back, and everything that can go wrong between."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from html import escape
from threading import Thread
from urllib.parse import quote_plus

import numpy as np
import pytest
from chat_server import Response, chat_server, told
from small_judges import KEY, LIMITS, WEEKLY, use_server

from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.interaction import chat_client
from nbutils.interaction.judges import JudgeLimits, check_judge, make_judge

SCORE = (7 + 5 + 10 + 0) / 40


@pytest.fixture
def judge_of(monkeypatch, tmp_path):
    """The judge of a server at `url`."""

    def made(url, limits=LIMITS, folder="cache", **settings):
        use_server(monkeypatch, url, **settings)
        return make_judge("server", "weekly", tmp_path / folder, limits, seed=3)

    return made


def test_what_is_asked_and_what_is_answered(judge_of):
    with chat_server(told(WEEKLY)) as server:
        found = judge_of(server.url).score(["Once {completion}"] * 2, ["a {prompt}", "b"])
    assert found.scores.tolist() == pytest.approx([SCORE] * 2)
    assert {name: each[0] for name, each in found.aspects.items()} == pytest.approx(
        {"coherence": 0.7, "repetition": 0.5, "instruction_following": 1.0, "style": 0.0}
    )
    assert found.raw == (WEEKLY, WEEKLY)
    assert found.words == 8
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {each["Authorization"] for each in server.headers} == {f"Bearer {KEY}"}
    request = next(each for each in server.requests if "a {prompt}" in each["messages"][1]["content"])
    assert "Once {completion}" in request["messages"][1]["content"]
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    asked = {name: request[name] for name in ("model", "temperature", "seed", "logprobs", "top_logprobs")}
    assert asked == {"model": "teacher-8b", "temperature": 0, "seed": 3, "logprobs": True, "top_logprobs": 20}


def test_a_server_without_a_key_gets_none(judge_of):
    with chat_server(told(WEEKLY)) as server:
        assert judge_of(f"{server.url}/", key="").score(["a"], ["b"]).ok.all()
    assert "Authorization" not in server.headers[0]
    assert server.paths == ["/v1/chat/completions"]


def test_log_probabilities_make_grades_expected_values(judge_of):
    tokens = [{"token": part, "top_logprobs": []} for part in ("coherence", ": ", "7")]
    tokens[2]["top_logprobs"] = [
        {"token": "7", "logprob": float(np.log(0.5))},
        {"token": "8", "logprob": float(np.log(0.5))},
    ]
    with chat_server(told(Response(WEEKLY, tokens))) as server:
        found = judge_of(server.url).score(["a"], ["b"])
    assert found.aspects["coherence"].tolist() == pytest.approx([0.75])
    assert found.aspects["repetition"].tolist() == [0.5]


@pytest.mark.parametrize(
    "response",
    [
        Response("coherence: 7\nrepetition: 5"),
        Response("7 5 10 0 3"),
        Response("none"),
        Response(""),
        Response(None),
        Response("11 11 11 11"),
        Response("\u202e\x1b]0;x\x07" + "9" * 5000),
        Response(body=b""),
        Response(body=b"<html>\x00\xff"),
        Response(body=b"[" * 200_000),
        Response(body=b"null"),
        Response(body=b'{"choices": []}'),
        Response(body=b'{"choices": [{"message": {"content": ["7 5 10 0"]}}]}'),
        Response(body=b'{"choices": {"0": 1}}'),
        Response(
            body=json.dumps(
                {"choices": [{"message": {"content": "7 5 10 0"}, "logprobs": {"content": [None, 7]}}]}
            ).encode()
            + b"}"
        ),
        Response(body=b"\x1f\x8b\x08\x00\x00", headers={"content-encoding": "gzip"}),
    ],
)
def test_hostile_replies_give_no_score_and_no_harm(judge_of, response):
    with chat_server(told(response)) as server:
        found = judge_of(server.url).score(["a"], ["b"])
    assert not found.ok.any()
    assert np.isnan(found.scores).all()
    assert found.words == 4
    assert len(found.raw[0]) <= 400
    assert not {"\u202e", "\x1b", "\x00", "\x07"} & set(found.raw[0])
    assert len(server.requests) == 1  # what cannot be read is not asked for again


def test_an_error_is_asked_again_whatever_its_status(judge_of):
    overloaded = Response(body=b'{"error": {"message": "overloaded"}}')
    with chat_server(told(overloaded, WEEKLY)) as server:
        assert judge_of(server.url).score(["a"], ["b"]).scores.tolist() == [SCORE]
        assert len(server.requests) == 2
        server.answer = told(overloaded)
        judge = judge_of(server.url, JudgeLimits(retries=0))
        assert judge.score(["a"], ["c"]).raw == ('{"error": {"message": "overloaded"}}',)
        server.answer = told(WEEKLY)
        assert judge.score(["a"], ["c"]).ok.all()  # it was not kept


@pytest.mark.parametrize(
    ("listed", "grade"),
    [
        ([("7", -(10**400))], 7),  # a whole number that no float holds
        ([("7", 1e-9), ("3", -30.0)], 7),  # rounded above 0
        ([("3", -0.01)], 7),  # what was written is not among them
        ([("7", -9999.0), ("3", -0.01)], 7),  # nor likely at all
        ([("7", 0.5), ("3", -0.01)], 7),  # no log-probability
        ([("7", float(np.log(0.25))), ("3", float(np.log(0.75)))], 4),
    ],
)
def test_log_probabilities_that_lie_leave_the_grade_that_was_written(judge_of, listed, grade):
    tokens = [{"token": part, "top_logprobs": []} for part in ("coherence", ": ", "7")]
    tokens[2]["top_logprobs"] = [{"token": token, "logprob": logprob} for token, logprob in listed]
    with chat_server(told(Response(WEEKLY, tokens))) as server:
        found = judge_of(server.url).score(["a"], ["b"])
    assert found.aspects["coherence"].tolist() == pytest.approx([grade / 10])


def test_odd_log_probabilities_do_no_harm(judge_of):
    for tokens in ([None, 7], [{"token": 7}], [{"token": "coherence: 7", "top_logprobs": [[]]}]):
        with chat_server(told(Response(WEEKLY, tokens))) as server:
            assert judge_of(server.url, folder=str(tokens)[:9].strip("[{'")).score(["a"], ["b"]).scores[0] == SCORE


def test_a_reply_of_any_size_is_read_to_a_bound_only(judge_of):
    with chat_server(told(Response(endless=True))) as server:
        start = time.monotonic()
        found = judge_of(server.url).score(["a"], ["b"])
        assert time.monotonic() - start < 5
        time.sleep(0.1)
        written = server.written
        time.sleep(0.1)
        assert server.written == written < 50 << 20  # what stands in buffers; nobody reads on
    assert not found.ok.any()
    assert "bytes, which was not read" in found.raw[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(judge_of, status):
    with chat_server(told(Response(status=status, body=b"busy"), Response(status=status), WEEKLY)) as server:
        found = judge_of(server.url).score(["a"], ["b"])
    assert found.scores.tolist() == [SCORE]
    assert len(server.requests) == 3
    assert server.times[2] - server.times[1] > 0.02  # twice the first wait


def test_tries_are_bounded_and_a_failure_is_no_score_and_not_kept(judge_of):
    with chat_server(told(Response(status=500, body=b"out of memory"))) as server:
        judge = judge_of(server.url)
        found = judge.score(["a"], ["b"])
        assert len(server.requests) == 3
        assert not found.ok.any()
        assert found.raw == ("HTTP 500: out of memory",)
        server.answer = told(WEEKLY)
        assert judge.score(["a"], ["b"]).ok.all()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_for_time_gets_it(judge_of, form):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=1.9), usegmt=True)  # whole seconds: at least 0.9
    wanted = {"retry-after": "0.4" if form == "seconds" else later}
    with chat_server(told(Response(status=429, headers=wanted), WEEKLY)) as server:
        assert judge_of(server.url).score(["a"], ["b"]).ok.all()
    assert server.times[1] - server.times[0] >= 0.35


def test_a_server_that_asks_for_too_much_time_is_given_up(judge_of):
    for wanted in ("1e9", "inf", "Fri, 31 Dec 9999 23:59:59 GMT"):
        with chat_server(told(Response(status=429, headers={"retry-after": wanted}))) as server:
            start = time.monotonic()
            assert not judge_of(server.url, folder=wanted[:3]).score(["a"], ["b"]).ok.any()
            assert time.monotonic() - start < 3
            assert len(server.requests) == 1
    for odd in ("soon", "-5", "nan", "", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"):
        with chat_server(told(Response(status=429, headers={"retry-after": odd}), WEEKLY)) as server:
            assert judge_of(server.url, folder=f"odd{odd[:4]}").score(["a"], ["b"]).ok.all()


@pytest.mark.parametrize("slow", [Response(WEEKLY, seconds=30), Response(WEEKLY, drip=0.05)])
def test_time_outs_count_from_the_request_to_its_last_byte(judge_of, slow):
    limits = JudgeLimits(timeout_seconds=0.3, retries=1)
    with chat_server(told(slow, WEEKLY)) as server:
        start = time.monotonic()
        assert judge_of(server.url, limits).score(["a"], ["b"]).ok.all()
        assert 0.3 <= time.monotonic() - start < 3
    with chat_server(told(slow)) as server:
        found = judge_of(server.url, limits, "other").score(["a"], ["b"])
        assert len(server.requests) == 2
    assert found.raw == ("no whole reply in 0.3 seconds",)


@pytest.mark.parametrize(
    "drops",
    [
        b"X-Slow: " + b"y" * 10_000,  # in its headers
        b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 10_000,  # in the extension of a chunk
        b"\r\n" + b"7 " * 10_000,  # up to the end of the connection, which seems whole where it was cut
    ],
)
def test_a_reply_that_drips_is_cut_off_wherever_it_does(judge_of, drops):
    """httpx bounds each read alone, and gives nothing out before headers are whole."""

    def drip(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            with suppress(OSError):  # it was cut off
                for byte in drops:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=drip, args=(listening,), daemon=True).start()
        start = time.monotonic()
        judge = judge_of(
            f"http://127.0.0.1:{listening.getsockname()[1]}/v1", JudgeLimits(timeout_seconds=0.4, retries=0)
        )
        found = judge.score(["a"], ["b"])
        assert 0.4 <= time.monotonic() - start < 3
    assert found.raw == ("no whole reply in 0.4 seconds",)


def test_a_budget_of_seconds_ends_waiting_too(judge_of, caplog):
    with chat_server(told(Response(WEEKLY, seconds=30))) as server:
        start = time.monotonic()
        limits = JudgeLimits(batch_size=1, timeout_seconds=20, most_seconds=0.4)
        found = judge_of(server.url, limits).score(["a"] * 5, list("abcde"))
        assert time.monotonic() - start < 3
    assert not found.ok.any()
    assert found.words == 4
    assert "has spent its 0.4 seconds" in caplog.text


def test_replies_are_kept_by_model_rubric_and_text_not_by_address(judge_of, tmp_path):
    with chat_server(told(WEEKLY, "not readable")) as first:
        before = judge_of(first.url).score(["a", "a"], ["b", "b"])
        judge_of(first.url).score(["a"], ["c"])
    with chat_server(told("0 0 0 0")) as second:
        after = judge_of(second.url).score(["a", "a", "a"], ["b", "b", "c"])
        assert second.requests == []
        judge_of(second.url, model="another").score(["a"], ["b"])
        assert len(second.requests) == 1
    assert after.ok.tolist() == [True, True, False]
    assert after.scores[0] == before.scores[0] == SCORE
    assert after.words == 12
    assert len(first.requests) == 2


def test_several_requests_run_at_a_time_and_no_more_than_allowed(judge_of):
    with chat_server(told(Response(WEEKLY, seconds=0.2))) as server:
        start = time.monotonic()
        found = judge_of(server.url).score(["a"] * 8, [str(i) for i in range(8)])
        assert 0.4 <= time.monotonic() - start < 1.2  # four at a time
    assert found.ok.all()


def test_scores_belong_to_their_texts_whatever_the_order_of_replies(judge_of):
    def answer(request):
        grade = int(request["messages"][1]["content"].split("Continuation:\n")[1].split()[0])
        return Response(f"{grade} {grade} {grade} {grade}", seconds=0.05 * (grade % 3))

    with chat_server(answer) as server:
        found = judge_of(server.url).score(["a"] * 10, [str(i) for i in range(10)])
    assert found.scores.tolist() == pytest.approx([i / 10 for i in range(10)])


def test_a_server_that_fails_on_and_on_is_not_asked_for_ever(judge_of, monkeypatch, caplog):
    monkeypatch.setattr(chat_client, "FAILURES_IN_A_ROW", 3)
    with chat_server(told(Response(status=503))) as server:
        found = judge_of(server.url, JudgeLimits(batch_size=1, retries=0)).score(
            ["a"] * 30, [str(i) for i in range(30)]
        )
    assert len(server.requests) == 3
    assert found.words == 12
    assert not found.ok.any()
    assert caplog.text.count("failed 3 times in a row") == 1


def test_a_text_that_is_too_long_fails_alone(judge_of):
    def answer(request):
        long = len(request["messages"][1]["content"]) > 5000
        return Response(status=400, body=b"maximum context length is 4096 tokens") if long else Response(WEEKLY)

    with chat_server(answer) as server:
        found = judge_of(server.url).score(["a"] * 3, ["b", "c" * 10_000, "d"])
    assert found.ok.tolist() == [True, False, True]
    assert all("logprobs" in request for request in server.requests)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(status=401, body=b"Incorrect API key provided: " + KEY.encode()), "Check WORKBOOK_JUDGE_KEY."),
        (Response(status=404, body=b"no such model"), "and the model in WORKBOOK_JUDGE_MODEL."),
        (Response(status=302, headers={"location": "http://127.0.0.1:9/"}), "redirects are not followed"),
        (Response(status=307, headers={"location": "{elsewhere}"}), "redirects are not followed"),
    ],
)
def test_mistakes_end_the_run_with_their_cure(judge_of, response, message):
    with chat_server(told(WEEKLY)) as elsewhere, chat_server(told(response)) as server:
        response.headers = {name: value.format(elsewhere=elsewhere.url) for name, value in response.headers.items()}
        with pytest.raises(ModelError) as caught:
            judge_of(server.url).score(["a"] * 20, [str(i) for i in range(20)])
        assert elsewhere.requests == []
    assert message in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.requests) <= 8


def test_a_server_that_is_not_there_ends_the_run_and_one_that_goes_away_does_not(judge_of):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ModelError, match="cannot be reached"):
        judge_of(f"http://127.0.0.1:{port}/v1").score(["a"], ["b"])
    with chat_server(told(WEEKLY)) as server:
        judge = judge_of(server.url)
        judge.score(["a"], ["b"])
    assert not judge.score(["a"], ["c"]).ok.any()


def test_the_key_is_in_no_log_no_reply_no_cache(judge_of, caplog, tmp_path):
    echoes = [Response(status=500, body=KEY.encode()), Response(f"key {KEY}"), Response(body=b"{" + KEY.encode())]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    echoes.append(Response(body=f'{{"choices": [{{"message": {{"content": "{escaped}"}}}}]}}'.encode()))
    with caplog.at_level(logging.DEBUG), chat_server(told(*echoes)) as server:
        judge = judge_of(server.url, JudgeLimits(batch_size=1, retries=1))
        found = judge.score(["a"] * 5, list("abcde"))
        with pytest.raises(ModelError) as caught:
            server.answer = told(Response(status=403, body=b"x" * 190 + KEY.encode()))
            judge.score(["a"], ["z"])
    assert sum("[key]" in raw for raw in found.raw) >= 3
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
    for shown in (caplog.text, str(found), repr(judge), repr(vars(judge)), str(caught.value), kept.decode("latin-1")):
        assert KEY not in shown
        assert KEY[:12] not in shown


def in_json(key):
    return json.dumps(key)[1:-1]


@pytest.mark.parametrize("spelled", [in_json, lambda key: in_json(key).replace("/", r"\/"), escape, quote_plus])
def test_a_key_that_is_spelled_otherwise_is_not_shown_either(judge_of, spelled):
    key = 'sk-/a"b&c/0123456789'
    response = Response(status=401, body=f"wrong: {spelled(key)}".encode())
    with chat_server(told(response)) as server, pytest.raises(ModelError, match=r"wrong: \[key\]"):
        judge_of(server.url, key=key).score(["a"], ["b"])


def test_no_proxy_hears_of_a_server_on_this_machine(judge_of, monkeypatch):
    with chat_server(told(WEEKLY)) as proxy, chat_server(told(WEEKLY)) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "")
        assert judge_of(server.url).score(["a"], ["b"]).ok.all()
        assert (len(server.requests), len(proxy.requests)) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": ""}, "WORKBOOK_JUDGE_URL is not set"),
        ({"model": ""}, "WORKBOOK_JUDGE_MODEL is not set"),
        ({"url": "localhost:8000"}, "is no address of a server"),
        ({"url": "ftp://a/v1"}, "is no address of a server"),
        ({"url": "http://a:b/v1"}, "is no address of a server"),
        ({"url": "http://me:hidden@a/v1"}, "holds more than an address"),
        ({"url": "http://a/v1?key=hidden"}, "holds more than an address"),
        ({"key": "hidden\r\nX: y"}, "holds a space or a character that no key has"),
        ({"key": "hïdden"}, "holds a space or a character that no key has"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name_alone(monkeypatch, settings, message):
    use_server(monkeypatch, **({"url": "http://localhost:1/v1"} | settings))
    with pytest.raises(ParameterError) as caught:
        check_judge("server", "weekly")
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)
