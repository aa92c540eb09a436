"""Batch scripts of Slurm that run a plan's variants as array tasks, such as params/cluster/slurm.sh."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from nbutils.cluster_files.commands import find_commands
from nbutils.errors import PlanError, did_you_mean
from nbutils.places import relative
from nbutils.runner import RUN_AGAIN
from nbutils.stopping import SAVE_SECONDS

HOOK = "stop_runners.sh"
MARGIN_SECONDS = 30  # to end the kernel and write the record, once the state is saved
OPTION_NAMES = (
    "account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments "
    "constraint container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task "
    "deadline delay-boot dependency distribution error exclude exclusive export export-file external-launcher extra "
    "extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres "
    "gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem "
    "mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks "
    "ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe "
    "parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation resv-ports "
    "segment signal sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min "
    "tmp tres-bind tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey wrap"
)
OPTIONS = frozenset(OPTION_NAMES.split())
SIGNAL = re.compile(r"(?:(?P<receiver>[BR]+):)?(?P<name>[A-Za-z0-9]+)(?:@(?P<seconds>\d+))?")
SIGTERM = ("TERM", "SIGTERM", "15")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>\d+))?(?::(?P<seconds>\d+))?")


def check_script(path: Path) -> str:
    """What the batch script would run. Raises PlanError with the place, the cause and the cure."""
    where = relative(path)
    text = _read(path)
    if path.name == HOOK:
        return f"{where}: no batch script, but what a pod runs before it goes (preStop). Check the file that names it."
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
        if "srun" not in run.before.split():
            raise PlanError(f"{where}: --signal goes to what srun starts. Write srun python -m nbutils run.")
    _check_shell(where, text)
    for command in commands:
        command.plan(where)
    told = " ".join(f"--{name}" + (f"={value}" if value else "") for name, value in options.items())
    return "\n".join(
        [
            f"{where}: a batch script of Slurm, {len(commands)} commands of the workbook in it.",
            f"  options  {told}",
            f"  stopped  {options['signal']}: a training has {min(seconds, SAVE_SECONDS):g} s to save, then its task "
            "is requeued",
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
    cure = f"Give --signal=TERM@{needed + MARGIN_SECONDS:g}: a training may need {SAVE_SECONDS:g} s to save."
    found = SIGNAL.fullmatch(options.get("signal", ""))
    if not found:
        raise PlanError(f"{where}: --signal is {options.get('signal', 'missing')!r}. {cure}")
    if "B" in (found["receiver"] or ""):
        raise PlanError(
            f"{where}: --signal=B: comes to the shell alone, and srun passes no SIGTERM on: it kills what it started. "
            f"{cure}"
        )
    if found["name"].upper() not in SIGTERM:
        raise PlanError(f"{where}: --signal is {found['name']}, and `run` saves its state at SIGTERM alone. {cure}")
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


def _check_shell(where: str, text: str) -> None:
    """Raise PlanError where SIGTERM ends the shell, and with it the step that is saving, or kills the step by srun."""
    traps = re.findall(r"^\s*trap\s+(.*)\s(?:SIG)?TERM\b", text, re.MULTILINE)
    if not traps:
        raise PlanError(
            f"{where}: SIGTERM ends the shell before the step has saved its state, and nothing requeues the task. "
            "Add: trap : TERM"
        )
    if any(re.search(r"\bkill\b", trap) for trap in traps):
        raise PlanError(
            f"{where}: the trap kills srun, which passes no SIGTERM on: it kills what it started. Write: trap : TERM"
        )
