"""The workbook's command line: check a plan, run its variants, look at them, make the report.

    python -m nbutils check params/quick.yaml
    python -m nbutils batch params/quick.yaml --workers 2
    python -m nbutils status
    python -m nbutils report

Commands import what they need when they are called: `status` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from nbutils.errors import PlanError, WorkbookError, did_you_mean
from nbutils.places import REPORTS, RUNS, relative, resolve

INTERRUPTED = 130  # what shells say of a command ended by Ctrl-C
EXAMPLES = """examples:
  python -m nbutils check params/quick.yaml --gpu A100     what a plan would run, and what that would cost
  python -m nbutils batch params/quick.yaml --workers 2    run all of it that is not finished
  python -m nbutils batch quick --only 'cosine-alpha0.5-*' some of it, and what that needs
  python -m nbutils run 04_cosine_mixing --params quick --variant cosine-alpha0.5-seed1-noise_seed0
  python -m nbutils status quick                           what is finished, running, failed, waiting
  python -m nbutils report                                 run folders become reports/<ISO week>.html, results.md
"""
RUN_HELP = """exit codes: 0 finished, now or before; 1 a cell failed; 2 a mistake in parameters, data or model; 75
asked to stop (SIGTERM, Ctrl-C), run it again and it goes on from what it saved; 138 the kernel died. Safe to repeat: a
finished run is not run again, and two runners never share a run."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Users' mistakes are one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    args.again = shlex.join(["python", "-m", "nbutils", *arguments])
    try:
        return args.command(args)
    except WorkbookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def check(args: argparse.Namespace) -> int:
    """List a plan's variants with their parameters and costs, or check a file for a cluster; starts nothing."""
    from nbutils.cluster_files import check_cluster_file, is_cluster_file
    from nbutils.cost import check_gpu
    from nbutils.listing import plan_listing, variant_names
    from nbutils.plans import find_plan, load_plan

    file = find_plan(args.plan)
    if is_cluster_file(file):
        print(check_cluster_file(file))
    elif args.names:
        print(variant_names(load_plan(file)))
    else:
        check_gpu(args.gpu, args.utilisation)
        print(plan_listing(load_plan(file), args.gpu, args.utilisation))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run one variant."""
    from nbutils.progress import duration
    from nbutils.runner import run_variant
    from nbutils.stopping import leave_quickly

    variant, plan, folder = _requested(args)
    leave_quickly()
    outcome = run_variant(variant, plan, folder)
    told = "was finished before" if outcome.skipped else f"{outcome.status} in {duration(outcome.seconds)}"
    print(f"{variant.name}: {told} -> {relative(outcome.folder)}")
    if outcome.message:
        print(*outcome.log, f"error: {outcome.message}", sep="\n", file=sys.stderr)
    return outcome.exit_code


def batch(args: argparse.Namespace) -> int:
    """Run all variants of a plan that are not finished."""
    from nbutils.batch import Batch, register_plan, select
    from nbutils.hosting import PRELOADED
    from nbutils.local_engine import LocalEngine, default_workers
    from nbutils.plans import find_plan, load_plan
    from nbutils.progress import make_display
    from nbutils.runner import RUN_AGAIN
    from nbutils.stopping import Stopped

    if args.workers is not None and args.workers < 1:
        raise PlanError(f"--workers is {args.workers}. Give the number of variants to run at a time, at least 1.")
    plan = load_plan(find_plan(args.plan))
    folder = resolve(args.out) if args.out else RUNS / plan.name
    preloaded = () if args.fresh_kernels else PRELOADED
    engine = LocalEngine(plan.name, folder, args.workers or default_workers(), preloaded=preloaded)
    work = Batch(plan, folder, select(plan, args.only), engine)
    work.check()
    register_plan(plan, folder)
    try:
        work.run(make_display(plan.name))
    except KeyboardInterrupt as stop:
        print(f"\nStopped with {work.tally().counts()}. Finished variants are kept; go on with: {args.again}")
        return RUN_AGAIN if isinstance(stop, Stopped) else INTERRUPTED
    print(work.table())
    return work.exit_code()


def status(args: argparse.Namespace) -> int:
    """Show the table of one plan's variants, or of all plans with runs."""
    from nbutils.plans import find_plan, load_plan
    from nbutils.status import folder_status, plan_status

    if args.plan is None:
        print(folder_status(resolve(args.out) if args.out else RUNS))
    else:
        plan = load_plan(find_plan(args.plan))
        print(plan_status(plan, resolve(args.out) if args.out else RUNS / plan.name))
    return 0


