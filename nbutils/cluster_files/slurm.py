"""Batch scripts of Slurm that run a plan's variants as array tasks, such as params/cluster/slurm.sh."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from nbutils.cluster_files.commands import Command, find_commands
from nbutils.errors import PlanError, did_you_mean
from nbutils.places import relative
from nbutils.runner import RUN_AGAIN
from nbutils.stopping import SAVE_SECONDS

MARGIN_SECONDS = 30  # to end the kernel and write the record, once the state is saved
OPTION_NAMES = (
    "account array chdir comment constraint cpus-per-gpu cpus-per-task error exclude exclusive export gpus "
    "gpus-per-node gpus-per-task gres hint job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu nice "
    "nodelist nodes ntasks ntasks-per-node open-mode output partition prefer qos requeue reservation signal time "
    "time-min tmp wait-all-nodes"
)
OPTIONS = frozenset(OPTION_NAMES.split())
SIGNAL = re.compile(r"(?P<batch>B:)?(?P<name>[A-Z0-9]+)(?:@(?P<seconds>\d+))?")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>\d+))?(?::(?P<seconds>\d+))?")


def check_script(path: Path) -> str:
    """What the batch script would run. Raises PlanError with the place, the cause and the cure."""
    where = relative(path)
    text = _read(path)
    options = _read_options(where, text)
    if not options:
        raise PlanError(f"{where} has no #SBATCH line, so it is no batch script of Slurm; only those can be checked.")
    _check_requeue(where, options, text)
    commands = find_commands(where, text)
    runs = [command for command in commands if command.name == "run"]
    if not runs:
        raise PlanError(f"{where} has no `python -m nbutils run`, so its tasks run no variant. Add it.")
    seconds = _check_signal(where, options)
    for run in runs:
        _check_heard(where, options["signal"], text, run)
    for command in commands:
        command.plan(where)
    told = " ".join(f"--{name}" + (f"={value}" if value else "") for name, value in options.items())
    return "\n".join(
        [
            f"{where}: a batch script of Slurm, {len(commands)} commands of the workbook in it.",
            f"  options  {told}",
            f"  stopped  {options['signal']}: a training has {seconds:g} s to save, then its task is requeued",
        ]
    )


def _read(path: Path) -> str:
    """The text of a script that bash can read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{relative(path)} cannot be read: {getattr(error, 'strerror', error)}.") from None
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    if checked.returncode:
        told = checked.stderr.strip().splitlines()[0].removeprefix(f"{path}: ")
        raise PlanError(f"{relative(path)} is not bash: {told}.")
    return text


def _read_options(where: str, text: str) -> dict[str, str]:
    """The #SBATCH options by name. Raises PlanError for one that Slurm has not, or would not read."""
    options: dict[str, str] = {}
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#SBATCH"):
            begun = begun or bool(line.strip() and not line.lstrip().startswith("#"))
            continue
        place = f"{where}, line {number}"
        if begun:
            raise PlanError(f"{place}: Slurm reads no #SBATCH line after the first command. Move it to the top.")
        given = line.removeprefix("#SBATCH").split(" #")[0].strip()
        name, _, value = given.removeprefix("--").partition("=")
        if not given.startswith("--") or name not in OPTIONS:
            near = did_you_mean(name.lstrip("-"), OPTIONS)
            raise PlanError(f"{place}: {given!r} is no option known here; write --name=value. {near}")
        options[name] = value.strip()
    return options


def _check_signal(where: str, options: dict[str, str]) -> float:
    """Seconds between the signal and the time limit. Raises PlanError where they are too few to save in."""
    needed = SAVE_SECONDS + MARGIN_SECONDS
    cure = f"Give --signal=B:TERM@{needed + MARGIN_SECONDS:g}: a training may need {SAVE_SECONDS:g} s to save."
    found = SIGNAL.fullmatch(options.get("signal", ""))
    if not found:
        raise PlanError(f"{where}: --signal is {options.get('signal', 'missing')!r}. {cure}")
    seconds = float(found["seconds"] or 60)
    if seconds < needed:
        raise PlanError(f"{where}: --signal comes {seconds:g} s before the time limit. {cure}")
    limit = _seconds(options.get("time", ""))
    if limit is None:
        raise PlanError(f"{where}: --time is {options.get('time', 'missing')!r}. Give --time=hours:minutes:seconds.")
    if limit <= seconds:
        raise PlanError(f"{where}: --time is {limit:g} s, and the signal comes {seconds:g} s before it. Give it more.")
    return seconds


def _seconds(time: str) -> float | None:
    """Seconds of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours..."""
    found = TIME.fullmatch(time)
    if not found:
        return None
    given = [int(found[name]) for name in ("hours", "minutes", "seconds") if found[name]]
    if found["days"]:
        given = [int(found["days"]) * 24 + given[0], *given[1:]]
    elif len(given) < 3:
        given = [0, *given]
    hours, minutes, seconds = (*given, 0, 0)[:3]
    return hours * 3600.0 + minutes * 60 + seconds


def _check_requeue(where: str, options: dict[str, str], text: str) -> None:
    if "requeue" not in options:
        raise PlanError(
            f"{where}: --requeue is missing, so that a task whose node fails is lost. Add #SBATCH --requeue."
        )
    if options.get("open-mode") != "append":
        raise PlanError(f"{where}: --open-mode is not append, so that a requeued task empties its log. Add it.")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    if "scontrol requeue" not in code or not re.search(rf"\b{RUN_AGAIN}\b", code):
        raise PlanError(
            f"{where}: nothing requeues a task that ends with exit code {RUN_AGAIN}, stopped and to be run again. "
            'Add: scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
        )


def _check_heard(where: str, given: str, text: str, run: Command) -> None:
    """Raise PlanError where the signal does not reach the runner. With B: it comes to the shell, else to steps."""
    if not given.startswith("B:"):
        if "srun" not in run.before.split():
            raise PlanError(f"{where}: without B: --signal goes to what srun starts. Write srun python -m nbutils run.")
        return
    name = given.removeprefix("B:").split("@")[0].removeprefix("SIG")
    if not re.search(rf"^\s*trap\s.*\b(?:SIG)?{name}\b", text, re.MULTILINE):
        raise PlanError(f"{where}: no trap hears the signal {name}. Add one that sends SIGTERM to the runner.")
    if run.after != "&":
        raise PlanError(
            f"{where}: `python -m nbutils run` is not in the background, and bash hears a signal only when it has "
            "ended. End its line with & and `wait` for it."
        )
