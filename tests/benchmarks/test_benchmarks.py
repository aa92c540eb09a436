"""Benchmarks: the sides compute the same thing, memory is really measured, ratios are judged by their bars. No timing.

python -m pytest tests/benchmarks/test_benchmarks.py
"""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from nbutils.benchmarks import measuring, sides
from nbutils.benchmarks.caches import BARS, Sizes, Student, cache_results, cache_verdicts, compare_caches
from nbutils.benchmarks.comparisons import (
    DISTILLATION,
    HEAD_BARS,
    HEADS,
    PREFIX_BARS,
    answers_only,
    compare,
    compare_prefixes,
    disagreements,
    growth,
)
from nbutils.benchmarks.measuring import Bar, judge, memory_by_positions, results
from nbutils.benchmarks.sides import TEMPERATURE, Problem, chunked, peers, textbook, torch_kl_div
from nbutils.benchmarks.throughput import peak_flops, step_results, training_steps
from nbutils.data import IGNORE_INDEX
from nbutils.foundation import places
from nbutils.models import products
from nbutils.objectives import WeightedTerm, chunked_head, cosine_mixing, distillation, head

TINY = Sizes(vocab=67, blocks=3, block_size=12, batch=2, top_k=5, teacher=(2, 32, 2), student=(1, 16, 2))


@pytest.fixture
def problem():
    return Problem.random(positions=11, vocab=300, width=8)


@pytest.fixture
def taught():
    return Problem.random(positions=16, vocab=300, width=8, teacher_width=12, masked=0.25)


