"""Runs that are killed again and again end with the weights and numbers of one that never was.

    python tests/kill_many.py --kills 200                all cases, as often as you have patience for
    python tests/kill_many.py --kills 20 --storage mds   the same with another way of storing the data

Runs are forked from this process, which has imported all they need and has run nothing: a start takes milliseconds, so
that a kill falls on training, evaluation or the writing of a checkpoint. Two processes are two such forks with gloo
between them; a kill takes one or both. Each case is first run without a kill, and its model, its best model,
metrics.csv (but for times), audit.csv and final numbers are compared byte for byte; of interactions also their rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}

import torch

from nbutils.data.preparation import DataConfig, prepare_data
from nbutils.interaction.settings import Interaction
from nbutils.interaction.training import InteractionConfig, train_interactively
from nbutils.objectives import cosine_mixing, smoothing
from nbutils.runs.metric_labels import is_of_the_machine
from nbutils.training.trainer import TrainingConfig, train

NUMBERS = ("parameters", "steps", "tokens_seen", "best_eval_ce_loss", "best_step")
WORDS = ("human_words", "student_words", "teacher_words")
ROUNDS = {"rounds": 4, "prompts_per_round": 5, "samples_per_prompt": 3, "prompt_tokens": 5, "response_tokens": 8}
ROUNDS |= {"passes": 2, "top_p": 1.0}
DEADLINE = 120.0  # seconds for one run
CASES = {  # (changes of the configuration, processes)
    "plain": ({}, 1),
    "chunks": ({"random_chunks": True, "gradient_accumulation_steps": 2, "max_steps": 16}, 1),
    "unlogged": ({"logging_steps": 4, "checkpoint_steps": 3, "random_chunks": True}, 1),
    "stops early": ({"early_stopping_patience": 6, "learning_rate": 0.3, "max_steps": 80, "eval_steps": 2}, 1),
    "two": ({"per_device_train_batch_size": 2, "random_chunks": True, "max_steps": 16}, 2),
    "two accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12}, 2),
}
INTERACTIONS = {
    "judged": ({"interaction": Interaction("simpo_judge", **ROUNDS)}, 1),
    "rewarded": ({"interaction": Interaction("ppo", kl_stop=0.02, kl_target=0.1, kl_horizon=100, **ROUNDS)}, 1),
    "two judged": ({"interaction": Interaction("simpo_judge", **ROUNDS), "per_device_train_batch_size": 2}, 2),
}


def write_data(folder: Path, storage: str = "arrow") -> Path:
    """Prepared data of made-up text: 300 tokens in the vocabulary, some 35 blocks of 16 in the train split."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklm", k=drawn.randint(2, 5))) for _ in range(80)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(" ".join(drawn.choices(words, k=4)))
    given = {} if storage == "arrow" else {"storage": storage}
    config = DataConfig("text", f"{corpus}/*.txt", vocab_size=300, block_size=16, minimum_characters=1, **given)
    prepare_data(config, folder / "data")
    return folder / "data"


def configuration(data: Path, run: Path, **changes: object) -> TrainingConfig:
    """A run of 20 steps over several epochs with dropout, evaluations and a checkpoint every other step.

    With an `interaction` among the changes it is that, of as many steps as it has.
    """
    if "interaction" not in changes:
        changes = {"objective": cosine_mixing(0.5, ramp=0.5), **changes}
    settings = (InteractionConfig if "interaction" in changes else TrainingConfig)(
        data_folder=data,
        run_folder=run,
        objective=smoothing(None),
        model_name="micro",
        dropout=0.2,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        eval_steps=3,
        checkpoint_steps=2,
        lr_scheduler_type="cosine",
    )
    return replace(settings, **changes)


def fork(config: TrainingConfig, processes: int) -> list[int]:
    """Start the run in `processes` forks of this process; returns their ids."""
    port = _free_port()
    return [_fork_rank(config, rank, processes, port) for rank in range(processes)]


def ends(pids: list[int], deadline: float = DEADLINE) -> list[int | None]:
    """Wait for the forks; their exit codes. Where one ends badly the others have nobody to talk to: None, if killed."""
    codes: dict[int, int | None] = {}
    limit = time.monotonic() + deadline
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > limit:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run_well(config: TrainingConfig, processes: int) -> None:
    """Run to the end. Raises AssertionError where a process fails."""
    codes = ends(fork(config, processes))
    assert not any(codes) and None not in codes, f"exit codes {codes}"


def untimed(row: dict[str, str]) -> dict[str, str]:
    """A row of metrics.csv without what the clock says."""
    return {name: value for name, value in row.items() if not is_of_the_machine(name)}


