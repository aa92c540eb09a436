"""A student that is distilled in rounds: on what text alone reads, towards its teacher, and never by a teacher's hand.

The loss and its gradients are compared with a textbook form in test_interaction_policy.py.
"""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_many import write_data
from safetensors.torch import load_file
from small_interaction import (
    configuration,
    left_behind,
    metrics_of,
    rounds_of,
    saved_teacher,
    settings,
    student,
    trained,
)
from small_judges import write_model

from nbutils.data.preparation import load_data
from nbutils.foundation.errors import ModelError, ParameterError, Preempted, RunError
from nbutils.interaction import examples, training
from nbutils.interaction.checks import check_interaction
from nbutils.interaction.training import InteractionConfig
from nbutils.models.loading import load_model, load_trained
from nbutils.models.teachers import LiveTeacher
from nbutils.objectives import smoothing
from nbutils.training.launching import launch
from nbutils.training.rows import plain_rows
from nbutils.training.tracking import Progress
from nbutils.training.trainer import TrainingConfig, train

WORDS = ("human_words", "student_words", "teacher_words", "tokens_seen")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def examples_of(config: InteractionConfig) -> tuple[list[list[dict]], dict]:
    """What the run learned from, round by round, and its numbers."""
    seen, write = [], examples.write_round

    def noted(file, number, made):
        seen.append(made)
        return write(file, number, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "write_round", noted)
        numbers = trained(config)
    return seen, numbers


# ---- beside text alone -----------------------------------------------------------------------------------------------


def test_it_reads_what_text_alone_reads_and_without_a_teachers_weight_it_is_text_alone(data, tmp_path):
    given = {"dropout": 0.2, "eval_steps": 2, "learning_rate": 3e-3}
    made = {
        name: configuration(data, tmp_path / name, settings(method, rounds=3, **changes), **given)
        for name, method, changes in (
            ("text", "text", {}),
            ("nothing", "distill", {"kd_weight": 0.0}),
            ("half", "distill", {"kd_weight": 0.5}),
        )
    }
    read = {name: examples_of(config) for name, config in made.items()}
    (rounds, numbers), (others, other_numbers) = read["text"], read["half"]
    for one, other in zip(rounds, others, strict=True):
        for each, same in zip(one, other, strict=True):
            assert each.keys() == same.keys() and all(np.array_equal(each[name], same[name]) for name in each)
    assert {name: numbers[name] for name in WORDS} == {name: other_numbers[name] for name in WORDS}
    assert other_numbers["teacher_words"] == other_numbers["student_words"] == 0 < other_numbers["human_words"]
    columns = ("round", "step", "examples", *WORDS[:3])
    assert rounds_of(tmp_path / "half", *columns) == rounds_of(tmp_path / "text", *columns)

    found = {name: weights(tmp_path / name) for name in made}
    for name, weight in found["text"].items():
        assert torch.equal(weight, found["nothing"][name]), name
        assert name.endswith("bias") or not torch.equal(weight, found["half"][name]), name
    assert [row["loss"] for row in metrics_of(tmp_path / "text")] == [
        row["loss"] for row in metrics_of(tmp_path / "nothing")
    ]
    for row in metrics_of(tmp_path / "half"):
        ce, kl, loss = (float(row[name]) for name in ("ce_loss", "kl_loss", "loss"))
        assert kl > 0 and loss == pytest.approx(0.5 * ce + 0.5 * kl, rel=1e-3)


def divergence(run: Path, teacher: Path, data: Path) -> float:
    """Mean KL(teacher || student) over the next tokens of the validation blocks, nats, by full logits."""
    rows = plain_rows(load_data(data))["validation"]
    ids = torch.stack([torch.as_tensor(rows[i]["input_ids"]) for i in range(len(rows))])
    with torch.no_grad():
        t, p = (load_trained(each)(ids).logits[:, :-1].double().log_softmax(-1) for each in (teacher, run / "model"))
    return float((t.exp() * (t - p)).sum(-1).mean())


