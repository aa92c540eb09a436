"""The order of training: python -m pytest tests/test_order.py"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

from nbutils.data.batches import RandomChunks, TrainingOrder, WithEmptyRow, collate, permutation
from nbutils.data.mds_blocks import require_streaming
from nbutils.data.packing import Blocks, load_blocks, save_blocks
from nbutils.foundation.errors import ParameterError
from nbutils.models.loading import build_config
from nbutils.objectives import ObjectiveModel, cosine_mixing
from nbutils.training.launching import launch
from nbutils.training.trainer import ObjectiveTrainer, TrainingConfig

BLOCK, VOCAB = 8, 61
LEFT = 4 * 4 + 1  # of blocks: with a global batch of 8, the second rank has nothing in an epoch's last batch


def numbered(count: int = LEFT) -> Blocks:
    """Blocks whose first token is their number."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (count, BLOCK), dtype=np.int32)
    tokens[:, 0] = np.arange(count)
    return Blocks(tokens, np.zeros_like(tokens), 0)


def loaders(rows: object, micro_batch: int, processes: int, seed: int = 1) -> list[DataLoader]:
    """What accelerate makes for each rank of the data loader that the trainer gives it, and tells the epoch."""
    found = []
    for rank in range(processes):
        order = TrainingOrder(rows, seed, micro_batch * processes if processes > 1 else 1)
        loader = DataLoader(WithEmptyRow(rows), batch_size=micro_batch, sampler=order, collate_fn=collate)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
        loader.batch_sampler.set_epoch = order.set_epoch
        found.append(loader)
    return found


def steps(rows: object, micro_batch: int, processes: int, accumulation: int, epoch: int = 0) -> list[list[int]]:
    """The numbers of the blocks of each optimiser step of an epoch, sorted."""
    ranks = []
    for loader in loaders(rows, micro_batch, processes):
        loader.set_epoch(epoch)
        ranks.append([batch["input_ids"][batch["labels"][:, 0] >= 0, 0].tolist() for batch in loader])
    assert len({len(rank) for rank in ranks}) == 1
    groups = range(0, len(ranks[0]), accumulation)
    return [sorted(n for rank in ranks for b in rank[start : start + accumulation] for n in b) for start in groups]


# ---- the order


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    found = {(seed, epoch): tuple(permutation(50, seed, epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)}
    assert len(set(found.values())) == 9  # seed 1 in epoch 1 is not seed 2 in epoch 0
    assert all(sorted(order) == list(range(50)) for order in found.values())
    torch.manual_seed(5)
    np.random.seed(5)
    assert tuple(permutation(50, 2, 1)) == found[2, 1]
    first = Counter(int(permutation(5, seed, 0)[0]) for seed in range(1000))
    assert all(140 < count < 260 for count in first.values())


@pytest.mark.parametrize("storage", ["arrow", "mds"])
@pytest.mark.parametrize("count", [16, LEFT, 23, 3])
def test_steps_are_made_of_the_same_blocks_whatever_the_number_of_processes(
    tmp_path: Path, count: int, storage: str
) -> None:
    if storage == "mds":
        try:
            require_streaming()
        except ParameterError as error:
            pytest.skip(str(error))
    save_blocks(numbered(count), tmp_path / "blocks", storage)
    rows = load_blocks(tmp_path / "blocks").with_format("numpy")
    for epoch in (0, 1):
        wanted = steps(rows, 8, 1, 1, epoch)
        order = permutation(count, 1, epoch).tolist()
        assert wanted == [sorted(order[start : start + 8]) for start in range(0, count, 8)]
        for micro_batch, processes, accumulation in ((2, 1, 4), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)):
            assert steps(rows, micro_batch, processes, accumulation, epoch) == wanted
        assert sorted(number for step in wanted for number in step) == list(range(count))


@pytest.mark.parametrize("processes", [1, 2])
def test_going_on_from_a_position_gives_the_rest_of_the_epoch(processes: int) -> None:
    """As the trainer resumes: batches are skipped, then the epoch is told."""
    rows = Dataset.from_dict({name: each.tolist() for name, each in numbered().columns.items()}).with_format("numpy")
    for whole, resumed in zip(loaders(rows, 2, processes), loaders(rows, 2, processes), strict=True):
        whole.set_epoch(3)
        expected = [batch["input_ids"].tolist() for batch in whole]
        rest = skip_first_batches(resumed, 2)
        rest.set_epoch(3)
        if hasattr(rest.batch_sampler.batch_sampler, "set_epoch"):
            rest.batch_sampler.batch_sampler.set_epoch(3)
        assert [batch["input_ids"].tolist() for batch in rest] == expected[2:]