def left_behind(run: Path) -> dict[str, object]:
    """All that a run ends with, and must be the same however often it was killed."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [untimed(row) for row in csv.DictReader(file)]
    numbers = json.loads((run / "numbers.json").read_text())
    weights = {name: (run / name / "model.safetensors").read_bytes() for name in ("model", "model_best")}
    files = {name: (run / name).read_text() for name in ("audit.csv", "round_samples.jsonl") if (run / name).exists()}
    if (run / "rounds.csv").exists():
        with (run / "rounds.csv").open(newline="") as file:
            files["rounds.csv"] = [untimed(row) for row in csv.DictReader(file)]
    found = {name: numbers[name] for name in (*NUMBERS, *WORDS) if name in numbers}
    return weights | files | {"metrics.csv": rows, "numbers": found}


def run_killed(
    config: TrainingConfig, processes: int, kills: int, moments: tuple[float, float], chance: random.Random
) -> None:
    """Run, kill after a random time between two `moments` (seconds), run again: so many kills, then to the end."""
    made = 0
    while made < kills:
        pids = fork(config, processes)
        time.sleep(chance.uniform(*moments))
        for pid in chance.sample(pids, chance.randint(1, processes)):
            os.kill(pid, signal.SIGKILL)  # one that has ended waits to be asked how: its id is still its own
        codes = ends(pids)
        assert processes > 1 or codes[0] in (0, -signal.SIGKILL), f"it failed by itself: {codes}"
        assert -signal.SIGKILL in codes or not any(codes), f"it failed by itself: {codes}"
        if any(codes):
            made += 1
        else:  # it was faster: once more from the beginning
            shutil.rmtree(config.run_folder)
    run_well(config, processes)


def undisturbed(config: TrainingConfig, processes: int) -> tuple[float, float]:
    """Run without a kill; when its first step was made and when it had ended, in seconds from its start."""
    start = time.monotonic()
    pids = fork(config, processes)
    while not (config.run_folder / "progress.json").exists() and time.monotonic() - start < DEADLINE:
        time.sleep(0.005)
    began = time.monotonic() - start
    codes = ends(pids)
    assert not any(codes) and None not in codes, f"it does not run at all: exit codes {codes}"
    return began, time.monotonic() - start


def check_case(name: str, data: Path, folder: Path, kills: int, chance: random.Random) -> None:
    """Compare a run of the case that is killed so often with one that is not. Raises AssertionError."""
    changes, processes = (CASES | INTERACTIONS)[name]
    start = time.monotonic()
    calm = configuration(data, folder / "calm", **changes)
    began, longest = undisturbed(calm, processes)
    wanted = left_behind(calm.run_folder)
    hunted = replace(calm, run_folder=folder / "hunted")
    run_killed(hunted, processes, kills, (0.8 * began, longest), chance)
    found = left_behind(hunted.run_folder)
    different = [part for part in wanted if wanted[part] != found[part]]
    steps = [int(row["step"]) for row in found["metrics.csv"]]
    if calm.early_stopping_patience:
        assert found["numbers"]["steps"] < calm.max_steps, "it did not stop early"
    assert not different, f"{name}: after {kills} kills other {', '.join(different)}, in {folder}"
    assert steps == sorted(steps) and len(set(steps)) >= len(steps) / 2
    resumed = (folder / "rank0.log").read_text().count("Training goes on from step")
    seconds = time.monotonic() - start
    print(
        f"{name}: {kills} kills, {resumed} times gone on from a checkpoint, the same bytes, {seconds:.1f} s", flush=True
    )


def _fork_rank(config: TrainingConfig, rank: int, processes: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    with _leaving():
        log = (config.run_folder.parent / f"rank{rank}.log").open("a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        torch.set_num_threads(1)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        numbers = (train_interactively if isinstance(config, InteractionConfig) else train)(config)
        if rank == 0:
            (config.run_folder / "numbers.json").write_text(json.dumps(numbers))


@contextmanager
def _leaving() -> Iterator[NoReturn]:
    """A fork's work, after which it is gone, with exit code 1 where that failed."""
    code = 1
    try:
        yield
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--storage", default="arrow", help="of the data (default: %(default)s)")
    parser.add_argument(
        "--case", choices=CASES | INTERACTIONS, action="append", help="one of them, or several (default: all)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    names = args.case or list(CASES | INTERACTIONS)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if not (pid := os.fork()):  # nothing runs in this process itself
            with _leaving():
                write_data(Path(scratch), args.storage)
        assert ends([pid]) == [0], "the data could not be prepared"
        for number, name in enumerate(names):
            kills = args.kills // len(names) + (number < args.kills % len(names))
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            try:
                check_case(name, Path(scratch) / "data", folder, kills, random.Random(f"{seed} {name}"))
            except BaseException:
                log = folder / "rank0.log"
                print(log.read_text()[-3000:] if log.exists() else "no log", file=sys.stderr)
                raise


if __name__ == "__main__":
    main()