# ---- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", HEADS.values(), ids=HEADS)
def test_both_sides_of_a_head_give_one_loss_and_the_same_gradients(problem, objective):
    for ours, theirs in zip(chunked(problem, objective)(), textbook(problem, objective)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", DISTILLATION.values(), ids=DISTILLATION)
def test_all_sides_of_distillation_give_one_loss_and_the_same_gradients(taught, objective):
    assert (taught.labels == IGNORE_INDEX).sum() == 4
    wanted = textbook(taught, objective)()
    for side in (chunked, torch_kl_div):
        for found, theirs in zip(side(taught, objective)(), wanted, strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cases", [HEADS, DISTILLATION], ids=["heads", "distillation"])
def test_a_peer_that_is_there_agrees_in_value_and_gradients_but_for_torchtunes_value(problem, taught, cases):
    subject = taught if cases is DISTILLATION else problem
    steps, skipped = peers(subject, cases.items())
    assert {name for _, name in steps} | set(skipped) == {name for case in cases for name in sides.PEERS.get(case, {})}
    assert cases is DISTILLATION or ("cross entropy", "torch linear_cross_entropy") in steps
    for (case, name), step in steps.items():
        (value, *gradients), (wanted, *theirs) = step(), textbook(subject, cases[case])()
        for found, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5, msg=name)
        entropy = _teacher_entropy(subject) if name.startswith("torchtune") else 0.0
        torch.testing.assert_close(value, wanted + entropy, rtol=1e-4, atol=1e-5, msg=name)


def _teacher_entropy(problem):
    logits = (problem.teacher_hidden @ problem.teacher_weight.t())[problem.kept] / TEMPERATURE
    return TEMPERATURE**2 * torch.distributions.Categorical(logits=logits).entropy().mean()


def test_a_peer_that_is_absent_or_refuses_is_skipped_with_its_reason(problem, monkeypatch):
    def absent(objective):
        raise ModuleNotFoundError("No module named 'nowhere'")

    def refuses(objective):
        def loss(problem):
            raise RuntimeError("\n  this machine will not do\nmore")

        return loss

    monkeypatch.setattr(sides, "PEERS", {"cross entropy": {"absent": absent, "refuses": refuses}})
    reasons = {
        "absent": "ModuleNotFoundError: No module named 'nowhere'",
        "refuses": "RuntimeError: this machine will not do",
    }
    assert peers(problem, HEADS.items()) == ({}, reasons)


def test_a_side_that_computes_something_else_is_named(taught, monkeypatch):
    def doubled(objective):
        return lambda p: 2 * _loss(p)

    def _loss(p):
        teacher = (p.teacher_hidden @ p.teacher_weight.t())[p.kept] / 2
        return -(4 * teacher.softmax(-1) * ((p.hidden @ p.weight.t())[p.kept] / 2).log_softmax(-1)).sum(-1).mean()

    monkeypatch.setattr(sides, "PEERS", {"KL": {"another": doubled}})
    measured, skipped = compare(taught, DISTILLATION, rounds=1)
    assert not skipped and set(measured["case"]) == set(DISTILLATION)
    told = disagreements(measured)
    assert len(told) == 2 and all(sentence.startswith("another (KL): its ") for sentence in told)
    assert "gradient is not the textbook form's, 100.0% away" in told[1]


def test_comparison_has_every_side_of_every_case(problem):
    measured, skipped = compare(problem, HEADS, rounds=1)
    found = measured.groupby("case")["side"].agg(set)
    assert all({"textbook", "chunked", "matrix_products"} <= found[case] for case in HEADS)
    assert (measured["seconds"] > 0).all() and len(judge(measured, HEAD_BARS)) == 2 * len(HEADS)
    assert not set(skipped) & set(measured["side"])


def test_sparse_targets_are_one_loss_in_both_forms():
    measured = compare_prefixes(Problem.random(9, 300, 8), rounds=1)
    values = measured.set_index("side")["value"]
    assert values["chunked"] == pytest.approx(values["padded"], rel=1e-5)
    judged = judge(measured, PREFIX_BARS)
    assert judged["bar"].tolist() == [1.1, 0.125]
    assert {"prefix_time_ratio", "prefix_padded_mib", "prefix_memory_bar"} <= set(results(measured, judged))


def test_answers_are_a_quarter_of_the_tokens_and_padding_is_none_of_them(taught):
    table = answers_only(taught, rounds=1)
    assert dict(zip(table["case"], table["tokens"], strict=True)) == {"KL of all tokens": 16, "KL of answers": 4}


def test_growth_is_measured_at_every_size_and_drawn():
    grown = growth([5, 10], vocab=300, width=4)
    assert grown.groupby(["case", "side"])["positions"].agg(list).tolist() == [[5, 10]] * 4
    axes = memory_by_positions(grown).axes[0]
    assert sorted(line.get_label() for line in axes.lines) == sorted(
        ["cross entropy, textbook", *(f"{case}, chunked" for case in HEADS)]
    )


# ---- how it is measured and judged -----------------------------------------------------------------------------------


def test_every_side_takes_its_turn_in_every_round_and_the_first_round_does_not_count(monkeypatch):
    calls = []
    clock = iter([0, 100, 0, 100, 0, 1, 0, 10, 0, 3, 0, 30, 0, 2, 0, 20])  # start and end of each step
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    assert measuring.interleaved(steps, rounds=3) == {"a": 2, "b": 20}
    assert calls == ["a", "b"] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is what a CPU is measured by")
def test_extra_memory_sees_what_is_held_at_once_and_forgets_what_was_freed():
    def twice_at_once():
        first = torch.ones(8 * 2**20)  # 32 MiB
        return first + 1

    for _ in range(2):  # the second time the memory has been there before
        assert measuring.extra_memory(twice_at_once) == pytest.approx(64, rel=0.15)


def test_ratios_are_taken_against_what_a_bar_names_or_the_best_other_side():
    rows = [
        ("plain", "textbook", 2.0, 100.0),
        ("plain", "chunked", 1.0, 50.0),
        ("sparse", "textbook", 8.0, 1000.0),
        ("sparse", "peer", 3.0, 4000.0),
        ("sparse", "matrix_products", 0.1, 1.0),
        ("sparse", "chunked", 1.5, 100.0),
    ]
    measured = pd.DataFrame(rows, columns=["case", "side", "seconds", "mib"])
    bars = [
        Bar("plain", "seconds", 0.4, ("plain", "textbook")),
        Bar("sparse", "seconds", 1.5, ("plain", "chunked")),
        Bar("sparse", "seconds", 1.0),
        Bar("sparse", "mib", 0.05),
    ]
    judged = judge(measured, bars)
    assert judged["ratio"].tolist() == [0.5, 1.5, 0.5, 0.1]
    assert judged["within the bar"].tolist() == [False, True, True, False]
    assert judged["whose"].tolist() == ["textbook", "chunked, plain", "peer", "textbook"]
    numbers = results(measured, judged)
    assert numbers["sparse_memory_ratio"] == 0.1 and numbers["sparse_memory_bar"] == 0.05
    assert numbers["plain_textbook_seconds"] == 2.0


def test_a_training_step_runs_on_both_sides():
    """Without a GPU there is no peak to compare with: the numbers that need one are NaN, the rest is measured."""
    table = training_steps("micro", cosine_mixing(0.5), batch=2, block=8, steps=1, device="cpu")
    assert list(table.index) == ["textbook", "chunked"] and (table["tokens_per_second"] > 0).all()
    assert table["utilisation"].isna().all()
    assert step_results({"cosine mix": table})["cosine_mix_chunked_step_seconds"] > 0


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("Radeon", math.nan)],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") == pytest.approx(peak, nan_ok=True)


