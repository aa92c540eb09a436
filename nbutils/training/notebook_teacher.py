"""A teacher for notebooks that are opened on their own: small, trained once, kept."""

from __future__ import annotations

import shutil
import uuid

from nbutils.data import PreparedData
from nbutils.foundation import places

SMALL_TEACHER = {"model_name": "tiny", "max_steps": 150, "learning_rate": 3e-3, "seed": 0}  # for notebooks run by hand


def small_teacher(data: PreparedData) -> str:
    """The run folder of a small teacher of `data`, trained on the first call; for notebooks opened on their own."""
    from nbutils.objectives import distillation
    from nbutils.training.trainer import TrainingConfig, train

    folder = places.RUNS / "interactive" / f"teacher-small-{data.card['fingerprint'][:12]}"
    if not (folder / "model_best").is_dir():
        print(f"Training a small teacher once, in {places.relative(folder)} ...")
        aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        train(TrainingConfig(data.folder, aside, distillation("none"), audit_blocks=0, **SMALL_TEACHER))
        try:
            aside.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    return str(folder)
