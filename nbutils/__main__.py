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
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbutils.batch import make_parser
from nbutils.foundation import (
    PARAMS,
    REPORTS,
    RUNS,
    WITH_PARENT,
    LockedRunError,
    PlanError,
    Stopped,
    WorkbookError,
    did_you_mean,
    relative,
    stop_on_sigterm,
    stop_with_parent,
    typed,
    visible,
)

if TYPE_CHECKING:
    from nbutils.batch import Engine
    from nbutils.foundation import Resources
    from nbutils.runs import Plan, Variant

CLOSED_PIPE = 141  # what shells say of a command whose reader has gone
REFUSED, RUN_AGAIN = 2, 75
INTERRUPTED = 130  # what shells say of a command ended by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Users' mistakes are one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [WITH_PARENT]:
        stop_with_parent(int(arguments[1]))
        arguments = arguments[2:]
    if not arguments:
        parser().print_help(sys.stderr)
        return REFUSED
    args = parser().parse_args(arguments)
    args.again = shlex.join(["python", "-m", "nbutils", *arguments])
    try:
        with stop_on_sigterm():
            return args.command(args)
    except LockedRunError as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        return RUN_AGAIN
    except WorkbookError as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return RUN_AGAIN if isinstance(stop, Stopped) else INTERRUPTED
    except BrokenPipeError:  # as of `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would tell of it at its end
        return CLOSED_PIPE
    except OSError as error:
        path = relative(Path(error.filename)) if error.filename else "a file"
        print(f"error: {path}: {error.strerror or error}. Mend that, then try again.", file=sys.stderr)
        return REFUSED


def check(args: argparse.Namespace) -> int:
    """List a plan's variants with their parameters and costs; starts nothing."""
    from nbutils.batch import check_gpu, plan_listing, variant_names
    from nbutils.runs import load_plan

    check_gpu(args.gpu, args.utilisation)
    file = _plan_file(args.plan)
    if args.names:
        print(variant_names(load_plan(file)))
    else:
        from nbutils.report import power_lines

        plan = load_plan(file)
        print(visible(plan_listing(plan, args.gpu, args.utilisation)))
        print(*map(visible, power_lines(plan, RUNS / plan.name)), sep="\n")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run one variant."""
    from nbutils.batch import duration, run_variant
    from nbutils.foundation import leave_quickly

    if args.manifest:
        return _repeat(args)
    if not (args.notebook and args.params and args.variant):
        args.parser.error("run needs NOTEBOOK, --params and --variant, or --from with the manifest.json of a run")
    variant, plan, folder = _requested(args)
    leave_quickly()
    outcome = run_variant(variant, plan, folder)
    told = "was finished before" if outcome.skipped else f"{outcome.status} in {duration(outcome.seconds)}"
    print(f"{variant.name}: {told} -> {relative(outcome.folder)}")
    if outcome.message:
        print(*map(visible, outcome.log), f"error: {outcome.message}", sep="\n", file=sys.stderr)
    return outcome.exit_code


def batch(args: argparse.Namespace) -> int:
    """Run all variants of a plan that are not finished."""
    from nbutils.batch import Batch, Display, register_plan, select
    from nbutils.report import power_lines
    from nbutils.runs import load_plan

    plan = load_plan(_plan_file(args.plan))
    folder = typed(args.out) if args.out else RUNS / plan.name
    work = Batch(plan, folder, select(plan, args.only), _engine(args, plan, folder), args.retries)
    work.check()
    for line in work.stale_table():
        print(visible(line))
    register_plan(plan, folder)
    for line in power_lines(plan, folder):
        print(visible(line))
    try:
        work.run(Display(plan.name))
    except KeyboardInterrupt as stop:
        print(f"\nStopped with {work.tally().counts()}. Finished variants are kept; go on with: {args.again}")
        return RUN_AGAIN if isinstance(stop, Stopped) else INTERRUPTED
    print(work.table())
    return work.exit_code()


def status(args: argparse.Namespace) -> int:
    """Show the table of one plan's variants, or of all plans with runs."""
    from nbutils.batch import folder_status, is_going_on, plan_folders, watch

    if args.plan is None:
        folder = _existing("--out", typed(args.out)) if args.out else RUNS
        show, folders = partial(folder_status, folder), partial(plan_folders, folder)
    else:
        folder, show = _planned_status(args)
        folders = partial(list, [folder])
    if args.watch:
        watch(partial(show, fit=True), going_on=lambda: any(map(is_going_on, folders())))
    else:
        print(show())
    if args.out and not folder.is_dir():
        print(f"There is no folder {relative(folder)}: nothing has run there.", file=sys.stderr)
    return 0


