"""Batches of a few lines' notebook, with kernels forked by a host or fresh."""

from __future__ import annotations

from pathlib import Path

from tiny_notebooks import write_plan

from nbutils.batch.batch import Batch, register_plan
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import Display
from nbutils.runs.plans import Plan, load_plan

STUDY = 'run_folder: str = ""  # where results go\nseed: int = 0  # of all, at least 0\n'
LIGHT = ("json",)  # what the host imports besides ipykernel


def batch(folder: Path, seeds: int, preloaded: tuple[str, ...], workers: int = 2) -> Batch:
    """Run `folder`'s study.ipynb for so many seeds, with no second attempt; results in its `runs`."""
    plan = study_plan(folder, f"{{name: study, notebook: {{here}}/study.ipynb, matrix: {{seed: {[*range(seeds)]}}}}}")
    return run_batch(plan, LocalEngine(plan.name, folder / "runs", workers, preloaded=preloaded), retries=0)


def study_plan(folder: Path, *stages: str) -> Plan:
    """A plan of these stages, each a YAML mapping in one line; `{here}` is `folder`."""
    listed = "".join(f"  - {stage}\n" for stage in stages)
    return load_plan(write_plan(folder / "p.yaml", f"name: p\nstages:\n{listed}"))


def run_batch(plan: Plan, engine: LocalEngine, **settings: float) -> Batch:
    """Run the plan with this engine; what it says is in the file `display` beside the plan."""
    work = Batch(plan, engine.plan_folder, list(plan.variants), engine, **settings)
    work.check()
    register_plan(plan, engine.plan_folder)
    with (plan.file.parent / "display").open("w") as log:
        work.run(Display("p", log))
    return work


def endings(work: Batch) -> dict[str, str]:
    return {name: outcome.status for name, outcome in work.outcomes.items()}
