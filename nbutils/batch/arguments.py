"""What the commands of `python -m nbutils` take: their arguments, their help, their examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

EXAMPLES = """examples:
  python -m nbutils check params/quick.yaml --gpu A100     what a plan would run, and what that would cost
  python -m nbutils batch params/quick.yaml --workers 2    run all of it that is not finished
  python -m nbutils batch quick --only 'cosine-alpha0.5-*' some of it, and what that needs
  python -m nbutils batch babylm --engine ray --address auto
  python -m nbutils run 04_cosine_mixing --params quick --variant cosine-alpha0.5-seed1-noise_seed0
  python -m nbutils run --from runs/quick/cosine-alpha0.5-seed1-noise_seed0/manifest.json
  python -m nbutils status quick --watch                   what is finished, running, failed, waiting
  python -m nbutils report                                 run folders become reports/<ISO week>.html, results.md
  python -m nbutils report --plan quick                    one plan alone: reports/<ISO week>-quick.html
  python -m nbutils report --compare reports/2026-W46.html reports/2026-W47.html

Paths are taken from the folder you are in; plans and notebooks are found by name from anywhere.
"""
RUN_HELP = """exit codes: 0 finished, now or before; 1 a cell failed or took too long; 2 a mistake in parameters, data,
model or folder; 75 asked to stop (SIGTERM, Ctrl-C), run it again and it goes on from what it saved; 138 the kernel
died. Safe to repeat: a finished run is not run again, and two runners never share a run. With --from: 0 the same
numbers, 1 others."""
PLAN_HELP = "a plan file, or the name of one in params/"
OUT_HELP = "folder of the plan's runs, and of no other plan's (default: the project's runs/<plan>)"
Add = Callable[..., Any]


def make_parser(commands: Sequence[Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the whole command line; what it gives has `command`, one of `commands`."""
    parser = argparse.ArgumentParser(
        prog="python -m nbutils",
        description="Run notebooks from plan files and report on their runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        name, told = command.__name__, command.__doc__
        sub = subparsers.add_parser(name, help=told, description=told, epilog=RUN_HELP if name == "run" else None)
        sub.set_defaults(command=command, parser=sub)
        ARGUMENTS[name](sub.add_argument)
    return parser


def _check_arguments(add: Add) -> None:
    add("plan", metavar="PLAN", help=PLAN_HELP)
    add("--gpu", default="A100", help="GPU to estimate hours for (default: %(default)s)")
    add("--utilisation", type=float, default=0.4, help="fraction of its peak in use (default: %(default)s)")
    add(
        "--names",
        action="store_true",
        help="the variants alone, a line each: stage, notebook, name, what it needs, GPUs, cores",
    )


def _run_arguments(add: Add) -> None:
    add("notebook", metavar="NOTEBOOK", nargs="?", help="name or path, such as 04_cosine_mixing")
    add("--params", metavar="FILE", help="a plan, or a YAML file of `name: value` lines")
    add("--variant", metavar="NAME", help="a variant of the plan, or a name for this run")
    add("--out", metavar="FOLDER", help=OUT_HELP)
    add("--run-minutes", type=float, metavar="X", help="end the run after X minutes (default: as the plan says)")
    add("--cell-minutes", type=float, metavar="X", help="end it where one cell takes longer")
    add("--from", dest="manifest", metavar="MANIFEST", help="repeat the run of this manifest.json and compare numbers")


def _batch_arguments(add: Add) -> None:
    add("plan", metavar="PLAN", help=PLAN_HELP)
    add("--workers", type=int, help="variants at a time (default: one for each GPU; without, half the cores, 2 of 2)")
    add("--only", metavar="PATTERN", default="*", help="variants by name, as 'cosine-*-seed1', and all they need")
    add("--out", metavar="FOLDER", help=OUT_HELP)
    add("--retries", type=int, default=3, help="more attempts at what was stopped or killed (default: %(default)s)")
    add("--gpus", metavar="IDS", help="GPUs to share out, as 0,1 (default: all, or CUDA_VISIBLE_DEVICES)")
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster (make ray)")
    add("--address", default="", help="with --engine ray: of the cluster (default: RAY_ADDRESS, or one started here)")
    add("--fresh-kernels", action="store_true", help="kernels import for themselves, not forked from one that has")


def _status_arguments(add: Add) -> None:
    add("plan", metavar="PLAN", nargs="?", help=f"{PLAN_HELP} or in runs/ (default: all plans with runs)")
    add("--out", metavar="FOLDER", help=f"with PLAN: {OUT_HELP}; without: the folder of all plans")
    add("--watch", action="store_true", help="follow it until nothing is at work any more")


def _report_arguments(add: Add) -> None:
    add("--runs", metavar="FOLDER", help="folder of all plans' runs (default: the project's runs)")
    add("--plan", default="", help=f"{PLAN_HELP} or in runs/ (default: every plan with runs)")
    add(
        "--out",
        metavar="FILE.html",
        help="where the page goes, its numbers (FILE.json) and log (FILE-results.md) beside it (default: "
        "reports/<ISO week>.html with results.md, of one plan reports/<ISO week>-<plan>.html)",
    )
    add("--compare", nargs=2, metavar=("A", "B"), help="two reports, or two folders of runs, side by side")


ARGUMENTS = {
    "check": _check_arguments,
    "run": _run_arguments,
    "batch": _batch_arguments,
    "status": _status_arguments,
    "report": _report_arguments,
}
