"""What an interaction may be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_interaction import settings
from small_judges import use_server, write_model

from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.interaction.checks import check_interaction
from nbutils.interaction.settings import Interaction

# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "simp"}, "method is 'simp'. Did you mean 'simpo'"),
        ({"prompts": "storys"}, "prompts is 'storys'. Did you mean 'story'"),
        ({"rounds": 0}, "rounds is 0; give a whole number, at least 1."),
        ({"sft_passes": -1}, "sft_passes is -1; give a whole number, at least 0."),
        ({"gamma": -0.1}, "gamma is -0.1; give a number of at least 0."),
        ({"kl_stop": float("nan")}, "kl_stop is nan; give a number of at least 0."),
        ({"clip": 0.0}, "clip is 0.0; give a number above 0."),
        ({"beta": float("inf")}, "beta is inf; give a number above 0."),
        ({"min_response_tokens": 33}, "min_response_tokens is 33; give a number from 0 to response_tokens, 32."),
        ({"min_response_tokens": -1}, "min_response_tokens is -1; give a number from 0"),
        (
            {"method": "ppo", "top_p": 1.0, "min_response_tokens": 4},
            "method ppo weighs each token by the probability it was sampled with, and with min_response_tokens 4 that "
            "is not the model's. Set min_response_tokens to 0.",
        ),
        ({"top_p": 1.5}, "top_p is 1.5; it lies above 0 and is at most 1."),
        ({"trace": 0.0}, "trace is 0.0; it lies above 0 and is at most 1."),
        (
            {"method": "simpo_judge"},
            "method simpo_judge compares samples of one prompt. Set samples_per_prompt to 2 or more.",
        ),
        (
            {"method": "rloo", "passes": 1},
            "method rloo compares samples of one prompt. Set samples_per_prompt to 2 or more.",
        ),
        (
            {"method": "sft", "samples_per_prompt": 2},
            "method sft takes one sample of a prompt. Set samples_per_prompt to 1.",
        ),
        (
            {"method": "sft", "prompts": "story"},
            "method sft needs human text after its prompts, and the story prompt has none. Set prompts to contexts.",
        ),
        (
            {"method": "ppo", "top_p": 0.8},
            "method ppo weighs each token by the probability it was sampled with, and with top_p 0.8 that is not the "
            "model's. Set top_p to 1.",
        ),
        (
            {"method": "rloo", "samples_per_prompt": 2, "passes": 1, "top_p": 1.0, "temperature": 0.7},
            "Set temperature to 1.",
        ),
        (
            {"method": "rloo", "samples_per_prompt": 2, "top_p": 1.0, "passes": 2},
            "method rloo learns from samples of the policy as it is; after a pass over them they are another's. "
            "Set passes, which is 2, to 1.",
        ),
        (
            {"method": "ppo", "top_p": 1.0, "prompts_per_round": 64, "kl_horizon": 12},
            "kl_horizon 12 is too short for rounds of 64 samples: one round could take the whole price of KL away. "
            "Set it above 12.8.",
        ),
    ],
)
def test_settings_that_cannot_be_say_so(changes, message):
    with pytest.raises(ParameterError) as caught:
        Interaction(**changes).check()
    assert message in str(caught.value)


PARAMS = {"method": "simpo", "judge": "rule", "second_judge": "rule_plain", "rubric": "weekly"}
PARAMS |= {"correcting_teacher": "human", "start_model": "", "model_name": "micro"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"method": "ppo", "judge": "none", "top_p": 1.0},
            "method ppo learns from scores, and judge is 'none'. Name one, as rule.",
        ),
        ({"judge": "ruled"}, "ruled"),
        ({"rubric": "weakly"}, "weakly"),
        ({"correcting_teacher": "humans"}, "humans"),
        (
            {"method": "three_way"},
            "method three_way prefers human text to corrections, and correcting_teacher is human. Name a model or a "
            "server as correcting_teacher, or set method to simpo.",
        ),
        (
            {"prompt_tokens": 9, "response_tokens": 8},
            "prompt_tokens 9 and response_tokens 8 are together longer than the blocks of 16 tokens they are taken "
            "from. Lower one, or prepare longer blocks.",
        ),
        (
            {"prompt_tokens": 8, "response_tokens": 8},
            "prompt_tokens 8 and response_tokens 8, with an end token before, are longer than the 16 "
            "positions of the model. Lower one, or take a model with more positions",
        ),
    ],
)
def test_what_a_variant_cannot_be_is_told_before_it_starts(changes, message):
    with pytest.raises((ParameterError, ModelError)) as caught:
        check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 6, **changes}, block_size=16)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"correcting_teacher": "{}"}, "positions of correcting_teacher '{}'. Lower one"),
        ({"judge": "{}", "method": "simpo_judge", "samples_per_prompt": 2}, "64 positions of judge '{}'. Lower one"),
        ({"second_judge": "{}"}, "with an end token before, are longer than the 64 positions of second_judge '{}'."),
        (
            {"judge": "{}", "method": "ppo", "prompts": "story", "top_p": 1.0},
            "response_tokens 60, with an end token before, are longer than the 64 positions of judge '{}'.",
        ),
    ],
)
def test_a_judge_or_teacher_with_too_few_positions_is_told_before_it_starts(short, changes, message):
    given = {**PARAMS, "prompt_tokens": 4, "response_tokens": 60, **changes}
    given = {name: short if value == "{}" else value for name, value in given.items()}
    with pytest.raises(ParameterError) as caught:
        check_interaction(given)
    assert message.format(short) in str(caught.value)
    if given.get("prompts") != "story":
        check_interaction({**given, "prompt_tokens": 3})


@pytest.mark.parametrize(
    "changes, role",
    [
        ({"correcting_teacher": "{}"}, "correcting_teacher"),
        ({"method": "simpo_judge", "samples_per_prompt": 2, "judge": "{}"}, "judge"),
        ({"method": "simpo_judge", "samples_per_prompt": 2, "judge": "rule", "second_judge": "rule"}, "judge"),
        ({"correcting_teacher": "server", "second_judge": "server"}, "correcting_teacher"),
        ({"correcting_teacher": "server", "second_judge": "{}"}, "correcting_teacher"),  # in memory the same model
    ],
)
def test_a_judge_that_teaches_holds_nothing_out(short, monkeypatch, changes, role):
    use_server(monkeypatch, "http://127.0.0.1:9/v1", model=str(Path(short).resolve()))
    other = f"{short}/../{Path(short).name}"  # the same folder by another name
    given = {**PARAMS, "prompt_tokens": 4, "response_tokens": 8, "second_judge": other, **changes}
    given = {name: short if value == "{}" else value for name, value in given.items()}
    with pytest.raises(ParameterError, match=f"is to hold out, and method {given['method']} learns from it as {role}."):
        check_interaction(given)
    check_interaction({**given, "second_judge": "rule_plain"})
    if role == "correcting_teacher":  # which text alone has none of
        check_interaction({**given, "method": "text"})


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> str:
    """A model with 64 positions."""
    return str(write_model(tmp_path_factory.mktemp("short"), positions=64))


def test_what_may_be_is_not_refused():
    check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 6}, block_size=16)
    check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 8, "start_model": "x"}, block_size=16)
    check_interaction({**PARAMS, "method": "simpo_judge", "correcting_teacher": "none", "samples_per_prompt": 2})
    made_later = {name: value for name, value in PARAMS.items() if name not in ("judge", "correcting_teacher")}
    check_interaction({**made_later, "method": "three_way"})
    with pytest.raises(ParameterError, match="Set samples_per_prompt"):
        check_interaction({**made_later, "samples_per_prompt": 2})
    settings("ppo", prompts="story").check_lengths(16, positions=5 + 8, story_tokens=5)
    with pytest.raises(ParameterError, match=r"The story prompt's 5 tokens and response_tokens 8, with an end token"):
        settings("ppo", prompts="story").check_lengths(16, positions=5 + 7, story_tokens=5)
