"""Correcting teachers: what they are told, what of their texts is used, what it costs."""

from __future__ import annotations

import logging
import sqlite3

import numpy as np
import pytest
import torch
from chat_server import Response, chat_server, told
from real_data import REAL_DATA, needs_real_data
from small_judges import LIMITS, TEMPLATE, use_server, write_model

from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.interaction.correction import check_corrector, make_corrector
from nbutils.interaction.judges import JudgeLimits
from nbutils.interaction.replies import FILE

PROMPTS = ["Once upon a time", "There was a girl ", "Once", "a girl", "style"]
COMPLETIONS = [" grades", "was", "", " there", " text"]
NOTHING = [""] * 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("chats"), TEMPLATE))


def test_the_human_teacher_gives_the_true_continuation_and_costs_nothing():
    found = make_corrector("human").correct(["a", "b"], ["x", "y"], [" true", " \n"], 0)
    assert found.texts == (" true", "")
    assert found.ok.tolist() == [True, False]
    assert found.ended.tolist() == [False, False]  # whether a reference was cut is for the caller to know
    assert found.words == 0


def test_a_model_repeats_itself_by_seed_round_and_text(base, tmp_path):
    def corrected(round=0, seed=5, folder="a", size=2, name=base):
        limits = JudgeLimits(batch_size=size)
        teacher = make_corrector(name, cache_folder=tmp_path / folder, limits=limits, seed=seed)
        return teacher.correct(PROMPTS, COMPLETIONS, NOTHING, round, max_tokens=8)

    first = corrected()
    assert first.texts == corrected(folder="b").texts == corrected().texts
    assert first.words == corrected().words == sum(len(text.split()) for text in first.texts)
    assert first.texts != corrected(round=1).texts
    assert first.texts != corrected(seed=6).texts
    assert all(first.texts[i] for i in range(5) if first.ok[i])
    assert len(set(first.texts)) > 3


def test_a_batch_that_is_kept_in_part_is_drawn_as_it_was(base, tmp_path):
    teacher = make_corrector(base, cache_folder=tmp_path, limits=LIMITS)
    first = teacher.correct(PROMPTS, COMPLETIONS, NOTHING, 0, max_tokens=8)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("DELETE FROM replies WHERE key = (SELECT max(key) FROM replies)")
    assert teacher.correct(PROMPTS, COMPLETIONS, NOTHING, 0, max_tokens=8).texts == first.texts


def test_a_model_ends_where_its_end_token_stands_and_the_cache_remembers(base, tmp_path):
    """What ended in 6 tokens says no more in 24; what did not goes on."""
    limits = JudgeLimits(batch_size=1)
    teacher = make_corrector(base, cache_folder=tmp_path, limits=limits, top_p=1.0)
    end = teacher.model.tokenizer.eos_token_id
    with torch.no_grad():
        weight = teacher.model.model.get_output_embeddings().weight
        weight[end] = 1.5 * weight.abs().max() * weight[end].sign()
    short, long = (teacher.correct(PROMPTS * 4, COMPLETIONS * 4, NOTHING * 4, 0, tokens) for tokens in (6, 24))
    assert short.ended.any() and not short.ended.all()
    goes_on = np.array([before != after for before, after in zip(short.texts, long.texts, strict=True)])
    assert not goes_on[short.ended].any() and long.ended[short.ended].all()
    assert goes_on[~short.ended].any() and long.ended[~short.ended & ~goes_on].all()  # the end token was the seventh
    kept = make_corrector(base, cache_folder=tmp_path, limits=limits, top_p=1.0)
    kept.write = None  # nobody is asked
    assert kept.correct(PROMPTS * 4, COMPLETIONS * 4, NOTHING * 4, 0, 6).ended.tolist() == short.ended.tolist()


def test_a_base_model_that_begins_another_text_has_ended(tmp_path):
    """Some learned a token that begins texts and none that ends them; in a chat it is the template's."""
    name = str(write_model(tmp_path / "model", TEMPLATE))
    teacher = make_corrector(name, cache_folder=tmp_path, limits=JudgeLimits(batch_size=1), top_p=1.0)
    model, tokenizer = teacher.model.model, teacher.model.tokenizer
    final, output = model.base_model.ln_f, model.get_output_embeddings().weight
    with torch.no_grad():  # it says anything at all, begins a text every other time, and never ends one
        output.zero_()
        final.weight[0], final.bias[0] = 0.0, 1.0
        output[tokenizer.bos_token_id, 0], output[tokenizer.eos_token_id, 0] = np.log(len(output)), -50.0
    told = PROMPTS * 4, COMPLETIONS * 4, NOTHING * 4, 0, 24
    chatted = teacher.correct(*told)
    tokenizer.chat_template = None
    written = teacher.correct(*told)
    assert not chatted.ended.any() and written.ended.all()
    assert np.mean([*map(len, written.texts)]) < np.mean([*map(len, chatted.texts)]) / 4


