"""Making a teacher's cache: one process runs the teacher over the data, all others wait and read.

The files are written aside and renamed when they are whole, so a build that is killed leaves nothing that is taken for
a cache; the next one clears what it left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.foundation import ModelError, ParameterError, RunError, exclusively, is_held, now, places, write_json
from nbutils.models.teacher_cache.reading import (
    CARD,
    COLUMNS,
    FORMAT,
    HEADS,
    LOG_PROBABILITIES,
    OFFSETS,
    TeacherCache,
    open_cache,
)
from nbutils.models.teachers import check_cache

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from nbutils.data import PreparedData
    from nbutils.models.teacher_target import TeacherStates, TopTokens
    from nbutils.models.teachers import LiveTeacher

logger = logging.getLogger(__name__)

CACHES = "teacher_cache"
TRAIN = "train"
SPLITS = (TRAIN, "validation", "test")  # students train on the first alone; on the others they are evaluated
SMALLEST = float(np.finfo(np.float16).min)  # the log of a probability of 0: finite, so that 0 times it is 0
ROWS_READ = 1024  # examples whose lengths are read at a time


def build_cache(
    teacher: LiveTeacher, data: PreparedData, kind: str, temperature: float, top_k: int, batch_size: int
) -> TeacherCache:
    """The cache of what `teacher` says on `data`, made where it is not there yet; then the teacher is not even loaded.

    kind "hidden": hidden states in float16; "topk": of the train split the `top_k` most probable tokens at
    `temperature`, of the averaged logits over the tokens of the data's vocabulary that every teacher has. The other
    splits, which are small and judged at any temperature, are kept as hidden states. Several processes may call it at
    once. Raises ParameterError, ModelError where the teacher's numbers do not fit float16, RunError where the disk is
    full or cannot be written.
    """
    check_cache(kind, top_k=top_k)
    wanted = _wanted(teacher, data, kind, temperature, top_k)
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    caches = places.RUNS / CACHES
    folder = caches / key
    if (cache := _found(folder, wanted)) is not None:
        return cache
    try:
        lock = caches / ".locks" / key
        if is_held(lock):
            logger.info("Another process makes the teacher's cache; waiting for it.")
        with exclusively(lock):
            if (cache := _found(folder, wanted)) is None:
                aside = caches / ".making" / key
                _clear(aside, folder)
                _make(aside, folder, teacher, data, wanted, batch_size)
                cache = open_cache(folder, wanted["teacher_fingerprint"], wanted["data_fingerprint"])
    except OSError as error:
        raise RunError(
            f"{places.relative(folder)} cannot be written ({error.strerror}). Mend the folder's permissions, or set "
            "teacher_cache to off."
        ) from error
    return cache


def _wanted(teacher: LiveTeacher, data: PreparedData, kind: str, temperature: float, top_k: int) -> dict[str, Any]:
    """All that decides a cache's numbers."""
    wanted = {
        "format": FORMAT,
        "kind": kind,
        "teacher_fingerprint": teacher.fingerprint(),
        "data_fingerprint": data.card["fingerprint"],
    }
    if kind == "hidden":
        return wanted
    vocab = _vocab(teacher, data)
    if top_k > vocab:
        raise ParameterError(f"cache_top_k is {top_k}, and teacher and data share {vocab} tokens. Give fewer.")
    return wanted | {"temperature": float(temperature), "top_k": top_k}


