"""The same plan on Ray: the same results; nodes that are lost, GPUs, stops; what is told where Ray cannot be used."""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_processes import processes_of, start_marked, wait_until
from kill_many import write_data
from small_batches import STUDY, endings, run_batch, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch import ray_engine, ray_node
from nbutils.batch.batch import Batch
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import Display, Tally
from nbutils.batch.ray_engine import MARKS, RayEngine
from nbutils.batch.ray_node import Task, work
from nbutils.foundation.errors import PlanError, RunError
from nbutils.foundation.files import read_json
from nbutils.runs.attempts import Place
from nbutils.runs.keys import nbutils_sha256
from nbutils.runs.manifest import read_manifest
from nbutils.runs.metric_labels import is_of_the_machine
from nbutils.runs.plans import Plan
from nbutils.runs.run_folder import load_runs

NEEDS = STUDY + 'data_folder: str = ""  # an earlier run\n'
NOTE = "import os\nopen(run_folder + '/note', 'w').write(f'{seed} {os.environ[\"OMP_NUM_THREADS\"]}')"
TRAINING = (
    "{name: training, notebook: 04_cosine_mixing, resources: {cpus: 1}, params: {data_folder: %s, model_name: micro, "
    "max_steps: 240, eval_steps: 80, checkpoint_steps: 10, samples: 0, audit_blocks: 1, "
    "per_device_train_batch_size: 4, dropout: 0.1}}"
)
PLAN = (
    "{name: data, notebook: {here}/study.ipynb, params: {seed: 9}, resources: {cpus: 1}}",
    "{name: study, notebook: {here}/study.ipynb, needs: {data_folder: data}, matrix: {seed: [1, 2]}, "
    "resources: {cpus: 1}}",
    "{name: after, notebook: {here}/study.ipynb, needs: {data_folder: study}, matrix: {seed: [2]}}",
)
ALONE = {"num_cpus": 1, "object_store_memory": ray_engine.STORE_BYTES, "include_dashboard": False}
GPU_NODE = ALONE | {"num_cpus": 3, "num_gpus": 2}  # as far as Ray knows


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="without requirements-ray.txt")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> tuple[Plan, Batch]:
    """A plan, and a batch of it by this machine's engine."""
    folder = tmp_path_factory.mktemp("here")
    write_notebook(folder / "study.ipynb", NOTE, "if seed == 2: raise ValueError('diverged')", parameters=NEEDS)
    plan = study_plan(folder, *PLAN)
    return plan, run_batch(plan, LocalEngine(plan.name, folder / "local", 2, preloaded=()))


@pytest.fixture(scope="module")
def cluster(ray):
    """Two nodes on this machine; the second has two GPUs."""
    from ray.cluster_utils import Cluster

    started = Cluster()
    add_node(started, ALONE)
    add_node(started, GPU_NODE)
    yield started
    started.shutdown()


def add_node(cluster, settings: dict[str, object]):
    """Ray waits half a minute for a new node's processes, which is little on a busy machine."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            return cluster.add_node(**settings)
    return cluster.add_node(**settings)


def artefacts(folder: Path) -> dict[str, object]:
    """What a run made, by name, without what a clock read."""
    found: dict[str, object] = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "metrics.csv":
            header, *rows = (line.split(",") for line in path.read_text().splitlines())
            found[name] = [[v for h, v in zip(header, row, strict=True) if not is_of_the_machine(h)] for row in rows]
        elif path.name == "result.json":
            found[name] = {k: v for k, v in read_json(path).items() if not is_of_the_machine(k)}
        elif path.name == "params.yaml":
            found[name] = path.read_text().replace(str(folder.parent), "")
        elif path.name not in ("manifest.json", "notebook.ipynb", "progress.json"):  # written as often as there is time
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.slow
def test_both_engines_come_to_the_same(here, ray):
    plan, local = here
    engine = RayEngine(plan, plan.file.parent / "ray", "local")
    work = run_batch(plan, engine)
    assert endings(work) == endings(local)
    assert endings(local)["after-seed2"] == "blocked"
    for name, outcome in work.outcomes.items():
        other = local.outcomes[name]
        assert (outcome.exit_code, outcome.message) == (other.exit_code, other.message)
        assert (outcome.again, outcome.log) == (other.again, other.log)
        if outcome.status != "blocked":
            notes = [(each / name / "note").read_text() for each in (engine.plan_folder, local.plan_folder)]
            assert notes[0] == notes[1]
    assert len(read_manifest(engine.plan_folder / "study-seed2")["attempts"]) == 1  # a mistake is not tried again
    assert not (engine.plan_folder / MARKS).exists()


def test_a_finished_plan_starts_no_ray(here, monkeypatch):
    plan, local = here
    monkeypatch.setitem(sys.modules, "ray", None)
    work = Batch(plan, local.plan_folder, [plan.variant("data"), plan.variant("study-seed1")], None)
    work.engine = RayEngine(plan, local.plan_folder, "127.0.0.1:1")
    work.check()
    work.run(Display("p", sys.stdout))
    assert all(outcome.skipped for outcome in work.outcomes.values())


# ---- nodes, workers and runners that end ----------------------------------------------------------------------------


LOST = """\
import os, signal, time
parent = lambda process: int(open(f"/proc/{process}/stat").read().rsplit(")", 1)[1].split()[1])
runner = parent(os.getppid())
worker = parent(runner)
first = not os.path.exists(f"{here}/tried{seed}")
open(f"{here}/tried{seed}", "w").write(f"{os.getpid()} {runner}")
if first and seed < 3:
    os.kill(worker if seed == 1 else runner, signal.SIGKILL)
    time.sleep(60)
