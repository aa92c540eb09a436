"""Models of counts: probabilities that sum to one, by hand, and what they leave out.

python -m pytest tests/evaluation/test_count_models.py
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from nbutils.evaluation.count_models import CountModel, Tokens, _tokens, beside_floors

VOCAB = 7


def rows_of(*rows: list[int]) -> Tokens:
    return _tokens(Dataset.from_dict({"input_ids": list(rows)}))


@pytest.fixture(scope="module")
def train() -> Tokens:
    generator = np.random.default_rng(0)
    return rows_of(*generator.integers(0, VOCAB - 1, (30, 9)).tolist())


def by_hand(rows: list[list[int]], order: int, context: tuple[int, ...], token: int) -> float:
    """Chen and Goodman's formula, one n-gram at a time."""
    grams = Counter(tuple(row[i : i + order]) for row in rows for i in range(len(row) - order + 1))
    levels = {order: grams}
    for length in range(order - 1, 0, -1):
        levels[length] = Counter(gram[1:] for gram in levels[length + 1])
    probability = 1 / VOCAB
    for length in range(1, order + 1):
        counts, before = levels[length], context[len(context) - length + 1 :] if length > 1 else ()
        occurring = Counter(counts.values())
        discount = occurring[1] / (occurring[1] + 2 * occurring[2]) if occurring[1] else 0
        same = {gram: count for gram, count in counts.items() if gram[:-1] == before}
        if same:
            seen = max(counts[(*before, token)] - discount, 0)
            probability = (seen + discount * len(same) * probability) / sum(same.values())
    return probability


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_are_those_of_the_formula_and_sum_to_one(train, order):
    rows = train.ids.reshape(30, 9).tolist()
    model = CountModel(train, order, VOCAB)
    for context in ([0, 1], [3, 3], [6, 6], [5, 0]):  # 6 was never seen
        asked = rows_of(*([*context, token] for token in range(VOCAB)))
        last = model.probabilities(asked)[2::3]
        assert last.sum() == pytest.approx(1)
        assert last == pytest.approx([by_hand(rows, order, tuple(context), token) for token in range(VOCAB)])


def test_the_first_tokens_of_a_row_have_the_context_that_is_there(train):
    """Of a trigram model the second token has the bigram of continuation counts, the first the unigram of them."""
    rows = train.ids.reshape(30, 9).tolist()
    one, two = CountModel(train, 3, VOCAB).probabilities(rows_of([4, 2]))
    trigrams = Counter(tuple(row[i : i + 3]) for row in rows for i in range(7))
    pairs = Counter(gram[1:] for gram in trigrams)
    alone = Counter(pair[1:] for pair in pairs)

    def mixed(counts: Counter, gram: tuple[int, ...], lower: float) -> float:
        occurring = Counter(counts.values())
        discount = occurring[1] / (occurring[1] + 2 * occurring[2]) if occurring[1] else 0
        same = [count for other, count in counts.items() if other[:-1] == gram[:-1]]
        return (max(counts[gram] - discount, 0) + discount * len(same) * lower) / sum(same)

    of_two = mixed(alone, (2,), 1 / VOCAB)
    assert one == pytest.approx(mixed(alone, (4,), 1 / VOCAB))
    assert two == pytest.approx(mixed(pairs, (4, 2), of_two))


def test_scored_is_what_a_language_model_scores():
    blocks = rows_of([1, 2, 3], [4, 5, 0])
    assert blocks.scored.tolist() == [False, True, True] * 2
    questions = _tokens(Dataset.from_dict({"input_ids": [[1, 2, 3, 4]], "labels": [[-100, -100, 3, 4]]}))
    assert questions.scored.tolist() == [False, False, True, True]


def test_as_many_tokens_are_counted_as_were_seen():
    data = Dataset.from_dict({"input_ids": [[number] * 10 for number in range(100)]})
    some = _tokens(data, 250)
    assert len(some.ids) == 250 and some.ids[0] == 0 and some.ids[-1] == 99


def test_the_line_says_which_floors_are_not_reached():
    told = beside_floors(
        5.99, {"unigram_eval_ce_loss": 6.32, "bigram_eval_ce_loss": 4.52, "trigram_eval_ce_loss": 3.99}
    )
    assert "below the unigram model's 6.320, NOT below the bigram model's 4.520, NOT below the trigram" in told