def _found(folder: Path, wanted: dict[str, Any]) -> TeacherCache | None:
    """The cache that stands there already, None where there is none or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        return open_cache(folder, wanted["teacher_fingerprint"], wanted["data_fingerprint"])
    except RunError as error:
        logger.warning("%s It is made anew.", error)
        return None


def _clear(*folders: Path) -> None:
    """Remove what a killed build, or damage, left. Needs the lock."""
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)


def _make(
    aside: Path, folder: Path, teacher: LiveTeacher, data: PreparedData, wanted: dict[str, Any], batch_size: int
) -> None:
    """Write the cache in `aside` and rename it to `folder`; on an error nothing stays. Needs the lock."""
    start = time.perf_counter()
    offsets = {split: _offsets(data.blocks[split]) for split in SPLITS if split in data.blocks}
    layouts = {split: _layout(teacher, data, wanted, kind_of(split, wanted["kind"])) for split in offsets}
    tokens = {split: int(each[-1]) for split, each in offsets.items()}
    size = sum(tokens[split] * _bytes(layout) for split, layout in layouts.items())
    logger.info("The teacher runs once over %d tokens; its cache takes %.0f MiB", sum(tokens.values()), size / 2**20)
    aside.mkdir(parents=True)
    try:
        if shutil.disk_usage(aside).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for split, each in offsets.items():
            (aside / split).mkdir()
            np.save(aside / split / OFFSETS, each)
            said = partial(_said, vocab=_vocab(teacher, data), kind=kind_of(split, wanted["kind"]), wanted=wanted)
            _write_split(aside / split, teacher, data.blocks[split], int(each[-1]), layouts[split], said, batch_size)
        _save_heads(teacher, aside / HEADS)
        description = {
            "teacher": [model.config._name_or_path or type(model).__name__ for model in teacher.models],
            "data": places.relative(data.folder),
            "arrays": {
                split: {name: {"dtype": np.dtype(dtype).name, "width": width} for name, (dtype, width) in each.items()}
                for split, each in layouts.items()
            },
            "splits": tokens,
            "examples": {split: len(each) - 1 for split, each in offsets.items()},
            "made": now(),
            "seconds": time.perf_counter() - start,
        }
        write_json(aside / CARD, wanted | description)
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(_disk_full(folder, size)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def kind_of(split: str, kind: str) -> str:
    """How a split is kept in a cache of `kind`: in that kind where students train."""
    return kind if split == TRAIN else "hidden"


def _layout(teacher: LiveTeacher, data: PreparedData, wanted: dict[str, Any], kind: str) -> dict[str, tuple[type, int]]:
    """{array: (type, numbers a position)}."""
    if kind == "hidden":
        return {f"teacher_hidden_{i}": (np.float16, weight.shape[1]) for i, weight in enumerate(_weights(teacher))}
    columns = np.uint16 if _vocab(teacher, data) <= 2**16 else np.int32
    return {COLUMNS: (columns, wanted["top_k"]), LOG_PROBABILITIES: (np.float16, wanted["top_k"] + 1)}


def _bytes(layout: dict[str, tuple[type, int]]) -> int:
    """What one position takes."""
    return sum(np.dtype(dtype).itemsize * width for dtype, width in layout.values())


def _offsets(blocks: Dataset) -> np.ndarray:
    """Where each example starts in the split's stream, and where the last one ends: (examples + 1,)."""
    rows = blocks.with_format("numpy", columns=["input_ids"])
    starts = range(0, len(rows), ROWS_READ)
    lengths = [len(row) for start in starts for row in rows[start : start + ROWS_READ]["input_ids"]]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _write_split(
    folder: Path,
    teacher: LiveTeacher,
    blocks: Dataset,
    tokens: int,
    layout: dict[str, tuple[type, int]],
    said: Callable[[TeacherStates, Tensor], dict[str, Tensor]],
    batch_size: int,
) -> None:
    """The arrays of a split; `said` makes them of the teacher's states and of which positions are real."""
    import torch

    rows = blocks.with_format("numpy", columns=["input_ids"])
    device = teacher.models[0].device
    with ExitStack() as stack, torch.no_grad():
        files = {
            name: stack.enter_context(_array_file(folder / f"{name}.npy", (tokens, width), dtype))
            for name, (dtype, width) in layout.items()
        }
        for start in range(0, len(rows), batch_size):
            input_ids, real = _padded(rows[start : start + batch_size]["input_ids"])
            with torch.autocast(device.type, enabled=False):
                arrays = said(teacher.target(input_ids.to(device), {}), real.to(device))
            for name, file in files.items():
                file.write(arrays[name].cpu().numpy().astype(layout[name][0]).tobytes())


