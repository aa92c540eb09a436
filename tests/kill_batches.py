"""Batches whose processes are killed at random moments lose no result and leave nothing half.

    python tests/kill_batches.py --kills 200

One batch after another runs short notebooks (tests/published_runs.py) in three stages, with other parameters each time,
so that good results are being replaced. Meanwhile SIGKILL hits any process of the batch: itself, a runner, a keeper, a
kernel, the process that runners are forked from. All the while every published run is read in full and compared with
what it must hold; after each kill `status` and the readers of runs are asked, too.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from batch_processes import MARK, processes_of
from published_runs import Fault, Looker, trained, write_study

from nbutils.batch.batch import Batch, register_plan
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import Display
from nbutils.batch.status import plan_status
from nbutils.foundation.files import is_held, read_json
from nbutils.runs.attempts import LOCKS
from nbutils.runs.plans import load_plan
from nbutils.runs.run_folder import load_runs

PLAN = """\
name: hunted
stages:
  - {name: data, notebook: {here}/data.ipynb, params: {generation: %d}, matrix: {seed: [1, 2]}}
  - name: study
    notebook: {here}/study.ipynb
    needs: {data_folder: data}
    params: {generation: %d}
    matrix: {seed: [1, 2], pause: [0.02, 0.04]}
  - name: after
    notebook: {here}/after.ipynb
    needs: {data_folder: data}
    params: {generation: %d}
    matrix: {seed: [1, 2]}