def test_the_student_comes_nearer_to_its_teacher_than_text_alone(data, tmp_path):
    """To a run that was trained for longer, on the same text and words, on text that it did not see."""
    teacher = tmp_path / "teacher"
    small = {"model_name": "micro", "dropout": 0.0, "max_steps": 100, "learning_rate": 3e-3, "audit_blocks": 0}
    train(TrainingConfig(data, teacher, smoothing(None), **small))
    found = {}
    for method in ("text", "distill"):
        given = settings(method, rounds=6, prompts_per_round=16, kd_weight=0.8, kd_temperature=1.0)
        config = configuration(data, tmp_path / method, given, learning_rate=4e-3)
        trained(replace(config, distilling_teacher=str(teacher)))
        found[method] = divergence(tmp_path / method, teacher / "model_best", data)
    assert found["distill"] < 0.8 * found["text"], found
    kl = [float(row["kl_loss"]) for row in metrics_of(tmp_path / "distill")]
    assert np.mean(kl[-8:]) < 0.8 * np.mean(kl[:8])


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_is_asked_in_training_alone_and_leaves_nothing_behind(data, tmp_path, monkeypatch):
    """Not by evaluations, one at every step; nothing in checkpoints; nothing in memory once it has taught."""
    made, asked = [], []
    load, target = training.distilling_teacher, LiveTeacher.target

    def loaded(*given):
        teacher = load(*given)
        made.append(weakref.ref(teacher))
        return teacher

    def told(self, ids, stored):
        asked.append(torch.is_grad_enabled())
        assert not any(each.requires_grad for model in self.models for each in model.parameters())
        assert not any(model.training for model in self.models)
        return target(self, ids, stored)

    monkeypatch.setattr(training, "distilling_teacher", loaded)
    monkeypatch.setattr(LiveTeacher, "target", told)
    changes = {"eval_steps": 1, "checkpoint_steps": 2, "checkpoints_kept": 9}
    config = configuration(data, tmp_path, settings("distill", rounds=1, passes=2), **changes)
    before = {
        name: each.clone() for name, each in load_file(Path(config.distilling_teacher) / "model.safetensors").items()
    }
    gc.disable()  # a trainer is in cycles: what it held would stay until they are looked for
    try:
        numbers = trained(config)
    finally:
        gc.enable()
    assert numbers["steps"] == 3 and asked == [False] * 3  # six examples twice, in batches of four
    assert len(made) == 1 and made[0]() is None
    saved = load_file(tmp_path / "checkpoints" / "step-2" / "model.safetensors")
    assert {name.removeprefix("model.") for name in saved} == weights(tmp_path).keys()
    after = load_file(Path(config.distilling_teacher) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_methods_load_no_teacher(data, tmp_path, monkeypatch):
    """A plan may name one for all arms of a stage."""
    monkeypatch.setattr(LiveTeacher, "models", property(lambda self: pytest.fail("loaded")))
    trained(configuration(data, tmp_path, settings("text", rounds=1), distilling_teacher=saved_teacher(data)))


def test_a_teacher_with_another_vocabulary_is_refused_before_anything_is_trained(data, tmp_path):
    teacher = write_model(tmp_path / "other")
    config = configuration(data, tmp_path / "run", settings("distill"), distilling_teacher=str(teacher))
    with pytest.raises(ModelError, match=r"The teacher cannot be used\. .*as many tokens, but other ones"):
        trained(config)
    assert not (config.run_folder / "metrics.csv").exists()


def test_a_teacher_that_never_ends_a_text_is_told_of(data, tmp_path, caplog):
    prepared, folder = load_data(data), tmp_path / "teacher"
    tokenizer, rows, given = prepared.tokenizer, plain_rows(prepared)["train"], settings("distill")
    model = load_model("micro", tokenizer, 16, from_scratch=True, dropout=0.0)
    final, output = model.base_model.ln_f, model.get_output_embeddings().weight.data
    for logit, told in ((0.0, 0), (-40.0, 1)):  # the end token's, by the first dimension, which is 1 everywhere
        final.weight.data[0], final.bias.data[0], output[:, 0] = 0.0, 1.0, 0.0
        output[tokenizer.eos_token_id] = 0.0
        output[tokenizer.eos_token_id, 0] = logit
        model.save_pretrained(folder)
        training.distilling_teacher(given, str(folder), tokenizer, rows)
        assert len(caplog.records) == told
    message = caplog.records[0].getMessage()
    assert "gives the end token <|endoftext|> a probability of " in message and "or lower kd_weight" in message


PARAMS = {"method": "distill", "judge": "rule", "second_judge": "rule_plain", "rubric": "weekly"}
PARAMS |= {"correcting_teacher": "human", "start_model": "", "model_name": "micro"}
FROM = "method distill learns from a teacher's distribution, and distilling_teacher is "
NAME = "Name a run of 02_teacher_finetune or of another training, a model folder or a Hub name as distilling_teacher."


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distilling_teacher": ""}, f"{FROM}empty. {NAME}"),
        ({"distilling_teacher": "human"}, f"{FROM}'human', who gives words alone. {NAME}"),
        ({"distilling_teacher": "server"}, f"{FROM}'server', who gives words alone. {NAME}"),
        ({"distilling_teacher": "tiny"}, "teacher 'tiny' is a configuration and has no weights."),
        (
            {"prompt_tokens": 8, "response_tokens": 8},
            "prompt_tokens 8 and response_tokens 8, with an end token before, are longer than the 16 positions of "
            "distilling_teacher '",
        ),
        ({"samples_per_prompt": 2}, "method distill takes one sample of a prompt. Set samples_per_prompt to 1."),
        ({"prompts": "story"}, "method distill needs human text after its prompts, and the story prompt has none."),
        ({"kd_weight": 1.5}, "kd_weight is 1.5; it is the teacher's share, the text has the rest: give a number in"),
        ({"kd_weight": float("nan")}, "kd_weight is nan;"),
        ({"kd_temperature": 0.0}, "kd_temperature is 0.0; give a number above 0."),
    ],
)
def test_what_cannot_be_distilled_is_told_before_it_starts(data, changes, message):
    given = {"prompt_tokens": 8, "response_tokens": 7, "distilling_teacher": saved_teacher(data)}
    with pytest.raises((ParameterError, ModelError)) as caught:
        check_interaction({**PARAMS, **given, **changes})
    assert message in str(caught.value)