def test_rows_that_draw_by_epoch_are_told_it(tmp_path: Path) -> None:
    save_blocks(numbered(40), tmp_path / "blocks")
    for processes in (1, 2):
        rows = RandomChunks(load_blocks(tmp_path / "blocks"), BLOCK, seed=1)
        for loader in loaders(rows, 2, processes):
            loader.set_epoch(2)
            assert rows.epoch == 2
            rows.set_epoch(0)


def test_the_empty_row_holds_nothing() -> None:
    rows = WithEmptyRow([{"input_ids": np.arange(5), "document_ids": np.zeros(5)}])
    batch = collate(rows.__getitems__([0, 1]))
    assert len(rows) == 1 and batch["input_ids"].shape == (2, 5)
    assert batch["labels"].tolist() == [[0, 1, 2, 3, 4], [-100] * 5]
    assert (collate([rows[1]])["labels"] == -100).all()


# ---- training in two processes


class Recorded:
    """Rows that write down which of them this rank reads, and in which epoch."""

    def __init__(self, rows: object, folder: Path) -> None:
        self.rows, self.epoch = rows, 0
        self.file = folder / f"read{os.environ.get('RANK', 0)}.jsonl"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        with self.file.open("a") as file:
            file.write(json.dumps([self.epoch, int(index)]) + "\n")
        return self.rows[index]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@dataclass
class Job:
    folder: Path
    blocks: Path
    micro_batch: int


def train(job: Job) -> None:
    """Two epochs over the blocks."""
    settings = {"data_folder": job.folder, "run_folder": job.folder, "objective": cosine_mixing(0.5), "dropout": 0.0}
    settings |= {"learning_rate": 3e-3, "eval_steps": 100, "audit_blocks": 0, "num_train_epochs": 2}
    config = TrainingConfig(**settings, per_device_train_batch_size=job.micro_batch)
    set_seed(1)
    model = ObjectiveModel(AutoModelForCausalLM.from_config(build_config("micro", VOCAB, BLOCK, 0.0)), config.objective)
    blocks = load_blocks(job.blocks).with_format("numpy")
    ObjectiveTrainer(config, model, Recorded(blocks, job.folder), blocks.select(range(4))).train()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save(weights, job.folder / f"weights{os.environ.get('RANK', 0)}.pt")


def read(folder: Path, rank: int, epoch: int) -> list[int]:
    """The rows that a rank reads in an epoch; for each empty row it reads row 0."""
    told = [json.loads(line) for line in (folder / f"read{rank}.jsonl").read_text().splitlines()]
    return [index for at, index in told if at == epoch]


@pytest.mark.soak
def test_two_processes_see_each_block_once_an_epoch_and_train_as_one_does(tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    save_blocks(numbered(), blocks)
    alone, pair = Job(tmp_path / "alone", blocks, 8), Job(tmp_path / "pair", blocks, 4)
    for job, processes in ((alone, 1), (pair, 2)):
        job.folder.mkdir()
        launch(train, job, processes, log_folder=job.folder)
    for epoch in (0, 1):
        one = read(alone.folder, 0, epoch)
        assert one == permutation(LEFT, 42, epoch).tolist()
        first, second = (read(pair.folder, rank, epoch) for rank in (0, 1))
        empty = 24 - LEFT  # rows, each of which is made from row 0
        assert Counter(first + second) == Counter(one) + Counter({0: empty})
        for step in range(2):
            both = first[4 * step : 4 * step + 4] + second[4 * step : 4 * step + 4]
            assert sorted(both) == sorted(one[8 * step : 8 * step + 8])
    one, two = (torch.load(job.folder / "weights0.pt") for job in (alone, pair))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    logs = [pd.read_csv(job.folder / "metrics.csv") for job in (alone, pair)]
    for column in ("step", "loss", "ce_loss", "tokens_seen"):
        np.testing.assert_allclose(logs[1][column], logs[0][column], rtol=1e-4, err_msg=column)
    assert logs[0]["tokens_seen"].max() == 2 * LEFT * BLOCK
