"""The scripts in params/cluster do what they say: on a Slurm of one machine, and in a pod that has to go."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_slurm import WAITING, install, tasks
from tiny_notebooks import write_notebook, write_plan

from nbutils.__main__ import parser
from nbutils.foundation.places import PARAMS, ROOT
from nbutils.foundation.yaml_files import read_yaml
from nbutils.runs.attempts import Place
from nbutils.runs.plans import load_plan
from nbutils.runs.run_folder import load_runs

CLUSTER = PARAMS / "cluster"
SLURM = CLUSTER / "slurm.sh"
DATA = 'run_folder: str = ""  # r\n'
STUDY = 'run_folder: str = ""  # r\nbefore_folder: str = ""  # a run\nseed: int = 0  # of all\n'
PLAN = """\
name: p
stages:
  - {name: data, notebook: {here}/data.ipynb, resources: {gpus: 2, cpus: 3}}
  - {name: study, notebook: {here}/study.ipynb, needs: {before_folder: data}, matrix: {seed: [1, 2]}}
  - {name: after, notebook: {here}/after.ipynb, needs: {before_folder: study}, matrix: {seed: [1, 2]}}
"""
# Seed 1 is a bug; seed 2 is stopped the first time, by the signal before the time limit.
CELL = """\
import time
from pathlib import Path
if seed == 1: raise ValueError("a bug")
once = Path("{folder}/once")
if not once.exists():
    once.touch()
    Path("{folder}/{waiting}").touch()
    time.sleep(100)
