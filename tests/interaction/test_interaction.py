"""What a student says and what becomes of it: rollouts with left padding, prompts, words counted by hand."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from kill_many import write_data
from small_interaction import WANTED, ToyJudge, ToyTeacher, ending_soon, prompts_of, settings, share, student

from nbutils.data.preparation import load_data
from nbutils.foundation.errors import ModelError
from nbutils.interaction.correctors import HumanCorrector
from nbutils.interaction.judges import JudgeLimits
from nbutils.interaction.policy import PolicyModel
from nbutils.interaction.rewards import Rewarded
from nbutils.interaction.rollouts import Rollout, Sampling, sample, without_end
from nbutils.interaction.rounds import Context, RoundMaker, _seed_of
from nbutils.training.rows import plain_rows


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def data(data_folder):
    return load_data(data_folder)


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


def test_samples_have_the_model_s_own_probabilities_whatever_it_was_published_with(data):
    model, prompts = student(data, sharp=1.5), prompts_of(data, (5, 5, 5))
    plain = responses(sample(model, data.tokenizer, prompts, Sampling(8), seed=2))
    for name, value in (("repetition_penalty", 5.0), ("min_p", 0.9), ("no_repeat_ngram_size", 1), ("typical_p", 0.1)):
        setattr(model.generation_config, name, value)
        assert responses(sample(model, data.tokenizer, prompts, Sampling(8), seed=2)) == plain
        assert getattr(model.generation_config, name) == value  # and it keeps what it was published with


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
    assert without_end(np.array([7, end]), end).tolist() == [7]
    assert without_end(np.array([7]), end).tolist() == [7]


def test_a_response_does_not_end_before_its_fewest_tokens(data):
    model = ending_soon(student(data), data)
    end, prompts = data.tokenizer.eos_token_id, prompts_of(data, [5, 2] * 15)
    free, bound = (sample(model, data.tokenizer, prompts, Sampling(8, min_response_tokens=n), seed=1) for n in (0, 6))
    assert min(len(each.response) for each in free) < 6
    lengths = {len(without_end(each.response, end)) for each in bound}
    assert min(lengths) == 6 and max(lengths) == 8


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


def test_pairs_are_of_samples_whose_scores_are_further_apart_than_the_margin(data, tmp_path):
    blocks = plain_rows(data)["train"]

    def made(margin):
        given, judge = settings("simpo_judge", score_margin=margin), ToyJudge()
        policy = PolicyModel(student(data), given)
        pairs = RoundMaker(given, policy, data.tokenizer, blocks, tmp_path, judge, None, 0, 8).make(0, 0)
        scores = np.array([share(text, set(WANTED)) for text in judge.asked[0][1]])
        return len(pairs), np.ptp(scores.reshape(-1, given.samples_per_prompt), axis=1)

    every, apart = made(0.0)
    margin = float(np.sort(apart)[len(apart) // 2])
    fewer, again = made(margin)
    assert np.array_equal(apart, again)
    assert every == (apart > 0).sum() and fewer == (apart > margin).sum()
    assert 0 < fewer < (apart >= margin).sum() <= every


# ---- words, by hand --------------------------------------------------------------------------------------------------


class Scripted:
    """In the place of `sample`: each prompt is answered with the same tokens."""

    def __init__(self, data, text):
        self.tokenizer, self.text = data.tokenizer, text

    def __call__(self, model, tokenizer, prompts, sampling, seed):
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

    def spent(method, judge=None, teacher=None, said="ka la ma bc", **changes):
        monkeypatch.setattr(rounds, "sample", Scripted(data, said))
        lengths = {"prompt_tokens": len(tokens["abc de"]), "response_tokens": length}
        given = settings(method, prompts_per_round=2, **{**lengths, **changes})
        policy = PolicyModel(student(data, positions=64), given)
        maker = RoundMaker(given, policy, tokenizer, blocks, tmp_path, judge, teacher, 0, 8)
        maker.story = np.array([*end, *tokens["abc de"]])
        examples = [maker.make(number, number) for number in range(2)]
        rows = rounds.read_rounds(tmp_path)
        return [tuple(int(row[name]) for name in rounds.WORDS) for row in rows], examples

    spent.folder = tmp_path
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
            assert words == [(2, 24, 6), (2, 48, 12)]  # the story prompt's two words, once
    assert len(examples[0]) == 6


def test_a_prompt_of_which_two_texts_are_the_same_has_its_turns_all_the_same(ledger):
    _, (examples, _) = ledger("three_way", teacher=ToyTeacher(" fa ga ha"))  # what the person wrote
    human_to_teacher, _, human_to_student = examples[:3]
    assert len(examples) == 6 and all(not np.array_equal(e["input_ids"], e["rejected_ids"]) for e in examples)
    assert np.array_equal(human_to_teacher["rejected_ids"], human_to_student["rejected_ids"])


def test_only_who_ends_by_themselves_is_learned_to_end_from(ledger, data):
    """The student says 4 words and an end token: a shorter text of the teacher ends, a longer one is cut."""
    end, decode = data.tokenizer.eos_token_id, data.tokenizer.decode
    _, (examples, _) = ledger("sft", teacher=ToyTeacher(" na oa"))
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de na oa<|endoftext|>"
    _, (examples, _) = ledger("sft", teacher=ToyTeacher(" na oa" * 9))
    spoken = data.tokenizer.encode("abc deka la ma bc")
    assert len(examples[0]["input_ids"]) == 1 + len(spoken) and examples[0]["input_ids"][-1] != end
    _, (examples, _) = ledger("sft", teacher=ToyTeacher(" na oa", ended=False))  # of few tokens in the student's eyes
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de na oa"
    room = len(data.tokenizer.encode(" na oa"))
    for most, ending in ((room, ""), (room + 1, "<|endoftext|>")):  # the end token is one of the response's
        _, (examples, _) = ledger("sft", teacher=ToyTeacher(" na oa"), response_tokens=most)
        assert decode(examples[0]["input_ids"]) == f"<|endoftext|>abc de na oa{ending}"
    _, (examples, _) = ledger("sft", teacher=HumanCorrector(JudgeLimits()))  # three words, and the document's end
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de fa ga ha<|endoftext|>"
    human = HumanCorrector(JudgeLimits())
    _, (examples, _) = ledger("sft", teacher=human, response_tokens=len(data.tokenizer.encode(" fa ga ha")))
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de fa ga ha"  # the document goes on beyond the block


def test_a_preference_looks_at_ends_only_where_both_have_one(data, tmp_path):
    """Student and teacher end by one law; a pair of which one was cut must teach nothing of ending."""
    generator, end = np.random.default_rng(0), data.tokenizer.eos_token_id
    words = [token for token in range(100) if token != end]
    given = settings("simpo", prompts_per_round=400, response_tokens=32)
    maker = RoundMaker(given, None, data.tokenizer, [], tmp_path, None, None, 0, 8)
    contexts = [maker.context(np.full(40, words[0])) for _ in range(400)]

    def written():
        length = 7 + generator.geometric(1 / 32)
        tokens = generator.choice(words, min(length, 32))
        return (np.append(tokens, end) if length < 32 else tokens), length < 32

    said = [Rollout(contexts[0].prompt, written()[0], "", "") for _ in contexts]
    corrected = [maker._cut(without_end(text, end), each, ended) for each in said for text, ended in [written()]]
    pairs = maker._corrected(contexts, said, corrected)
    of_preference = {}
    for name, mask in (("input_ids", "response"), ("rejected_ids", "rejected")):
        scored = [pair[name][1:][pair[mask][:-1] > 0] for pair in pairs]
        of_preference[name] = np.array([tokens[-1] == end for tokens in scored])
    assert len(pairs) == 400 and 0.05 < of_preference["input_ids"].mean() < 0.3
    assert np.array_equal(of_preference["input_ids"], of_preference["rejected_ids"])
    ends = np.array([text[-1] == end for text in corrected])  # cross entropy learns them all
    assert np.array_equal([pair["labels"][-1] == end for pair in pairs], ends) and ends.mean() > 0.35


def test_a_student_that_says_nothing_is_not_corrected(ledger, data, monkeypatch):
    from nbutils.interaction.rounds import read_rounds

    _, (examples, _) = ledger("simpo", teacher=ToyTeacher(" na oa"), said="")
    assert examples == []
    assert [row["uncorrected"] for row in read_rounds(ledger.folder)] == ["2", "2"]


def test_a_response_of_a_person_ends_at_its_document_s_end(ledger, data):
    end, decode = data.tokenizer.eos_token_id, data.tokenizer.decode
    _, (examples, _) = ledger("three_way", teacher=ToyTeacher(" na<|endoftext|>oa"))
    human_to_teacher, teacher_to_student, human_to_student = examples[:3]
    for pair, name in ((human_to_teacher, "input_ids"), (human_to_student, "input_ids")):
        assert decode(pair[name]) == "<|endoftext|>abc de fa ga ha<|endoftext|>"
    assert decode(human_to_student["rejected_ids"]) == "<|endoftext|>abc deka la ma bc<|endoftext|>"
    written = teacher_to_student["input_ids"]  # an end token spelled in a teacher's text is text
    assert written.tolist().count(end) == 1
    assert np.array_equal(human_to_teacher["rejected_ids"], written)
    assert len(examples) == 6  # three pairs for each of two prompts
    assert decode(written).startswith("<|endoftext|>abc de na<|end")
    said = teacher_to_student["rejected_ids"]  # the teacher may use as many tokens; where it was cut, neither ends
    assert len(written) == len(said) and said[-1] != end
    _, (examples, _) = ledger("text")
    assert decode(examples[0]["input_ids"]) == "<|endoftext|>abc de fa ga ha<|endoftext|>other text"
