"""Benchmarks of distillation: all sides compute the same thing, peers that are absent are skipped, bars are judged.

python -m pytest tests/test_distillation_benchmarks.py
"""

import math

import pandas as pd
import pytest
import torch

from nbutils.benchmarks import caches as cache_benchmarks
from nbutils.benchmarks import distillation as distillation_benchmarks
from nbutils.benchmarks.caches import Sizes, Student, cache_results, cache_verdicts, compare_caches
from nbutils.benchmarks.distillation import (
    CASES,
    Problem,
    answers_only,
    chunked,
    compare,
    disagreements,
    peers,
    results,
    textbook,
    torch_kl_div,
    verdicts,
)
from nbutils.data.batches import IGNORE_INDEX
from nbutils.foundation import places
from nbutils.models import products
from nbutils.objectives import WeightedTerm, chunked_head, distillation, head

TINY = Sizes(vocab=67, blocks=3, block_size=12, batch=2, top_k=5, teacher=(2, 32, 2), student=(1, 16, 2))


@pytest.fixture
def problem():
    return Problem.random(positions=16, vocab=300, width=8, teacher_width=12)


def test_a_quarter_of_the_positions_is_masked(problem):
    assert (problem.labels == IGNORE_INDEX).sum() == 4


@pytest.mark.parametrize("objective", CASES.values(), ids=CASES)
def test_all_sides_give_one_loss_and_the_same_gradients(problem, objective):
    wanted = textbook(problem, objective)()
    for side in (chunked, torch_kl_div):
        for found, theirs in zip(side(problem, objective)(), wanted, strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)


def test_a_peer_that_is_there_agrees_in_value_and_gradients_but_for_torchtunes_value(problem):
    steps, skipped = peers(problem)
    assert {name for _, name in steps} | set(skipped) == {
        n for makers in distillation_benchmarks._PEERS.values() for n in makers
    }
    if not steps:
        pytest.skip(f"no peer is installed: {skipped}")
    for (case, name), step in steps.items():
        (value, *gradients), (wanted, *theirs) = step(), textbook(problem, CASES[case])()
        for found, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6, msg=name)
        entropy = _teacher_entropy(problem) if name.startswith("torchtune") else 0.0
        torch.testing.assert_close(value, wanted + entropy, rtol=1e-4, atol=1e-5, msg=name)


def _teacher_entropy(problem):
    temperature = distillation_benchmarks.TEMPERATURE
    logits = (problem.teacher_hidden @ problem.teacher_weight.t())[problem.labels != IGNORE_INDEX] / temperature
    return temperature**2 * torch.distributions.Categorical(logits=logits).entropy().mean()


def test_a_peer_that_is_absent_is_skipped_with_its_reason(problem, monkeypatch):
    def absent(objective):
        raise ModuleNotFoundError("No module named 'nowhere'")

    def refuses(objective):
        def loss(problem):
            raise RuntimeError("\n  this machine will not do\nmore")

        return loss

    makers = {"absent": absent, "refuses": refuses}
    monkeypatch.setattr(distillation_benchmarks, "_PEERS", {"KL": makers, "CE + KL": {}})
    steps, skipped = peers(problem)
    assert steps == {} and skipped["absent"] == "ModuleNotFoundError: No module named 'nowhere'"
    assert skipped["refuses"] == "RuntimeError: this machine will not do"


def test_a_side_that_computes_something_else_is_named(problem, monkeypatch):
    def cross_entropy(objective):
        return lambda p: 2 * textbook_loss(p)

    def textbook_loss(p):
        kept = p.labels != IGNORE_INDEX
        teacher = (p.teacher_hidden @ p.teacher_weight.t())[kept] / 2
        return -(4 * teacher.softmax(-1) * ((p.hidden @ p.weight.t())[kept] / 2).log_softmax(-1)).sum(-1).mean()

    monkeypatch.setattr(distillation_benchmarks, "_PEERS", {"KL": {"another": cross_entropy}, "CE + KL": {}})
    measured, skipped = compare(problem, rounds=1)
    assert not skipped and set(measured["case"]) == set(CASES)
    told = disagreements(measured)
    assert len(told) == 2 and all(sentence.startswith("another (KL): its ") for sentence in told)
    assert "gradient is not the textbook form's, 100.0% away" in told[1]


def test_the_best_of_all_others_is_the_standard_and_the_bare_products_are_not_among_them():
    rows = [
        ("KL", "peer", 2.0, 300.0),
        ("KL", "textbook", 3.0, 200.0),
        ("KL", "matrix_products", 0.5, 10.0),
        ("KL", "chunked", 1.9, 101.0),
    ]
    measured = pd.DataFrame(rows, columns=["case", "side", "seconds", "mib"])
    answers = pd.DataFrame({"seconds": {"all tokens": 2.0, "answers": 0.6}})
    judged = verdicts(measured, answers)
    assert judged["whose"].tolist() == ["peer", "textbook", "KL of all tokens"]
    assert judged["ratio"].tolist() == pytest.approx([0.95, 0.505, 0.3])
    assert judged["within the bar"].tolist() == [True, False, True]
    numbers = results(measured, judged)
    assert numbers["kl_time_ratio"] == pytest.approx(0.95) and numbers["kl_memory_bar"] == 0.5
    assert numbers["kl_chunked_mib"] == 101.0 and numbers["kl_of_answers_time_ratio"] == pytest.approx(0.3)


