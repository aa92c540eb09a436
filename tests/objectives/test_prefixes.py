"""Targets over prefix sets: python -m pytest tests/test_prefixes.py"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from prefix_tokenizers import KINDS, PADDED, dense_target, llama3, rows_by_name, sentence_piece, word_level
from real_data import REAL_DATA, needs_real_data

from nbutils.data.bytes_of_tokens import token_bytes
from nbutils.data.tokenization import load_tokenizer, tokenize
from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.objectives.prefixes import (
    SmoothedTargets,
    Smoothing,
    check_smoothing,
    count_distribution,
    describe,
    effective_smoothing,
    equals_cross_entropy,
    leaves_no_gold_mass,
    mean_target_entropy,
    predicted_cost,
    smoothed_targets,
)
from nbutils.objectives.prefixes.settings import FORMS, OVER
from nbutils.objectives.prefixes.table import build_table


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest):
    return KINDS[request.param]()


# Settings


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"form": "normalized"}, ["smoothing is 'normalized'", "'normalised'"]),
        ({"over": "prefix"}, ["smoothed_over is 'prefix'", "'prefixes'"]),
        ({"over": "zebra"}, ["smoothed_over is 'zebra'", "Valid names: prefixes, "]),
        ({"tau": 0.0}, ["tau is 0.0", "a number above 0", "set smoothing to none"]),
        ({"tau": -1.0}, ["tau is -1.0", "a number above 0"]),
        ({"tau": math.inf}, ["tau is inf"]),
        ({"tau": math.nan}, ["tau is nan"]),
        ({"eps": 1.1}, ["eps is 1.1", "from 0 to 1"]),
        ({"eps": -0.1}, ["eps is -0.1", "from 0 to 1"]),
        ({"eps": math.nan}, ["eps is nan"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_cure(changed, words) -> None:
    with pytest.raises(ParameterError) as refused:
        check_smoothing(**{"form": "normalised", "tau": 0.2, "eps": 0.1, "over": "prefixes"} | changed)
    assert all(word in str(refused.value) for word in words), refused.value


def test_cells_that_are_cross_entropy_are_known_as_such() -> None:
    same = {(form, tau) for form in FORMS for tau in (0.05, 0.1, 0.2) if equals_cross_entropy(Smoothing(form, tau))}
    assert same == {("unnormalised", 0.05), ("unnormalised", 0.1), ("none", 0.05), ("none", 0.1), ("none", 0.2)}
    assert equals_cross_entropy(Smoothing("mixed_uniform", eps=0.0))
    assert not equals_cross_entropy(Smoothing("mixed_uniform", eps=0.01))
    chain = build_table(word_level(*("a" * n for n in range(1, 60))), 60)  # every prefix is a token: the worst case
    mass = smoothed_targets(chain, Smoothing("unnormalised", 0.1)).gold_mass
    assert 4e-5 < (1 - mass).max() < 1e-4


def test_no_gold_mass_is_left_by_eps_1_alone() -> None:
    assert leaves_no_gold_mass(Smoothing("mixed_uniform", eps=1.0))
    assert not leaves_no_gold_mass(Smoothing("mixed_uniform", eps=0.9))
    assert not leaves_no_gold_mass(Smoothing("normalised", eps=1.0))


# Targets

WORDS = ("s", "st", "straw", " ", " straw")  # ids 1 to 5; 0 is special


def words_table():
    return build_table(word_level(*WORDS), 7)


def softmax(*scores: float) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("none", [0, 0, 1]),
        ("normalised", softmax(1 / 5 / 0.5, 2 / 5 / 0.5, 5 / 5 / 0.5)),
        ("unnormalised", softmax(1 / 0.5, 2 / 0.5, 5 / 0.5)),
        ("mixed_uniform", [0.15, 0.15, 0.7]),
        ("mixed_normalised", [*(0.3 * w for w in softmax(1 / 5 / 0.5, 2 / 5 / 0.5)), 0.7]),
        ("mixed_unnormalised", [*(0.3 * w for w in softmax(1 / 0.5, 2 / 0.5)), 0.7]),
    ],
)
def test_targets_by_hand(form: str, expected: list[float]) -> None:
    targets = smoothed_targets(words_table(), Smoothing(form, tau=0.5, eps=0.3))
    tokens, weights = targets.row(3)
    assert tokens.tolist() == [1, 2, 3]
    assert weights == pytest.approx(expected, abs=1e-7)
    assert targets.gold_mass[3] == pytest.approx(expected[-1])
    assert targets.gold_mass[[0, 1, 4, 6]].tolist() == [1, 1, 1, 1]  # special, no proper prefix, no token


@pytest.mark.parametrize(("form", "expected"), [("normalised", [0, 0, 1]), ("mixed_unnormalised", [0, 0.3, 0.7])])
def test_a_tiny_tau_leaves_all_to_the_longest(form: str, expected: list[float]) -> None:
    assert smoothed_targets(words_table(), Smoothing(form, 1e-320, 0.3)).row(3)[1] == pytest.approx(expected)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("form", FORMS)
def test_every_target_is_a_distribution(form: str, over: str, tokenizer) -> None:
    found = build_table(tokenizer, len(tokenizer) + PADDED)
    for smoothing in (Smoothing(form, 0.05, 1.0, over), Smoothing(form, 1e-5, 0.2, over), Smoothing(form, 2, 0, over)):
        targets = smoothed_targets(found, smoothing)
        assert (targets.tokens[targets.offsets[1:] - 1] == np.arange(len(found.lengths))).all()
        for gold in range(0, len(found.lengths), 7):
            q = dense_target(targets, gold)
            assert q.min() > -1e-9 and q.sum() == pytest.approx(1, abs=1e-6)
            assert q[gold] == pytest.approx(targets.gold_mass[gold], abs=1e-7)
            seen = q[q > 1e-12]
            assert targets.entropy[gold] == pytest.approx(-(seen * np.log(seen)).sum(), abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_controls_keep_the_gold_mass_exactly(form: str) -> None:
    found = build_table(KINDS["byte-level"](), 400)
    wanted = smoothed_targets(found, Smoothing(form, 0.3, 0.4))
    uniform = smoothed_targets(found, Smoothing(form, 0.3, 0.4, "uniform"))
    random = smoothed_targets(found, Smoothing(form, 0.3, 0.4, "random"))
    assert (uniform.gold_mass == wanted.gold_mass).all() and (random.gold_mass == wanted.gold_mass).all()
    assert (random.weights == wanted.weights).all() and (random.entropy == wanted.entropy).all()
    gold = int(found.sizes.argmax())
    others = np.delete(dense_target(uniform, gold), gold)
    assert others == pytest.approx(np.full(399, (1 - wanted.gold_mass[gold]) / 399))
    assert (np.diff(uniform.offsets) == 1).all()


def assert_random_control(found, targets: SmoothedTargets, texts: list[bytes]) -> int:
    """How many stand-ins are shorter or longer than the prefix they stand in for."""
    others = 0
    for gold in np.flatnonzero(found.sizes > 1):
        row, prefixes = targets.tokens[targets.offsets[gold] : targets.offsets[gold + 1]].tolist(), found.row(gold)
        assert len(set(row)) == len(row) == len(prefixes) and row[-1] == gold
        for stand_in, prefix in zip(row[:-1], prefixes, strict=False):
            assert texts[stand_in] and not texts[gold].startswith(texts[stand_in])
            assert len(texts[stand_in]) < len(texts[gold])
            assert texts[stand_in].isascii() or not texts[gold].isascii()
            others += len(texts[stand_in]) != len(texts[prefix])
    return others


def test_random_tokens_are_as_long_as_the_prefixes_and_none_of_them() -> None:
    tokenizer = KINDS["byte-level"]()
    found, texts = build_table(tokenizer, 400), token_bytes(tokenizer)
    first, again, second = (smoothed_targets(found, Smoothing(over="random"), seed) for seed in (0, 0, 1))
    fallbacks = assert_random_control(found, first, texts)
    assert fallbacks < 0.1 * len(found.tokens)
    assert (first.tokens == again.tokens).all() and not (first.tokens == second.tokens).all()


def test_two_random_tokens_of_a_row_are_never_the_same() -> None:
    found, texts = build_table(sentence_piece(), 15), token_bytes(sentence_piece())
    for seed in range(10):  # a space and its byte stand before a word: two tokens of one length
        assert_random_control(found, smoothed_targets(found, Smoothing(over="random"), seed), texts)


def test_a_random_token_is_shorter_where_none_is_as_long() -> None:
    found = build_table(word_level("a", "b", "c", "ab", "abc"), 6)
    row = smoothed_targets(found, Smoothing(over="random")).row(5)[0].tolist()
    assert sorted(row[:-1]) == [2, 3] and row[-1] == 5  # for a and ab: b and c in some order


def test_too_few_tokens_for_the_random_control_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"Token 2 has 1 proper prefixes.*too few other.*smoothed_over to uniform"):
        smoothed_targets(build_table(word_level("a", "ab"), 3), Smoothing(over="random"))


def test_whitespace_is_left_out_of_the_sets_and_one_hot_itself() -> None:
    found = build_table(word_level(" ", "  ", " s", "  st", "s", "st"), 7)
    targets = smoothed_targets(found, Smoothing("normalised", 0.5, over="prefixes_but_whitespace"))
    assert [targets.row(gold)[0].tolist() for gold in range(1, 7)] == [[1], [2], [3], [4], [5], [5, 6]]
    assert targets.gold_mass[1:6].tolist() == [1] * 5
    assert smoothed_targets(found, Smoothing("normalised", 0.5)).row(4)[0].tolist() == [1, 2, 4]
    assert rows_by_name(sentence_piece())["\u3000"] == ["<0xE3>", "\u3000"]
    bytes_of_whitespace = smoothed_targets(build_table(sentence_piece(), 15), Smoothing(over="prefixes_but_whitespace"))
    assert bytes_of_whitespace.row(14)[0].tolist() == [14]
    assert targets.row(6)[1] == pytest.approx(softmax(0.5 / 0.5, 1 / 0.5))


@needs_real_data
def test_gold_mass_and_entropy_of_llama_3() -> None:
    """Mean over the ASCII vocabulary, as reckoned once with another program."""
    _, found = llama3()
    published = {
        0.05: (0.987, 0.05, 1.000, 0.000),
        0.1: (0.932, 0.24, 1.000, 0.000),
        0.2: (0.767, 0.72, 0.997, 0.02),
        0.5: (0.476, 1.31, 0.935, 0.23),
        1: (0.352, 1.44, 0.800, 0.57),
        2: (0.292, 1.48, 0.607, 1.02),
    }
    for tau, numbers in published.items():
        both = [smoothed_targets(found, Smoothing(form, tau)) for form in ("normalised", "unnormalised")]
        ours = [values[found.ascii].mean() for each in both for values in (each.gold_mass, each.entropy)]
        assert ours == pytest.approx(numbers, abs=0.0055) and ours[::2] == pytest.approx(numbers[::2], abs=0.0006)
    targets = smoothed_targets(found, Smoothing())
    assert sum(each.nbytes for each in (targets.offsets, targets.tokens, targets.weights)) <= 6e6


@needs_real_data
def test_the_random_control_of_llama_3() -> None:
    tokenizer, found = llama3()
    targets = smoothed_targets(found, Smoothing(over="random"))
    assert assert_random_control(found, targets, token_bytes(tokenizer)) < 1000


# Arithmetic


def test_mean_over_a_corpus_by_hand() -> None:
    targets = smoothed_targets(words_table(), Smoothing("mixed_uniform", eps=0.3))
    counts = np.array([0, 1, 0, 3, 0, 0, 0])
    assert effective_smoothing(targets, counts) == pytest.approx(0.75 * 0.3)
    assert predicted_cost(targets, counts) == pytest.approx(-0.75 * math.log(0.7))
    entropy = -2 * 0.15 * math.log(0.15) - 0.7 * math.log(0.7)
    assert mean_target_entropy(targets, counts) == pytest.approx(0.75 * entropy)
    nothing_left = smoothed_targets(words_table(), Smoothing("mixed_uniform", eps=1.0))
    assert predicted_cost(nothing_left, counts) == math.inf
    assert not np.signbit(targets.entropy).any()
    assert predicted_cost(nothing_left, np.array([1, 1, 0, 0, 0, 0, 0])) == 0


@needs_real_data
def test_what_a_published_smoothing_costs_by_arithmetic_alone() -> None:
    """LZ78/nanochat leaves the gold token 1 / (1 + w d), d its proper prefixes; the ceilings with GPT-2's tokens.

    They were reckoned on the raw WikiText-2; in the file here rare words are <unk>, three tokens.
    """
    tokenizer = load_tokenizer(f"{REAL_DATA}/tokenizers/gpt2")
    found = build_table(tokenizer, len(tokenizer))
    text = Path(f"{REAL_DATA}/wikitext2/test.txt").read_text(encoding="utf-8")
    counts = np.bincount(np.concatenate(tokenize(text.splitlines(keepends=True), tokenizer)), minlength=50_257)
    bytes_per_token = len(text.encode()) / counts.sum()
    for w, ceiling in ((0.1, 0.0773), (0.5, 0.2613), (1.0, 0.3922)):
        gold_mass = 1 / (1 + w * (found.sizes - 1))
        targets = SmoothedTargets(*[np.zeros(0)] * 5, gold_mass=gold_mass.astype(np.float32))
        bits_per_byte = predicted_cost(targets, counts) / math.log(2) / bytes_per_token
        assert bits_per_byte == pytest.approx(ceiling, rel=0.025)


# For people to look at


def test_words_are_shown_with_their_targets() -> None:
    tokenizer = KINDS["byte-level"]()
    found = build_table(tokenizer, 400)
    (straw, several) = describe(smoothed_targets(found, Smoothing()), tokenizer, [" straw", " straw hat there"])
    assert straw["gold"] == straw["tokens"][-1] == several["gold"] == " straw"
    assert straw["tokens"][0] == " " and all(straw["gold"].startswith(token) for token in straw["tokens"])
    assert sum(straw["weights"]) == pytest.approx(1) and straw["weights"] == sorted(straw["weights"])
    (uniform,) = describe(smoothed_targets(found, Smoothing(over="uniform")), tokenizer, [" straw"])
    assert uniform["weights"] == pytest.approx(straw["weights"][-1:])
    assert uniform["each_other"] == pytest.approx((1 - straw["weights"][-1]) / 399)
    json.dumps([straw, uniform])


def test_set_sizes_are_counted_in_the_vocabulary_and_in_the_corpus() -> None:
    frame = count_distribution(words_table(), np.array([9, 1, 0, 2, 0, 1, 0]))
    assert frame.index.tolist() == [1, 2, 3] and frame["tokens"].tolist() == [2, 2, 1]
    assert frame["share_of_vocabulary"].tolist() == [0.4, 0.4, 0.2]
    assert frame["share_of_corpus"].tolist() == [0.25, 0.25, 0.5]
