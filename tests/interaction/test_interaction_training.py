"""Interaction on the trainer: judges' failures, ratios of 1, equal weights however steps are shared out, learning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_many import write_data
from safetensors.torch import load_file
from small_interaction import ToyJudge, ToyTeacher, configuration, metrics_of, rounds_of, settings, trained

from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.interaction import training
from nbutils.interaction.examples import ROUND_FILE, read_round
from nbutils.interaction.settings import METHODS
from nbutils.training.launching import launch

GOOD, FAILING = 1, 2  # rounds of the judge that breaks down


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- a judge that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simpo_judge", "ppo", "rloo"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_judge_that_fails_on_everything_changes_no_weight(data, tmp_path, method, scaled, monkeypatch):
    """Not even by the momentum of the good round before it. `scaled`: with float16's scaler of losses."""
    if scaled:
        with_scaler(monkeypatch)
    passes = 1 if method == "rloo" else 2
    steps = {"simpo_judge": 3, "ppo": 9, "rloo": 5}[method]
    given = settings(method, rounds=GOOD + FAILING, passes=passes)
    config = configuration(data, tmp_path, given, checkpoint_steps=steps, checkpoints_kept=9, weight_decay=0.1)
    judge = ToyJudge(fails=lambda call, index: call >= GOOD)
    numbers = trained(config, judge)
    good = saved(tmp_path, steps)
    assert same(good, saved(tmp_path, 2 * steps)) and same(good, saved(tmp_path, 3 * steps))
    assert numbers["steps"] == 3 * steps and numbers["judge_failure_rate"] == pytest.approx(2 / 3)
    assert ("value_head.weight" in good) == (method == "ppo")
    wanted = [(18, 0), (0, 18), (0, 18)]
    assert rounds_of(tmp_path, "scored", "failures") == wanted
    examples = [count for (count,) in rounds_of(tmp_path, "examples")]
    assert examples[0] > 0 and examples[1:] == [0, 0]
    assert np.isnan(rounds_of(tmp_path, "reward")[1:]).all()

    alone = configuration(data, tmp_path / "untrained", settings(method, rounds=1))
    trained(alone, ToyJudge(fails=lambda call, index: True))
    at_first = load_file(tmp_path / "untrained" / "model" / "model.safetensors")
    assert not all(torch.equal(good[f"model.{name}"], value) for name, value in at_first.items())


def with_scaler(monkeypatch):
    """What the Trainer is on a GPU with precision fp16."""
    made = training.InteractionTrainer.__init__

    def scaled(self, *given, **named):
        made(self, *given, **named)
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=4.0)
        self.accelerator.state._mixed_precision = "fp16"

    monkeypatch.setattr(training.InteractionTrainer, "__init__", scaled)


def test_a_teacher_that_fails_on_everything_changes_no_weight(data, tmp_path):
    config = configuration(data, tmp_path, settings("simpo", passes=2), checkpoint_steps=4, checkpoints_kept=9)
    numbers = trained(config, teacher=ToyTeacher(" abc", fails=lambda call, index: call > 0))
    assert numbers["judge_failure_rate"] == 0  # the teacher is no judge
    assert rounds_of(tmp_path, "failures", "uncorrected") == [(0, 0), (0, 6)]
    assert same(saved(tmp_path, 4), saved(tmp_path, 6)) or numbers["steps"] != 6


def test_scores_that_are_all_the_same_rank_nothing(data, tmp_path):
    trained(configuration(data, tmp_path, settings("simpo_judge")), ToyJudge(wanted=""))
    assert rounds_of(tmp_path, "examples", "reward", "failures") == [(0, 0, 0)] * 2


def kept_of(data, run, method, fails, monkeypatch):
    """The examples of the first round, and what its judge was asked."""
    seen = []

    def noted(file, number, examples):
        seen.append(examples)
        return write(file, number, examples)

    from nbutils.interaction import examples as module

    write = module.write_round
    monkeypatch.setattr(module, "write_round", noted)
    judge = ToyJudge(fails=fails)
    trained(configuration(data, run, settings(method, rounds=1)), judge)
    return seen[0], judge


