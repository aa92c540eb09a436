"""Interaction, piece by piece: rollouts, masks, losses against a textbook form, words by hand, settings, evaluation."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kill_many import write_data
from small_interaction import WANTED, ToyJudge, ToyTeacher, configuration, settings, share
from torch.nn import functional

from nbutils.batches import collate
from nbutils.errors import ModelError, ParameterError
from nbutils.interaction import training
from nbutils.interaction.correctors import HumanCorrector
from nbutils.interaction.evaluation import held_out_samples, judge_student
from nbutils.interaction.examples import (
    RoundRows,
    pair_example,
    read_round,
    reward_columns,
    reward_example,
    text_example,
    write_round,
)
from nbutils.interaction.judges import JudgeLimits
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rewards import Rewarded
from nbutils.interaction.rollouts import Sampling, sample, with_end
from nbutils.interaction.rounds import Context, RoundMaker, _seed_of
from nbutils.interaction.settings import METHODS, Interaction, check_interaction
from nbutils.interaction.training import starting_model
from nbutils.models import load_model
from nbutils.preparation import load_data
from nbutils.rows import plain_rows

SHARP = 3.0  # random weights times this differ from one context to the next


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def data(data_folder):
    return load_data(data_folder)


def student(data, name="micro", positions=32, sharp=SHARP):
    """A small model whose predictions hang on what it read."""
    torch.manual_seed(3)
    model = load_model(name, data.tokenizer, positions, from_scratch=True, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharp)
    return model


def ending_soon(model, data, factor=4.0):
    """The same model; its end token is likely."""
    end = data.tokenizer.eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[end] *= factor
    return model


def prompts_of(data, lengths):
    """Beginnings of training blocks behind an end token."""
    blocks = data.blocks["train"].with_format("numpy")
    tokens = [np.asarray(blocks[i]["input_ids"][:length], np.int64) for i, length in enumerate(lengths)]
    return [np.insert(each, 0, data.tokenizer.eos_token_id) for each in tokens]


def responses(rollouts):
    return [each.response.tolist() for each in rollouts]


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "llama3-micro"])
def test_left_padding_changes_no_response(data, name):
    """Almost greedy: one position that was counted from the padding, or one look at it, and they would differ."""
    model, prompts = student(data, name), prompts_of(data, (1, 9, 4, 6, 2))
    sampling = Sampling(response_tokens=8, temperature=1e-6)
    together = responses(sample(model, data.tokenizer, prompts, replace(sampling, batch_size=5), seed=0))
    alone = responses(sample(model, data.tokenizer, prompts, replace(sampling, batch_size=1), seed=0))
    assert together == alone
    assert len({tuple(each) for each in alone}) == 5  # the prompts matter


@pytest.mark.parametrize("name", ["micro", "llama3-micro"])
def test_what_is_learned_from_has_the_probability_it_was_sampled_with(data, name, monkeypatch):
    """generate's own distributions, of left-padded batches, are those of the padded rows that the loss is made from."""
    model, prompts = student(data, name, sharp=1.5), prompts_of(data, (1, 9, 4))
    generate, scores = model.generate, []

    def recorded(*given, **named):
        found = generate(*given, **named, return_dict_in_generate=True, output_logits=True)
        scores.append(torch.stack(found.logits, 1).log_softmax(-1))  # (batch, time, vocab)
        return found.sequences

    monkeypatch.setattr(model, "generate", recorded)
    rollouts = sample(model, data.tokenizer, prompts, Sampling(6, batch_size=3), seed=5)
    policy = PolicyModel(model, settings("text"))
    thoughts = Rewarded(policy, settings("text"), 2, rollouts, None).thoughts
    for row, rollout in enumerate(rollouts):
        wanted = [scores[0][row, i, token].item() for i, token in enumerate(rollout.response)]
        found = thoughts["log_probs"][row][thoughts["mask"][row] > 0]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_response_ends_with_its_first_end_token(data):
    model = ending_soon(student(data), data)
    end, prompts = data.tokenizer.eos_token_id, prompts_of(data, [5] * 30)
    rollouts = sample(model, data.tokenizer, prompts, Sampling(8), seed=1)
    lengths = [len(each.response) for each in rollouts]
    assert min(lengths) < max(lengths) == 8
    for rollout in rollouts:
        assert end not in rollout.response[:-1]
        assert len(rollout.response) == 8 or rollout.response[-1] == end
        assert rollout.text == data.tokenizer.decode(rollout.response[rollout.response != end])
    assert with_end(np.array([7, end]), end).tolist() == [7, end]
    assert with_end(np.array([7]), end).tolist() == [7, end]


def test_samples_follow_from_their_seed_and_leave_no_trace(data):
    model, prompts = student(data), prompts_of(data, (3, 5, 3))

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    first = responses(sample(model, data.tokenizer, prompts, Sampling(8), seed=1))
    assert states() == before
    torch.rand(5)
    assert responses(sample(model, data.tokenizer, prompts, Sampling(8), seed=1)) == first
    assert responses(sample(model, data.tokenizer, prompts, Sampling(8), seed=2)) != first