"""
PRELOADED = ("nbutils.runs.run_folder", "pyarrow.parquet")
RETRIES, BACKOFF_SECONDS = 20, 0.0005  # it doubles with every retry
LONGEST_PAUSE = 1.5  # seconds between two kills
BATCH_SECONDS = 300.0  # for a batch that nobody kills any more, and for what a killed one leaves at work
BATCH_ITSELF = 0.1  # how often it is the batch that is killed
LOOK_SECONDS = 0.02


@dataclass
class Hunt:
    """Batches in `folder`, one at a time, of which any process may be killed."""

    folder: Path
    chance: random.Random
    kills: int
    made: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "study", "after"):
            write_study(self.folder, name, resumes=name == "study")
        self.runs, self.plan_file = self.folder / "runs", self.folder / "hunted.yaml"
        self.generations = [0, 0, 0]
        self._change()
        self.looker = Looker(self.runs, [variant.name for variant in load_plan(self.plan_file).variants])

    def go(self) -> None:
        """All the kills, then a batch to its end. Raises Fault."""
        while self.made < self.kills:
            if self.chance.random() < 0.75:
                self._change()
            self._batch()
        self._batch()
        self._must_be_over()

    def _change(self) -> None:
        """Other parameters: of the study, at times of the stage beside it or of what both need."""
        self.generations[1] += 1
        self.generations[2] += self.chance.random() < 0.5
        self.generations[0] += self.chance.random() < 0.3
        self.plan_file.write_text((PLAN % tuple(self.generations)).replace("{here}", str(self.folder)))

    def _batch(self) -> None:
        """A batch to its end, or until it is killed."""
        self.batches += 1
        mark, log = f"{os.getpid()}-{self.batches}", self.folder / f"batch-{self.batches}.log"
        words = [sys.executable, __file__, "--batch", str(self.plan_file), str(self.runs)]
        with log.open("w") as output:
            batch = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | {MARK: mark})
        begun = self._locks()
        self._look_until(lambda: self._locks() != begun or batch.poll() is not None)
        while batch.poll() is None and self.made < self.kills:
            until = time.monotonic() + self.chance.uniform(0, LONGEST_PAUSE)
            self._look_until(lambda until=until: time.monotonic() > until or batch.poll() is not None)
            self._kill_one(mark, batch.pid)
        self._look_until(lambda: batch.poll() is not None)
        if batch.returncode not in (0, -signal.SIGKILL):
            raise Fault(f"a batch ended with {batch.returncode}:\n{log.read_text()[-3000:]}")
        if batch.returncode == 0 or self.chance.random() < 0.5:  # else the next begins while runners are at work
            self._look_until(lambda: not processes_of(mark))
        if batch.returncode == 0:
            self._must_be_finished()

    def _locks(self) -> list[int]:
        """When a runner last took each lock."""
        return [path.stat().st_mtime_ns for path in sorted((self.runs / LOCKS).glob("[!.]*"))]

    def _kill_one(self, mark: str, batch: int) -> None:
        victims = [each for each in processes_of(mark) if each != batch]
        if not victims or self.chance.random() < BATCH_ITSELF:
            victims = [batch]
        try:
            os.kill(self.chance.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            return
        self.made += 1
        self._check()

    def _look_until(self, holds) -> None:
        """Look at the published runs again and again until something holds."""
        deadline = time.monotonic() + BATCH_SECONDS
        while not holds():
            self.looker.look()
            time.sleep(LOOK_SECONDS)
            if time.monotonic() > deadline:
                raise Fault(f"it did not come to its end in {BATCH_SECONDS} s")

    def _check(self) -> None:
        """What is published, and whether our own readers can read it, whatever goes on."""
        self.looker.look()
        table = plan_status(load_plan(self.plan_file), self.runs)
        runs = {run.variant: run for run in load_runs(self.runs)} if self.runs.is_dir() else {}
        for name, published in self.looker.last.items():
            if name not in runs or name not in table:
                raise Fault(f"{name} is published, and the readers of runs do not see it")
            if published.status == "finished" and runs[name].status != "finished":
                raise Fault(f"{name} is finished, and load_runs has {runs[name].status}")

    def _must_be_over(self) -> None:
        """Where nothing runs: no lock is held, and every record can be read."""
        if held := [path for path in (self.runs / LOCKS).glob("[!.]*") if is_held(path)]:
            raise Fault(f"locks are still held: {held}")
        for path in self.runs.rglob("manifest.json"):
            read_json(path)
        self._check()

    def _must_be_finished(self) -> None:
        """After a batch that came to its end: every run is there, of these parameters."""
        data = {seed: trained(seed, self.generations[0], 0)[-1] for seed in (1, 2)}
        self.looker.seen.clear()
        self.looker.look()
        for variant in load_plan(self.plan_file).variants:
            published = self.looker.last.get(variant.name)
            upstream = data[variant.params["seed"]] if variant.needs else 0
            states = trained(variant.params["seed"], variant.params["generation"], upstream)
            if published is None or (published.status, published.state) != ("finished", states[-1]):
                raise Fault(f"the batch has ended, and {variant.name} is {published}, not at {states[-1]}")


def run_batch(plan_file: Path, folder: Path) -> int:
    """The process that is hunted: a batch with warm kernels and retries."""
    plan = load_plan(plan_file)
    engine = LocalEngine(plan.name, folder, workers=3, gpus=(), preloaded=PRELOADED)
    work = Batch(plan, folder, list(plan.variants), engine, RETRIES, BACKOFF_SECONDS)
    work.check()
    register_plan(plan, folder)
    work.run(Display("p", sys.stdout))
    print(work.table())
    return work.exit_code()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of victims and moments (default: another each time)")
    parser.add_argument("--batch", nargs=2, type=Path, metavar=("PLAN", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        sys.exit(run_batch(*args.batch))
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hunt-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        hunt = Hunt(Path(scratch), random.Random(seed), args.kills)
        try:
            hunt.go()
        finally:
            for number in range(1, hunt.batches + 1):
                for process in processes_of(f"{os.getpid()}-{number}"):
                    os.kill(process, signal.SIGKILL)
    counts = hunt.looker.counts
    print(
        f"{hunt.made} kills in {hunt.batches} batches. {counts['finished']} results published, {counts['replaced']} in "
        f"place of a good one, {counts['resumed']} by runs that went on from a checkpoint: none lost, none half, none "
        "wrong."
    )


if __name__ == "__main__":
    main()
