"""Answers: generation with padding on the left, and measures against hand calculation, NLTK and sacrebleu.

python -m pytest tests/test_answers.py
"""

import math
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_bleu
from small_words import WORDS

from nbutils.data.tokenization import character_tokenizer
from nbutils.evaluation.answer_measures import (
    COLUMNS,
    compare_answers,
    exact_match,
    measure_answers,
    paired_bleu,
    sentence_bleu,
    token_f1,
)
from nbutils.evaluation.question_answering import generate_answers, left_padded
from nbutils.foundation.errors import ModelError, ParameterError, RunError
from nbutils.models.loading import load_model

LETTERS = character_tokenizer(["abcdefghij klmnop"])
POSITIONS = 32
PROMPTS = ["abcdefgh", "c", "ab cd", "hgfedcba ponm", "k", "lmn"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = load_model("micro", LETTERS, POSITIONS, from_scratch=True, dropout=0.5)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # else a wrong position would hardly show
        model.transformer.wte.weight.mul_(5)
    return model


def greedy(model, prompts, **settings):
    return generate_answers(model, LETTERS, prompts, top_k=1, **{"max_new_tokens": 8} | settings)


@contextmanager
def ending(model, number):
    """The model made to end a text at `number` tokens, prompt included, and nowhere else, and to add letters alone."""
    end, silent = LETTERS.eos_token_id, [LETTERS.unk_token_id, LETTERS(" ")["input_ids"][0]]

    def hook(_, __, kwargs, output):
        over = kwargs["position_ids"][:, -1:] == number - 1
        output.logits[:, -1:, end] = torch.where(over, 1e4, -1e4)
        output.logits[:, -1, silent] = -1e4
        return output

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_padding_changes_neither_logits_nor_greedy_answers(model):
    model.eval()
    tokens = [LETTERS(prompt)["input_ids"] for prompt in PROMPTS]
    ids, mask = left_padded(tokens, model.device)
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    for row, alone in enumerate(tokens):
        whole = torch.tensor([alone + output.sequences[row, ids.shape[1] :].tolist()])
        with torch.no_grad():
            expected = model(whole).logits[0, len(alone) - 1 : -1]  # no cache, no padding, no mask
        torch.testing.assert_close(torch.stack(output.logits)[:, row], expected, rtol=1e-4, atol=1e-4)
    together = greedy(model, PROMPTS)
    assert together == [greedy(model, [prompt])[0] for prompt in PROMPTS]
    assert together == greedy(model, PROMPTS, batch_size=2)
    assert len(set(together)) == len(PROMPTS)


def test_answers_repeat_and_leave_the_global_random_state_and_the_mode_alone(model):
    settled = generate_answers(model.eval(), LETTERS, PROMPTS, max_new_tokens=8, seed=1, batch_size=4)
    model.train()  # with dropout 0.5, which must not touch the answers
    before = torch.random.get_rng_state()
    first, again, other = (
        generate_answers(model, LETTERS, PROMPTS, max_new_tokens=8, seed=seed, batch_size=4) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert settled == first == again != other
    assert model.training


def test_an_answer_ends_at_the_end_token_and_is_the_answer_alone(model):
    with ending(model, 1000):
        whole = greedy(model, PROMPTS, max_new_tokens=14)
    with ending(model, 13):
        ended = greedy(model, PROMPTS, max_new_tokens=14)
    assert [len(answer) for answer in whole] == [14] * len(PROMPTS)  # a token is a letter
    assert ended == [answer[: 13 - len(prompt)] for prompt, answer in zip(PROMPTS, whole, strict=True)]
    assert "" in ended  # the longest prompt's: the end token came first


def test_sampling_keeps_to_the_nucleus(model):
    tokens = LETTERS("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chances = (model.eval()(tokens).logits[0, -1] / 0.7).softmax(-1)
    order = chances.argsort(descending=True)
    nucleus = order[: int((chances[order].cumsum(0) < 0.5).sum()) + 1]
    answers = generate_answers(model, LETTERS, ["abc"] * 200, max_new_tokens=1, top_p=0.5, top_k=0, batch_size=200)
    allowed = {LETTERS.decode([i], skip_special_tokens=True).strip() for i in nucleus.tolist()}
    assert set(answers) <= allowed and len(set(answers)) > 1
    chosen = generate_answers(model, LETTERS, ["abc"] * 2000, max_new_tokens=1, top_p=1, top_k=0, batch_size=2000)
    letter = LETTERS.decode([order[0].item()])
    assert chosen.count(letter) / 2000 == pytest.approx(chances[order[0]].item(), abs=0.05)


def test_a_long_prompt_shortens_its_own_answer_alone(model):
    with ending(model, 1000):
        answers = greedy(model, ["b", "a" * (POSITIONS - 2), "b"], max_new_tokens=12)
        alone = greedy(model, ["b"], max_new_tokens=12)
    assert [len(answer) for answer in answers] == [12, 2, 12]
    assert answers[0] == answers[2] == alone[0]


def test_a_prompt_that_does_not_fit_is_named(model):
    with pytest.raises(
        ModelError, match=r"Prompt 1 \('aaaa.* has 32 tokens and leaves no room .* 32 positions. Shorten"
    ):
        greedy(model, ["a", "a" * POSITIONS])
    with pytest.raises(ModelError, match=r"Prompt 0 has no token to continue from. Give every prompt some text"):
        greedy(model, [""])
    assert greedy(model, []) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0. Set it to 1 or more"),
        ({"temperature": 0.0}, r"generation_temperature is 0. Set it above 0; .* set generation_top_k to 1"),
        ({"temperature": math.nan}, r"generation_temperature is nan"),
        ({"top_k": -1}, r"generation_top_k is -1. Set it to 1 or more, or to 0 to cut nothing off"),
        ({"top_p": 1.5}, r"generation_top_p is 1.5. Set it above 0 and up to 1"),
        ({"batch_size": 0}, r"batch size of generation is 0. Set it to 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(model, settings, message):
    with pytest.raises(ParameterError, match=message):
        generate_answers(model, LETTERS, ["a"], **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_gives_no_answers(value, caplog):
    model = load_model("micro", WORDS, 16, from_scratch=True)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(value)
    assert generate_answers(model, WORDS, ["w3", "w4"]) == []
    assert "it diverged, and it gives no answers" in caplog.text
    measured = measure_answers(["q", "r"], ["x", "y"], [])
    assert list(measured.examples.columns) == COLUMNS and len(measured.examples) == 0
    assert {"bleu", "corpus_bleu", "chrf", "exact_match", "token_f1"} <= measured.numbers.keys()
    assert all(math.isnan(each) for each in measured.numbers.values())


# Tokens as the two tokenisers must give them: "2018" apart from its full stop in mid-text, "isn't" in two.
TRUTH = "Revenue fell in 2018. It isn't clear why (see note 4)."
TRUTH_TOKENS = [
    "Revenue",
    "fell",
    "in",
    "2018",
    ".",
    "It",
    "is",
    "n't",
    "clear",
    "why",
    "(",
    "see",
    "note",
    "4",
    ")",
    ".",
]
GIVEN = "Revenue rose in 2018. It is clear why."
GIVEN_TOKENS = ["Revenue", "rose", "in", "2018", ".", "It", "is", "clear", "why", "."]


def test_sentence_bleu_by_nltk_on_tokens_written_by_hand():
    smoothing = SmoothingFunction().method4
    assert sentence_bleu(TRUTH, GIVEN) == pytest.approx(
        nltk_bleu([TRUTH_TOKENS], GIVEN_TOKENS, smoothing_function=smoothing), abs=1e-12
    )
    assert sentence_bleu(TRUTH, TRUTH) == pytest.approx(1)


def test_sentence_bleu_by_hand():
    # Answer "the cat sat", reference "the cat sat down": precisions 1, 1, 1, and no 4-gram: (ln 3 / 10) / 1.
    assert sentence_bleu("the cat sat down", "the cat sat") == pytest.approx(
        math.exp(1 - 4 / 3) * (math.log(3) / 10) ** 0.25
    )
    assert sentence_bleu("$12.5", "$12.5") == pytest.approx((math.log(2) / 10 * math.log(2) / 20) ** 0.25)
    assert sentence_bleu("$12.5", "12.5") == pytest.approx(math.exp(1 - 2))  # more, as NLTK has it
    assert sentence_bleu("cat", "cat") == 1 and sentence_bleu("cat", "dog") == 0


@pytest.mark.parametrize("answer", ["", "  \n", "?"])
def test_an_answer_of_nothing_scores_nothing(answer):
    assert sentence_bleu("the cat", answer) == 0
    assert exact_match("the cat", answer) == token_f1("the cat", answer) == 0


def test_exact_match_and_f1_by_hand():
    assert exact_match("The Cat, sat.", "a cat  sat") == 1
    assert exact_match("another", "other") == 0  # articles go as words, not as letters
    assert token_f1("the big big cat", "a big cat sat there") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert token_f1("The.", "an") == 1 and token_f1("dog", "cat") == 0


def test_all_measures_of_three_answers():
    questions, references = ["q1", "q2", "q3"], [TRUTH, "four words stand here", "dog"]
    answers = [GIVEN, "four words stand here", ""]
    examples, numbers, signatures = measure_answers(questions, references, answers)
    assert list(examples.columns) == COLUMNS
    assert examples[["question", "reference", "answer"]].to_numpy().T.tolist() == [questions, references, answers]
    assert examples["exact_match"].tolist() == [0, 1, 0]
    assert numbers["bleu"] == pytest.approx((sentence_bleu(TRUTH, GIVEN) + 1 + 0) / 3)
    assert numbers["token_f1"] == pytest.approx((token_f1(TRUTH, GIVEN) + 1 + 0) / 3)
    assert numbers["corpus_bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert numbers["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert signatures.keys() == numbers.keys()
    assert "nltk:3.10.4" in signatures["bleu"] and "method4" in signatures["bleu"] and "Punkt" in signatures["bleu"]
    assert signatures["corpus_bleu"] == "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
    assert signatures["chrf"] == "chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"


def test_the_references_themselves_get_the_most():
    references = [TRUTH, GIVEN, "$12.5"]
    numbers = measure_answers(["q"] * 3, references, references).numbers
    assert numbers["exact_match"] == numbers["token_f1"] == 1
    assert numbers["corpus_bleu"] == pytest.approx(100) and numbers["chrf"] == pytest.approx(100)
    short = (math.log(2) / 10 * math.log(2) / 20) ** 0.25
    assert numbers["bleu"] == numbers["bleu_limit"] == pytest.approx((1 + 1 + short) / 3)


def test_other_numbers_of_questions_and_answers_are_refused():
    with pytest.raises(RunError, match=r"2 questions, 2 references and 1 answers. Give one reference and one answer"):
        measure_answers(["q", "r"], ["x", "y"], ["x"])


def made_up_answers(keep, seed, number=60):
    """References of ten words and answers that keep each word with chance `keep`."""
    draw = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in draw.integers(30, size=10)) for _ in range(number)]
    draw = np.random.default_rng(seed)
    answers = [" ".join(w if draw.random() < keep else "zz" for w in each.split()) for each in references]
    return references, answers


@pytest.mark.parametrize("metric", ["corpus_bleu", "chrf"])
def test_the_paired_bootstrap_tells_a_difference_from_noise(metric):
    references, better = made_up_answers(0.9, seed=1)
    _, worse = made_up_answers(0.6, seed=2)
    found = paired_bleu(references, worse, better, metric)
    direct = {"corpus_bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric]
    assert found.score_a == pytest.approx(direct(worse, [references]).score)
    assert found.score_b == pytest.approx(direct(better, [references]).score)
    assert found.difference == pytest.approx(found.score_b - found.score_a)
    assert 0 < found.low < found.difference < found.high and found.p_value == pytest.approx(1 / 1001)
    assert "bs:1000|seed:12345" in found.signature
    assert paired_bleu(references, worse, better, metric) == found
    turned = paired_bleu(references, better, worse, metric)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    _, alike = made_up_answers(0.6, seed=3)
    noise = paired_bleu(references, worse, alike, metric)
    assert noise.low < 0 < noise.high and noise.p_value > 0.05


def test_the_interval_is_of_the_resamples_that_sacrebleu_tests():
    references, first = made_up_answers(0.7, seed=1, number=25)
    _, second = made_up_answers(0.75, seed=2, number=25)
    found = paired_bleu(references, first, second)
    rows = np.random.default_rng(12345).choice(25, size=(1000, 25), replace=True)

    def score(answers, chosen):
        return sacrebleu.corpus_bleu([answers[i] for i in chosen], [[references[i] for i in chosen]]).score

    differences = np.array([score(second, chosen) - score(first, chosen) for chosen in rows])
    assert (found.low, found.high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-3)
    sizes = np.abs(differences)
    beyond = (sizes - sizes.mean() > abs(found.difference)).sum()
    assert found.p_value == pytest.approx((beyond + 1) / 1001)


def test_the_same_answers_do_not_differ():
    references, answers = made_up_answers(0.7, seed=1, number=10)
    found = paired_bleu(references, answers, list(answers))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_answers_to_different_questions_are_not_compared():
    references, answers = made_up_answers(0.7, seed=1, number=5)
    table = pd.DataFrame({"question": [f"q{i}" for i in range(5)], "reference": references, "answer": answers})
    assert compare_answers(table, table.set_axis(range(3, 8))) == paired_bleu(references, answers, answers)
    with pytest.raises(RunError, match=r"ce answered 5 questions and kd 4: not the same ones. Compare variants that"):
        compare_answers(table, table[1:], names=("ce", "kd"))
    with pytest.raises(RunError, match=r"ce and kd have another question in row 1: 'q1' and 'q9'"):
        compare_answers(table, table.assign(question=["q0", "q9", "q2", "q3", "q4"]), names=("ce", "kd"))
    with pytest.raises(RunError, match=r"a and b have another reference in row 0: "):
        compare_answers(table, table.assign(reference=references[::-1]))
    with pytest.raises(RunError, match=r"The second side has 4 answers to 5 questions. Compare variants on the same"):
        paired_bleu(references, answers, answers[1:])
    with pytest.raises(RunError, match=r"There is no question to compare answers to"):
        paired_bleu([], [], [])