@pytest.mark.parametrize(
    "method, failed, left",
    [
        ("ppo", {1, 3, 4, 5}, 14),
        ("rloo", {1, 3, 4}, 14),  # 2 of the first prompt; of the second one sample alone, which has none to beat
        ("rloo", {0, 1, 2, 3, 4, 5}, 12),
    ],
)
def test_samples_without_a_score_are_left_out(data, tmp_path, method, failed, left, monkeypatch):
    examples, judge = kept_of(data, tmp_path, method, lambda call, index: index in failed, monkeypatch)
    assert len(examples) == left
    assert rounds_of(tmp_path, "examples", "scored", "failures") == [(left, 18 - len(failed), len(failed))]
    assert all(np.isfinite(column).all() for each in examples for column in each.values())
    known = [score(text) for index, text in enumerate(judge.asked[0][1]) if index not in failed]
    assert rounds_of(tmp_path, "reward")[0][0] == pytest.approx(np.mean(known), rel=1e-12)


def score(text: str) -> float:
    return float(ToyJudge().score([""], [text]).scores[0])


def test_pairs_are_the_best_and_the_worst_of_the_scored_ones(data, tmp_path, monkeypatch):
    from nbutils.data.preparation import load_data

    examples, judge = kept_of(data, tmp_path, "simpo_judge", lambda call, index: index in (0, 3, 4, 5, 7), monkeypatch)
    texts = judge.asked[0][1]
    wanted = []
    for first in range(0, 18, 3):
        known = [index for index in range(first, first + 3) if index not in (0, 3, 4, 5, 7)]
        if known and max(score(texts[i]) for i in known) > min(score(texts[i]) for i in known):
            best, worst = (choose(known, key=lambda i: score(texts[i])) for choose in (max, min))
            wanted.append((texts[best], texts[worst]))
    decode = load_data(data).tokenizer.decode
    found = [
        tuple(
            decode(each[ids][np.flatnonzero(each[mask]) + 1], skip_special_tokens=True)
            for ids, mask in (("input_ids", "response"), ("rejected_ids", "rejected"))
        )
        for each in examples
    ]
    assert found == wanted and 0 < len(wanted) < 6


# ---- the first inner pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-9), ("bf16", 1e-9)])
def test_a_policy_that_has_not_moved_has_ratio_one(data, tmp_path, precision, tolerance):
    """In the first step of every round; in the second it has moved."""
    given = settings("ppo", rounds=3, passes=2)
    config = configuration(data, tmp_path, given, per_device_train_batch_size=18, precision=precision)
    trained(replace(config, learning_rate=3e-3), ToyJudge())
    rows = metrics_of(tmp_path)
    kl, clipped = ([float(row[name]) for row in rows] for name in ("approximate_kl", "clip_fraction"))
    assert len(rows) == 6 and max(kl[::2]) < tolerance and max(clipped[::2]) == 0
    assert min(kl[3::2]) > 1e-4  # the very first step has a learning rate of 0
    assert rounds_of(tmp_path, "kl")[0][0] == pytest.approx(0, abs=1e-9)


def test_a_round_is_left_where_its_policy_has_gone_too_far(data, tmp_path):
    given = settings("ppo", passes=4, kl_stop=1e-5)
    config = configuration(data, tmp_path, given, per_device_train_batch_size=18, learning_rate=3e-3)
    trained(replace(config, checkpoint_steps=1, checkpoints_kept=99), ToyJudge())
    kl = [float(row["approximate_kl"] or 0) for row in metrics_of(tmp_path)]
    weights = [saved(tmp_path, step) for step in range(1, 9)]
    # round 1: step 1 has a learning rate of 0, step 3 sees how far step 2 went and is the last that moves anything
    moved = [not same(one, other) for one, other in pairwise(weights)]
    far = [step for step, each in enumerate(kl) if each > 1e-5]
    assert far == [2, 5] and moved == [True, True, False, True, True, False, False]


