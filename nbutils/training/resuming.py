"""What a training run needs to go on as if it had never stopped, in and out of a checkpoint.

    model.safetensors              what is trained (a frozen part comes from where the model came from), and buffers
    optimizer.pt  scheduler.pt  scaler.pt  trainer_state.json   as transformers.Trainer has them
    rng_state*.pth  pending-*.safetensors   of each process: random states, and sums that were not logged yet
    progress.json                  tokens seen, seconds of each kind, the best evaluation, early stopping
    run/                           metrics.csv, audit.csv, harness.parquet and the best model as they were

Where the next batch comes from is a function of the seed and the step (data/order.py), so nothing is kept of it. All of
it is taken after the evaluation of a step, when the random states are those the next step begins with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl

from nbutils.data import fingerprint
from nbutils.foundation import DRIVEN_FOLDER, Preempted, StopRequest, read_json, relative, resolve, write_json
from nbutils.training.checkpoints import CHECKPOINTS, Checkpoints, flush, link_files
from nbutils.training.tracking import replace_folder

if TYPE_CHECKING:
    from nbutils.training.trainer import ObjectiveTrainer, TrainingConfig

logger = logging.getLogger(__name__)
MODEL, PROGRESS, KEPT = "model.safetensors", "progress.json", "run"
FILES = ("metrics.csv", "audit.csv", "harness.parquet", "minimal_pairs.parquet")
BEST = "model_best"
CHANGES_NOTHING = ("run_folder", "data_folder", "report_to", "checkpoint_steps", "checkpoints_kept")
# Parameters whose folder's content decides numbers.
NAMED = ("model_name", "start_model", "distilling_teacher", "correcting_teacher", "judge")
CANNOT_WRITE = (OSError, SafetensorError, RuntimeError)  # a full disk is each of these, by who writes
MIB = 2**20


class Checkpointing(TrainerCallback):
    """Saves the state every so many steps, and where the run is asked to stop; puts it back before the first step."""

    def __init__(self, trainer: ObjectiveTrainer, config: TrainingConfig, data_fingerprint: str = "") -> None:
        self.trainer, self.config, self.data_fingerprint = trainer, config, data_fingerprint
        self.run_folder, self.steps = config.run_folder, config.checkpoint_steps
        self.folder = config.run_folder / CHECKPOINTS
        self.stop = StopRequest()
        self.seconds = 0.0  # that saving took
        self.ended = False  # the checkpoint is that of the last step
        self._stopping, self._from, self._saved = False, None, None

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Those of this run. What they belong to takes a look at all files of its models: not before it is needed."""
        args = self.trainer.args
        belongs_to = belonging(self.config, self.data_fingerprint, args.world_size, args.bf16, args.fp16)
        return Checkpoints(self.folder, belongs_to, self.config.checkpoints_kept)

    # ---- when ----

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = self._any(self.stop.asked)
        due = bool(self.steps) and state.global_step % self.steps == 0
        control.should_save |= due or self._stopping or self._is_last(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._stopping |= self._any(self.stop.asked)
        control.should_save |= self._stopping or self._is_last(control)

    def _is_last(self, control: TrainerControl) -> bool:
        """Whether training ends here and may have to be found again: a run stopped later does not train anew."""
        driven = os.environ.get(DRIVEN_FOLDER) == str(self.run_folder)
        return control.should_training_stop and (driven or bool(self.steps))

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            where = f"the state of step {self._saved} is saved" if self._saved else "no state could be saved"
            raise Preempted(f"asked to stop at step {state.global_step}; {where}. Run it again to go on.", agreed=True)

    # ---- out ----

    def save(self) -> None:
        """Write the checkpoint of this step. Where that cannot be done, training goes on and the log says why."""
        start, trainer = time.perf_counter(), self.trainer
        step, first = trainer.state.global_step, trainer.is_world_process_zero()
        beside = self.folder / f"step-{step}.new"
        parts: list[tuple[bool, Callable[[], Any]]] = [
            (first, lambda: self.checkpoints.begin(step)),
            (True, lambda: self._write_rank(beside)),
            (first, lambda: self._write(beside)),
            (first, lambda: self.checkpoints.commit(step, trainer.best_model.step)),
        ]
        failed = None
        for mine, part in parts:
            failed = _failure(part) if mine else None
            if self._any(failed is not None):
                break
        else:
            self._saved = step
        if failed is not None:
            self._tell(step, failed)
        if first and self._saved != step:
            self.checkpoints.abandon(step)
        self.seconds += time.perf_counter() - start

    def _write_rank(self, folder: Path) -> None:
        trainer, rank = self.trainer, self.trainer.args.process_index
        trainer._save_rng_state(str(folder))
        pending = {"loss": trainer._tr_loss}
        pending |= {f"sum {name}": value for name, value in trainer.term_sums.items()}
        pending |= {f"count {name}": torch.as_tensor(value) for name, value in trainer.term_counts.items()}
        save_file({name: value.detach().cpu().clone() for name, value in pending.items()}, folder / _pending(rank))
        for path in (folder / _pending(rank), *folder.glob(f"rng_state_{rank}.pth"), *folder.glob("rng_state.pth")):
            flush(path)

    def _write(self, folder: Path) -> None:
        trainer = self.trainer
        save_file(trained_tensors(trainer.trained_module), folder / MODEL)
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        state = dataclasses.replace(trainer.state, log_history=[])  # that is metrics.csv
        state.save_to_json(str(folder / "trainer_state.json"))
        progress = {
            "ended": trainer.control.should_training_stop,
            "tokens_seen": trainer.tokens_seen,
            "evaluation_seconds": trainer.evaluation_seconds,
            "elapsed_seconds": trainer.elapsed_seconds,
            "checkpoint_seconds": self.seconds,
            "last_logged": trainer._globalstep_last_logged,
            "callbacks": {type(each).__name__: each.remembered() for each in trainer.remembering},
        }
        write_json(folder / PROGRESS, progress)
        kept = folder / KEPT
        kept.mkdir()
        for name in trainer.kept_files:
            if (self.run_folder / name).is_file():
                shutil.copyfile(self.run_folder / name, kept / name)
        if (self.run_folder / BEST).is_dir() and trainer.best_model.step:
            link_files(self.run_folder / BEST, kept / BEST)

    def _tell(self, step: int, failure: Exception) -> None:
        model, optimizer = self.trainer.trained_module, self.trainer.optimizer
        tensors = [*trained_tensors(model).values()]
        tensors += [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
        needed = sum(each.numel() * each.element_size() for each in tensors) / MIB
        logger.error(
            "Step %d could not be saved in %s (%s). A checkpoint needs %.1f MiB there. What was saved before is whole, "
            "and training goes on.",
            step,
            relative(self.folder),
            " ".join(str(failure).split()) or type(failure).__name__,
            needed,
        )

    # ---- in ----

    def find(self) -> str | None:
        """The folder of the checkpoint to go on from, the same for all processes; None to begin.

        The first process reads and verifies them. Raises RunError where they are of another run.
        """
        found: list[Any] = [None]
        if self.trainer.is_world_process_zero() and self.folder.is_dir():
            try:
                found = [self.checkpoints.newest()]
            except Exception as error:
                found = [error]
        if self.trainer.args.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return str(found[0]) if found[0] else None

    def restore(self, folder: Path) -> None:
        """Put everything back but what the Trainer itself takes from the folder."""
        trainer, progress = self.trainer, read_json(folder / PROGRESS)
        self._from, self.ended = folder, progress["ended"]
        self.seconds = progress["checkpoint_seconds"]
        self._saved = int(folder.name.removeprefix("step-"))
        trainer.tokens_seen = progress["tokens_seen"]
        trainer.evaluation_seconds = progress["evaluation_seconds"]
        trainer.elapsed_before = progress["elapsed_seconds"]
        self._last_logged = progress["last_logged"]
        if trainer.is_world_process_zero():
            self._restore_files(folder / KEPT)
            logger.info("Training goes on from step %d, saved in %s.", self._saved, relative(folder))
        for each in trainer.remembering:
            each.resume(progress["callbacks"][type(each).__name__])

    def _restore_files(self, kept: Path) -> None:
        for name in self.trainer.kept_files:
            (self.run_folder / name).unlink(missing_ok=True)
            if (kept / name).is_file():
                beside = self.run_folder / f"{name}.new"
                shutil.copyfile(kept / name, beside)
                beside.replace(self.run_folder / name)
        best, beside = self.run_folder / BEST, self.run_folder / f"{BEST}.new"
        shutil.rmtree(beside, ignore_errors=True)
        if (kept / BEST).is_dir():
            link_files(kept / BEST, beside)
            replace_folder(beside, best)
        else:
            shutil.rmtree(best, ignore_errors=True)

    def on_train_begin(self, args, state, control, **kwargs):
        if self._from is None:
            return
        trainer, device = self.trainer, args.device
        pending = load_file(self._from / _pending(args.process_index))
        trainer._tr_loss = pending.pop("loss").to(device)
        trainer._globalstep_last_logged = self._last_logged
        kinds = {"sum": trainer.term_sums, "count": trainer.term_counts}
        for name, value in pending.items():
            kind, _, term = name.partition(" ")
            kinds[kind][term] = value.to(device)

    # ---- together ----

    def _any(self, mine: bool) -> bool:
        """Whether it is so for any process; all of them have to ask."""
        if self.trainer.args.world_size == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.trainer.args.device)
        return bool(self.trainer.accelerator.reduce(flag, "sum") > 0)


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """By name, each once where some are tied: the parameters that are trained, and the buffers."""
    saved = model.state_dict(keep_vars=True)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    buffers = {name: each for name, each in model.named_buffers() if name in saved}
    return {name: each.detach().contiguous() for name, each in (trained | buffers).items()}


def load_trained_tensors(model: torch.nn.Module, file: Path) -> None:
    """The inverse of saving `trained_tensors`. Raises KeyError where the names are not the same."""
    saved, wanted = load_file(file), trained_tensors(model)
    if saved.keys() != wanted.keys():
        raise KeyError(f"{file} holds other tensors than the model: {sorted(saved.keys() ^ wanted.keys())}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])


def belonging(config: TrainingConfig, data_fingerprint: str, processes: int, *half: bool) -> dict[str, Any]:
    """All that decides a training's numbers, by name: two runs that agree in it may share checkpoints."""
    told = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    told = {name: value for name, value in told.items() if name not in CHANGES_NOTHING}
    told["precision"] = {(True, False): "bf16", (False, True): "fp16"}.get(half, "float32")
    named = {name: getattr(config, name, "") for name in NAMED}
    named |= {f"teachers.{i}": name for i, name in enumerate(config.teachers)}
    contents = {
        f"content of {n}": fingerprint(n, resolve(name)) for n, name in named.items() if name and resolve(name).is_dir()
    }
    return flat(told) | contents | {"data": data_fingerprint, "processes": processes}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dataclasses, mappings and sequences as {dotted name: plain value}; of arrays and tensors a hash."""
    if dataclasses.is_dataclass(value):
        inner = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.repr}
        return {name: type(value).__name__} | _joined(name, inner)
    if isinstance(value, Mapping):
        return _joined(name, value)
    if isinstance(value, list | tuple):
        return {name: len(value)} | _joined(name, dict(enumerate(value)))
    if torch.is_tensor(value) or hasattr(value, "tobytes"):
        array = value.detach().cpu().numpy() if torch.is_tensor(value) else value
        return {name: f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"}
    plain = value is None or isinstance(value, str | int | float | bool)
    return {name: value if plain else str(value) if isinstance(value, Path) else type(value).__name__}


def _joined(name: str, inner: Mapping[Any, Any]) -> dict[str, Any]:
    parts = [flat(each, f"{name}.{key}" if name else str(key)) for key, each in inner.items()]
    return {key: each for part in parts for key, each in part.items()}


def _pending(rank: int) -> str:
    return f"pending-{rank}.safetensors"


def _failure(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except CANNOT_WRITE as error:
        return error
    return None