@contextmanager
def _array_file(path: Path, shape: tuple[int, int], dtype: type) -> Iterator[Any]:
    """A .npy file to be filled row after row: on a full disk an error, where a memory map would end the process."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())


def _padded(rows: Any) -> tuple[Tensor, Tensor]:
    """Examples as one batch (batch, time), padded on the right, and which of its positions are real, flat."""
    import torch

    real = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    input_ids = np.zeros(real.shape, np.int64)
    input_ids[real] = np.concatenate(list(rows))
    return torch.from_numpy(input_ids), torch.from_numpy(real.reshape(-1))


def _said(states: TeacherStates, real: Tensor, vocab: int, kind: str, wanted: dict[str, Any]) -> dict[str, Tensor]:
    """{array: what is stored of the real positions}."""
    states = states.rows(real)
    if kind == "topk":
        top = top_tokens(states, vocab, wanted["top_k"], wanted["temperature"])
        return {COLUMNS: top.columns, LOG_PROBABILITIES: top.log_probabilities}
    for hidden in states.hidden:
        if not hidden.half().isfinite().all():
            raise ModelError(
                f"The teacher's hidden states reach {hidden.abs().max().item():.3g}, and float16 ends at 65504. Set "
                "teacher_cache to off; numbers that are not finite mean that the teacher diverged."
            )
    return {f"teacher_hidden_{i}": hidden.half() for i, hidden in enumerate(states.hidden)}


def top_tokens(states: TeacherStates, vocab: int, top_k: int, temperature: float) -> TopTokens:
    """The `top_k` most probable of the first `vocab` tokens at each position, most probable first, and the rest's mass.

    Log-probabilities are float16. The logits exist for one chunk of positions at a time.
    """
    import torch

    from nbutils.models.products import chunk_rows
    from nbutils.models.teacher_target import TopTokens

    hidden = states.hidden[0]
    rows = chunk_rows(vocab, len(hidden))
    states = states.in_precision(torch.promote_types(hidden.dtype, torch.float32))
    memory = torch.empty(2, rows, vocab, device=hidden.device)
    columns, log_probabilities = [], []
    for indices in torch.arange(len(hidden), device=hidden.device).split(rows):
        logits = states.rows(indices).logits(memory[0, : len(indices)]).div_(temperature)
        top, chosen = logits.topk(top_k, -1)
        log_top = top - logits.logsumexp(-1, keepdim=True)
        others = torch.softmax(logits, -1, out=memory[1, : len(indices)]).scatter_(-1, chosen, 0)
        log_rest = others.sum(-1, keepdim=True).log()  # not 1 - sum: exact where the teacher is sure
        columns.append(chosen.int())
        log_probabilities.append(torch.cat([log_top, log_rest], -1).clamp_min_(SMALLEST).half())
    return TopTokens(torch.cat(columns), torch.cat(log_probabilities), temperature)


def _save_heads(teacher: LiveTeacher, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({f"head_{i}": w.detach().cpu().clone().contiguous() for i, w in enumerate(_weights(teacher))}, path)


def _weights(teacher: LiveTeacher) -> list[Tensor]:
    """The output matrix of each teacher, (vocab, width)."""
    from nbutils.models.loading import head_matrices

    return [head_matrices(model)[0].weight for model in teacher.models]


def _vocab(teacher: LiveTeacher, data: PreparedData) -> int:
    return min(data.card["vocab_size"], teacher.vocab)


def _disk_full(folder: Path, size: int) -> str:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return (
        f"The disk is full: the teacher's cache {places.relative(folder)} needs {size / 2**20:,.0f} MiB, "
        f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free. Free space (old runs, runs/{CACHES}, HF_HOME), "
        "set teacher_cache to topk with a small cache_top_k, which takes less, or to off."
    )
