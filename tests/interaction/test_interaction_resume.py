"""Interactions that are killed anywhere end as if nobody had touched them: in a round, between rounds, between the two.

python tests/kill_many.py --case judged --case rewarded --kills 200     SIGKILL at random moments
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from kill_many import write_data
from small_interaction import ToyTeacher, configuration, left_behind, metrics_of, rounds_of, settings, trained
from small_judges import write_model

from nbutils.foundation.errors import Preempted
from nbutils.interaction import examples, rounds
from nbutils.interaction.correctors import ModelCorrector
from nbutils.interaction.judges import JudgeLimits
from nbutils.interaction.training import InteractionConfig, InteractionTrainer
from nbutils.runs.attempts import clear_folder
from nbutils.training.checkpoints import CHECKPOINTS
from nbutils.training.resuming import Checkpointing, belonging
from nbutils.training.tracking import Progress

HERE = Path(__file__).parents[1]
ROUND = {"simpo_judge": 4, "ppo": 9, "simpo": 6}  # optimiser steps of a round
ROUNDS = 3


class KilledError(BaseException):
    """Nobody catches it: in the place of SIGKILL, at a moment that is chosen."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def configured(data: Path, run: Path, method: str) -> InteractionConfig:
    """Dropout where the method has it, a judge whose budget ends in the second round, a policy that goes too far."""
    changes = {"simpo": {"sft_passes": 1}, "ppo": {"kl_stop": 0.02, "kl_target": 0.1, "kl_horizon": 50}}
    given = settings(method, rounds=ROUNDS, passes=2, prompts_per_round=8, **changes.get(method, {}))
    if method == "ppo":
        given = replace(given, prompts_per_round=6)
    limits = JudgeLimits(most_words=130 if method == "simpo_judge" else 0)
    return configuration(
        data,
        run,
        given,
        dropout=0.2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        eval_steps=3,
        logging_steps=2,
        checkpoint_steps=3,
        judge_limits=limits,
    )


def ended(config: InteractionConfig) -> dict[str, object]:
    """What the run leaves behind when it is run to its end; the words among it."""
    numbers = trained(config, teacher=ToyTeacher(" abc de fgh"))
    told = {name: numbers[name] for name in ("human_words", "student_words", "teacher_words", "tokens_seen", "steps")}
    return left_behind(config.run_folder) | {"numbers": told}


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory) -> Callable[[str], dict[str, object]]:
    """method -> what a run that nobody disturbed leaves behind."""
    found: dict[str, dict[str, object]] = {}

    def left(method: str) -> dict[str, object]:
        if method not in found:
            run = tmp_path_factory.mktemp(f"calm-{method}")
            found[method] = ended(configured(data, run, method))
            assert found[method]["numbers"]["steps"] == ROUNDS * ROUND[method]
        return found[method]

    return left


def killed(patch: pytest.MonkeyPatch, owner: object, name: str, when: Callable[..., bool], after: bool) -> None:
    """The run dies in the first call of `owner.name` for which `when(*arguments)` holds: before it or after it."""
    function = getattr(owner, name)

    def dying(*given, **named):
        dies = when(*given)
        if dies and not after:
            raise KilledError
        result = function(*given, **named)
        if dies:
            raise KilledError
        return result

    patch.setattr(owner, name, dying)


def making(number: int) -> Callable[..., bool]:
    return lambda file, round, *rest: round == number


def telling_of(number: int) -> Callable[..., bool]:
    return lambda folder, rows: len(rows) == number + 1


def at_step(step: int) -> Callable[..., bool]:
    return lambda self, args, state, *rest: state.global_step == step


