"""The scripts in params/cluster do what they say: on a Slurm of one machine, and in a pod that has to go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_slurm import CANCELLED, WAITING, install, tasks
from tiny_notebooks import write_notebook, write_plan

from nbutils.batch.listing import variant_names
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


def test_names_are_told_at_once_and_in_order(plan):
    rows = [line.split("\t") for line in variant_names(load_plan(plan)).splitlines()]
    assert [row[2] for row in rows] == ["data", "study-seed1", "study-seed2", "after-seed1", "after-seed2"]
    assert rows[0] == ["data", str(plan.parent / "data.ipynb"), "data", "-", "2", "3", "runs/p"]
    assert (rows[1][0], rows[1][3:6]) == ("study", ["data", "0", "-"])
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "nbutils", "check", str(plan), "--names"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert time.perf_counter() - start < 2
    assert done.stdout.splitlines()[0].split("\t") == rows[0]
    assert not {"torch", "pandas", "numpy"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


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


@pytest.mark.parametrize(
    ("codes", "requeued"),
    [
        ([0], [False]),
        ([1], [False]),
        ([2], [False]),
        ([75, 75, 75, 75, 143], [True] * 5),
        ([138, 75, 137, 75, 138], [True, True, True, True, False]),
    ],
)
def test_a_task_is_requeued_by_its_exit_code(tmp_path, codes, requeued):
    """Memory kills come again: after two of them it is enough, however often it was stopped."""
    install(tmp_path / "slurm")
    mark = tmp_path / "slurm" / "requeue-7_2"
    for code, again in zip(codes, requeued, strict=True):
        mark.unlink(missing_ok=True)
        done = one_task(tmp_path, f"exit {code}")
        assert (done.returncode, mark.exists()) == (code, again)
        assert done.stdout == (f"study-seed1: exit code {code}, back into the queue\n" if again else "")


def test_a_task_that_was_cancelled_stays_away(tmp_path):
    environment = install(tmp_path / "slurm") | {"SLURM_JOB_ID": "1"}
    python = tmp_path / "slurm" / "bin" / "python"
    again = f"{tmp_path}/again"
    cancelled = tmp_path / "slurm" / CANCELLED
    python.write_text(f"#!/bin/sh\n[ ! -e {again} ] || exit 0\ntouch {again}\nsleep 0.5\ntouch {cancelled}\nsleep 9\n")
    python.chmod(0o755)
    (tmp_path / "study.names").write_text("study\tstudy.ipynb\tstudy-seed1\t-\t0\t-\n")
    options = ["--array=1-1", f"--output={tmp_path}/log"]
    command = ["sbatch", *options, str(SLURM), "p.yaml", "", str(tmp_path / "study.names")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=20)
    assert [task["codes"] for task in tasks(tmp_path / "slurm")] in ([[137]], [[143]])
    assert "back into the queue" not in (tmp_path / "log").read_text()


def test_a_signal_to_the_shell_leaves_the_step_alone(tmp_path):
    """SIGTERM to the shell that waits neither ends the task nor reaches srun, which would kill the step."""
    install(tmp_path / "slurm")
    # the shell is the parent of the stand-in of srun, which is this process's
    runner = "kill -TERM $(ps -o ppid= -p $PPID); sleep 0.3; echo saved; exit 75"
    done = one_task(tmp_path, runner)
    assert (done.returncode, done.stdout) == (75, "saved\nstudy-seed1: exit code 75, back into the queue\n")


def test_the_folder_of_a_plan_is_asked_of_its_reader(plan, tmp_path):
    """Its name may stand in quotation marks, before a comment, in a file of Windows."""
    text = plan.read_text().replace("name: p\n", 'name:   "p"  # of all\n').replace("\n", "\r\n")
    plan.write_bytes(text.encode())
    environment = install(tmp_path / "slurm") | {"OUT": ""}
    sbatch = tmp_path / "slurm" / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\nshift $(($# - 3))\necho "$@" >&2\necho 1\n')
    (tmp_path / "nbutils").symlink_to(ROOT / "nbutils")
    done = subprocess.run(
        ["bash", str(SLURM), str(plan)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.glob("runs/p/.slurm/*/*"))
    assert names == ["after.names", "data.names", "names", "study.names"]
    assert done.stderr.startswith(f"{plan}  runs/p/.slurm/")  # no folder: `run` decides


def test_a_script_without_a_plan_tells_its_usage(tmp_path):
    done = subprocess.run(["bash", str(SLURM), "none.yaml"], env=install(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: bash params/cluster/slurm.sh PLAN.yaml" in done.stderr


def test_an_index_of_the_job_is_a_variant_of_its_stage(plan, tmp_path):
    container = read_yaml(CLUSTER / "job.yaml")["spec"]["template"]["spec"]["containers"][0]
    runner = tmp_path / "bin" / "python"
    runner.parent.mkdir()
    runner.write_text(f'#!/bin/sh\n[ "$3" = run ] && echo "$@" || exec "{sys.executable}" "$@"\n')
    runner.chmod(0o755)
    variables = {"PLAN": str(plan), "STAGE": "after", "JOB_COMPLETION_INDEX": "1"}
    variables |= {"PATH": f"{runner.parent}:{os.environ['PATH']}"}
    done = subprocess.run(container["command"], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    given = f"-m nbutils run {tmp_path}/after.ipynb --params {plan} --variant after-seed2\n"
    assert (done.stdout, done.stderr) == (given, "")


@pytest.mark.slow
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
        subprocess.run(["bash", str(CLUSTER / "stop_runners.sh"), str(tmp_path / "runs")], check=True, timeout=30)
        assert not place.is_locked()
        assert runner.wait(10) == 75
        assert other.poll() is None
        other.kill()
    assert place.result()["status"] == "preempted"


def test_a_runner_that_starts_while_a_pod_goes_is_asked_too(tmp_path):
    """Ray goes on giving work to the pod; and a second SIGTERM would end a runner that saves its state."""
    locks = tmp_path / "runs" / "p" / ".locks"
    locks.mkdir(parents=True)
    holder = tmp_path / "holder.sh"
    holder.write_text(
        'exec 9>>"$1"; flock 9; echo "process $$ on $(uname -n)" >"$1"\n'
        "ended=; trap 'echo asked; ended=$((SECONDS + 2))' TERM\n"
        'until [ -n "$ended" ] && [ "$SECONDS" -ge "$ended" ]; do sleep 0.1; done\n'
    )

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", str(holder), str(locks / name)], stdout=subprocess.PIPE, text=True)

    with start("first") as first:
        while not (locks / "first").exists() or not (locks / "first").read_text():
            time.sleep(0.05)
        hook = subprocess.Popen(["bash", str(CLUSTER / "stop_runners.sh"), str(tmp_path / "runs")])
        assert first.stdout.readline() == "asked\n"
        with start("second") as second:
            assert hook.wait(30) == 0
            assert (first.poll(), second.poll()) == (0, 0)
            assert (first.stdout.read(), second.stdout.read()) == ("", "asked\n")
            assert second.wait(5) == 0
        start_of_wait = time.monotonic()
        with start("third") as third:
            command = ["bash", str(CLUSTER / "stop_runners.sh"), str(tmp_path / "runs"), "1"]
            subprocess.run(command, check=True, timeout=10)
            assert time.monotonic() - start_of_wait < 4  # the pod's time is over, whoever is still at work
            third.kill()