def test_what_can_be_distilled_is_not_refused(data, tmp_path):
    check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 7, "distilling_teacher": saved_teacher(data)})
    check_interaction(PARAMS)  # a run still to be made
    check_interaction({**PARAMS, "method": "text", "distilling_teacher": ""})
    with pytest.raises(ParameterError, match="distilling_teacher is empty"):  # as in a notebook that is run by hand
        trained(configuration(data, tmp_path, settings("distill"), distilling_teacher=""))


# ---- killed, and shared out ------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Nobody catches it: in the place of SIGKILL, at a moment that is chosen."""


def disturbed(config: InteractionConfig, name: str, step: int, act: Callable[[], None]) -> None:
    """The run, in which `act` happens at the step."""
    told = getattr(Progress, name)

    def acting(self, args, state, control, **given):
        if state.global_step == step:
            act()
        return told(self, args, state, control, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, name, acting)
        trained(config)


def die() -> None:
    raise KilledError


def test_a_run_that_is_killed_or_stopped_ends_as_if_it_had_not_been(data, tmp_path):
    """Three rounds of four steps with dropout: killed in a round without a checkpoint of it, stopped in another."""
    changes = {"dropout": 0.2, "learning_rate": 3e-3, "eval_steps": 3, "logging_steps": 2, "checkpoint_steps": 3}
    given = settings("distill", rounds=3, passes=2, prompts_per_round=8)
    calm, config = (configuration(data, tmp_path / name, given, **changes) for name in ("calm", "disturbed"))
    wanted = trained(calm)
    with pytest.raises(KilledError):
        disturbed(config, "on_step_end", 5, die)
    with pytest.raises(Preempted, match="the state of step 8 is saved"):
        disturbed(config, "on_step_begin", 7, lambda: signal.raise_signal(signal.SIGTERM))
    found = trained(config)
    assert left_behind(config.run_folder) == left_behind(calm.run_folder)
    assert {name: found[name] for name in (*WORDS, "steps")} == {name: wanted[name] for name in (*WORDS, "steps")}
    assert found["steps"] == 12


def test_a_run_does_not_go_on_with_another_teacher(data, tmp_path):
    """The folder is the same, its weights are not."""
    teacher = tmp_path / "teacher"
    student(load_data(data), positions=16, sharp=2.0).save_pretrained(teacher)
    config = configuration(data, tmp_path / "run", settings("distill"), distilling_teacher=str(teacher))
    config = replace(config, checkpoint_steps=1)
    with pytest.raises(KilledError):
        disturbed(config, "on_step_end", 2, die)
    student(load_data(data), positions=16, sharp=4.0).save_pretrained(teacher)
    with pytest.raises(RunError, match="distilling_teacher"):
        trained(config)


@dataclass(frozen=True)
class Job:
    data: Path
    run: Path


def distilled_by_two(job: Job) -> dict[str, float]:
    """A process of two, or the only one; rounds of seven, so that the last batches hold empty rows."""
    import os

    processes = int(os.environ.get("WORLD_SIZE", 1))
    given = settings("distill", prompts_per_round=7, passes=1)
    config = configuration(job.data, job.run, given, per_device_train_batch_size=4 // processes)
    return trained(replace(config, optim="sgd", learning_rate=0.1))


@pytest.mark.slow
@pytest.mark.soak
def test_two_processes_are_taught_as_one_is(data, tmp_path):
    saved_teacher(data)
    both, alone = tmp_path / "both", tmp_path / "alone"
    two = launch(distilled_by_two, Job(data, both), processes=2, log_folder=tmp_path)
    one = distilled_by_two(Job(data, alone))
    assert {name: two[name] for name in WORDS} == {name: one[name] for name in WORDS}
    others = weights(alone)
    for name, each in weights(both).items():
        torch.testing.assert_close(each, others[name], rtol=1e-4, atol=1e-6)
    rows, same = metrics_of(both), metrics_of(alone)
    for name in ("loss", "ce_loss", "kl_loss"):
        np.testing.assert_allclose([float(r[name]) for r in rows], [float(r[name]) for r in same], rtol=1e-4)
