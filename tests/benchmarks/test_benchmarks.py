"""Benchmarks: the sides compute the same thing, memory is really measured, ratios are judged by their bars. No timing.

python -m pytest tests/test_benchmarks.py
"""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from nbutils.benchmarks import heads as benchmarks
from nbutils.benchmarks import measuring
from nbutils.benchmarks.heads import (
    CASES,
    Case,
    Problem,
    chunked,
    compare,
    growth,
    results,
    step_results,
    textbook,
    verdicts,
)
from nbutils.benchmarks.measuring import memory_by_positions
from nbutils.benchmarks.throughput import peak_flops, training_steps
from nbutils.objectives import cosine_mixing


@pytest.fixture
def problem():
    return Problem.random(positions=11, vocab=300, width=8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_of_a_case_give_one_loss_and_the_same_gradients(problem, case):
    for ours, theirs in zip(chunked(problem, case.objective)(), textbook(problem, case.objective)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_peer_gives_the_loss_and_gradients_of_cross_entropy(problem):
    steps, skipped = benchmarks.peers(problem)
    assert "torch linear_cross_entropy" in steps
    for step in steps.values():
        for theirs, ours in zip(step(), chunked(problem, cosine_mixing(0.0))(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert set(steps) | set(skipped) == set(benchmarks._PEERS)


def test_a_peer_that_cannot_be_imported_is_skipped_with_its_reason(problem, monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'nowhere'")

    monkeypatch.setattr(benchmarks, "_PEERS", {"absent": absent})
    assert benchmarks.peers(problem) == ({}, {"absent": "ModuleNotFoundError: No module named 'nowhere'"})


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


def test_ratios_are_taken_against_what_a_bar_names():
    rows = [
        ("plain", "textbook", 2.0, 100.0),
        ("plain", "chunked", 1.0, 50.0),
        ("sparse", "textbook", 8.0, 1000.0),
        ("sparse", "chunked", 1.5, 100.0),
    ]
    measured = pd.DataFrame(rows, columns=["case", "side", "seconds", "mib"])
    plain = Case("plain", cosine_mixing(0.0), time_bar=0.4, memory_bar=0.5)
    sparse = Case("sparse", cosine_mixing(0.5, top_k=5), 1.5, 0.05, time_against="plain")
    judged = verdicts(measured, (plain, sparse))
    assert judged["ratio"].tolist() == [0.5, 0.5, 1.5, 0.1]
    assert judged["within the bar"].tolist() == [False, True, True, False]
    assert judged["ratio to"].tolist() == ["textbook plain", "textbook plain", "chunked plain", "textbook sparse"]
    numbers = results(measured, pd.DataFrame(columns=["positions", "case", "side", "mib"]), (plain, sparse))
    assert numbers["bars_missed"] == 2
    assert numbers["sparse_memory_ratio"] == 0.1 and numbers["sparse_memory_bar"] == 0.05
    assert numbers["plain_textbook_seconds"] == 2.0


def test_comparison_has_every_side_of_every_case(problem):
    measured, skipped = compare(problem, CASES, rounds=1)
    sides = measured.groupby("case")["side"].agg(set)
    assert all({"textbook", "chunked", "matrix_products"} <= sides[case.name] for case in CASES)
    assert (measured["seconds"] > 0).all() and len(verdicts(measured, CASES)) == 2 * len(CASES)
    assert not set(skipped) & set(measured["side"])


def test_growth_is_measured_at_every_size_and_drawn():
    grown = growth([5, 10], vocab=300, width=4)
    assert grown.groupby(["case", "side"])["positions"].agg(list).tolist() == [[5, 10]] * 4
    axes = memory_by_positions(grown).axes[0]
    assert sorted(line.get_label() for line in axes.lines) == sorted(
        ["cross entropy, textbook", *(f"{case.name}, chunked" for case in CASES)]
    )


def test_a_training_step_runs_on_both_sides():
    """Without a GPU there is no peak to compare with: the numbers that need one are NaN, the rest is measured."""
    table = training_steps("micro", cosine_mixing(0.5), batch=2, block=8, steps=1, device="cpu")
    assert list(table.index) == ["textbook", "chunked"] and (table["tokens_per_second"] > 0).all()
    assert table["utilisation"].isna().all()
    assert step_results({"cosine mix": table})["cosine_mix_chunked_step_seconds"] > 0


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Radeon", math.nan),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") == pytest.approx(peak, nan_ok=True)
