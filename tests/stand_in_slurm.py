"""A Slurm of one machine for tests of batch scripts: sbatch runs an array's tasks one by one before it returns.

It honours what params/cluster/slurm.sh relies on: #SBATCH lines and options of the command line, dependencies,
requeues, steps that srun starts, and the signal before the time limit, which comes as soon as a task writes `waiting`:
to the step, or with B: to the script's shell alone. As the real one srun passes no SIGTERM on to its step, it kills it.
`install` makes the commands; what was run is in `tasks`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = "STAND_IN_SLURM"  # environment variable: where jobs are noted
WAITING = "waiting"
STEP = "step"  # file: the process of the step that runs


def install(folder: Path) -> dict[str, str]:
    """Make sbatch, scontrol and srun in `folder`; returns the environment in which they are found."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in ("sbatch", "scontrol", "squeue", "srun"):
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    here = Path(sys.executable).parent
    return os.environ | {FOLDER: str(folder), "PATH": f"{commands}:{here}:{os.environ['PATH']}"}


def tasks(folder: Path) -> list[dict]:
    """The tasks in the order in which they ended: job, its name and options, task, exit code of each attempt."""
    return [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]


def sbatch(words: list[str]) -> None:
    options: dict[str, str] = {}
    given = [word for word in words if word.startswith("--")]
    script, *arguments = words[len(given) :]
    lines = [line.split(maxsplit=1)[1] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")]
    for word in (*lines, *given):
        name, _, value = word.removeprefix("--").partition("=")
        options[name] = value
    folder = Path(os.environ[FOLDER])
    job = len(list(folder.glob("job-*"))) + 1
    (folder / f"job-{job}").touch()
    kind, *needed = options.get("dependency", "afterany").split(":")
    ended = tasks(folder) if needed else []
    assert {int(each) for each in needed} <= {task["job"] for task in ended}, "a dependency on no job"
    failed = any(task["codes"][-1] for task in ended if str(task["job"]) in needed)
    if kind == "afterany" or not failed:
        first, last = (int(each) for each in options["array"].split("%")[0].split("-"))
        for task in range(first, last + 1):
            _run(folder, job, task, options, [script, *arguments])
    print(job)


def _run(folder: Path, job: int, task: int, options: dict[str, str], command: list[str]) -> None:
    mark = folder / f"requeue-{job}_{task}"
    codes: list[int] = []
    while mark.exists() or not codes:
        mark.unlink(missing_ok=True)
        variables = {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(task)}
        variables |= {"SLURM_RESTART_COUNT": str(len(codes))} if codes else {}
        mode = "a" if options.get("open-mode") == "append" else "w"
        with Path(options["output"].replace("%a", str(task))).open(mode) as log:
            process = subprocess.Popen(
                ["bash", *command], env=os.environ | variables, stdout=log, stderr=log, process_group=0
            )
        while process.poll() is None:
            _signal(folder, process, options["signal"])
            time.sleep(0.05)
        codes.append(process.returncode)
    with (folder / "tasks.jsonl").open("a") as file:
        file.write(json.dumps({"job": job, "task": task, "codes": codes, "options": options}) + "\n")


def _signal(folder: Path, process: subprocess.Popen, given: str) -> None:
    """Send what a running task has to hear now: its time is nearly over."""
    if (folder / WAITING).exists():
        (folder / WAITING).unlink()
        number = signal.Signals[f"SIG{given.removeprefix('B:').split('@')[0]}"]
        os.kill(process.pid if given.startswith("B:") else int((folder / STEP).read_text()), number)


def squeue(words: list[str]) -> None:
    assert words[0] == "--noheader"
    assert words[2] == "--format=%T"
    print("RUNNING")


def scontrol(words: list[str]) -> None:
    command, task = words
    assert command == "requeue"
    (Path(os.environ[FOLDER]) / f"requeue-{task}").touch()


def srun(words: list[str]) -> None:
    command = words[next(position for position, word in enumerate(words) if not word.startswith("--")) :]
    step = subprocess.Popen(
        command, start_new_session=True
    )  # no child of srun on a real cluster, and in no group of it
    signal.signal(signal.SIGTERM, lambda number, frame: os.killpg(step.pid, signal.SIGKILL))
    (Path(os.environ[FOLDER]) / STEP).write_text(str(step.pid))
    code = step.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    {"sbatch": sbatch, "scontrol": scontrol, "squeue": squeue, "srun": srun}[sys.argv[1]](sys.argv[2:])
