"""What was killed or stopped from outside is tried again, a mistake never; a batch that is stopped leaves nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from batch_processes import processes_of, start_marked, wait_until
from small_batches import LIGHT, STUDY, endings, run_batch, study_plan
from tiny_notebooks import write_notebook

from nbutils.batch.batch import Batch
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import Display
from nbutils.batch.ray_engine import RayEngine
from nbutils.batch.runner import Outcome
from nbutils.batch.status import plan_status
from nbutils.runs.plans import Variant
from nbutils.runs.run_folder import load_runs

ONCE = """\
import os, signal, time
runner = int(open(f"/proc/{os.getppid()}/stat").read().rsplit(")", 1)[1].split()[1])
mark = f"{{here}}/tried{seed}"
first = not os.path.exists(mark)
open(mark, "a").close()
"""
ENDS = """\
if seed == 1 and first: os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)
if seed == 2: os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)
if seed == 3: raise ValueError("diverged")
if seed == 4 and first: os.kill(runner, signal.SIGTERM); time.sleep(9)
if seed == 5 and first: os.kill(runner, signal.SIGKILL); time.sleep(9)
if seed == 6: os._exit(3)
"""


@pytest.mark.slow
def test_what_was_killed_or_stopped_is_tried_again_and_a_mistake_never(tmp_path):
    write_notebook(tmp_path / "study.ipynb", ONCE.replace("{{here}}", str(tmp_path)), ENDS, parameters=STUDY)
    study = "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3, 4, 5, 6, 7]}}"
    after = "{name: after, notebook: {here}/after.ipynb, needs: {data_folder: study}, matrix: {seed: [1, 2]}}"
    write_notebook(tmp_path / "after.ipynb", parameters=STUDY + 'data_folder: str = ""  # an earlier run\n')
    plan = study_plan(tmp_path, study, after)
    engine = LocalEngine(plan.name, tmp_path / "runs", 2, preloaded=LIGHT)
    work = run_batch(plan, engine, retries=2, backoff_seconds=1)
    attempts = {
        run.variant: [each["status"] for each in run.manifest["attempts"]] for run in load_runs(engine.plan_folder)
    }
    assert attempts == {
        "study-seed1": ["killed", "finished"],
        "study-seed2": ["killed"] * 3,
        "study-seed3": ["failed"],
        "study-seed4": ["preempted", "finished"],
        "study-seed5": ["killed", "finished"],
        "study-seed6": ["killed"],  # it left by itself: that is its own doing
        "study-seed7": ["finished"],
        "after-seed1": ["finished"],
    }
    assert endings(work) == {name: each[-1] for name, each in attempts.items()} | {"after-seed2": "blocked"}
    assert "ended by SIGKILL" in work.outcomes["study-seed2"].message
    assert work.exit_code() == 1
    told = (tmp_path / "display").read_text()
    assert re.search(r"killed   study-seed2: KernelDied: .*; retry in 1 s \(1 of 2\) \[", told)
    assert re.search(r"killed   study-seed2: KernelDied: .*; retry in 2 s \(2 of 2\) \[", told)
    assert re.search(r"preempted study-seed4: .*; retry in 1 s", told)
    assert re.search(r"killed   study-seed5: the runner itself was killed; .*; retry in 1 s", told)
    assert told.count("retry in") == 5
    starts = re.findall(r"start    (\S+)", told)
    assert starts.index("study-seed3") < starts.index("study-seed1", 1)  # meanwhile others go on
    assert "to be tried again" in told


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "nbutils", "batch", str(folder / "p.yaml"), "--out", str(folder / "runs"), *words]


@pytest.mark.slow
def test_two_batches_over_one_folder_run_each_variant_once(tmp_path):
    work = f"import time\nopen('{tmp_path}/ran', 'a').write(f'{{seed}} ')\ntime.sleep(1.5)"
    write_notebook(tmp_path / "study.ipynb", work, parameters=STUDY)
    study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}")
    words = command(tmp_path, "--workers", "2", "--fresh-kernels")
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other,
    ):
        told = [one.communicate()[0], other.communicate()[0]]
    assert (one.returncode, other.returncode) == (0, 0), told
    assert sorted((tmp_path / "ran").read_text().split()) == ["1", "2", "3"], told
    assert [len(run.manifest["attempts"]) for run in load_runs(tmp_path / "runs")] == [1, 1, 1]
    for each in told:
        assert len(re.findall(r"^study-seed\d +finished ", each, re.MULTILINE)) == 3, told
    assert "another runner is at work on it" in "".join(told)


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_second_ctrl_c_kills_what_does_not_stop(tmp_path):
    mark = "open(run_folder + '/.training-1', 'w')"  # as a training that still saves: the runner waits for it
    deaf = f"import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{mark}"
    write_notebook(tmp_path / "study.ipynb", deaf, "time.sleep(100)", parameters=STUDY)
    plan = study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}")
    attempts = tmp_path / "runs" / ".attempts"
    words = ("batch", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "runs"), "--workers", "2", "--fresh-kernels")
    with start_marked(tmp_path, *words) as process:
        wait_until(lambda: len(list(attempts.glob("*/.training-1"))) == 2)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # it waits
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate()
    assert process.returncode == 130, told
    assert "asked 2 running variants to stop; a training saves its state first. Ask again to kill." in told
    wait_until(lambda: not processes_of(str(tmp_path)), 30)
    assert len(re.findall(r"study-seed\d  killed ", plan_status(plan, tmp_path / "runs"))) == 2


# ---- engines with a queue -------------------------------------------------------------------------------------------


@dataclass
class Queue:
    """An engine that takes all at once and runs one at a time, as a cluster may."""

    workers: int = 1
    counts_preemption: bool = True
    endings: dict[str, list[str]] = field(default_factory=dict)  # before it finishes
    names: list[str] = field(default_factory=list)
    stopped: bool = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def check(self, variants):
        return None

    def has_room(self, variant):
        return True

    def start(self, variant: Variant):
        self.names.append(variant.name)

    def is_at_work(self, name):
        return name == self.names[0]

    def wait(self, seconds):
        if not self.names:
            return []
        name = self.names.pop(0)
        status = self.endings[name].pop(0) if self.endings.get(name) else "finished"
        return [Outcome(name, status, 0, again=status != "finished")]

    def stop(self):
        self.stopped = True


def test_what_an_engine_has_queued_waits_and_does_not_run(tmp_path):
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    plan = study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}")
    seen = []

    class Seen(Display):
        def tick(self, tally):
            seen.append(([each.variant for each in tally.running], len(tally.waiting), len(tally.ended)))

    with (tmp_path / "display").open("w") as log:
        Batch(plan, tmp_path / "runs", list(plan.variants), Queue()).run(Seen("p", log))
    assert seen == [(["study-seed2"], 1, 1), (["study-seed3"], 0, 2), ([], 0, 3)]
    assert re.findall(r"start +\S+|finished \S+", (tmp_path / "display").read_text()) == [
        *("start    study-seed1", "finished study-seed1", "start    study-seed2", "finished study-seed2"),
        *("start    study-seed3", "finished study-seed3"),
    ]


@pytest.mark.parametrize(
    ("counts", "ended"),
    [(True, ["preempted", "preempted", "preempted"]), (False, ["finished", "killed", "finished"])],
)
def test_what_a_node_that_goes_has_stopped_does_not_count(tmp_path, monkeypatch, counts, ended):
    """Where nodes come and go they ask their runners to stop; a kill counts in any case."""
    monkeypatch.setattr("nbutils.batch.batch.TICK_SECONDS", 0.0)
    write_notebook(tmp_path / "study.ipynb", parameters=STUDY)
    plan = study_plan(tmp_path, "{name: study, notebook: {here}/study.ipynb, matrix: {seed: [1, 2, 3]}}")
    ends = {
        "study-seed1": ["preempted"] * 5,
        "study-seed2": ["killed", "preempted", "killed"],
        "study-seed3": ["killed", "preempted"],
    }
    engine = Queue(counts_preemption=counts, endings=ends)
    work = Batch(plan, tmp_path / "runs", list(plan.variants), engine, retries=1, backoff_seconds=0.01)
    with (tmp_path / "display").open("w") as log:
        work.run(Display("p", log))
    assert list(dict(sorted(endings(work).items())).values()) == ended
    told = (tmp_path / "display").read_text()
    assert len(re.findall(r"preempted study-seed1: .*; retry in \d+ s \[", told)) == (0 if counts else 5)
    assert LocalEngine.counts_preemption
    assert not RayEngine.counts_preemption