def test_every_round_of_every_seed_has_draws_of_its_own():
    assert len({_seed_of(seed, number) for seed in range(5) for number in range(20)}) == 100


def test_a_model_without_finite_logits_is_told(data):
    model = student(data)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ModelError, match=r"The student's logits are not finite: it diverged. Lower the learning rate."):
        sample(model, data.tokenizer, prompts_of(data, (3,)), Sampling(4), seed=0)


# ---- losses, against the textbook ------------------------------------------------------------------------------------


def examples_of(method, data, policy, number=5):
    """Examples of different lengths with columns drawn at random; of pairs, as their first pass has them."""
    drawn = np.random.default_rng(0)

    def tokens(low, high):
        return drawn.integers(0, len(data.tokenizer), drawn.integers(low, high))

    examples = []
    for index in range(number):
        prompt, response = tokens(1, 5), tokens(1, 7)
        if method in ("text", "sft"):
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
    policy = PolicyModel(student(data, sharp=1.5).double(), settings(method, **changes)).double()
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.weight, std=0.3)
    return policy


def spoken(policy, ids):
    """log p of tokens 1, 2, ... of one sequence, by full logits; and the hidden states before them."""
    given = torch.from_numpy(ids)[None]
    logits = policy.model(given).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0], policy.model.base_model(given)[0][0, :-1]


def textbook(policy, examples):
    """The loss of all examples as the papers have it, one sequence after the other."""
    given = policy.settings
    responses = [torch.from_numpy(each.get("response", np.zeros(1)))[:-1] > 0 for each in examples]
    if given.method in ("text", "sft"):
        every = torch.cat([spoken(policy, each["input_ids"])[0] for each in examples])
        return -every.mean()
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


def fused(policy, *batches):
    """The loss of micro-batches of examples, added up as the trainer does it."""
    batches = [collate(each) for each in batches]
    units = [policy.units(each) for each in batches]
    counts = {name: sum(each[name] for each in units) for name in units[0]}
    return sum(policy(counts=counts, **each)["loss"] for each in batches)