def test_a_kept_text_that_does_not_say_how_it_ended_is_asked_for_again(base, tmp_path):
    teacher = make_corrector(base, cache_folder=tmp_path, limits=LIMITS)
    first = teacher.correct(PROMPTS, COMPLETIONS, NOTHING, 0, max_tokens=8)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE replies SET reply = ?", ['{"text": "old", "raw": "old"}'])
    again = teacher.correct(PROMPTS, COMPLETIONS, NOTHING, 0, max_tokens=8)
    assert again.texts == first.texts and again.ended.tolist() == first.ended.tolist()


def test_a_base_model_sees_the_prompt_alone_and_an_instruct_model_what_to_correct(base, chats, tmp_path):
    texts = []
    for name in (base, chats):
        teacher = make_corrector(name, cache_folder=tmp_path, limits=LIMITS)
        asked = []
        sampled = teacher._sampled

        def noted(prompts, first, asked=asked, sampled=sampled):
            asked.extend(prompts)
            return sampled(prompts, first)

        teacher._sampled = noted
        texts.append(teacher.correct(["Once"], [" grades"], [""], 0, max_tokens=4))
        told = teacher.model.tokenizer.decode(asked[0])
        if name == base:
            assert told == "Once"
        else:
            assert told.startswith("<|begin|><|turn|>system\nYou are a writer")
            assert "Student Completion: grades" in told
            assert told.endswith("<|turn|>assistant\nPartial Text: Once\n Corrected Completion:")
            assert all(text.startswith(" ") for text in texts[-1].texts if text)


def test_a_teacher_that_diverged_corrects_nothing(base, tmp_path, caplog):
    teacher = make_corrector(base, cache_folder=tmp_path, limits=LIMITS)
    with torch.no_grad():
        teacher.model.model.get_output_embeddings().weight.fill_(float("nan"))
    found = teacher.correct(PROMPTS, COMPLETIONS, NOTHING, 0, max_tokens=4)
    assert not found.ok.any()
    assert found.texts == ("",) * 5
    assert found.words == 0
    assert "corrected all but 5 of 5 texts" in caplog.text


def test_a_prompt_too_long_is_cut_and_a_model_too_short_is_refused(tmp_path):
    teacher = make_corrector(str(write_model(tmp_path / "m", positions=64)), cache_folder=tmp_path, limits=LIMITS)
    assert len(teacher.correct(["start " * 200 + "Once"], [""], [""], 0, max_tokens=8).texts) == 1
    with pytest.raises(ModelError, match="64 positions, no room for a prompt and 64 tokens"):
        teacher.correct(["Once"], [""], [""], 0, max_tokens=64)


@needs_real_data
def test_a_published_model_writes_on_with_the_space_between(tmp_path):
    teacher = make_corrector(f"{REAL_DATA}/models/stories260k_llama", cache_folder=tmp_path, limits=LIMITS)
    found = teacher.correct(["Once upon a time, there was a"] * 3, [""] * 3, [""] * 3, 0, max_tokens=16)
    assert found.ok.all()
    assert all(text.startswith(" ") for text in found.texts)
    assert len(set(found.texts)) == 3


@pytest.fixture
def teacher_of(monkeypatch, tmp_path):
    """The correcting teacher of a server at `url`."""

    def made(url, limits=LIMITS):
        use_server(monkeypatch, url)
        return make_corrector("server", cache_folder=tmp_path / "cache", limits=limits, temperature=0.7, seed=1)

    return made