# ---- sharing out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_micro_batches_of_two_are_one_of_four(data, tmp_path, method):
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        run = tmp_path / str(size)
        config = configuration(data, run, settings(method, prompts_per_round=5, passes=1, rounds=1))
        config = replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        trained(replace(config, optim="sgd", learning_rate=0.1), ToyJudge(), ToyTeacher(" abc"))
        found.append((load_file(run / "model" / "model.safetensors"), metrics_of(run)))
    (one, rows), (other, others) = found
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)
    assert len(rows) == len(others) > 1
    for row, other_row in zip(rows, others, strict=True):
        for name in ("loss", "ce_loss", "simpo_loss", "policy_loss", "value_loss"):
            if row.get(name):
                assert float(other_row[name]) == pytest.approx(float(row[name]), rel=1e-4, abs=1e-6), name


@dataclass(frozen=True)
class Job:
    data: Path
    run: Path


class TellingJudge(ToyJudge):
    """Leaves a file that names the process which asked."""

    def score(self, prompts, completions):
        import os

        (Path(self.folder) / f"asked-by-{os.environ.get('RANK', 'none')}").touch()
        return super().score(prompts, completions)


def judged_by_two(job: Job) -> int:
    """A process of two, or the only one."""
    import os

    processes = int(os.environ.get("WORLD_SIZE", 1))
    judge = TellingJudge()
    judge.folder = job.run
    given = settings("simpo_judge", rounds=2, prompts_per_round=7)
    config = configuration(job.data, job.run, given, per_device_train_batch_size=4 // processes)
    trained(replace(config, optim="sgd", learning_rate=0.1), judge)
    return len(judge.asked)


@pytest.mark.slow
@pytest.mark.soak
def test_two_processes_learn_what_one_does_and_the_first_asks_the_judge(data, tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert launch(judged_by_two, Job(data, both), processes=2, log_folder=tmp_path) == 2
    judged_by_two(Job(data, alone))
    assert [path.name for path in both.glob("asked-by-*")] == ["asked-by-0"]
    names = ("examples", "reward", "scored")
    np.testing.assert_allclose(rounds_of(both, *names), rounds_of(alone, *names))
    weights = [load_file(run / "model" / "model.safetensors") for run in (both, alone)]
    for name, each in weights[0].items():
        torch.testing.assert_close(each, weights[1][name], rtol=1e-3, atol=1e-5)
    two, one = metrics_of(both), metrics_of(alone)
    for name in ("loss", "simpo_loss", "ce_loss"):
        np.testing.assert_allclose([float(r[name]) for r in two], [float(r[name]) for r in one], rtol=1e-4)


# ---- before anything runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response, told", [(12, "blocks of 16 tokens"), (11, "the 16 positions of the model")])
def test_sequences_that_do_not_fit_are_told_before_the_first_sample(data, tmp_path, response, told):
    judge = ToyJudge()
    with pytest.raises(ParameterError, match=f"prompt_tokens 5 and response_tokens {response}.*{told}"):
        trained(configuration(data, tmp_path, settings("simpo_judge", response_tokens=response)), judge)
    assert not judge.asked
    trained(configuration(data, tmp_path / "fits", settings("simpo_judge", response_tokens=10, rounds=1)), judge)


def test_a_student_that_diverges_is_told(data, tmp_path):
    config = configuration(data, tmp_path, settings("simpo_judge"), learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(ModelError, match=r"it diverged\. Lower the learning rate"):
        trained(config, ToyJudge())


# ---- learning --------------------------------------------------------------------------------------------------------


ROUNDS = {"simpo_judge": 20, "ppo": 20, "rloo": 60}  # of 12, of 48 and of 1 step


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simpo_judge", "ppo", pytest.param("rloo", marks=pytest.mark.soak)])
def test_the_reward_of_a_toy_judge_rises(data, tmp_path, method):
    given = settings(
        method,
        rounds=ROUNDS[method],
        prompts_per_round=24,
        samples_per_prompt=4,
        prompt_tokens=4,
        kl_coefficient=0.0,
        passes=1 if method == "rloo" else 2,
    )
    size = 96 if method == "rloo" else 16  # a round is one step
    config = configuration(data, tmp_path, given, per_device_train_batch_size=size, learning_rate=5e-3)
    trained(config, ToyJudge())
    rewards = [reward for (reward,) in rounds_of(tmp_path, "reward")]
    assert rewards[0] < 0.25 and np.mean(rewards[-3:]) > 0.8, rewards
    kl = [each for (each,) in rounds_of(tmp_path, "kl")]
    assert kl[0] == 0 and kl[-1] > 1


@pytest.mark.slow
@pytest.mark.soak
def test_the_price_of_divergence_keeps_the_student_where_it_began(data, tmp_path):
    reached = []
    for coefficient in (0.0, 2.0):
        given = settings("rloo", rounds=8, prompts_per_round=24, samples_per_prompt=4, kl_coefficient=coefficient)
        run = tmp_path / str(coefficient)
        trained(configuration(data, run, given, per_device_train_batch_size=16, learning_rate=4e-3), ToyJudge())
        reached.append(rounds_of(run, "reward", "kl")[-1])
    (free, far), (bound, near) = reached
    assert free > bound and far > 3 * near, reached


@pytest.mark.parametrize("size, accumulated, steps", [(18, 1, 1), (9, 2, 1), (4, 2, 3)])
def test_a_round_of_leave_one_out_is_as_few_steps_as_the_batch_allows(data, tmp_path, size, accumulated, steps):
    config = configuration(data, tmp_path, settings("rloo"), per_device_train_batch_size=size)
    numbers = trained(replace(config, gradient_accumulation_steps=accumulated), ToyJudge())
    assert numbers["steps"] == 2 * steps


def test_the_weight_of_the_divergence_follows_it(data, tmp_path):
    from nbutils.interaction.rewards import AdaptiveKL

    given = settings("ppo", rounds=4, kl_target=0.05, kl_horizon=100, kl_coefficient=0.3)
    trained(configuration(data, tmp_path, given, learning_rate=3e-3), ToyJudge())
    wanted, rows = [0.3], rounds_of(tmp_path, "kl_response", "kl_coefficient")
    for divergence, _ in rows[:-1]:
        wanted.append(AdaptiveKL(wanted[-1], 0.05, 100).update(divergence, 18))
    assert [coefficient for _, coefficient in rows] == pytest.approx(wanted, rel=1e-12)
    assert len(set(wanted)) > 2


def test_what_was_left_of_another_run_is_not_learned_from(data, tmp_path):
    """A folder that a run was interrupted in, and another judge: nothing of the first is seen."""
    config = configuration(data, tmp_path / "used", settings("simpo_judge"))

    class StoppedError(Exception):
        pass

    def interrupted(call, index):
        if call == 1:
            raise StoppedError
        return False

    with pytest.raises(StoppedError):
        trained(config, ToyJudge(fails=interrupted))
    assert read_round(config.run_folder / ROUND_FILE, 0)
    fresh = replace(config, run_folder=tmp_path / "fresh")
    fresh.run_folder.mkdir()
    for each in (config, fresh):
        trained(each, ToyJudge(wanted="xyz "))
    names = ("examples", "reward", "student_words")
    assert rounds_of(config.run_folder, *names) == rounds_of(fresh.run_folder, *names)
    one, other = (run / "model" / "model.safetensors" for run in (config.run_folder, fresh.run_folder))
    assert one.read_bytes() == other.read_bytes()
