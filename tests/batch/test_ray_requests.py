"""What is asked of a Ray cluster, what is told where no node has it, a runner's log; no cluster is needed.

python -m pytest tests/test_ray_requests.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small_batches import STUDY, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch import ray_engine
from nbutils.batch.ray_cluster import Cluster
from nbutils.batch.ray_engine import MARKS, RayEngine
from nbutils.batch.ray_worker import Task, work
from nbutils.runs.attempts import Place
from nbutils.runs.keys import nbutils_sha256
from nbutils.runs.plans import Plan

TRAINS = STUDY + "processes: int = 1  # that train, at least 0\n"
ZERO = Cluster(((0, 4),), grows=True)  # nodes with GPUs are started when somebody asks for them
SMALL, LARGE = Cluster(((0, 4), (1, 1))), Cluster(((0, 4), (1, 2)))


def trainings(folder: Path, *settings: str) -> Plan:
    """A plan of stages that train in one process, with these settings each."""
    write_notebook(folder / "study.ipynb", parameters=TRAINS)
    stages = (f"{{name: v{n}, notebook: {{here}}/study.ipynb{each}}}" for n, each in enumerate(settings))
    return study_plan(folder, *stages)


@pytest.mark.parametrize(
    ("cluster", "asked"),
    [
        (ZERO, [(1, 1), (0, 1), (2, 1)]),
        (LARGE, [(1, 1), (0, 1), (2, 1)]),
        (Cluster(((0, 4),)), [(0, 1), (0, 1), (2, 1)]),  # trains on cores
    ],
)
def test_gpus_that_may_yet_be_started_are_asked_for(tmp_path, monkeypatch, caplog, cluster, asked):
    pytest.importorskip("ray", reason="without requirements-ray.txt")
    plan = trainings(tmp_path, "", ", resources: {gpus: 0}", ", resources: {gpus: 2}")
    monkeypatch.setattr(ray_engine, "look_at", lambda address: cluster)
    engine = RayEngine(plan, tmp_path / "runs", "10.0.0.5:6379")
    engine.check([plan.variants[1]])
    assert [engine._request(variant) for variant in plan.variants] == asked
    if cluster.grows:
        engine.check([plan.variants[0]])
        assert "v0 asks for 1 GPUs and 1 cores on one machine, and the Ray cluster at 10.0.0.5:6379" in caplog.text
        assert "Where it is to train on cores, let its stage say `resources: {gpus: 0}`." in caplog.text


def task(plan: Plan, number: int, folder: Path, gpus: int, cpus: int) -> Task:
    return Task(
        plan.variants[number], "p", folder / "runs", folder / "runs" / MARKS / "1", nbutils_sha256(), gpus, cpus
    )


def test_what_no_node_can_run_is_told_once(tmp_path, caplog):
    plan = trainings(tmp_path, "", "", "")
    engine = RayEngine(plan, tmp_path / "runs", "10.0.0.5:6379")
    engine._tasks = {n: task(plan, n, tmp_path, *asked) for n, asked in enumerate([(1, 2), (0, 1), (1, 2)])}
    engine.tell_stuck(LARGE)
    assert not caplog.messages
    engine.tell_stuck(SMALL)
    engine.tell_stuck(SMALL)
    assert caplog.messages == [
        "Nothing in the Ray cluster at 10.0.0.5:6379 can run v0 now, which asks for 1 GPUs and 2 cores on one machine; "
        "there is 1 GPUs and 1 cores or 0 GPUs and 4 cores. It and 1 more wait until there is such a node. Start one, "
        "or end the batch by Ctrl-C and go on later."
    ]
    engine.tell_stuck(LARGE)
    engine._begun = {"v0"}
    engine.tell_stuck(SMALL)
    assert len(caplog.messages) == 2
    assert "can run v2 now" in caplog.messages[1] and "It waits until" in caplog.messages[1]


def test_a_runners_log_keeps_what_stands_there(tmp_path):
    """The message of the attempt before points to it, and another batch's runner may be at work."""
    plan = trainings(tmp_path, "")
    given = task(plan, 0, tmp_path, 0, 1)
    given.marks.mkdir(parents=True)
    log = Place(given.plan_folder, "v0").log
    log.parent.mkdir(parents=True)
    log.write_text("an earlier attempt\n")
    assert work(given).outcome.status == "finished"
    assert log.read_text().startswith("an earlier attempt\n")