def test_a_server_is_told_what_the_template_says_and_kept_to_its_words(teacher_of):
    with chat_server(told("walked home.\n")) as server:
        found = teacher_of(server.url).correct(["Anna ", "Anna"], ["walk {prompt}", "go"], ["", ""], 2, max_tokens=30)
        again = teacher_of(server.url).correct(["Anna ", "Anna"], ["walk {prompt}", "go"], ["", ""], 2, max_tokens=30)
    assert found.texts == again.texts == ("walked home.", " walked home.")
    assert found.words == again.words == 4
    assert len(server.requests) == 2
    request = next(each for each in server.requests if "{prompt}" in each["messages"][2]["content"])
    assert [turn["role"] for turn in request["messages"]] == ["system", "user", "user", "user", "assistant"]
    assert request["messages"][-1]["content"] == "Partial Text: Anna\n Corrected Completion:"
    asked = (request["temperature"], request["top_p"], request["max_tokens"], request["continue_final_message"])
    assert asked == (0.7, 0.8, 30, True)
    assert server.requests[0]["seed"] != server.requests[1]["seed"]


def test_a_server_that_cannot_go_on_with_a_beginning_gets_none(teacher_of):
    def answer(request):
        if "continue_final_message" in request:
            return Response(status=422, body=b"unknown field: continue_final_message")
        return Response("went.")

    with chat_server(answer) as server:
        assert teacher_of(server.url).correct(["A"], ["b"], [""], 0).texts == (" went.",)
    assert server.requests[-1]["messages"][-1]["role"] == "user"
    assert "add_generation_prompt" not in server.requests[-1]


def test_a_server_says_what_ended_by_itself(teacher_of):
    replies = Response("went.", finish_reason="stop"), Response("went and", finish_reason="length"), "went"
    with chat_server(told(*replies)) as server:
        for _ in range(2):
            teacher = teacher_of(server.url, JudgeLimits(batch_size=1))
            found = teacher.correct(["p"] * 3, list("abc"), [""] * 3, 0)
            assert found.ok.all() and found.ended.tolist() == [True, False, False]
    assert len(server.requests) == 3


def test_what_fails_is_left_out(teacher_of, caplog):
    with chat_server(told(Response("  \n"), Response(None), Response(body=b"{"), "fine")) as server:
        teacher = teacher_of(server.url, JudgeLimits(batch_size=1, retries=0))
        found = teacher.correct(["p"] * 4, list("abcd"), [""] * 4, 0)
    assert found.ok.tolist() == [False, False, False, True]
    assert found.texts == ("", "", "", " fine")
    assert (found.words, found.not_asked) == (1, 0)
    assert "corrected all but 3 of 4 texts" in caplog.text


def test_the_budget_of_words_is_never_passed(teacher_of, caplog):
    with caplog.at_level(logging.WARNING), chat_server(told("one two three")) as server:
        teacher = teacher_of(server.url, JudgeLimits(batch_size=2, most_words=10))
        found = teacher.correct(["p"] * 6, list("abcdef"), [""] * 6, 0, max_tokens=4)
    assert found.ok.tolist() == [True, True, True, False, False, False]
    assert (found.words, found.not_asked) == (9, 3)
    assert "has spent its 10 words" in caplog.text


def test_a_server_that_writes_on_and_on_is_cut_and_paid_for_what_was_asked(teacher_of):
    with chat_server(told(Response("word  " * 100_000, finish_reason="stop"))) as server:
        teacher = teacher_of(server.url, JudgeLimits(batch_size=2, most_words=100))
        found = teacher.correct(["p"] * 2, ["a", "b"], [""] * 2, 0, max_tokens=4)
    assert found.texts == (" word  word  word  word",) * 2
    assert found.words == 8 and not found.ended.any()


def test_half_characters_of_a_server_reach_no_tokenizer(teacher_of):
    with chat_server(told("a\ud800b")) as server:
        for _ in range(2):  # asked and kept
            assert teacher_of(server.url).correct(["p"], ["a"], [""], 0).texts == (" a?b",)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"name": "humans"}, ModelError, "Did you mean 'human'?"),
        ({"name": "micro"}, ModelError, "is a configuration and has no weights"),
        ({"name": "server"}, ParameterError, "WORKBOOK_JUDGE_URL is not set"),
        ({"name": "human", "prompt": "corection"}, ParameterError, "Did you mean 'correction'?"),
        ({"name": "human", "temperature": 0}, ParameterError, "temperature of corrections is 0"),
        ({"name": "human", "top_p": 1.5}, ParameterError, "top_p of corrections is 1.5"),
    ],
)
def test_teachers_that_cannot_be_are_refused(monkeypatch, settings, kind, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("WORKBOOK_JUDGE_URL", raising=False)
    with pytest.raises(kind) as caught:
        make_corrector(**settings)
    assert message in str(caught.value)
    check_corrector("human")
