"""Prompts as files, and what is read from the replies to them."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from small_judges import ASPECTS

from nbutils.foundation.errors import ParameterError
from nbutils.interaction import prompts
from nbutils.interaction.judges import check_judge
from nbutils.interaction.judges.server_judge import expected_grades, parse_grades
from nbutils.interaction.prompts import read_correction, read_rubric, read_story, rubric_names


def test_the_prompts_of_the_project_say_what_they_are_to_say():
    assert rubric_names() == ["story", "weekly"]
    weekly, story = read_rubric("weekly"), read_rubric("story")
    assert [(each.name, each.low, each.high) for each in weekly.aspects] == [
        (name, 0, 10) for name in ("coherence", "repetition", "instruction_following", "style")
    ]
    assert [(each.name, each.low, each.high) for each in story.aspects] == [
        (name, 0, 3) for name in ("narrative_coherence", "creativity", "grammar", "non_repetition")
    ]
    assert (read_story().max_new_tokens, read_story().length_weight) == (90, 0.4)
    assert read_story().prompt.endswith("in a faraway land,")
    turns = read_correction().messages("Anna", "walk")
    assert [turn["role"] for turn in turns] == ["system", "user", "user", "user", "assistant"]
    assert turns[-1]["content"] == "Partial Text: Anna\n Corrected Completion:"


def test_braces_in_texts_are_data():
    rubric = read_rubric("weekly")
    text = rubric.messages("{completion} {0} {name!r}", "{prompt} %s {")[1]["content"]
    assert "{completion} {0} {name!r}" in text
    assert "{prompt} %s {" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("system:", "sytem:"), "has the key 'sytem'. Did you mean 'system'?"),
        (("{completion}", "it"), "needs {completion} in user, the place where the completion goes."),
        (("{prompt}", "{prompt} {reference}"), "has {reference} in user, which nothing fills."),
        (("name: style, low", "low"), "Give each aspect name, low and high, and nothing else."),
        (("style, low: 0", "style, low: 10"), "grades style from 10 to 10. Give whole numbers"),
        (("style, low: 0", "style, low: 0.5"), "grades style from 0.5 to 10."),
        (("{name: style", "{name: coherence"), "names an aspect twice."),
        (("{name: style", "{name: manners"), "grades 'manners', which user does not ask for."),
        (("plain: |", "plain: 3\nother: |"), "has the key 'other'."),
        (("name: weekly", "name: 7"), "has name 7. Give a text."),
        (("name: weekly", "name: weekly\nname: b"), "'name' stands here a second time"),
        (("system: >-", "system: ["), "is not YAML"),
    ],
)
def test_a_rubric_with_a_mistake_is_refused_with_its_file_and_its_cure(tmp_path, change, message):
    text = (prompts.FOLDER / "judge-weekly.yaml").read_text()
    assert change[0] in text
    (tmp_path / "judge-weekly.yaml").write_text(text.replace(*change))
    with pytest.raises(ParameterError) as caught:
        read_rubric("weekly", tmp_path)
    assert message in str(caught.value)
    assert "judge-weekly.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("correction", ("user:", "user: Tell me.\nother:"), "has the key 'other'"),
        ("correction", ('- "Partial Text: {prompt}"', "- Go on."), "needs {prompt} in user"),
        (
            "correction",
            ("{prompt}\\n Corrected", "{promt}\\n Corrected"),
            "has {promt} in prefill, which nothing fills",
        ),
        ("story", ("90", "0"), "has max_new_tokens 0. Give a whole number of at least 1."),
        ("story", ("0.4", "-1"), "has length_weight -1. Give a number of at least 0."),
        ("story", ("0.4", ".nan"), "has length_weight nan."),
        ("story", ("faraway land", "{land}"), "has {land} in prompt, which nothing fills. Fields of prompt: none."),
        ("story", ("length_weight:", "#"), "lacks length_weight. Add it."),
    ],
)
def test_mistakes_in_the_other_prompts_are_named(tmp_path, file, change, message):
    text = (prompts.FOLDER / f"{file}.yaml").read_text()
    assert change[0] in text
    head, _, tail = text.rpartition("\nname:")  # comments stay as they are
    (tmp_path / f"{file}.yaml").write_text(head + "\nname:" + tail.replace(*change))
    with pytest.raises(ParameterError) as caught:
        {"correction": read_correction, "story": read_story}[file](file, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["weakly", "../secret", "", "a/b", "weekly.yaml"])
def test_a_rubric_that_does_not_exist_is_refused(name):
    with pytest.raises(ParameterError, match="rubric is"):
        check_judge("rule", name)


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("coherence: 7\ninstruction_following: 10", (7, 10)),
        ("Coherence:7,\n Instruction Following:\t0 \n\n", (7, 0)),
        ("7 10", (7, 10)),
        ("7, 10", (7, 10)),
        ("7\n10\n", (7, 10)),
        ("710", None),
        ("7", None),
        ("7 10 3", None),
        ("1 2 3 4", None),
        ("", None),
        ("none", None),
        ("7 11", None),
        ("-7 10", None),
        ("7.5 10", None),
        ("7/10 10/10", None),
        ("07 10", None),
        ("٧ 9", None),
        ("7 and 10", None),
        ("coherence: 7 (of 10)\ninstruction_following: 10", None),
        ("instruction_following: 10\ncoherence: 7", None),
        ("coherence: 7\ncoherence: 7\ninstruction_following: 10", None),
        ("Sure! coherence: 7\ninstruction_following: 10", None),
        ("7 10\x00", None),
        ("9" * 5000 + " 1", None),
        ("7" * 10_000_000, None),
        (" " * 10_000_000 + "7 10", None),
        ("7 " * 300, None),
    ],
)
def test_exactly_the_grades_that_were_asked_for_or_none(reply, grades):
    assert parse_grades(reply, ASPECTS) == grades


def test_no_text_breaks_the_parser_or_takes_it_long():
    generator = random.Random(3)
    parts = ["coherence", ":", "7", "10", " ", "\n", ",", "instruction_following", "\t", "\u202e", "\ud800", "-", "0"]
    start = time.monotonic()
    for _ in range(3000):
        reply = "".join(generator.choices(parts, k=generator.randint(0, 40)))
        grades = parse_grades(reply, ASPECTS)
        assert grades is None or all(0 <= grade <= 10 for grade in grades)
    for nasty in ("coherence:" + " \n" * 290, "7" + " " * 590, " ,;\n" * 140, "7 " + "\n ," * 190):
        parse_grades(nasty, ASPECTS)
    assert time.monotonic() - start < 5


def told(*pieces, **alternatives):
    """Tokens as a server tells of them; alternatives by place: {token: probability}."""
    tokens = [{"token": piece, "logprob": -0.1, "top_logprobs": []} for piece in pieces]
    for place, each in alternatives.items():
        index = int(place.removeprefix("at_"))
        tokens[index]["top_logprobs"] = [{"token": t, "logprob": float(np.log(p))} for t, p in each.items()]
    return tokens


def test_grades_of_a_server_are_expected_values_where_it_tells_probabilities():
    tokens = told("7", " ", "9", at_0={"7": 0.5, "3": 0.25, "x": 0.2, "11": 0.05}, at_2={"9": 0.6, "10": 0.2, "1": 0.2})
    assert expected_grades("7 9", tokens, ASPECTS) == pytest.approx((17 / 3, 7.6))
    assert expected_grades("7 9", told("7", " 9", at_1={" 9": 0.4, "8": 0.4}), ASPECTS) == pytest.approx((7, 8.5))


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        "7 9",
        [3],
        told("7", " 10"),  # another text
        told("7", " ", "9", at_2={"9": 0.6, "1": 0.4}),  # may be half of a 10
        [{"token": "7"}, {"token": " 9", "top_logprobs": [{"token": "9", "logprob": None}]}],
        [{"token": "7"}, {"token": " 9", "top_logprobs": [{"token": "9", "logprob": float("nan")}]}],
        [{"token": "7"}, {"token": " 9", "top_logprobs": [{"token": "9", "logprob": float("-inf")}]}],
        [{"token": "7"}, {"token": " 9", "top_logprobs": {"9": 1}}],
    ],
)
def test_probabilities_that_cannot_be_believed_leave_the_grades_as_written(tokens):
    assert expected_grades("7 9", tokens, ASPECTS) == (7.0, 9.0)


def test_probabilities_save_no_reply_that_cannot_be_read():
    assert expected_grades("7 or 9", told("7", " or", " 9", at_0={"7": 1.0}), ASPECTS) is None