def report(args: argparse.Namespace) -> int:
    """Execute the report notebook, export it as one HTML file, and write the log and the week's numbers beside it."""
    import tempfile

    from nbutils.kernels import NotebookFailed, execute
    from nbutils.notebooks import find_notebook
    from nbutils.params import read_schema
    from nbutils.report import export, write_log, write_metrics, write_summary
    from nbutils.studies import gather

    notebook = find_notebook("08_report")
    week = f"{date.today():%G-W%V}"
    html = resolve(args.out) if args.out else REPORTS / f"{week}.html"
    runs = resolve(args.runs)
    given = {"runs_folder": str(runs), "reports_folder": str(html.parent), "plan": args.plan, "week": week}
    params = read_schema(notebook).convert(given)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / notebook.name
        try:
            execute(notebook, executed, params, environment={})
        except NotebookFailed as failure:
            print(*failure.record["log"], f"error: {relative(notebook)}, {failure}", sep="\n", file=sys.stderr)
            return 1
        print(export(executed, html))
    evidence = gather(runs, args.plan)
    written = [write_log(evidence, html.parent), write_summary(evidence, html.parent, week), *write_metrics(evidence)]
    print(*written, sep="\n")
    return 0


def _requested(args: argparse.Namespace) -> tuple[Any, str, Path]:
    """(variant, plan name, folder of the plan's runs) that `run` was asked for."""
    from nbutils.batch import register_plan
    from nbutils.notebooks import find_notebook
    from nbutils.plans import SLUG, find_plan, load_plan
    from nbutils.runner import flat_variant
    from nbutils.yamlfile import read_yaml

    notebook, file = find_notebook(args.notebook), find_plan(args.params)
    given = read_yaml(file) or {}
    if isinstance(given, dict) and "stages" in given:
        plan = load_plan(file)
        variant, name = plan.variant(args.variant), plan.name
        if variant.notebook != notebook:
            near = did_you_mean(notebook.stem, [variant.notebook.stem])
            raise PlanError(f"{variant.name} of {relative(file)} is a run of another notebook. {near}")
        folder = resolve(args.out) if args.out else RUNS / name
        register_plan(plan, folder)
        return variant, name, folder
    if not isinstance(given, dict):
        raise PlanError(f"{relative(file)} is neither a plan nor a mapping of parameters, `name: value` on each line.")
    if not SLUG.fullmatch(args.variant):
        raise PlanError(f"--variant {args.variant!r} becomes a folder. Use a-z, 0-9 and ._- only.")
    return flat_variant(notebook, args.variant, given), file.stem, resolve(args.out) if args.out else RUNS / file.stem


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments; what stands in files for clusters is checked with it."""
    parser = argparse.ArgumentParser(
        prog="python -m nbutils",
        description="Run notebooks from plan files and report on their runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, add_arguments in COMMANDS.items():
        epilog = RUN_HELP if command is run else None
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__, epilog=epilog)
        sub.set_defaults(command=command)
        add_arguments(sub.add_argument)
    return parser


PLAN_HELP = "a plan file, or the name of one in params/"
OUT_HELP = "folder that holds the plan's runs, each in a folder of its own (default: runs/<plan>)"


def _check_arguments(add: Callable[..., Any]) -> None:
    add("plan", metavar="PLAN", help=f"{PLAN_HELP}; or a file for a cluster, such as params/cluster/slurm.sh")
    add("--names", action="store_true", help="the variants alone, with tabs between stage, notebook, name and needs")
    add("--gpu", default="A100", help="GPU to estimate hours for (default: %(default)s)")
    add("--utilisation", type=float, default=0.4, help="fraction of its peak in use (default: %(default)s)")


def _run_arguments(add: Callable[..., Any]) -> None:
    add("notebook", metavar="NOTEBOOK", help="name or path, such as 04_cosine_mixing")
    add("--params", metavar="FILE", required=True, help="a plan, or a YAML file of `name: value` lines")
    add("--variant", metavar="NAME", required=True, help="a variant of the plan, or a name for this run")
    add("--out", metavar="FOLDER", help=OUT_HELP)


def _batch_arguments(add: Callable[..., Any]) -> None:
    add("plan", metavar="PLAN", help=PLAN_HELP)
    add("--workers", type=int, help="variants at a time (default: half the cores, but 2 of 2; 1 with a GPU)")
    add("--only", metavar="PATTERN", default="*", help="variants by name, as 'cosine-*-seed1', and all they need")
    add("--out", metavar="FOLDER", help=OUT_HELP)
    add("--fresh-kernels", action="store_true", help="kernels import for themselves, not forked from one that has")


def _status_arguments(add: Callable[..., Any]) -> None:
    add("plan", metavar="PLAN", nargs="?", help=f"{PLAN_HELP} (default: all plans with runs)")
    add("--out", metavar="FOLDER", help=f"with PLAN: {OUT_HELP}; without: the folder of all plans")


def _report_arguments(add: Callable[..., Any]) -> None:
    add("--runs", metavar="FOLDER", default=str(RUNS), help="folder of all plans' runs (default: runs)")
    add("--plan", default="", help="one plan's name (default: every plan with runs)")
    add("--out", metavar="FILE", help="the HTML file (default: reports/<ISO week>.html)")


COMMANDS = {
    check: _check_arguments,
    run: _run_arguments,
    batch: _batch_arguments,
    status: _status_arguments,
    report: _report_arguments,
}


if __name__ == "__main__":
    sys.exit(main())