def test_answers_are_a_quarter_of_the_tokens_and_padding_is_none_of_them(problem):
    table = answers_only(problem, rounds=1)
    assert table["tokens"].to_dict() == {"all tokens": 16, "answers": 4}
    assert (table["seconds"] > 0).all()


# ---- the head's memory and precision ---------------------------------------------------------------------------------


def test_distillation_needs_no_more_buffers_than_cross_entropy(problem, monkeypatch):
    made = []
    kind = head.Buffers

    class Counted(kind):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(head, "Buffers", Counted)
    for objective in CASES.values():
        chunked(problem, objective)()
    assert [len(buffers._all) for buffers in made] == [3, 3]


def test_chunks_are_even_and_small_on_a_cpu(monkeypatch):
    monkeypatch.setattr(products, "CHUNK_BYTES", 40 * 2**20)
    assert products.chunk_rows(32768, 768, "cuda") == 256  # three, where 320 would fit and leave 128 for the last
    assert products.chunk_rows(32768, 320, "cuda") == 320 and products.chunk_rows(32768, 321, "cuda") == 192
    assert products.chunk_rows(1024, 4096, "cuda") == 4096 and products.chunk_rows(1024, 4096, "cpu") == 256


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_student_that_equals_its_teacher_has_value_and_gradients_zero(divergence):
    p = Problem.random(positions=40, vocab=500, width=16, teacher_width=16)
    same = Problem(p.hidden, p.weight, p.hidden.detach(), p.weight.detach(), p.labels)
    value, *gradients = chunked(same, distillation(divergence, 0.0, 1.0, 2.0))()
    assert abs(value) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-2), (torch.bfloat16, 2e-2)])
def test_a_teacher_close_to_the_student_leaves_the_small_divergence_exact(dtype, bound):
    """The difference of two large sums would drown a divergence of 1e-5 nats."""
    p = Problem.random(positions=40, vocab=500, width=16, teacher_width=16)
    generator = torch.Generator().manual_seed(2)
    near = p.hidden.detach() + 2e-3 * torch.randn(p.hidden.shape, generator=generator)
    sides = [tensor.detach().to(dtype) for tensor in (p.hidden, p.weight, near, p.weight)]
    objective = distillation("forward", 0.0, 1.0, 2.0)
    wide = [tensor.double() for tensor in sides]
    ours = Problem(*(s.requires_grad_(i < 2) for i, s in enumerate(sides)), p.labels)
    exact = Problem(*(s.requires_grad_(i < 2) for i, s in enumerate(wide)), p.labels)
    (value, *found), (wanted, *theirs) = chunked(ours, objective)(), textbook(exact, objective)()
    assert 1e-7 < wanted < 1e-3
    assert abs(value.double() - wanted) / wanted < bound
    for gradient, reference in zip(found, theirs, strict=True):
        assert (gradient.double() - reference).norm() / reference.norm() < bound


def test_teacher_logits_that_were_given_up_are_formed_again(problem):
    """Two terms that need them, one after the other: the second must not read the first one's scratch memory."""
    kept = (problem.labels != IGNORE_INDEX).sum()
    terms = [distillation("forward", 0.0, 1.0, t).terms[1] for t in (1.0, 3.0)]
    matrices = problem.hidden, problem.weight, None, problem.labels
    both, _ = chunked_head(*matrices, [WeightedTerm(t, 1.0, kept) for t in terms], problem.teacher)
    apart = [chunked_head(*matrices, [WeightedTerm(t, 1.0, kept)], problem.teacher)[0] for t in terms]
    torch.testing.assert_close(both, sum(apart))
    leaves = problem.hidden, problem.weight
    found, wanted = torch.autograd.grad(both, leaves), torch.autograd.grad(sum(apart), leaves)
    torch.testing.assert_close(found, wanted)


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_a_cached_teacher_is_compared_with_the_live_one_and_leaves_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "RUNS", tmp_path)
    measured = compare_caches(TINY, rounds=1)
    assert measured.index.tolist() == ["live", "hidden", "topk"]
    assert measured["bytes a token"].tolist() == [0, 2 * 32, 2 * 5 + 2 * 6]
    assert measured.loc["hidden", "loss"] == pytest.approx(measured.loc["live", "loss"], rel=1e-4)
    assert measured.loc["topk", "loss"] != measured.loc["live", "loss"]
    assert (measured["seconds"] > 0).all() and (measured["seed noise"] > 0).all()
    assert not list((tmp_path / "teacher_cache").glob("[!.]*"))
    assert cache_results(measured)["cached_hidden_bytes_per_token"] == 64


def test_an_epoch_lowers_the_loss(monkeypatch):
    data, live = TINY.data(), TINY.live_teacher()
    student = Student(TINY, live, data.blocks["train"])
    before = student.loss(live, data.blocks["train"])
    for _ in range(3):
        student.epoch()
    assert student.loss(live, data.blocks["train"]) < before


def test_a_cache_is_judged_by_its_time_and_by_the_seed_noise():
    columns = {"seconds": [2.0, 1.1, 0.7], "loss": [5.0, 5.01, 5.3], "seed noise": [0.2] * 3}
    judged = cache_verdicts(pd.DataFrame(columns, index=["live", "hidden", "topk"]))
    assert judged["ratio"].tolist() == pytest.approx([0.55, 0.05, 0.35, 1.5])
    assert judged["within the bar"].tolist() == [False, True, True, False]
    assert cache_benchmarks.BARS == {"hidden": 0.5, "topk": 0.4}
    assert not math.isnan(judged["bar"].sum())
