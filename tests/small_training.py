"""Trainings of seconds that tests of several rooms start."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed

from nbutils.models.loading import build_config
from nbutils.objectives import ObjectiveModel, cosine_mixing
from nbutils.training.trainer import ObjectiveTrainer, TrainingConfig

VOCAB, BLOCK = 61, 16


def blocks(number, seed=0):
    """Learnable token blocks: each token is followed by one of two; 40 tokens a document."""
    generator = np.random.default_rng(seed)
    tokens = [0]
    for coin in generator.integers(2, size=number * BLOCK - 1):
        tokens.append((3 * tokens[-1] + 1 + 5 * coin) % VOCAB)
    documents = np.arange(number * BLOCK) // 40
    shape = (number, BLOCK)
    columns = {"input_ids": np.reshape(tokens, shape), "document_ids": documents.reshape(shape)}
    return Dataset.from_dict({name: array.astype(np.int32).tolist() for name, array in columns.items()})


def model(objective, dropout=0.0, seed=1):
    set_seed(seed)
    return ObjectiveModel(AutoModelForCausalLM.from_config(build_config("micro", VOCAB, BLOCK, dropout)), objective)


def config(folder, **changes):
    settings = TrainingConfig(
        data_folder=folder,
        run_folder=folder,
        objective=cosine_mixing(0.5),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        dropout=0.0,
        eval_steps=3,
    )
    return replace(settings, **changes)


def trained(settings, train_blocks=None, dropout=0.0):
    trainer = ObjectiveTrainer(settings, model(settings.objective, dropout), train_blocks or blocks(96), blocks(8, 1))
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.objective_model.parameters()])