def _planned_status(args: argparse.Namespace) -> tuple[Path, Callable[..., str]]:
    """The folder of a plan's runs and what tells its table. Of some plans nothing but that folder is left."""
    from nbutils.batch import plan_status, recorded_status
    from nbutils.runs import load_plan

    file, folder = _plan_file(args.plan), typed(args.out) if args.out else RUNS / args.plan
    if not file.is_file() and recorded_status(folder).startswith(f"{args.plan}: "):
        return folder, partial(recorded_status, folder)
    plan = load_plan(file)
    folder = folder if args.out else RUNS / plan.name
    return folder, partial(plan_status, plan, folder)


def report(args: argparse.Namespace) -> int:
    """Execute the report notebook, export it as one HTML file, and write the log and the week's numbers beside it."""
    import tempfile

    from nbutils.batch import NotebookFailed, execute
    from nbutils.report import export, gather, write_log, write_metrics, write_summary
    from nbutils.runs import find_notebook, read_schema

    if args.compare:
        return _compare(args)
    notebook = find_notebook("08_report")
    week = f"{date.today():%G-W%V}"
    runs = _existing("--runs", typed(args.runs)) if args.runs else RUNS
    plan, name = _reported_plan(args.plan, runs)
    html = _page(args.out) if args.out else REPORTS / f"{week}{f'-{name}' * bool(name)}.html"
    given = {"runs_folder": str(runs), "reports_folder": str(html.parent), "plan": plan, "week": week}
    params = read_schema(notebook).convert(given)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / notebook.name
        try:
            execute(notebook, executed, params, environment={})
        except NotebookFailed as failure:
            told = [*failure.record["log"], f"error: {relative(notebook)}, {failure}"]
            print(*map(visible, told), sep="\n", file=sys.stderr)
            return 1
        print(export(executed, html))
    evidence, log = gather(runs, plan), f"{html.stem}-results.md" if args.out or name else "results.md"
    numbers = write_summary(evidence, html.parent, week, html.stem)
    print(write_log(evidence, html.parent, log), numbers, *write_metrics(evidence), sep="\n")
    return 0


def _reported_plan(word: str, runs: Path) -> tuple[str, str]:
    """What the report notebook takes for the plan that was asked for, and its name; both empty for all plans."""
    from nbutils.report import is_folder_name
    from nbutils.runs import load_plan, load_runs

    is_file = not is_folder_name(word) or word.endswith((".yaml", ".yml"))
    if not word or (not is_file and any(run.plan == word for run in load_runs(runs))):
        return word, word
    file = _plan_file(word)
    return str(file), load_plan(file).name


def _page(out: str) -> Path:
    """The HTML file that `--out` names. Its numbers stand beside it under its name, so that has to end in .html."""
    if not out.endswith(".html"):
        raise PlanError(f"--out {out} is the name of no HTML file. Let it end in .html, as reports/mine.html.")
    return typed(out)


def _plan_file(word: str) -> Path:
    """The plan file that was asked for; where there is none, where it would lie for one who types here."""
    from nbutils.runs import find_plan

    file = find_plan(word)
    return file if file.exists() or file.parent == PARAMS else typed(word)


def _notebook(word: str) -> Path:
    """The notebook that was asked for, by name, or by path from here or from the repository's root."""
    from nbutils.runs import find_notebook

    file = typed(f"{word.removesuffix('.ipynb')}.ipynb")
    return find_notebook(file if file.is_file() and ("/" in word or word.endswith(".ipynb")) else word)