def gradients(policy, loss):
    parameters = dict(policy.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def same_gradients(found, wanted, **tolerance):
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def empty_row(method, width=np.float64):
    """A row that holds nothing, as a round that is short has them."""
    row = RoundRows(settings(method), SimpleNamespace())[0]
    return {name: value.astype(width) if value.dtype == np.float32 else value for name, value in row.items()}


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_textbook_in_micro_batches_too(data, method):
    policy = policy_of(method, data, sft_weight=0.3)
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


# ---- words, by hand --------------------------------------------------------------------------------------------------


class Scripted:
    """In the place of `sample`: each prompt is answered with the same tokens."""

    def __init__(self, data, text):
        self.tokenizer, self.text = data.tokenizer, text

    def __call__(self, model, tokenizer, prompts, sampling, seed):
        from nbutils.interaction.rollouts import Rollout

        end = self.tokenizer.eos_token_id
        tokens = np.array([*self.tokenizer.encode(self.text), end], np.int64)
        decode = self.tokenizer.decode
        return [Rollout(p, tokens, decode(p, skip_special_tokens=True), self.text) for p in prompts]


@pytest.fixture
def ledger(data, tmp_path, monkeypatch):
    """(method, judge, teacher) -> the words of two rounds of two prompts, as rounds.csv has them.

    Each prompt has 2 words and goes on with 3 of a person's, then an end token and another document; the student says
    4 words.
    """
    from nbutils.interaction import rounds

    tokenizer = data.tokenizer
    tokens = {text: tokenizer.encode(text) for text in ("abc de", " fa ga ha", "other text")}
    end = [tokenizer.eos_token_id]
    block = np.array([*tokens["abc de"], *tokens[" fa ga ha"], *end, *tokens["other text"]])
    blocks = [{"input_ids": block}] * 8
    length = len(block) - len(tokens["abc de"])

    def spent(method, judge=None, teacher=None, **changes):
        monkeypatch.setattr(rounds, "sample", Scripted(data, "ka la ma bc"))
        given = settings(
            method,
            prompts_per_round=2,
            prompt_tokens=len(tokens["abc de"]),
            response_tokens=length,
            **changes,
        )
        policy = PolicyModel(student(data, positions=64), given)
        maker = RoundMaker(given, policy, tokenizer, blocks, tmp_path, judge, teacher, 0, 8)
        maker.story = np.array([*end, *tokens["abc de"]])
        examples = [maker.make(number, number) for number in range(2)]
        rows = rounds.read_rounds(tmp_path)
        return [tuple(int(row[name]) for name in rounds.WORDS) for row in rows], examples

    return spent


def test_words_of_each_method_by_hand(ledger):
    human = HumanCorrector(JudgeLimits())
    words, examples = ledger("text")
    assert words == [(14, 0, 0), (28, 0, 0)]  # 2 x (2 of the prompt, 3 and then 2 of another document)
    words, examples = ledger("sft", teacher=human)
    assert words == [(10, 8, 0), (20, 16, 0)]  # 2 x (2 + 3), 2 x 4
    words, examples = ledger("simpo", judge=ToyJudge(), teacher=ToyTeacher(" na oa"))
    assert words == [(4, 8, 4), (8, 16, 8)]  # the judge looks on: it costs nothing
    words, examples = ledger("three_way", teacher=ToyTeacher(" na oa pa"))
    assert words == [(10, 8, 6), (20, 16, 12)]
    words, examples = ledger("three_way", teacher=human)
    assert words == [(10, 8, 0), (20, 16, 0)]  # a person's words are counted once
    for method in ("simpo_judge", "ppo", "rloo"):
        words, examples = ledger(method, judge=ToyJudge())
        assert words == [(4, 24, 6), (8, 48, 12)]  # three samples a prompt; the judge's words are one a sample
        if method != "simpo_judge":
            words, examples = ledger(method, judge=ToyJudge(), prompts="story")
            assert words == [(0, 24, 6), (0, 48, 12)]
    assert len(examples[0]) == 6


def test_a_response_of_a_person_ends_at_its_document_s_end(ledger, data):
    end, decode = data.tokenizer.eos_token_id, data.tokenizer.decode
    _, (examples, _) = ledger("three_way", teacher=ToyTeacher(" na<|endoftext|>oa"))
    human_to_teacher, teacher_to_student, human_to_student = examples[:3]
    for pair, name in ((human_to_teacher, "input_ids"), (human_to_student, "input_ids")):
        assert decode(pair[name]) == "<|endoftext|>abc de fa ga ha<|endoftext|>"
    assert decode(teacher_to_student["rejected_ids"]) == "<|endoftext|>abc deka la ma bc<|endoftext|>"
    written = teacher_to_student["input_ids"]  # an end token spelled in a teacher's text is text
    assert written.tolist().count(end) == 2 and written[-1] == end
    assert np.array_equal(human_to_teacher["rejected_ids"], written)
    assert decode(written).startswith("<|endoftext|>abc de na<|endo")
    said = teacher_to_student["rejected_ids"]  # the teacher may use as many tokens, and has no end among them
    assert len(written) == len(said) + 1
    _, (examples, _) = ledger("text")
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de fa ga ha<|endoftext|>other text"


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
        ({"top_p": 1.5}, "top_p is 1.5; it lies above 0 and is at most 1."),
        ({"trace": 0.0}, "trace is 0.0; it lies above 0 and is at most 1."),
        (
            {"method": "simpo_judge"},
            "method simpo_judge compares samples of one prompt. Set samples_per_prompt to 2 or more.",
        ),
        ({"method": "rloo"}, "method rloo compares samples of one prompt. Set samples_per_prompt to 2 or more."),
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
        ({"method": "rloo", "samples_per_prompt": 2, "top_p": 1.0, "temperature": 0.7}, "Set temperature to 1."),
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
            {"prompt_tokens": 8, "response_tokens": 7},
            "prompt_tokens 8 and response_tokens 7, with an end token before and after, are longer than the 16 "
            "positions of the model. Lower one, or take a model with more positions",
        ),
    ],
)
def test_what_a_variant_cannot_be_is_told_before_it_starts(changes, message):
    with pytest.raises((ParameterError, ModelError)) as caught:
        check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 6, **changes}, block_size=16)
    assert message in str(caught.value)


def test_what_may_be_is_not_refused():
    check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 6}, block_size=16)
    check_interaction({**PARAMS, "prompt_tokens": 8, "response_tokens": 8, "start_model": "x"}, block_size=16)
    check_interaction({**PARAMS, "method": "simpo_judge", "correcting_teacher": "none", "samples_per_prompt": 2})
    made_later = {name: value for name, value in PARAMS.items() if name not in ("judge", "correcting_teacher")}
    check_interaction({**made_later, "method": "three_way"})
    with pytest.raises(ParameterError, match="Set samples_per_prompt"):
        check_interaction({**made_later, "samples_per_prompt": 2})
    settings("ppo", prompts="story").check_lengths(16, positions=5 + 8 + 1, story_tokens=5)
    with pytest.raises(ParameterError, match=r"The story prompt's 5 tokens and response_tokens 8, with an end token"):
        settings("ppo", prompts="story").check_lengths(16, positions=5 + 8, story_tokens=5)


# ---- evaluation ------------------------------------------------------------------------------------------------------


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
    assert all(len(prompt) == 6 and prompt[0] == data.tokenizer.eos_token_id for prompt, _ in given[0])


def test_prompts_come_once_each_before_any_comes_again(data, tmp_path):
    blocks = plain_rows(data)["train"]
    given = settings("text", prompts_per_round=len(blocks) // 2)
    maker = RoundMaker(given, None, data.tokenizer, blocks, tmp_path, None, None, 5, 8, precision=nullcontext)

    def seen(number):
        return [context.prompt.tolist() for context in maker._contexts(number)]

    every = [np.asarray(block["input_ids"][:5]).tolist() for block in blocks]
    two = seen(0) + seen(1)
    assert sorted(each[1:] for each in two) != sorted(every[: len(two)])  # not in the order of the file
    assert all(two.count(each) <= every.count(each[1:]) for each in two)
    assert isinstance(maker._contexts(0)[0], Context)