if seed == 3:
    raise ValueError("diverged")
"""


@pytest.mark.soak
def test_what_was_killed_is_tried_again_and_a_mistake_is_not(cluster, tmp_path):
    write_notebook(tmp_path / "study.ipynb", f"here = {str(tmp_path)!r}", LOST, parameters=STUDY)
    plan = study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}")
    work = run_batch(plan, RayEngine(plan, tmp_path / "runs", cluster.address), retries=1, backoff_seconds=0.5)
    assert endings(work) == {"study-seed1": "finished", "study-seed2": "finished", "study-seed3": "failed"}
    records = [read_manifest(tmp_path / "runs" / variant.name) for variant in plan.variants]
    attempts = [[each["status"] for each in record["attempts"]] for record in records]
    assert attempts == [["killed", "finished"], ["killed", "finished"], ["failed"]]
    told = (tmp_path / "display").read_text()
    assert re.search(r"killed   study-seed1: Ray's worker ended while it ran, .*; retry in", told)
    assert re.search(r"killed   study-seed2: the runner itself was killed; .*; retry in", told)


class Thief(Display):
    """Takes the node away that trains, once there is a checkpoint; when that is known there comes another."""

    def __init__(self, cluster, training: Place, known: Callable[[], bool]) -> None:
        super().__init__("p", sys.stdout)
        self.cluster, self.training, self.known, self.taken, self.given = cluster, training, known, 0.0, False

    def tick(self, tally: Tally) -> None:
        saved = [each for each in (self.training.attempt / "checkpoints").glob("step-*") if not each.suffix]
        if saved and not self.taken:
            self.taken = time.monotonic()
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)
        if self.taken and not self.given and (self.known() or time.monotonic() - self.taken > 60):
            self.given = True
            add_node(self.cluster, GPU_NODE)


@pytest.mark.soak
def test_a_node_is_lost_and_every_variant_finishes_with_its_numbers(cluster, tmp_path, caplog):
    write_notebook(tmp_path / "study.ipynb", NOTE, parameters=NEEDS)
    (tmp_path / "prepared").mkdir()
    training = TRAINING % write_data(tmp_path / "prepared")
    calm = study_plan(tmp_path, training)
    run_batch(calm, LocalEngine(calm.name, tmp_path / "calm", 1, preloaded=()))
    training = training.replace("cpus: 1", "cpus: 1, gpus: 1")
    plan = study_plan(tmp_path, PLAN[0], PLAN[1].replace("[1, 2]", "[1, 3]"), training)
    place = Place(tmp_path / "runs", "training")
    work = Batch(plan, place.plan_folder, list(plan.variants), RayEngine(plan, place.plan_folder, cluster.address), 0)
    work.check()
    told = "training: its node was lost. It is queued again, for a node of 1 GPUs and 1 cores"
    work.run(Thief(cluster, place, lambda: told in caplog.text))
    assert caplog.text.count(told) == 1
    assert set(endings(work).values()) == {"finished"}, work.table()
    assert [each["status"] for each in read_manifest(place.published)["attempts"]] == ["killed", "finished"]
    assert re.search(r"Training goes on from step \d", (place.published / "notebook.ipynb").read_text())
    assert artefacts(place.published) == artefacts(tmp_path / "calm" / "training")


# ---- what variants ask for ------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_variant_sees_the_gpus_it_asked_for(cluster, tmp_path):
    note = "import os\nopen(run_folder + '/seen', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    write_notebook(tmp_path / "study.ipynb", note, parameters=STUDY)
    stage = "{name: asks%s, notebook: {here}/study.ipynb, params: {seed: %s}, resources: {gpus: %s}}"
    plan = study_plan(tmp_path, *(stage % (number, number, number) for number in (0, 1, 2)))
    work = run_batch(plan, RayEngine(plan, tmp_path / "runs", cluster.address))
    assert set(endings(work).values()) == {"finished"}, work.table()
    seen = [(tmp_path / "runs" / f"asks{number}" / "seen").read_text() for number in (0, 1, 2)]
    assert seen[0] == "" and seen[1] in ("0", "1") and seen[2] == "0,1"


def test_what_no_node_could_give_is_refused(tmp_path):
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    plan = study_plan(tmp_path, "{name: large, notebook: {here}/study.ipynb, resources: {gpus: 3, cpus: 2}}")
    engine = RayEngine(plan, tmp_path / "runs", "10.0.0.5:6379")
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"GPU": 2.0, "CPU": 3.0}}]
    engine._expected, engine._ray = list(plan.variants), SimpleNamespace(nodes=lambda: nodes)
    with pytest.raises(PlanError) as refusal:
        engine._check_room()
    assert str(refusal.value).startswith(
        "large asks for 3 GPUs and 2 cores on one machine, and the Ray cluster at 10.0.0.5:6379 has machines with "
        "2 GPUs and 3 cores or 0 GPUs and 4 cores. Let its stage ask for fewer"
    )
    nodes[1]["Resources"]["GPU"] = 3.0
    engine._check_room()


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_is_stopped_or_killed_leaves_no_process(ray, tmp_path, number):
    write_notebook(tmp_path / "study.ipynb", "import time\ntime.sleep(100)", parameters=STUDY)
    study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2]}}")
    runs = tmp_path / "runs"
    with start_marked(tmp_path, "batch", str(tmp_path / "p.yaml"), "--out", str(runs), "--engine", "ray") as batch:
        wait_until(lambda: len([*runs.glob(".attempts/*/notebook.ipynb")]) == 2, 180)
        batch.send_signal(number)
        told = batch.stdout.read() if number == signal.SIGTERM else ""
    wait_until(lambda: not processes_of(str(tmp_path)), 120)  # ours in 2 s; agents of Ray itself look once a minute
    ended = {run.status for run in load_runs(runs)}
    if number == signal.SIGTERM:
        assert (batch.returncode, ended) == (75, {"preempted"}), told
        assert "Finished variants are kept; go on with: python -m nbutils batch" in told
        assert not any(word in told for word in ("Traceback", "raylet", "WARNING")), told
        assert not (runs / MARKS).exists()
    else:
        assert ended == {"killed"}


# ---- what is told ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path) -> Plan:
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    return study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb}")


def test_ray_that_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        RunError, match=r"^Ray is not installed. Install it with `make ray`, or leave --engine ray out.$"
    ):
        RayEngine(tiny, tmp_path / "runs").check(list(tiny.variants))


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "^No Ray cluster at 127.0.0.1:1: Connection refused. Give host:port of its head"),
        ("ray://head:10001", "^ray://head:10001 is an address for clients outside the cluster. The batch runs on a"),
        ("head", "^No Ray cluster at head: .* Give host:port of its head"),
    ],
)
def test_addresses_of_no_cluster(ray, tiny, tmp_path, address, told):
    with pytest.raises(RunError, match=told):
        RayEngine(tiny, tmp_path / "runs", address).check(list(tiny.variants))


def test_a_node_without_the_folder_or_with_other_code_runs_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node, "SHARED_SECONDS", 0.1)
    task = Task(tiny.variants[0], "p", tmp_path / "runs", tmp_path / "runs" / MARKS / "1", "another", 0, 1)
    assert "does not see the batch's folder" in work(task)
    task.marks.mkdir(parents=True)
    assert "has another nbutils in" in work(task)
    assert not (tmp_path / "runs" / "study").exists()


@pytest.mark.slow
def test_a_runners_log_keeps_what_stands_there(tiny, tmp_path):
    """The message of the attempt before points to it, and another batch's runner may be at work."""
    task = Task(tiny.variants[0], "p", tmp_path / "runs", tmp_path / "runs" / MARKS / "1", nbutils_sha256(), 0, 1)
    task.marks.mkdir(parents=True)
    log = Place(task.plan_folder, "study").log
    log.parent.mkdir(parents=True)
    log.write_text("an earlier attempt\n")
    assert work(task).status == "finished"
    assert log.read_text().startswith("an earlier attempt\n")
