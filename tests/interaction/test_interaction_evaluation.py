"""What is measured of the student that an interaction leaves: the same for every arm."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_many import write_data
from small_interaction import WANTED, ToyJudge, ToyTeacher, configuration, settings, share, student, trained
from small_judges import write_model

from nbutils.data.preparation import load_data
from nbutils.interaction import training
from nbutils.interaction.correction import make_corrector
from nbutils.interaction.evaluation import held_out_samples, judge_student
from nbutils.interaction.judges import Judged, JudgeLimits
from nbutils.interaction.prompts import read_story
from nbutils.interaction.training import judge_of, starting_model
from nbutils.models.loading import load_trained


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def data(data_folder):
    return load_data(data_folder)


def judged_by(monkeypatch, **judges):
    monkeypatch.setattr(training, "make_judge", lambda name, *given, **named: judges[name])


def test_numbers_of_both_judges_by_hand(data_folder, data, tmp_path, monkeypatch):
    config = configuration(data_folder, tmp_path, settings("simpo"), judge="first")
    first, second = ToyJudge(fails=lambda call, index: index == 1), ToyJudge("klm")
    judged_by(monkeypatch, first=first, second=second)
    torch.manual_seed(config.seed)
    model = starting_model(config, data)
    numbers, records = judge_student(config, model, data, "second", number=4)
    prompts, texts = first.asked[0]
    assert second.asked == first.asked and len(first.asked) == 1 and len(texts) == 4
    shares = [share(text, set(WANTED)) for text in texts]
    known = [shares[i] for i in (0, 2, 3)]
    others = [share(text, set("klm")) for text in texts]
    assert numbers["test_judge_score"] == numbers["test_judge_wanted"] == pytest.approx(np.mean(known))
    assert numbers["test_judge_failures"] == 1 and numbers["test_second_judge_failures"] == 0
    assert numbers["test_second_judge_score"] == pytest.approx(np.mean(others))
    assert numbers["test_response_words"] == np.mean([len(text.split()) for text in texts])
    assert numbers["kl_to_start"] == 0  # nothing has been learned
    if "judges_agreement" in numbers:
        assert numbers["judges_agreement_samples"] == 3
    assert [each["judge"] for each in records] == [shares[0], None, *shares[2:]]
    assert [each["second_judge"] for each in records] == others
    assert [each["completion"] for each in records] == texts and [each["prompt"] for each in records] == prompts
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3)
    moved, _ = judge_student(config, model, data, "none", number=4)
    assert abs(moved["kl_to_start"]) > 1e-3 and "test_second_judge_score" not in moved


def test_a_judge_that_fails_on_everything_gives_no_score(data_folder, data, tmp_path, monkeypatch):
    config = configuration(data_folder, tmp_path, settings("simpo"), judge="first")
    judged_by(monkeypatch, first=ToyJudge(fails=lambda call, index: True))
    numbers, records = judge_student(config, student(data), data, "none", number=3)
    assert numbers["test_judge_failures"] == 3
    assert not {"test_judge_score", "test_judge_wanted"} & numbers.keys()
    assert {each["judge"] for each in records} == {None}
    assert judge_student(config, student(data), data, "none", number=0) == ({}, [])


def test_a_judge_that_nobody_asked_has_no_rate_of_failures(data_folder, tmp_path):
    config = configuration(data_folder, tmp_path / "text", settings("text", rounds=1), judge="rule")
    assert "judge_failure_rate" not in trained(config)
    config = configuration(data_folder, tmp_path / "sft", settings("sft", rounds=1), judge="rule")
    assert trained(config, teacher=ToyTeacher(" abc"))["judge_failure_rate"] == 0


def test_a_student_that_diverged_is_not_judged(data_folder, data, tmp_path, monkeypatch, caplog):
    judged_by(monkeypatch, rule=None)
    model = student(data)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    config = configuration(data_folder, tmp_path, settings("simpo"))
    assert judge_student(config, model, data, "rule", number=3) == ({}, [])
    assert "The student is not judged. The student's logits are not finite" in caplog.text


def test_every_arm_is_asked_the_same_with_the_same_draws(data_folder, data, tmp_path):
    model, given = student(data), []
    for method, seed, top_p in (("text", 1, 0.5), ("simpo", 2, 0.8), ("ppo", 1, 1.0)):
        config = configuration(data_folder, tmp_path, settings(method, top_p=top_p), seed=seed)
        rollouts = held_out_samples(config, model, data, 5, "test")
        given.append([(each.prompt.tolist(), each.response.tolist()) for each in rollouts])
    assert given[0] == given[1] == given[2]
    assert len({tuple(prompt) for prompt, _ in given[0]}) > 1
    assert all(len(prompt) == 8 and prompt[0] == data.tokenizer.eos_token_id for prompt, _ in given[0])
    assert max(len(response) for _, response in given[0]) == 8  # the other half of a block of 16


def test_every_arm_is_asked_for_stories_and_contexts_by_the_same_rubrics(data_folder, data, tmp_path, monkeypatch):
    """Whatever an arm learned from and however long its responses were; with no budget of words or seconds."""
    model, asked, scored = student(data, positions=192), [], []

    def make(name, rubric, cache, limits, *others):
        asked.append((name, rubric, limits, *others[2:]))
        return ToyJudge()

    monkeypatch.setattr(training, "make_judge", make)
    limits, none = JudgeLimits(7, most_words=1, most_seconds=1e-9), JudgeLimits(7)
    for method, changes in (("text", {}), ("ppo", {"prompts": "story", "response_tokens": 5, "length_weight": 0.3})):
        given = settings(method, **changes)
        rubric = {"rubric": given.prompts.replace("contexts", "weekly")}
        config = configuration(data_folder, tmp_path, given, judge="rule", judge_limits=limits, **rubric)
        numbers, records = judge_student(config, model, data, "other", number=3, stories=4)
        scored.append(({n: v for n, v in numbers.items() if n != "kl_to_start"}, records))
    assert scored[0] == scored[1]
    assert asked[:4] == asked[4:]
    assert [each[:3] for each in asked[:4]] == [
        ("rule", "weekly", none), ("rule", "story", none), ("other", "weekly", none), ("other", "story", none),
    ]  # fmt: skip
    assert 0 < asked[0][3] < asked[1][3]  # the length that a judge of rules expects is that of what was asked
    numbers, records = scored[0]
    assert [each["prompts"] for each in records] == ["contexts"] * 3 + ["story"] * 4
    assert {each["prompt"] for each in records[3:]} == {read_story().prompt}
    assert len({each["completion"] for each in records[3:]}) == 4
    stories = [each["judge"] for each in records[3:]]
    assert numbers["test_story_judge_score"] == pytest.approx(np.mean(stories)) != numbers["test_judge_score"]
    assert numbers["test_story_second_judge_failures"] == numbers["test_story_second_judge_not_asked"] == 0
    assert numbers["test_story_response_words"] > numbers["test_response_words"]


def test_stories_that_do_not_fit_a_model_are_left_out_and_told(data_folder, data, tmp_path, monkeypatch, caplog):
    judged_by(monkeypatch, first=ToyJudge())
    config = configuration(data_folder, tmp_path, settings("simpo"), judge="first")
    numbers, _ = judge_student(config, student(data, positions=16), data, number=2, stories=2)
    assert "test_judge_score" in numbers and "test_story_judge_score" not in numbers
    assert "No stories are judged: the model's 16 positions do not hold their prompt." in caplog.text


def test_the_length_that_a_story_is_judged_by_is_one_that_the_model_can_write(data_folder, data, tmp_path, monkeypatch):
    expected = []
    monkeypatch.setattr(training, "make_judge", lambda *given: expected.append(given[-1]) or ToyJudge())
    config = configuration(data_folder, tmp_path, settings("simpo"), judge="rule")
    prompt = len(data.tokenizer(read_story().prompt)["input_ids"]) + 1  # and the end token before it
    for positions in (prompt + 30, prompt + 60, prompt + 90, prompt + 120):
        judge_student(config, student(data, positions=positions), data, number=0, stories=1)
    assert expected[0] > 1 and expected[2] == expected[3]  # 90 tokens are what the story prompt asks for
    assert expected[:3] == pytest.approx([expected[2] / 3, expected[2] * 2 / 3, expected[2]], abs=1)


def test_what_nobody_asked_is_no_failure_and_the_mass_on_numbers_is_told(data_folder, data, tmp_path, monkeypatch):
    nothing = np.full(3, np.nan)
    mass = np.array([0.9, 0.05, np.nan])
    judge = ToyJudge()
    told = Judged(
        np.array([0.5, np.nan, np.nan]), np.array([True, False, False]), ("",) * 3, {"a": nothing}, 1, 1, mass
    )
    monkeypatch.setattr(judge, "score", lambda prompts, completions: told)
    judged_by(monkeypatch, first=judge)
    config = configuration(data_folder, tmp_path, settings("simpo"), judge="first")
    numbers, _ = judge_student(config, student(data), data, number=3)
    assert numbers["test_judge_failures"] == numbers["test_judge_not_asked"] == 1
    assert numbers["test_judge_score"] == 0.5
    assert numbers["test_judge_number_mass"] == pytest.approx(0.475)


def test_a_judge_s_model_is_in_memory_once_and_only_while_it_is_asked(data_folder, data, tmp_path, monkeypatch):
    """For both rubrics, and for corrections too; the second judge is loaded when the first one has gone."""
    folders = [write_model(tmp_path / name, positions=size) for name, size in (("one", 1024), ("two", 512))]
    loaded, memory = [], []

    def load(source, precision):
        alive = [each() for each in memory]
        loaded.append((Path(source).name, sum(each is not None for each in alive)))
        model = load_trained(source, precision)
        memory.append(weakref.ref(model))
        return model

    monkeypatch.setattr("nbutils.models.load_trained", load)
    limits = JudgeLimits(most_seconds=1e-9, least_number_mass=0.0)  # no seconds to judge in while it learned
    named = {"judge": str(folders[0]), "judge_limits": limits}
    config = configuration(data_folder, tmp_path / "run", settings("simpo"), **named)
    corrector = make_corrector(str(folders[0]), cache_folder=tmp_path / "cache")
    corrector.correct(["Once"], [" a"], [""], 0, max_tokens=2)
    judge = judge_of(replace(config, judge_limits=replace(limits, most_seconds=0.0)), data, str(folders[0]))
    assert judge.model is corrector.model and judge.score(["Once"], [" a"]).ok.all()
    assert loaded == [("one", 0)]
    numbers, _ = judge_student(config, student(data, positions=192), data, str(folders[1]), number=2, stories=2)
    assert {"test_judge_score", "test_second_judge_score", "test_story_second_judge_score"} <= numbers.keys()
    assert loaded == [("one", 0), ("one", 0), ("two", 0)]
    assert [each() for each in memory] == [None] * 3
    kinds = [f"{kind}{role}" for kind in ("", "story_") for role in ("judge", "second_judge")]
    assert all(numbers[f"test_{kind}_not_asked"] == numbers[f"test_{kind}_failures"] == 0 for kind in kinds)
    assert 0 < numbers["test_judge_number_mass"] < 1


def test_only_a_judge_of_rules_looks_at_the_text(data_folder, data, tmp_path, monkeypatch):
    judged_by(monkeypatch, other=ToyJudge())
    monkeypatch.setattr(training, "plain_rows", lambda data: pytest.fail("nobody needs the text"))
    config = configuration(data_folder, tmp_path, settings("simpo"))
    assert judge_of(config, data, "other") is not None