"""


@pytest.fixture
def plan(tmp_path):
    write_notebook(tmp_path / "data.ipynb", "x = 1", parameters=DATA)
    write_notebook(tmp_path / "study.ipynb", CELL.format(folder=tmp_path / "slurm", waiting=WAITING), parameters=STUDY)
    write_notebook(tmp_path / "after.ipynb", "x = 1", parameters=STUDY)
    return write_plan(tmp_path / "p.yaml", PLAN)


@pytest.mark.slow
def test_a_plan_runs_to_its_end_as_arrays(plan, tmp_path):
    """A bug is not tried again and blocks what needs it alone; what is stopped before the time limit goes on."""
    environment = install(tmp_path / "slurm") | {"OUT": str(tmp_path / "runs"), "AT_ONCE": "4"}
    command = ["bash", str(SLURM), str(plan), "--partition=gpu"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ended = tasks(tmp_path / "slurm")
    codes = {f"{task['options']['job-name']} {task['task']}": task["codes"] for task in ended}
    assert codes == {"data 1": [0], "study 1": [1], "study 2": [75, 0], "after 1": [2], "after 2": [0]}
    runs = {run.variant: run for run in load_runs(tmp_path / "runs")}
    assert {name: run.status for name, run in runs.items()} == {
        "data": "finished",
        "study-seed1": "failed",
        "study-seed2": "finished",
        "after-seed2": "finished",
    }
    assert [each["status"] for each in runs["study-seed2"].manifest["attempts"]] == ["preempted", "finished"]
    data, study, *_, after = [task["options"] for task in ended]
    assert (data["gres"], data["cpus-per-task"], data["partition"]) == ("gpu:2", "3", "gpu")
    assert "gres" not in study
    assert (study["array"], study["dependency"], after["dependency"]) == ("1-2%4", "afterany:1", "afterany:2")
    logs = {path.name: path.read_text() for path in (tmp_path / "runs" / ".slurm").glob("*/*.log")}
    assert "study-seed2: exit code 75, back into the queue" in logs["study-2.log"]
    assert "study-seed2: finished" in logs["study-2.log"]  # after it, in the same file
    assert "after-seed1 needs study-seed1 for before_folder, which is failed" in logs["after-1.log"]


def one_task(tmp_path: Path, runner: str) -> subprocess.CompletedProcess:
    """A task of slurm.sh by itself, with `runner` for the shell text that python is."""
    python = tmp_path / "slurm" / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{runner}\n")
    python.chmod(0o755)
    (tmp_path / "study.names").write_text("a\tb\tc\t-\t0\t-\nstudy\tstudy.ipynb\tstudy-seed1\t-\t0\t-\n")
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "STAND_IN_SLURM": str(tmp_path / "slurm")}
    variables |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": "50"}
    command = ["bash", str(SLURM), "p.yaml", "", str(tmp_path / "study.names")]
    return subprocess.run(command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True)


def test_a_task_is_requeued_by_its_exit_code(tmp_path):
    """Memory kills come again: after two of them it is enough, however often it was stopped."""
    install(tmp_path / "slurm")
    mark = tmp_path / "slurm" / "requeue-7_2"
    for code, again in ((1, False), (143, True), (138, True), (75, True), (137, True), (75, True), (138, False)):
        mark.unlink(missing_ok=True)
        done = one_task(tmp_path, f"exit {code}")
        assert (done.returncode, mark.exists()) == (code, again)
        assert done.stdout == (f"study-seed1: exit code {code}, back into the queue\n" if again else "")


@pytest.mark.parametrize("name", ["job", "kuberay", "runai"])
def test_each_yaml_loads_and_its_command_is_one_of_ours(plan, tmp_path, name):
    """As the real parser reads it; a pod of job.yaml runs the variant of its index."""
    content = read_yaml(CLUSTER / f"{name}.yaml")
    if "entrypoint" in content["spec"]:
        words = shlex.split(content["spec"]["entrypoint"])
    else:
        container = content["spec"]["template"]["spec"]["containers"][0]
        runner = tmp_path / "bin" / "python"
        runner.parent.mkdir()
        runner.write_text(f'#!/bin/sh\n[ "$3" = run ] && echo python "$@" || exec "{sys.executable}" "$@"\n')
        runner.chmod(0o755)
        variables = {"PLAN": str(plan), "STAGE": "after", "JOB_COMPLETION_INDEX": "1"}
        variables |= {"PATH": f"{runner.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            container["command"], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        words = shlex.split(done.stdout)
        assert words[-1] == "after-seed2" and words[4] == f"{tmp_path}/after.ipynb"
        file, stage = (each["value"] for each in container["env"][:2])
        stages = [variant.stage for variant in load_plan(ROOT / file).variants]
        assert content["spec"]["completions"] == stages.count(stage)
    assert words[:3] == ["python", "-m", "nbutils"]
    args = parser().parse_args(words[3:])
    assert args.command.__name__ == ("run" if name == "job" else "batch")


@pytest.mark.soak
def test_a_pod_that_goes_stops_its_own_runners_and_waits_for_them(tmp_path):
    notebook = write_notebook(tmp_path / "study.ipynb", "open(run_folder + '/on', 'w')\nimport time\ntime.sleep(100)")
    (tmp_path / "flat.yaml").write_text("seed: 1\n")
    place = Place(tmp_path / "runs" / "p", "study")
    command = [sys.executable, "-m", "nbutils", "run", str(notebook), "--params", str(tmp_path / "flat.yaml")]
    command += ["--variant", place.variant, "--out", str(place.plan_folder)]
    with (
        subprocess.Popen(["sleep", "100"]) as other,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as runner,
    ):
        deadline = time.monotonic() + 30
        while not (place.attempt / "on").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # locks that nobody holds, or somebody on another machine, name processes that are none of ours
        lock = place.plan_folder / ".locks" / "ended"
        lock.write_text(f"process {other.pid} on {os.uname().nodename}")
        subprocess.run(["bash", str(CLUSTER / "stop_runners.sh"), str(tmp_path / "runs")], check=True)
        assert not place.is_locked()
        assert runner.wait() == 75
        assert other.poll() is None
        other.kill()
    assert place.result()["status"] == "preempted"
