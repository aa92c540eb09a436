"""Options that a server does not take: what is left out, what is not, and that no text is lost by it."""

from __future__ import annotations

import json

import pytest
from chat_server import Response, chat_server
from small_judges import WEEKLY, use_server

from nbutils.interaction.judges import JudgeLimits, make_judge


@pytest.fixture
def judged_by(monkeypatch, tmp_path):
    """The judge of a server at `url`."""

    def made(url, limits):
        use_server(monkeypatch, url)
        return make_judge("server", "weekly", tmp_path, limits, seed=3)

    return made


@pytest.mark.parametrize("option", ["logprobs", "seed"])
def test_what_a_server_does_not_know_is_left_out_which_is_no_try_of_a_text(judged_by, option, caplog):
    def answer(request):
        if option in request:
            return Response(status=400, body=f'{{"error": "{option} is not supported by this model"}}'.encode())
        return Response(WEEKLY)

    with chat_server(answer) as server:
        judge = judged_by(server.url, JudgeLimits(batch_size=4, retries=0))
        assert judge.score(["a"] * 6, [str(i) for i in range(6)]).ok.all()
    assert not {"logprobs", "top_logprobs"} & set(server.requests[-1]) or option == "seed"
    assert len(server.requests) <= 10  # six, and the few that were on their way
    assert caplog.text.count(f"does not take {option} and gets it no more") == 1


@pytest.mark.parametrize("refused", [{"seed"}, {"seed", "logprobs"}])
def test_of_the_names_in_a_refusal_only_those_at_fault_are_left_out(judged_by, refused):
    """Of one that repeats the request, which holds them all."""

    def answer(request):
        return Response(status=422, body=json.dumps(request).encode()) if refused & set(request) else Response(WEEKLY)

    with chat_server(answer) as server:
        assert judged_by(server.url, JudgeLimits(batch_size=1, retries=0)).score(["a"] * 2, ["b", "c"]).ok.all()
    assert {"seed", "logprobs"} - set(server.requests[-1]) == refused


def test_a_refused_text_that_is_repeated_switches_nothing_off(judged_by, caplog):
    def answer(request):
        text = request["messages"][1]["content"]
        bad = "logprobs" in text
        return Response(status=400, body=f"not to be judged: {text}".encode()) if bad else Response(WEEKLY)

    with chat_server(answer) as server:
        judge = judged_by(server.url, JudgeLimits(batch_size=1, retries=2))
        found = judge.score(["a"] * 3, ["b", "the logprobs of a seed", "c"])
    assert found.ok.tolist() == [True, False, True]
    assert {"seed", "logprobs", "top_logprobs"} <= set(server.requests[-1])
    assert "gets it no more" not in caplog.text
    assert len(server.requests) == 2 + 4  # with both, without one, without the other, without both
