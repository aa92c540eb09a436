"""Tokens seen by an interaction, counted by hand: of pairs both sequences, where both are learned from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kill_many import write_data
from small_interaction import ToyJudge, ToyTeacher, configuration, empty_row, metrics_of, settings, student, trained

from nbutils.data.batches import collate
from nbutils.data.preparation import load_data
from nbutils.interaction import examples
from nbutils.interaction.examples import pair_example, text_example
from nbutils.interaction.policy import PolicyModel


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def weighed(prompt: int, chosen: int, rejected: int, *weights: float) -> dict[str, np.ndarray]:
    """A pair of so many tokens, with its weights of cross entropy and preference."""
    prompt, chosen, rejected = (np.arange(number) + 1 for number in (prompt, chosen, rejected))
    return pair_example(prompt, chosen, rejected) | {"weights": np.array(weights, np.float32)}


def test_tokens_of_a_batch_are_those_that_something_is_learned_from(data):
    model = student(load_data(data))
    policy = PolicyModel(model, settings("simpo"))
    pairs = {
        "both": (weighed(3, 4, 2, 0.2, 1.0), 7 + 5),
        "preference alone": (weighed(2, 1, 6, 0.0, 1.0), 3 + 8),
        "imitation alone": (weighed(3, 4, 9, 1.0, 0.0), 7),
        "nothing": (weighed(5, 5, 5, 0.0, 0.0), 0),
        "no other response": (weighed(4, 2, 0, 0.2, 1.0), 6),
        "no pair": (weighed(4, 2, 0, 0.0, 1.0), 0),
        "an empty row": (empty_row("simpo", np.float32), 0),
    }
    for told, (row, wanted) in pairs.items():
        assert policy.tokens_read(collate([row])) == wanted, told
    assert policy.tokens_read(collate([row for row, _ in pairs.values()])) == 12 + 11 + 7 + 6
    policy = PolicyModel(model, settings("text"))
    rows = [text_example(np.arange(3), np.arange(length)) for length in (5, 1, 2)]
    assert policy.tokens_read(collate([*rows, empty_row("text")])) == 8 + 4 + 5


def made_in(run, data, given, monkeypatch, **changes):
    """(examples of each round, numbers) of a run with a toy judge and a toy teacher that fails now and then."""
    seen, write = [], examples.write_round

    def noted(file, number, rows):
        seen.append(rows)
        return write(file, number, rows)

    monkeypatch.setattr(examples, "write_round", noted)
    config = configuration(data, run, given, **changes)
    numbers = trained(config, ToyJudge(), ToyTeacher(" abc de", fails=lambda call, index: index == call))
    return seen, numbers


@pytest.mark.parametrize("changes", [{"sft_passes": 1, "passes": 2}, {"sft_weight": 0.0, "passes": 1}])
def test_a_run_of_pairs_counts_both_sides_of_each_pass(data, tmp_path, changes, monkeypatch):
    given = settings("simpo", **changes)
    rounds, numbers = made_in(tmp_path, data, given, monkeypatch)
    assert [len(rows) for rows in rounds] == [5, 5]  # of six: one was not corrected
    chosen, rejected = (
        sum(len(row[name]) for rows in rounds for row in rows) for name in ("input_ids", "rejected_ids")
    )
    assert rejected > 0 and chosen != rejected
    wanted = given.sft_passes * chosen + given.passes * (chosen + rejected)
    assert numbers["tokens_seen"] == wanted == int(metrics_of(tmp_path)[-1]["tokens_seen"])


def test_steps_that_are_left_out_read_nothing(data, tmp_path, monkeypatch):
    """Rounds of four steps on all examples: three of the first and two of the second are made."""
    given = settings("ppo", passes=4, kl_stop=1e-5)
    changes = {"per_device_train_batch_size": 18, "learning_rate": 3e-3}
    rounds, numbers = made_in(tmp_path, data, given, monkeypatch, **changes)
    first, second = (sum(len(row["input_ids"]) for row in rows) for rows in rounds)
    assert numbers["tokens_seen"] == 3 * first + 2 * second