def _existing(option: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise PlanError(f"{option}: there is no folder {relative(folder)}. Name the one that holds the runs.")
    return folder


def _engine(args: argparse.Namespace, plan: Plan, folder: Path) -> Engine:
    """The engine that `batch` was asked for. Raises PlanError for options that fit no other."""
    from nbutils.batch import PRELOADED, LocalEngine, default_workers

    if args.retries < 0:
        raise PlanError(f"--retries is {args.retries}. Give 0, for no second attempt, or more.")
    if args.workers is not None and args.workers < 1:
        raise PlanError(f"--workers is {args.workers}. Give the number of variants to run at a time, at least 1.")
    if args.engine == "ray":
        from nbutils.batch import RayEngine

        local = {"--workers": args.workers, "--gpus": args.gpus, "--fresh-kernels": args.fresh_kernels}
        for option, value in local.items():
            if value:
                raise PlanError(
                    f"{option} is for this machine alone: Ray shares out what its nodes have. Leave it out."
                )
        return RayEngine(plan, folder, args.address)
    if args.address:
        raise PlanError(f"--address {args.address} is that of a Ray cluster. Add --engine ray, or leave it out.")
    gpus = None if args.gpus is None else tuple(each.strip() for each in args.gpus.split(",") if args.gpus.strip())
    preloaded = () if args.fresh_kernels else PRELOADED
    return LocalEngine(plan.name, folder, args.workers or default_workers(gpus), gpus, preloaded)


def _repeat(args: argparse.Namespace) -> int:
    """Run what a manifest says once more; 0 where its numbers came out the same."""
    from nbutils.batch import repeat

    if args.notebook or args.params or args.variant:
        raise PlanError("--from names the notebook, its parameters and the variant. Leave those out, or --from.")
    repeated = repeat(Path(args.manifest), typed(args.out) if args.out else None, _limits(args))
    print(visible(repeated.told()))
    return repeated.exit_code


def _compare(args: argparse.Namespace) -> int:
    """Two reports or two sets of runs, side by side."""
    from nbutils.report import compare

    print(visible(compare(*map(Path, args.compare), typed(args.out) if args.out else None)))
    return 0


def _limits(args: argparse.Namespace) -> Resources:
    """The limits that `run` was given, None where it was not."""
    from nbutils.foundation import read_resources

    return read_resources("run", {"run_minutes": args.run_minutes, "cell_minutes": args.cell_minutes})


def _requested(args: argparse.Namespace) -> tuple[Variant, str, Path]:
    """(variant, plan name, folder of the plan's runs) that `run` was asked for."""
    given = {name: minutes for name, minutes in vars(_limits(args)).items() if minutes is not None}
    variant, plan, folder = _found(args)
    return replace(variant, resources=replace(variant.resources, **given)), plan, folder


def _found(args: argparse.Namespace) -> tuple[Variant, str, Path]:
    from nbutils.batch import flat_variant, register_plan
    from nbutils.foundation import read_yaml
    from nbutils.runs import SLUG, load_plan

    notebook, file = _notebook(args.notebook), _plan_file(args.params)
    given = read_yaml(file) or {}
    if isinstance(given, dict) and "stages" in given:
        plan = load_plan(file)
        variant, name = plan.variant(args.variant), plan.name
        if variant.notebook != notebook:
            near = did_you_mean(notebook.stem, [variant.notebook.stem])
            raise PlanError(f"{variant.name} of {relative(file)} is a run of another notebook. {near}")
        folder = typed(args.out) if args.out else RUNS / name
        register_plan(plan, folder)
        return variant, name, folder
    if not isinstance(given, dict):
        raise PlanError(f"{relative(file)} is neither a plan nor a mapping of parameters, `name: value` on each line.")
    if not SLUG.fullmatch(args.variant):
        raise PlanError(f"--variant {args.variant!r} becomes a folder. Use a-z, 0-9 and ._- only.")
    return flat_variant(notebook, args.variant, given), file.stem, typed(args.out) if args.out else RUNS / file.stem


COMMANDS = (check, run, batch, status, report)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    return make_parser(COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
