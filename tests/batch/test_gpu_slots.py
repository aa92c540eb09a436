"""GPUs and cores of this machine are shared out: each its own, none idle for nothing, nobody for ever last."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from small_batches import LIGHT, endings, run_batch, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch import local_engine
from nbutils.batch.local_engine import LocalEngine, default_workers, machine_gpus
from nbutils.foundation import environment
from nbutils.foundation.errors import PlanError
from nbutils.runs.run_folder import load_runs

PARAMETERS = """\
run_folder: str = ""  # where results go
seconds: float = 0.5  # to take
seed: int = 0  # of all, at least 0
processes: int = 0  # at least 0
"""
NOTE = """\
import json, os, time
start = time.time()
time.sleep(seconds)
told = {"start": start, "end": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}
told["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
json.dump(told, open(run_folder + "/result.json", "w"))
"""


def stage(name: str, gpus: int | None, seconds: list[float], **resources: int) -> str:
    """A stage of one variant for each of these times; their names end in 0, 1 and so on."""
    asked = resources | ({} if gpus is None else {"gpus": gpus})
    told = ", ".join(f"{key}: {value}" for key, value in asked.items())
    only = [f"{{seed: {seed}, seconds: {each}}}" for seed, each in enumerate(seconds)]
    matrix = f"matrix: {{seed: {[*range(len(seconds))]}, seconds: {sorted(set(seconds))}}}, only: [{', '.join(only)}]"
    return f"{{name: {name}, notebook: {{here}}/study.ipynb, {matrix}, resources: {{{told}}}}}"


@pytest.fixture(autouse=True)
def gpus_of_the_machine(monkeypatch):
    """As many as any of the batches below is given: none of them computes on one."""
    monkeypatch.setattr(environment, "gpus", lambda: ("H100",) * 6)


def run(folder: Path, gpus: tuple[str, ...] | None, workers: int, *stages: str) -> dict[str, dict]:
    """What each variant noted, by its stage and number."""
    write_notebook(folder / "study.ipynb", NOTE, parameters=PARAMETERS)
    plan = study_plan(folder, *stages)
    work = run_batch(plan, LocalEngine(plan.name, folder / "runs", workers, gpus, LIGHT))
    assert set(endings(work).values()) == {"finished"}, work.table()
    return {f"{each.stage}{each.params['seed']}": each.result for each in load_runs(folder / "runs")}


def meet(one: dict, other: dict) -> bool:
    return one["start"] < other["end"] and other["start"] < one["end"]


@pytest.mark.slow
def test_each_has_its_own_gpus(tmp_path):
    """Two variants on 2 GPUs, three on 1, one on none, where there are 3."""
    wide, narrow = stage("wide", 2, [0.8, 0.8]), stage("narrow", 1, [0.6, 0.6, 0.6])
    noted = run(tmp_path, ("0", "1", "GPU-7f"), 4, wide, narrow, stage("none", 0, [0.5]))
    taken = {name: [each for each in told["gpus"].split(",") if each] for name, told in noted.items()}
    assert {name: len(ids) for name, ids in taken.items()} == {
        **dict.fromkeys(("wide0", "wide1"), 2),
        **dict.fromkeys(("narrow0", "narrow1", "narrow2"), 1),
        "none0": 0,
    }
    for one, other in combinations(noted, 2):
        if meet(noted[one], noted[other]):
            assert not set(taken[one]) & set(taken[other]), (one, other)
    assert {each["threads"] for each in noted.values()} == {str(max(1, environment.cores() // 4))}


@pytest.mark.soak
@pytest.mark.slow
def test_a_wide_variant_is_not_passed_over_for_ever(tmp_path):
    """One GPU is free before the other: it is kept for who asked for both, though others could use it."""
    early, wide, late = stage("early", 1, [0.5, 1.5]), stage("wide", 2, [0.2]), stage("late", 1, [0.2, 0.2, 0.2])
    noted = run(tmp_path, ("0", "1"), 2, early, wide, late)
    assert noted["wide0"]["start"] < min(noted[f"late{number}"]["start"] for number in range(3))


@pytest.mark.soak
def test_cores_that_are_asked_for_are_there(tmp_path, monkeypatch):
    """Of 2 cores, one whole machine's worth at a time; threads as asked. CUDA_VISIBLE_DEVICES is left alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "as it was")
    monkeypatch.setattr(environment, "cores", lambda: 2)
    monkeypatch.setattr(environment, "gpus", lambda: ())
    noted = run(tmp_path, None, 2, stage("all", None, [0.3, 0.3], cpus=2), stage("one", None, [0.3]))
    assert not any(meet(one, other) for one, other in combinations(noted.values(), 2))
    assert [noted[name]["threads"] for name in ("all0", "all1", "one0")] == ["2", "2", "1"]
    assert {each["gpus"] for each in noted.values()} == {"as it was"}


def test_more_than_there_is_is_refused(tmp_path, monkeypatch):
    write_notebook(tmp_path / "study.ipynb", parameters=PARAMETERS)
    monkeypatch.setattr(environment, "cores", lambda: 4)

    def check(stage: str, gpus: tuple[str, ...]) -> None:
        plan = study_plan(tmp_path, stage)
        LocalEngine(plan.name, tmp_path / "runs", 1, gpus).check(list(plan.variants))

    told = "{name: a, notebook: {here}/study.ipynb, %s}"
    for asked, gpus, message in (
        ("resources: {gpus: 3}", ("0", "5"), "a asks for 3 GPUs, and there are 2 here."),
        ("resources: {gpus: 1}", (), "a asks for 1 GPUs, and there are 0 here."),
        ("params: {processes: 2}", ("0",), "a asks for 2 GPUs, and there are 1 here."),
        ("resources: {cpus: 5}", (), "a asks for 5 cores, and there are 4 here. Let its stage ask for fewer, with "),
    ):
        with pytest.raises(PlanError) as refusal:
            check(told % asked, gpus)
        assert str(refusal.value).startswith(message)
    check(told % "params: {processes: 2}", ())  # without GPUs its processes train on cores
    check(told % "resources: {gpus: 1, cpus: 4}", ("0",))


@pytest.mark.parametrize(
    ("there", "gpus", "told"),
    [
        (
            2,
            ("0", "1", "0"),
            "The GPUs to share out are '0,1,0', and 0 is there twice. Name each once, with --gpus or "
            "CUDA_VISIBLE_DEVICES, as 0,1.",
        ),
        (
            2,
            ("0", ""),
            "The GPUs to share out are '0,', and an id is empty. Name each once, with --gpus or "
            "CUDA_VISIBLE_DEVICES, as 0,1.",
        ),
        (0, ("0",), "There is no GPU 0 on this machine; it has none. Leave --gpus out."),
        (0, ("GPU-8932f937",), "There is no GPU GPU-8932f937 on this machine; it has none. Leave --gpus out."),
        (2, ("0", "2"), "There is no GPU 2 on this machine; it has 0, 1. Name some of those with --gpus."),
        (2, ("a",), "There is no GPU a on this machine; it has 0, 1. Name some of those with --gpus."),
        (2, ("1", "MIG-8932f937"), ""),
        (0, (), ""),
        (0, None, ""),
    ],
)
def test_gpus_that_are_not_there_are_refused(tmp_path, monkeypatch, there, gpus, told):
    monkeypatch.setattr(environment, "gpus", lambda: ("H100",) * there)
    monkeypatch.setattr(local_engine, "DEVICES", tmp_path)
    engine = LocalEngine("p", tmp_path / "runs", 1, gpus)
    if told:
        with pytest.raises(PlanError) as refusal:
            engine.check([])
        assert str(refusal.value) == told
    else:
        engine.check([])


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, ("0", "1", "2")),
        ("2,0", ("2", "0")),
        ("GPU-8932f937, MIG-1", ("GPU-8932f937", "MIG-1")),
        ("1,-1,2", ("1",)),
        ("0,7,1", ("0",)),
        ("", ()),
    ],
)
def test_gpus_are_those_that_cuda_would_see(monkeypatch, visible, gpus):
    monkeypatch.setattr(environment, "gpus", lambda: ("H100",) * 3)
    monkeypatch.setattr(environment, "cores", lambda: 16)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_gpus() == LocalEngine("p", Path("runs"), 1).gpus == gpus
    assert default_workers() == (len(gpus) or 8)
    assert default_workers(("5",)) == 1
