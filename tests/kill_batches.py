"""Batches whose processes are killed at random moments lose no result and leave nothing half.

    python tests/kill_batches.py --kills 200

One batch after another runs short notebooks (tests/published_runs.py) in three stages, with other parameters each time,
so that good results are being replaced. Meanwhile SIGKILL hits the batch itself, a runner, a kernel, the process that
runners or kernels are forked from: at any time, as a run begins, as it has written its result, as it is published. A
killed batch is followed by another, at once or when its last process has gone. All the while every published run is
read in full and compared with what it must hold; after each kill `status` and the readers of runs are asked, too.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from batch_processes import (
    GONE_SECONDS,
    MARK,
    RUN_SECONDS,
    Orphans,
    Process,
    by_role,
    is_lock_held,
    kernels_of,
    processes_of,
)
from published_runs import PIDS, Fault, Looker, trained, write_study

from nbutils.batch.batch import Batch, register_plan
from nbutils.batch.local_engine import LocalEngine
from nbutils.batch.progress import LogDisplay
from nbutils.batch.status import plan_status
from nbutils.foundation.files import read_json
from nbutils.runs.attempts import ATTEMPTS, LOCKS
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
START_SECONDS = 20.0  # for a batch's first runner
LONGEST_ANY, LONGEST_WAIT = 1.2, 4.0  # seconds to a kill at any moment, and at one of those that are waited for
BATCH_SECONDS = 120.0  # for a batch that nobody kills any more
LOOK_SECONDS, SCAN_SECONDS = 0.02, 0.25  # between looks at the published runs, and at the processes
AT_ONCE = 0.15  # how often a batch is hunted before its first runner is there
VICTIMS = {"runner": 10, "kernel": 10, "batch": 3, "host": 1, "forkserver": 2}  # how often, beside the others
MOMENTS = {"any": 6, "running": 3, "training": 5, "result": 3, "finished": 4}  # any, or when an attempt gets so far
TOLD = {"": "before it is recorded", "running": "in the first cells", "training": "training", "saving": "saving"}
TOLD |= {"result": "after its result", "finished": "as it is published"}
AFTERWARDS = (0, 0, 0.003, 0.03, 0.1)  # seconds


@dataclass
class Hunt:
    """Batches in `folder`, one at a time, and who of them was killed when."""

    folder: Path
    chance: random.Random
    kills: int
    made: Counter = field(default_factory=Counter)
    batches: int = 0
    generations: list[int] = field(default_factory=lambda: [0, 0, 0])
    doomed: list[tuple[float, Process, str]] = field(default_factory=list)  # until when, who, why
    longest: float = 0.0  # seconds that a process outlived a killed batch and its last runner
    orphans: list[Orphans] = field(default_factory=list)
    scanned: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("data", "study", "after"):
            write_study(self.folder, name, resumes=name == "study")
        self.runs, self.pids, self.plan_file = self.folder / "runs", self.folder / PIDS, self.folder / "hunted.yaml"
        self._write_plan()
        self.looker = Looker(self.runs, [variant.name for variant in load_plan(self.plan_file).variants])
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.warnings.append(record.getMessage())
        logging.getLogger("nbutils.runs.run_folder").addHandler(handler)

    def go(self) -> None:
        """All the kills, then a batch to its end. Raises Fault."""
        while sum(self.made.values()) < self.kills:
            if self.batches == 0 or self.chance.random() < 0.75:
                self._change()
            self._batch()
        self._batch()
        self._watch_until(lambda: not self.orphans and not self.doomed, RUN_SECONDS)
        self._must_be_over()

    def _change(self) -> None:
        """Other parameters: of the study, at times of the stage beside it or of what both need."""
        self.generations[1] += 1
        self.generations[2] += self.chance.random() < 0.5
        self.generations[0] += self.chance.random() < 0.3
        self._write_plan()

    def _write_plan(self) -> None:
        self.plan_file.write_text((PLAN % tuple(self.generations)).replace("{here}", str(self.folder)))

    def _batch(self) -> None:
        """A batch to its end, or until it is killed."""
        self.batches += 1
        mark, log = f"{os.getpid()}-{self.batches}", self.folder / f"batch-{self.batches}.log"
        words = [sys.executable, __file__, "--batch", str(self.plan_file), str(self.runs)]
        with log.open("w") as output:
            batch = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | {MARK: mark})
        if self.chance.random() > AT_ONCE:
            before = self._lock_times()
            self._watch_until(lambda: self._lock_times() != before or batch.poll() is not None, START_SECONDS)
        killed = False
        while batch.poll() is None and sum(self.made.values()) < self.kills and not killed:
            killed = self._kill_one(batch, mark)
        if killed:
            batch.wait()
            self.orphans.append(Orphans(mark))
            if self.chance.random() < 0.5:  # else the next one starts while runners of this one are at work
                self._watch_until(lambda: not self.orphans, RUN_SECONDS)
                self._must_be_over()
            return
        self._watch_until(lambda: batch.poll() is not None, BATCH_SECONDS)
        if batch.poll() is None:
            os.kill(batch.pid, signal.SIGKILL)
        if batch.wait() != 0:
            raise Fault(f"a batch ended with {batch.returncode}:\n{log.read_text()[-3000:]}")
        self._must_be_finished()

    def _kill_one(self, batch: subprocess.Popen, mark: str) -> bool:
        """Wait for a moment and kill someone; whether that was the batch."""
        moment = self._drawn(MOMENTS)
        name = self._wait_for(moment, batch)
        roles = by_role(processes_of(mark), batch.pid)
        there = {role: weight for role, weight in VICTIMS.items() if roles.get(role)}
        if not there or batch.poll() is not None:
            return False
        victim, role = None, self._drawn(there)
        if moment != "any" and name and role in ("runner", "kernel"):  # the very one
            runner = self._runner_of(name)
            found = [each for each in roles["runner"] if each.pid == runner] if role == "runner" else []
            victim = next(iter(found or (kernels_of(runner, self.pids) if runner else [])), None)
        victim = victim or self.chance.choice(roles[role])
        when = self._phase(role, victim, roles)
        with_it = self._end_with(role, victim, roles)
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.made[role, when] += 1
        self.doomed += [(time.monotonic() + GONE_SECONDS, each, f"its {role} was killed") for each in with_it]
        self._check()
        return role == "batch"

    def _drawn(self, weights: dict[str, int]) -> str:
        return self.chance.choices(list(weights), list(weights.values()))[0]

    def _wait_for(self, moment: str, batch: subprocess.Popen) -> str:
        """The variant for which the moment has come; empty where it is any moment, or none came."""
        began = time.monotonic()
        if moment == "any":
            until = began + self.chance.uniform(0, LONGEST_ANY)
            self._watch_until(lambda: time.monotonic() > until or batch.poll() is not None, LONGEST_WAIT)
            return ""
        before = {name: self._state(name) for name in self.looker.names}
        while time.monotonic() - began < LONGEST_WAIT and batch.poll() is None:
            for name in self.looker.names:
                state = self._state(name)
                if state != before[name] and state == moment:
                    time.sleep(self.chance.choice(AFTERWARDS))
                    return name
                before[name] = state
            self.looker.look()
            time.sleep(0.002)
        return ""

    def _state(self, name: str) -> str:
        """How far the attempt at a variant is, one of TOLD or how an earlier one ended."""
        attempt = self.runs / ATTEMPTS / name
        try:
            status = read_json(attempt / "manifest.json")["status"]
        except OSError:
            return ""
        names = {"result.json": "result", "model": "saving", "metrics.csv": "training"} if status == "running" else {}
        return next((state for file, state in names.items() if (attempt / file).exists()), status)

    def _lock_times(self) -> dict[Path, int]:
        """Of the locks, when a runner last took each."""
        return {path: path.stat().st_mtime_ns for path in (self.runs / LOCKS).glob("[!.]*")}

    def _runner_of(self, name: str) -> int:
        words = (self.runs / LOCKS / name).read_text().split()
        return int(words[1]) if len(words) > 1 else 0

    def _phase(self, role: str, victim: Process, roles: dict[str, list[Process]]) -> str:
        """What the victim is at, for the record."""
        if role not in ("runner", "kernel"):
            return "at work" if roles.get("runner") else "as it starts or ends"
        for name in self.looker.names:
            runner = self._runner_of(name) if (self.runs / LOCKS / name).exists() else 0
            if victim.pid == runner or (runner and victim.pid in [each.pid for each in kernels_of(runner, self.pids)]):
                return TOLD.get(self._state(name), TOLD[""])
        return TOLD[""]

    def _end_with(self, role: str, victim: Process, roles: dict[str, list[Process]]) -> list[Process]:
        """Who may not outlive the victim by more than GONE_SECONDS; of a killed batch, nobody may."""
        if role == "runner":
            return kernels_of(victim.pid, self.pids)
        return [each for each in roles.get("kernel", []) if role == "host" and each.parent == victim.pid]

    def _watch_until(self, holds, seconds: float) -> None:
        """Look again and again until something holds, for so long at most."""
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            self.looker.look()
            self._look_for_the_doomed()
            time.sleep(LOOK_SECONDS)

    def _look_for_the_doomed(self) -> None:
        now = time.monotonic()
        self.doomed = [each for each in self.doomed if each[1].is_alive()]
        for until, process, why in self.doomed:
            if now > until:
                raise Fault(f"process {process} is still there {GONE_SECONDS} s after {why}")
        if self.orphans and now - self.scanned > SCAN_SECONDS:
            self.scanned = now
            self.orphans = [each for each in self.orphans if each.are_left()]
            self.longest = max([self.longest, *(each.outlived for each in self.orphans)])

    def _check(self) -> None:
        """After a kill: what is published, and whether our own readers can read it, whatever goes on."""
        self.looker.look()
        self._look_for_the_doomed()
        plan = load_plan(self.plan_file)
        table = plan_status(plan, self.runs)
        runs = {run.variant: run for run in load_runs(self.runs)} if self.runs.is_dir() else {}
        for name, published in self.looker.last.items():
            if name not in runs or name not in table:
                raise Fault(f"{name} is published, and the readers of runs do not see it")
            if published.status == "finished" and runs[name].status != "finished":
                raise Fault(f"{name} is finished, and load_runs has {runs[name].status}")
        if self.warnings:
            raise Fault(f"the readers of runs passed something over: {self.warnings}")

    def _must_be_over(self) -> None:
        """Where nothing runs: no lock is held, and every record can be read."""
        for path in (self.runs / LOCKS).glob("*"):
            if is_lock_held(path):
                raise Fault(f"the lock {path} is still held")
        for path in self.runs.rglob("manifest.json"):
            read_json(path)
        self._check()

    def _must_be_finished(self) -> None:
        """After a batch that came to its end: every run is there, of these parameters."""
        if not self.orphans:
            self._must_be_over()
        data = {seed: trained(seed, self.generations[0], 0)[-1] for seed in (1, 2)}
        for variant in load_plan(self.plan_file).variants:
            self.looker.seen.pop(variant.name, None)
            self.looker.look()
            published = self.looker.last.get(variant.name)
            upstream = data[variant.params["seed"]] if variant.needs else 0
            states = trained(variant.params["seed"], variant.params["generation"], upstream)
            if published is None or (published.status, published.state) != ("finished", states[-1]):
                raise Fault(f"the batch has ended, and {variant.name} is {published}, not at {states[-1]}")

    def told(self, seconds: float) -> str:
        """The summary."""
        roles: dict[str, Counter] = {}
        for (role, phase), number in self.made.items():
            roles.setdefault(role, Counter())[phase] += number
        killed = "; ".join(
            f"{role} {counts.total()} ({', '.join(f'{number} {phase}' for phase, number in counts.most_common())})"
            for role, counts in sorted(roles.items(), key=lambda item: -item[1].total())
        )
        counts = self.looker.counts
        return (
            f"{sum(self.made.values())} kills in {seconds:.0f} s and {self.batches} batches: {killed}. "
            f"{counts['finished']} results published, {counts['replaced']} in place of a good one, {counts['resumed']} "
            "by runs that went on from a checkpoint: none lost, none half, none wrong. Of a killed batch nothing was "
            f"left {self.longest:.1f} s after its last runner."
        )


def run_batch(plan_file: Path, folder: Path) -> int:
    """The process that is hunted: a batch with warm kernels and retries."""
    plan = load_plan(plan_file)
    engine = LocalEngine(plan.name, folder, workers=3, gpus=(), preloaded=PRELOADED)
    work = Batch(plan, folder, list(plan.variants), engine, RETRIES, BACKOFF_SECONDS)
    work.check()
    register_plan(plan, folder)
    work.run(LogDisplay(sys.stdout))
    print(work.table())
    return work.exit_code()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of victims and moments (default: another each time)")
    parser.add_argument("--keep", action="store_true", help="leave the folder for a look")
    parser.add_argument("--batch", nargs=2, type=Path, metavar=("PLAN", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        sys.exit(run_batch(*args.batch))
    seed = random.randrange(10**6) if args.seed is None else args.seed
    scratch = Path(tempfile.mkdtemp(prefix="hunt-", dir="/tmp"))
    (scratch / "tmp").mkdir()
    os.environ["TMPDIR"] = str(scratch / "tmp")  # what the killed leave there goes with it
    print(f"seed {seed}, {scratch}", flush=True)
    hunt = Hunt(scratch, random.Random(seed), args.kills)
    start = time.monotonic()
    try:
        hunt.go()
        print(hunt.told(time.monotonic() - start), flush=True)
        if not args.keep:
            shutil.rmtree(scratch)
    finally:
        for number in range(1, hunt.batches + 1):
            for process in processes_of(f"{os.getpid()}-{number}"):
                os.kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