# ---- the head's memory and precision ---------------------------------------------------------------------------------


def test_distillation_needs_no_more_buffers_than_cross_entropy(taught, monkeypatch):
    made = []

    class Counted(head.Buffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(head, "Buffers", Counted)
    for objective in DISTILLATION.values():
        chunked(taught, objective)()
    assert [len(buffers._all) for buffers in made] == [3, 3]


def test_chunks_are_even_and_small_on_a_cpu(monkeypatch):
    monkeypatch.setattr(products, "CHUNK_BYTES", 40 * 2**20)
    assert products.chunk_rows(32768, 768, "cuda") == 256  # three, where 320 would fit and leave 128 for the last
    assert products.chunk_rows(32768, 320, "cuda") == 320 and products.chunk_rows(32768, 321, "cuda") == 192
    assert products.chunk_rows(1024, 4096, "cuda") == 4096 and products.chunk_rows(1024, 4096, "cpu") == 256


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_student_that_equals_its_teacher_has_value_and_gradients_zero(divergence):
    p = Problem.random(positions=40, vocab=500, width=16, masked=0.25)
    same = Problem(p.hidden, p.weight, p.labels, p.hidden.detach(), p.weight.detach())
    value, *gradients = chunked(same, distillation(divergence, 0.0, 1.0, 2.0))()
    assert abs(value) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-2), (torch.bfloat16, 2e-2)])
def test_a_teacher_close_to_the_student_leaves_the_small_divergence_exact(dtype, bound):
    """The difference of two large sums would drown a divergence of 1e-5 nats."""
    p = Problem.random(positions=40, vocab=500, width=16, masked=0.25)
    generator = torch.Generator().manual_seed(2)
    near = p.hidden.detach() + 2e-3 * torch.randn(p.hidden.shape, generator=generator)
    tensors = [tensor.detach().to(dtype) for tensor in (p.hidden, p.weight, near, p.weight)]
    objective = distillation("forward", 0.0, 1.0, 2.0)

    def with_teacher(hidden, weight, teacher_hidden, teacher_weight):
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), p.labels, teacher_hidden, teacher_weight)

    exact = with_teacher(*(tensor.double() for tensor in tensors))
    value, *found = chunked(with_teacher(*tensors), objective)()
    wanted, *theirs = textbook(exact, objective)()
    assert 1e-7 < wanted < 1e-3
    assert abs(value.double() - wanted) / wanted < bound
    for gradient, reference in zip(found, theirs, strict=True):
        assert (gradient.double() - reference).norm() / reference.norm() < bound


def test_teacher_logits_that_were_given_up_are_formed_again(taught):
    """Two terms that need them, one after the other: the second must not read the first one's scratch memory."""
    count = (taught.labels != IGNORE_INDEX).sum()
    terms = [distillation("forward", 0.0, 1.0, t).terms[1] for t in (1.0, 3.0)]
    matrices = taught.hidden, taught.weight, None, taught.labels
    both, _ = chunked_head(*matrices, [WeightedTerm(t, 1.0, count) for t in terms], taught.teacher)
    apart = [chunked_head(*matrices, [WeightedTerm(t, 1.0, count)], taught.teacher)[0] for t in terms]
    torch.testing.assert_close(both, sum(apart))
    leaves = taught.hidden, taught.weight
    torch.testing.assert_close(torch.autograd.grad(both, leaves), torch.autograd.grad(sum(apart), leaves))


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


def test_an_epoch_lowers_the_loss():
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
    assert BARS == {"hidden": 0.5, "topk": 0.4}