def moments(method: str) -> dict[str, tuple[object, str, Callable[..., bool], bool]]:
    """Where a run is killed: owner and name of a function, in which call, after it or before. In the order of a run."""
    length = ROUND[method]
    return {
        "before a round is told": (rounds, "write_rounds", telling_of(1), False),
        "between samples and examples": (examples, "write_round", making(1), False),
        "between rollout and update": (examples, "write_round", making(1), True),
        "in the middle of a round": (Progress, "on_step_end", at_step(length + length // 2), False),
        "at a round's end": (Checkpointing, "on_step_end", at_step(2 * length), True),
        "in the last rollout": (examples, "write_round", making(2), False),
    }


@pytest.mark.parametrize("method", ["simpo_judge", "ppo"])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(data, calm, tmp_path, method, caplog):
    """One run, killed at each moment, one after the other."""
    caplog.set_level("INFO")
    config = configured(data, tmp_path, method)
    for owner, name, when, after in moments(method).values():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            killed(patch, owner, name, when, after)
            ended(config)
    found = ended(config)
    for part, value in calm(method).items():
        assert found[part] == value, part
    assert caplog.text.count("Training goes on from step") == len(moments(method))


@pytest.mark.parametrize("method", ["simpo_judge", "ppo"])
def test_without_a_checkpoint_a_killed_run_begins_anew(data, calm, tmp_path, method):
    """It has told of a round that has no samples yet, or has them, and begins with the first."""
    config = replace(configured(data, tmp_path, method), checkpoint_steps=0)
    for moment in ("between samples and examples", "in the middle of a round"):
        owner, name, when, after = moments(method)[moment]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            killed(patch, owner, name, when, after)
            ended(config)
    assert ended(config) == calm(method)


@pytest.mark.parametrize("method", ["simpo_judge", "ppo"])
def test_a_run_that_is_asked_to_stop_goes_on_where_it_was(data, calm, tmp_path, method):
    """In the first step of all, the last of a round, the first of one, in its middle, in the very last."""
    config = replace(configured(data, tmp_path, method), checkpoint_steps=0)
    length = ROUND[method]
    for step in (1, length, length + 1, length + 2, ROUNDS * length):

        def stop(self, args, state, control, step=step, **named):
            if state.global_step == step - 1:
                signal.raise_signal(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Progress, "on_step_begin", stop)
            with pytest.raises(Preempted, match=f"asked to stop at step {step}; the state of step {step} is saved"):
                ended(config)
    assert ended(config) == calm(method)


def test_the_runs_above_meet_what_they_are_meant_to(data, calm, tmp_path):
    """The judge's budget ends in the middle; PPO leaves rounds early, and its price of divergence moves."""
    table = calm("simpo_judge")["rounds.csv"]
    not_asked = [int(row["not_asked"]) for row in table]
    assert not_asked[0] == 0 < not_asked[1] < not_asked[2] >= 23  # one says nothing, and nobody is asked about that
    assert {row["failures"] for row in table} == {"0"}  # a spent budget is no failure of the judge's
    table = calm("ppo")["rounds.csv"]
    assert len({row["kl_coefficient"] for row in table}) == ROUNDS
    run = tmp_path / "ppo"
    config = configured(data, run, "ppo")
    stops = []
    with pytest.MonkeyPatch.context() as patch:
        far = InteractionTrainer._stop_when_far

        def noted(self):
            far(self)
            stops.append((self.rows.round, self._stopped_round == self.rows.round))

        patch.setattr(InteractionTrainer, "_stop_when_far", noted)
        trained(config)
    assert any(stopped for _, stopped in stops)
    assert len(stops) < ROUNDS * ROUND["ppo"]  # steps that were left out ask nothing


def test_words_never_decrease_and_stand_beside_every_step(data, tmp_path):
    config = replace(configured(data, tmp_path, "simpo"), logging_steps=1)
    ended(config)
    names = ("human_words", "student_words", "teacher_words")
    of_rounds = rounds_of(tmp_path, *names)
    steps = [tuple(float(row[name]) for name in names) for row in metrics_of(tmp_path)]
    assert steps == [each for each in of_rounds for _ in range(ROUND["simpo"])]
    for earlier, later in pairwise(of_rounds):
        assert all(one < other for one, other in zip(earlier, later, strict=True))
    shown = [json.loads(line) for line in (tmp_path / "round_samples.jsonl").read_text().splitlines()]
    assert [each["round"] for each in shown] == [1, 1, 2, 2, 3, 3]


def test_what_was_answered_before_a_kill_is_not_asked_again(data, tmp_path, monkeypatch):
    """Of a run that is tried again its checkpoints alone are left: the replies are among them."""
    teacher = write_model(tmp_path / "teacher")
    config = replace(configured(data, tmp_path / "run", "simpo"), correcting_teacher=str(teacher), checkpoint_steps=0)
    config = replace(config, interaction=replace(config.interaction, rounds=2))
    trained(config)
    wanted = left_behind(config.run_folder)
    clear_folder(config.run_folder, {CHECKPOINTS})
    monkeypatch.setattr(ModelCorrector, "write", None)
    trained(config)
    assert left_behind(config.run_folder) == wanted
    assert rounds_of(config.run_folder, "teacher_words")[-1][0] > 0


@pytest.mark.parametrize("who", ["judge", "correcting_teacher"])
def test_a_checkpoint_is_none_of_a_run_with_another_judge_or_teacher_of_that_name(data, tmp_path, who):
    model = write_model(tmp_path / "model")
    config = replace(configured(data, tmp_path / "run", "simpo"), **{who: str(model)})
    before = belonging(config, "data", 1, False, False)
    assert belonging(config, "data", 1, False, False) == before
    (model / "model.safetensors").write_bytes(b"trained again")
    assert belonging(config, "data", 1, False, False) != before


@pytest.mark.soak
def test_kills_at_random_moments_change_not_a_bit():
    words = [sys.executable, str(HERE / "kill_many.py"), "--kills", "4", "--case", "judged", "--case", "rewarded"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same bytes") == 2
