"""Checkpoints that can be trusted: written beside, flushed, hashed, renamed; the newest that verifies is gone on from.

    <run>/checkpoints/step-120/       whole: manifest.json has the size and SHA-256 of every file, and its own
    <run>/checkpoints/step-140.new/   being written, or what was left of it by a kill; never read
    <run>/checkpoints/step-100.old/   torn, or being removed

A checkpoint says what it belongs to (parameters, data, number of processes): another run does not go on from it.
What is in one is nbutils.training.resuming's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbutils.foundation import MANIFEST, RunError, atomic_write, read_json, relative

CHECKPOINTS = "checkpoints"  # in the folder of a run that trains

logger = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d+)")
BESIDE, ASIDE = ".new", ".old"


class Torn(Exception):
    """A checkpoint that is not whole; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. `belongs_to`: what must be the same for a run to go on from one, as JSON has it."""

    folder: Path
    belongs_to: Mapping[str, Any]
    kept: int = 2

    def newest(self) -> Path | None:
        """The newest that verifies, None where there is none; others are passed over with a line in the log.

        Those are set aside, and removed when the next one is written: none of them counts among the kept.
        Raises RunError where it belongs to a run with other parameters or data.
        """
        for step, checkpoint in sorted(self._whole().items(), reverse=True):
            try:
                manifest = read_manifest(checkpoint)
                self._check_belongs(manifest["belongs_to"], checkpoint)
                verify(checkpoint, manifest)
            except Torn as reason:
                logger.warning("The checkpoint of step %d is passed over: %s.", step, reason)
                _set_aside(checkpoint)
            else:
                return checkpoint
        return None

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [*self.folder.glob(f"*{BESIDE}"), *self.folder.glob(f"*{ASIDE}")]:
            shutil.rmtree(left)
        beside = self.folder / f"step-{step}{BESIDE}"
        beside.mkdir()
        return beside

    def commit(self, step: int, best_step: int) -> None:
        """Make what lies beside the checkpoint of `step`, and remove those that are no longer needed.

        Kept are the newest `kept` and the one of the best evaluation. Those of later steps go: they are of a course
        that this run left when it went on from an earlier step.
        """
        beside, place = self.folder / f"step-{step}{BESIDE}", self.folder / f"step-{step}"
        files = {path.relative_to(beside).as_posix(): path for path in sorted(beside.rglob("*")) if path.is_file()}
        hashes = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
        manifest = {"step": step, "belongs_to": dict(self.belongs_to), "files": hashes}
        atomic_write(beside / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n")
        for path in [*files.values(), *(each for each in beside.rglob("*") if each.is_dir()), beside]:
            flush(path)
        if place.exists():
            _remove(place)
        beside.rename(place)
        flush(self.folder)
        self._prune(step, best_step)

    def abandon(self, step: int) -> None:
        """Remove what was written beside for `step`."""
        shutil.rmtree(self.folder / f"step-{step}{BESIDE}", ignore_errors=True)

    def _whole(self) -> dict[int, Path]:
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return {int(match[1]): path for path in found if (match := NAME.fullmatch(path.name))}

    def _prune(self, step: int, best_step: int) -> None:
        whole = self._whole()
        earlier = sorted(each for each in whole if each <= step)
        needed = {*earlier[-max(1, self.kept) :], best_step}
        for each, path in whole.items():
            if each not in needed or each > step:
                _remove(path)

    def _check_belongs(self, found: Mapping[str, Any], checkpoint: Path) -> None:
        wanted = json.loads(json.dumps(self.belongs_to))
        names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if names:
            told = "; ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in names)
            raise RunError(
                f"{relative(checkpoint)} was made in another run: {told}. Set {', '.join(names)} back to go on from "
                f"it, or delete {relative(self.folder)} to train from the beginning."
            )


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises Torn where it is missing or damaged."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        digest = manifest.pop("sha256")
        if digest != _digest(manifest):
            raise Torn(f"{MANIFEST} is damaged")
        return manifest
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Torn(f"{MANIFEST} cannot be read ({type(error).__name__})") from None


def verify(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Raise Torn where a file of the checkpoint is not what its manifest says."""
    for name, wanted in manifest["files"].items():
        try:
            size = (checkpoint / name).stat().st_size
            if size != wanted["bytes"]:
                raise Torn(f"{name} has {size} bytes of {wanted['bytes']}")
            if _sha256(checkpoint / name) != wanted["sha256"]:
                raise Torn(f"{name} is damaged")
        except OSError as error:
            raise Torn(f"{name} cannot be read ({error.strerror})") from None


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_files(source: Path, target: Path) -> None:
    """The files of folder `source` in a new folder `target`, with no second copy where the disk has hard links.

    For files that are never written again: a change of one would be a change of both.
    """
    target.mkdir(parents=True)
    for path in _files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, place)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _remove(checkpoint: Path) -> None:
    """Under another name first: a kill in between leaves no torn one behind."""
    shutil.rmtree(_set_aside(checkpoint))


def _set_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(checkpoint.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
