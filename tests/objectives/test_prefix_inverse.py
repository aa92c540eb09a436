"""Un-smoothing: python -m pytest tests/test_prefix_inverse.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prefix_tokenizers import KINDS, dense_target, word_level

from nbutils.foundation.errors import ParameterError
from nbutils.objectives.prefixes import PrefixTable, SmoothedTargets, Smoothing, Unsmoothing, smoothed_targets
from nbutils.objectives.prefixes.settings import FORMS, OVER
from nbutils.objectives.prefixes.table import build_table

ROWS = 6
# A prefix at a large tau takes nearly as much as the gold token: the matrix is then as far from 1 as it gets.
SETTINGS = [(form, tau, eps) for form in FORMS for tau, eps in ((0.2, 0.1), (2.0, 0.5))]


def table(kind: str) -> PrefixTable:
    tokenizer = KINDS[kind]()
    return build_table(tokenizer, len(tokenizer) + 2)


def matrix(targets: SmoothedTargets) -> np.ndarray:
    """Column y is q_y, (vocab, vocab) float64."""
    return np.stack([dense_target(targets, gold) for gold in range(len(targets.gold_mass))], axis=1)


def text_distributions(vocab: int) -> np.ndarray:
    """(ROWS, vocab), as peaked as a language model's."""
    drawn = np.random.default_rng(0).dirichlet(np.full(vocab, 0.05), ROWS) + 1e-12
    return drawn / drawn.sum(1, keepdims=True)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("form", "tau", "eps"), SETTINGS)
@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_what_was_smoothed_comes_back(kind: str, form: str, tau: float, eps: float, over: str) -> None:
    found = table(kind)
    targets = smoothed_targets(found, Smoothing(form, tau, eps, over))
    dense, wanted = matrix(targets), text_distributions(len(found.lengths))
    p = wanted @ dense.T
    given = torch.from_numpy(p.copy())
    inverse = Unsmoothing(targets, found.lengths)
    ours = inverse.invert(given)
    assert ours.probabilities.numpy() == pytest.approx(np.linalg.solve(dense, p.T).T, abs=1e-6)
    assert ours.probabilities.numpy() == pytest.approx(wanted, abs=1e-6)
    assert ours.negative_mass.max() < 1e-6
    assert (given.numpy() == p).all()
    single = inverse.invert(given.float())
    assert single.probabilities.dtype == torch.float32
    assert single.probabilities.numpy() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("form", "tau", "eps"), SETTINGS)
def test_noise_becomes_a_distribution_and_what_is_cut_is_told(form: str, tau: float, eps: float, over: str) -> None:
    found = table("byte-level")
    targets = smoothed_targets(found, Smoothing(form, tau, eps, over))
    p = torch.softmax(3 * torch.randn(ROWS, len(found.lengths), generator=torch.manual_seed(0)).double(), -1)
    ours = Unsmoothing(targets, found.lengths).invert(p)
    for row in range(ROWS):
        wanted, below_zero, negative_mass = one_by_one(p[row].numpy(), targets, found.lengths)
        assert ours.probabilities[row].numpy() == pytest.approx(wanted, abs=1e-6)
        assert ours.below_zero[row].numpy().tolist() == below_zero.tolist()
        assert ours.negative_mass[row].item() == pytest.approx(negative_mass, abs=1e-5)
    assert ours.probabilities.min() >= 0
    assert ours.probabilities.sum(1).numpy() == pytest.approx(np.ones(ROWS))
    one_hot = (targets.gold_mass == 1).all()
    assert one_hot or (ours.negative_mass > 0).all()


def one_by_one(p: np.ndarray, targets: SmoothedTargets, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """P of p (vocab,), which tokens came out below 0 and their sum, from the definition: one token after another."""
    dense = matrix(targets)
    if targets.background.any():
        raw = np.linalg.solve(dense, p)
    else:
        raw, kept = np.zeros(len(p)), np.zeros(len(p))
        for gold in np.argsort(-lengths, kind="stable"):
            raw[gold] = (p[gold] - (dense[gold] @ kept - dense[gold, gold] * kept[gold])) / dense[gold, gold]
            kept[gold] = max(raw[gold], 0)
    return np.maximum(raw, 0) / np.maximum(raw, 0).sum(), raw < 0, -np.minimum(raw, 0).sum()


def test_by_hand() -> None:
    """ab is smoothed to a by a half: p(a) = P(a) + P(ab) / 2 and p(ab) = P(ab) / 2."""
    found = build_table(word_level("a", "ab"), 3)
    inverse = Unsmoothing(smoothed_targets(found, Smoothing("mixed_uniform", eps=0.5)), found.lengths)
    ours = inverse.invert(torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4]], dtype=torch.float64))
    assert ours.probabilities.numpy() == pytest.approx(np.array([[0.2, 0.2, 0.6], [0.5 / 1.3, 0, 0.8 / 1.3]]))
    assert ours.below_zero.tolist() == [[False] * 3, [False, True, False]]
    assert ours.negative_mass.numpy() == pytest.approx([0, 0.3])


@pytest.mark.parametrize("over", OVER)
def test_a_target_without_gold_mass_cannot_be_inverted(over: str) -> None:
    found = build_table(word_level("a", "b", "ab"), 4)
    targets = smoothed_targets(found, Smoothing("mixed_uniform", eps=1.0, over=over))
    with pytest.raises(ParameterError, match=r"The target of 1 tokens leaves .* Give eps below 1"):
        Unsmoothing(targets, found.lengths)


def test_lengths_of_another_table_are_noticed() -> None:
    found = build_table(word_level("a", "ab"), 3)
    with pytest.raises(ValueError, match="some prefix is no shorter"):
        Unsmoothing(smoothed_targets(found, Smoothing()), found.lengths[::-1]).invert(torch.ones(1, 3) / 3)
