"""Losses and gradients of each method against a textbook form on full logits, and the rows they are made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kill_many import write_data
from small_interaction import (
    empty_row,
    ending_soon,
    fused,
    gradients,
    prompts_of,
    same_gradients,
    settings,
    student,
)
from torch.nn import functional

from nbutils.data.batches import collate
from nbutils.data.preparation import load_data
from nbutils.interaction.examples import (
    RoundOrder,
    RoundRows,
    pair_example,
    read_round,
    reward_columns,
    reward_example,
    text_example,
    write_round,
)
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rewards import Rewarded
from nbutils.interaction.rollouts import Sampling, sample
from nbutils.interaction.settings import METHODS
from nbutils.models.teachers import LiveTeacher


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def data(data_folder):
    return load_data(data_folder)


# ---- losses, against the textbook ------------------------------------------------------------------------------------


def examples_of(method, data, policy, number=5):
    """Examples of different lengths with columns drawn at random; of pairs, as their first pass has them."""
    drawn = np.random.default_rng(0)

    def tokens(low, high):
        return drawn.integers(0, len(data.tokenizer), drawn.integers(low, high))

    examples = []
    for index in range(number):
        prompt, response = tokens(1, 5), tokens(1, 7)
        if method in ("text", "distill", "sft"):
            examples.append(text_example(prompt, response))
        elif method in ("ppo", "rloo"):
            ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
            columns = {name: drawn.normal(size=ids.shape[1]) for name in reward_columns(method)[1:]}
            if method == "ppo":  # near what the policy says: some ratios are clipped, some are not
                near = 0.3 * columns["old_log_probs"]
                columns["old_log_probs"] = policy.log_probs(ids)[0][0].detach().numpy() + near
            examples.append(reward_example(prompt, response, **columns))
        else:
            weights = {"weights": np.array([(0.3, 1.0), (1.0, 0.0)][index % 2])}
            examples.append(pair_example(prompt, response, tokens(1, 7)) | weights)
    return examples


def policy_of(method, data, **changes):
    """A policy in float64; its value head has opinions."""
    teacher = LiveTeacher([student(data, "llama3-micro").double()]) if method == "distill" else None
    policy = PolicyModel(student(data, sharp=1.5).double(), settings(method, **changes), teacher=teacher).double()
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    return policy


def spoken(policy, ids):
    """log p of tokens 1, 2, ... of one sequence, by full logits; and the hidden states before them."""
    given = torch.from_numpy(ids)[None]
    logits = policy.model(given).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0], policy.model.base_model(given)[0][0, :-1]


def from_teacher(policy, ids):
    """T^2 KL(teacher || student) where tokens 1, 2, ... of one sequence are predicted, by full logits."""
    temperature, given = policy.settings.kd_temperature, torch.from_numpy(ids)[None]
    models = (policy.teacher.models[0], policy.model)
    t, p = ((each(given).logits[0, :-1] / temperature).log_softmax(-1) for each in models)
    return temperature**2 * (t.detach().exp() * (t.detach() - p)).sum(-1)


def textbook(policy, examples):
    """The loss of all examples as the papers have it, one sequence after the other."""
    given = policy.settings
    responses = [torch.from_numpy(each.get("response", np.zeros(1)))[:-1] > 0 for each in examples]
    if given.method in ("text", "distill", "sft"):
        every = torch.cat([spoken(policy, each["input_ids"])[0] for each in examples])
        if given.method != "distill":
            return -every.mean()
        divergence = torch.cat([from_teacher(policy, each["input_ids"]) for each in examples])
        return -(1 - given.kd_weight) * every.mean() + given.kd_weight * divergence.mean()
    total = 0.0
    if given.method == "rloo":
        for each, mask in zip(examples, responses, strict=True):
            total = total - each["advantages"][0] * spoken(policy, each["input_ids"])[0][mask].sum()
        return total / len(examples)
    if given.method == "ppo":
        for each, mask in zip(examples, responses, strict=True):
            log_probs, hidden = spoken(policy, each["input_ids"])
            columns = {name: torch.from_numpy(each[name][:-1]) for name in reward_columns("ppo")[1:]}
            ratio, advantage = (log_probs - columns["old_log_probs"]).exp(), columns["advantages"]
            clipped = ratio.clamp(1 - given.clip, 1 + given.clip)
            value, old = policy.value_head(hidden)[:, 0], columns["old_values"]
            near = torch.minimum(torch.maximum(value, old - given.value_clip), old + given.value_clip)
            squares = torch.maximum((value - columns["returns"]) ** 2, (near - columns["returns"]) ** 2)
            part = -torch.minimum(ratio * advantage, clipped * advantage) + given.value_weight * squares / 2
            total = total + part[mask].sum()
        return total / sum(mask.sum() for mask in responses)
    tokens = sum(len(each["input_ids"]) - 1 for each in examples)
    pairs = sum(each["weights"][1] > 0 for each in examples)
    for each, mask in zip(examples, responses, strict=True):
        of_cross_entropy, of_preference = each["weights"]
        chosen, rejected = spoken(policy, each["input_ids"])[0], spoken(policy, each["rejected_ids"])[0]
        total = total - of_cross_entropy * chosen.sum() / tokens
        margin = chosen[mask].mean() - rejected[torch.from_numpy(each["rejected"])[:-1] > 0].mean()
        loss = -functional.logsigmoid(given.beta * margin - given.gamma)
        total = total + of_preference * loss / pairs
    return total


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_textbook_in_micro_batches_too(data, method):
    policy = policy_of(method, data, sft_weight=0.3, kd_weight=0.7, kd_temperature=1.7)
    examples = examples_of(method, data, policy)
    loss = textbook(policy, examples)
    wanted = gradients(policy, loss)
    whole = fused(policy, examples)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(whole, loss, **exact)
    same_gradients(gradients(policy, whole), wanted, **exact)
    assert any(each.abs().max() > 1e-3 for each in wanted.values())
    nothing = empty_row(method)
    parts = fused(policy, examples[:2], [*examples[2:], nothing, nothing], [nothing])
    torch.testing.assert_close(parts, loss, **exact)
    same_gradients(gradients(policy, parts), wanted, **exact)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_hold_nothing_have_no_loss_and_no_gradient(data, method):
    policy = policy_of(method, data)
    loss = fused(policy, [empty_row(method)] * 2)
    assert loss.item() == 0
    assert all(each is None or not each.any() for each in gradients(policy, loss).values())


@pytest.mark.parametrize("method", ["simpo", "ppo", "rloo"])
def test_what_is_outside_the_mask_changes_nothing(data, method, monkeypatch):
    """From a sample with an early end to the loss: tokens behind it, columns outside the mask, prompts as targets."""
    policy = policy_of(method, data, sft_weight=0.0)
    ending_soon(policy.model, data)
    rollouts = sample(policy.model, data.tokenizer, prompts_of(data, (4, 2, 6, 3)), Sampling(8), seed=2)
    assert min(len(each.response) for each in rollouts) < 8
    drawn = np.random.default_rng(0)
    examples = []
    for rollout in rollouts:
        time = len(rollout.prompt) + len(rollout.response)
        columns = {name: drawn.normal(size=time) for name in reward_columns("ppo")[1:]}
        if method == "simpo":
            other = pair_example(rollout.prompt, np.array([5, 6, 7]), rollout.response)
            examples.append(other | {"weights": np.array([0.0, 1.0])})
        else:
            examples.append(reward_example(rollout.prompt, rollout.response, **columns))
    batch = collate(examples)
    told = [(batch["input_ids"], batch["response"])]
    told += [(batch["rejected_ids"], batch["rejected"])] if method == "simpo" else []
    counts = policy.units(batch)
    wanted = policy(counts=counts, **batch)["loss"]
    corrupt = {name: each.clone() for name, each in batch.items()}
    for name, lengths in (("input_ids", "input_ids"), ("rejected_ids", "rejected_ids")):
        for row, example in enumerate(examples):
            if name in example:
                corrupt[name][row, len(example[lengths]) :] = 9
    for name in set(reward_columns("ppo")[1:]) & batch.keys():
        if not (method == "rloo" and name == "advantages"):  # one number for a response stands at all its places
            corrupt[name][batch["response"] == 0] = float("nan")
    loss = policy(counts=counts, **corrupt)["loss"]
    assert torch.equal(loss, wanted)
    same_gradients(gradients(policy, loss), gradients(policy, wanted), rtol=0, atol=0)

    masks = [mask for _, mask in told]
    scored, hidden = [], policy.log_probs

    def recorded(ids):
        log_probs, states = hidden(ids)
        scored.append(log_probs.detach().requires_grad_())
        return scored[-1], states

    monkeypatch.setattr(policy, "log_probs", recorded)
    (slope,) = torch.autograd.grad(policy(counts=counts, **batch)["loss"], scored[:1])
    time = slope.shape[1]
    response = torch.cat([functional.pad(mask, (0, time - mask.shape[1])) for mask in masks]) > 0
    assert not slope[~response].any()
    assert (slope[response] != 0).any()
    sizes = [len(rollout.response) for rollout in rollouts]
    assert response[-len(sizes) :].sum(1).tolist() == sizes  # its end token included


# ---- distance from the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simpo", "ppo"])
def test_the_divergence_is_that_of_the_whole_distributions(data, method):
    """Of samples drawn with top_p, of which log p - log q is no fair estimate; against full logits."""
    model = student(data, sharp=1.5)
    policy = PolicyModel(model, settings(method))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.4)
    ending_soon(model, data)
    rollouts = sample(model, data.tokenizer, prompts_of(data, (4, 2, 6, 3)), Sampling(8, top_p=0.5), seed=2)
    assert min(len(each.response) for each in rollouts) < 8
    wanted, sampled = [], []
    for rollout in rollouts:
        ids = torch.from_numpy(np.concatenate([rollout.prompt, rollout.response]))[None]
        places = slice(len(rollout.prompt) - 1, -1)
        with torch.no_grad():
            p, q = (each(ids).logits[0, places].double().log_softmax(-1) for each in (model, policy.start))
        wanted.append((p.exp() * (p - q)).sum(-1))
        sampled.append((p - q).gather(-1, torch.from_numpy(rollout.response)[:, None])[:, 0])
    found = Rewarded(policy, policy.settings, 3, rollouts, None).divergence([])
    assert found["kl"] == pytest.approx(torch.cat(wanted).mean().item(), rel=1e-4)
    assert found["kl_response"] == pytest.approx(np.mean([each.sum().item() for each in wanted]), rel=1e-4)
    assert abs(torch.cat(sampled).mean().item() / found["kl"] - 1) > 0.2, "the estimate would have been another"


def test_the_divergence_is_found_a_chunk_at_a_time(data, monkeypatch):
    from nbutils.objectives import head

    policy = PolicyModel(student(data, sharp=1.5), settings("simpo"))
    with torch.no_grad():
        policy.output.weight.mul_(1.4)
    rollouts = sample(policy.model, data.tokenizer, prompts_of(data, (4, 2, 6, 3)), Sampling(8), seed=2)
    whole = Rewarded(policy, policy.settings, 4, rollouts, None).divergence([])["kl"]
    sizes, made = [], head.Buffers

    def buffers(rows, *given):
        sizes.append(rows)
        return made(rows, *given)

    monkeypatch.setattr(head, "Buffers", buffers)
    monkeypatch.setattr(head, "chunk_rows", lambda *given: 5)
    assert Rewarded(policy, policy.settings, 4, rollouts, None).divergence([])["kl"] == pytest.approx(whole, rel=1e-5)
    assert sizes and max(sizes) == 5


# ---- examples --------------------------------------------------------------------------------------------------------


def test_a_round_is_read_as_it_was_written(data, tmp_path):
    for method in METHODS:
        policy = policy_of(method, data)
        examples = examples_of(method, data, policy)
        write_round(tmp_path / "round.npz", 3, examples)
        assert read_round(tmp_path / "round.npz", 2) is None
        found = read_round(tmp_path / "round.npz", 3)
        assert [each.keys() for each in found] == [each.keys() for each in examples]
        for one, other in zip(found, examples, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in one)
    write_round(tmp_path / "round.npz", 4, [])
    assert read_round(tmp_path / "round.npz", 4) == []
    assert read_round(tmp_path / "none.npz", 4) is None


def test_passes_of_imitation_come_before_those_of_preference(tmp_path):
    given = settings("simpo", passes=2, sft_passes=1, prompts_per_round=3)
    rows = RoundRows(given, tmp_path / "round.npz")
    pair = pair_example(np.array([1, 2]), np.array([3]), np.array([4]))
    rows.make = lambda number: [pair, pair]
    rows.set_epoch(0)
    weights = [rows[index]["weights"].tolist() for index in range(len(rows))]
    imitation, both, nothing = [1, 0], [pytest.approx(given.sft_weight), 1], [0, 0]
    assert weights == [imitation, imitation, nothing, both, both, nothing, both, both, nothing]


def made_round(tmp_path, given, examples):
    rows = RoundRows(given, tmp_path / "round.npz")
    rows.make = lambda number: examples
    order = RoundOrder(rows, seed=1)
    order.set_epoch(0)
    return rows, order


@pytest.mark.parametrize("method", ["simpo", "rloo"])
def test_steps_are_whole_or_idle_where_a_round_is_short(tmp_path, method):
    """Four of six examples, in each pass of its own order; what is empty comes after all passes."""
    passes = 1 if method == "rloo" else 3
    given = settings(method, passes=passes, prompts_per_round=6 if method == "simpo" else 2)
    pair = [pair_example(np.array([1]), np.array([n]), np.array([9])) for n in range(2, 6)]
    reward = [reward_example(np.array([1]), np.array([n]), advantages=np.ones(2, np.float32)) for n in range(2, 6)]
    rows, order = made_round(tmp_path, given, pair if method == "simpo" else reward)
    indices = [*order]
    assert len(indices) == len(order) == 6 * passes
    real = [bool(np.any(rows[index]["labels"] >= 0)) for index in indices]
    assert real == [True] * 4 * passes + [False] * 2 * passes
    seen = [[int(rows[index]["input_ids"][1]) for index in indices[4 * n : 4 * n + 4]] for n in range(passes)]
    assert all(sorted(each) == [2, 3, 4, 5] for each in seen)
    assert passes == 1 or len({tuple(each) for each in seen}) > 1


def test_three_pairs_of_a_prompt_take_turns(tmp_path):
    """A pass has as many examples as one of simpo; imitation sees human texts and corrections in turn."""
    given = settings("three_way", passes=3, sft_passes=2, prompts_per_round=6)
    assert given.examples_per_round == settings("simpo", prompts_per_round=6).examples_per_round
    kinds = [(10, 20), (20, 30), (10, 30)]  # human over correction, correction over student, human over student
    pairs = [
        pair_example(np.array([prompt]), np.array([better]), np.array([worse]))
        for prompt in range(6)
        for better, worse in kinds
    ]
    rows, order = made_round(tmp_path, given, pairs)
    assert len([*order]) == 6 * 5

    def told(number):
        found = [rows[6 * number + row] for row in range(6)]
        assert [each["input_ids"][0] for each in found] == [*range(6)]
        return [(int(each["input_ids"][1]), int(each["rejected_ids"][1])) for each in found]

    for number in (0, 1):
        assert sorted(better for better, _ in told(number)) == [10] * 3 + [20] * 3
    for number in (2, 3, 4):
        assert sorted(told(number)) == sorted(kinds * 2)
    for prompt in range(6):
        assert {told(number)[prompt] for number in (2, 3, 4)} == {*kinds}
        assert {told(number)[prompt][0] for number in (0, 1)} == {10, 20}
