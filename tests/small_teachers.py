"""Small teachers with opinions, and what they speak on: running text, and questions with answers of any length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, GPT2Config

from nbutils.data.batches import UNLABELLED
from nbutils.data.packing import Blocks, load_blocks, save_blocks
from nbutils.data.preparation import PreparedData
from nbutils.models.teachers import LiveTeacher

VOCAB, BLOCK = 67, 12
LENGTHS = {"train": [7, 12, 3, 9, 5], "validation": [4, 10]}


def teacher_of(*seeds: int, width: int = 32, vocab: int = VOCAB) -> LiveTeacher:
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=vocab, n_positions=BLOCK, n_embd=width, n_layer=2, n_head=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model.lm_head.weight.mul_(15)  # a teacher with opinions
        models.append(model)
    return LiveTeacher(tuple(models))


def text(folder: Path, seed: int = 0) -> PreparedData:
    draw = np.random.default_rng(seed)
    for split, blocks in (("train", 9), ("validation", 4), ("test", 3)):
        ids = draw.integers(0, VOCAB, (blocks, BLOCK), dtype=np.int32)
        save_blocks(Blocks(ids, np.zeros_like(ids), 0), folder / split)
    return prepared(folder, {split: load_blocks(folder / split) for split in ("train", "validation", "test")}, "lm")


def questions(folder: Path) -> PreparedData:
    draw, blocks = np.random.default_rng(3), {}
    features = Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    for split, lengths in LENGTHS.items():
        ids = [draw.integers(0, VOCAB, length).tolist() for length in lengths]
        labels = [[UNLABELLED] * 2 + row[2:] for row in ids]
        blocks[split] = Dataset.from_dict({"input_ids": ids, "labels": labels}, features)
    return prepared(folder, blocks, "qa")


def prepared(folder: Path, blocks: dict[str, Dataset], task: str) -> PreparedData:
    card = {"fingerprint": f"data of {folder.name}", "vocab_size": VOCAB, "block_size": BLOCK, "task": task}
    return PreparedData(folder, card, None, blocks, None)
