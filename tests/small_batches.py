"""Batches of a few lines' notebook, with kernels forked by a host or fresh."""

from __future__ import annotations

from pathlib import Path

from tiny_notebooks import write_plan

from nbutils.batch import Batch, register_plan, select
from nbutils.local_engine import LocalEngine
from nbutils.plans import load_plan
from nbutils.progress import LogDisplay

STUDY = 'run_folder: str = ""  # where results go\nseed: int = 0  # of all, at least 0\n'
LIGHT = ("json",)  # what the host imports besides ipykernel


def batch(folder: Path, seeds: int, preloaded: tuple[str, ...], workers: int = 2) -> Batch:
    """Run `folder`'s study.ipynb for so many seeds; results in its `runs`."""
    stage = f"{{name: study, notebook: {{here}}/study.ipynb, matrix: {{seed: {[*range(seeds)]}}}}}"
    plan = load_plan(write_plan(folder / "p.yaml", f"name: p\nstages:\n  - {stage}\n"))
    work = Batch(
        plan, folder / "runs", select(plan, "*"), LocalEngine(plan.name, folder / "runs", workers, None, preloaded)
    )
    work.check()
    register_plan(plan, folder / "runs")
    with (folder / "display").open("w") as log:
        work.run(LogDisplay(log))
    return work


def endings(work: Batch) -> dict[str, str]:
    return {name: outcome.status for name, outcome in work.outcomes.items()}
