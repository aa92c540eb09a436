"""Where a variant's run is made and how it is published: beside the results, under a lock, by renaming.

    runs/<plan>/<variant>/             the published run, whole
    runs/<plan>/.attempts/<variant>/   the run that is being made, or one that failed after a good one
    runs/<plan>/.previous/<variant>/   the run that is being replaced, for the moment this takes
    runs/<plan>/.aside/<variant>/      checkpoints of a run that was not finished when its parameters or code changed
    runs/<plan>/.locks/<variant>       held by the runner at work; a lock outlives no process
    runs/<plan>/.logs/<variant>        what the runner itself printed

A failed attempt is published only where no good result stands in its place. What it had saved of a training
(checkpoints/) is moved into the next attempt with the same key.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nbutils.foundation import MANIFEST, LockedRunError, RunError, is_held, lock, relative, shortened, visible
from nbutils.runs.manifest import FINISHED, KILLED, RUNNING, Manifest, as_killed, find_manifest
from nbutils.training import CHECKPOINTS

ATTEMPTS, PREVIOUS, ASIDE, LOCKS, LOGS = ".attempts", ".previous", ".aside", ".locks", ".logs"
RESERVE, RESERVED = ".reserve", 1 << 18  # a file in an attempt's folder, and its bytes
LOCK_SECONDS = 1.0  # a look at the lock holds it for a moment: long enough to wait for that, not for a run

logger = logging.getLogger(__name__)


def _variant_in(folder: str) -> property:
    """A property of a place: what has the variant's name in this folder of the plan's."""
    return property(lambda place: place.plan_folder / folder / place.variant)


@dataclass(frozen=True)
class Place:
    """The files of one variant in the folder of its plan."""

    plan_folder: Path
    variant: str

    published = _variant_in("")
    attempt = _variant_in(ATTEMPTS)
    previous = _variant_in(PREVIOUS)
    aside = _variant_in(ASIDE)
    lock_file = _variant_in(LOCKS)
    log = _variant_in(LOGS)

    def reserve(self) -> None:
        """Take the room that the record of the end will need, before the disk can be full."""
        (self.attempt / RESERVE).write_bytes(bytes(RESERVED))

    def use_reserve(self) -> None:
        """Give back what was reserved: the record is written next."""
        (self.attempt / RESERVE).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runners off. Raises LockedRunError where one is at work, RunError where it cannot be locked.

        The system releases the lock when the process ends, however it ends; on NFS this needs version 3 or later.
        """
        path = self.lock_file
        try:
            for folder in (path, self.attempt, self.previous, self.log):
                folder.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"{relative(self.plan_folder)} cannot be written ({error.strerror}). Name another folder, or mend it."
            ) from None
        with file:
            if not _locked(file, path):
                raise LockedRunError(f"{self.variant}: {self.holder()}")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether a runner is at work on this variant."""
        return is_held(self.lock_file)

    def holder(self) -> str:
        """Who is at work on this variant, and what to do: a sentence or two, where it is locked."""
        try:
            name = shortened(visible(self.lock_file.read_text(encoding="utf-8", errors="replace")))
        except OSError:
            name = ""
        return (
            f"another runner is at work on it ({name or 'it has not said which'}). Wait until it ends; if its machine "
            f"is gone for good, delete {relative(self.lock_file)}."
        )

    def result_folder(self) -> Path:
        """Where the published run lies: in its place, but for the moment in which it is being replaced."""
        return self.previous if self.previous.is_dir() and not self.published.is_dir() else self.published

    def result(self) -> Manifest | None:
        """The manifest of the published run, None where there is none."""
        return find_manifest(self.result_folder())

    def unpublished(self) -> Manifest | None:
        """The manifest of a run that is being made or that was not published, None where there is none."""
        locked = self.is_locked()  # asked before reading: a run that ends in between is then seen as ended
        manifest = find_manifest(self.attempt)
        return as_killed(manifest) if manifest and manifest["status"] == RUNNING and not locked else manifest

    def history(self) -> list[dict[str, Any]]:
        """The attempts so far; each manifest has those of the manifests before it. Needs the lock."""
        manifests = [manifest for manifest in (self.result(), find_manifest(self.attempt)) if manifest]
        attempts = max((manifest["attempts"] for manifest in manifests), key=len, default=[])
        # whoever has the lock knows that no other attempt runs
        return [each | {"status": KILLED} if each["status"] == RUNNING else each for each in attempts]

    def is_finished(self, key: str) -> bool:
        """Whether the published run is finished and has this key."""
        result = self.result()
        return result is not None and result["status"] == FINISHED and result["key"] == key

    def mend(self) -> None:
        """Complete a publication that was cut short. Needs the lock."""
        attempt = find_manifest(self.attempt)
        if attempt and attempt["status"] == FINISHED:
            self.publish()
        elif self.result_folder() == self.previous:
            self.previous.rename(self.published)

    def clear(self, key: str = "") -> None:
        """Make the folder for a new attempt, empty but for the checkpoints of one with the same key. Needs the lock.

        The manifest stays until the new one takes its place: without it nobody would know whose checkpoints these are.
        """
        kept = self._checkpoints(key)
        if kept == self.attempt:
            clear_folder(self.attempt, {CHECKPOINTS, MANIFEST})
            return
        made = self._made(key)
        if kept != made:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            if kept is not None:
                _move_checkpoints(kept, made)
        for folder in (self.result_folder(), self.attempt):
            if self._has_checkpoints(folder):
                self._set_aside(folder)
        if self.attempt.is_dir():
            shutil.rmtree(self.attempt)
        made.rename(self.attempt)

    def _made(self, key: str) -> Path:
        """The next attempt's folder until it takes its place."""
        return self.plan_folder / ASIDE / f"{self.variant}.{key[:12]}"

    def _checkpoints(self, key: str) -> Path | None:
        """The folder with those of an attempt with this key that did not finish, the last one's first."""
        folders = (self._made(key), self.attempt, self.result_folder(), self.aside)
        return next((each for each in folders if self._has_checkpoints(each) and read_key(each) == key), None)

    def _has_checkpoints(self, folder: Path) -> bool:
        manifest = find_manifest(folder)
        return (folder / CHECKPOINTS).is_dir() and manifest is not None and manifest["status"] != FINISHED

    def _set_aside(self, folder: Path) -> None:
        """Keep the checkpoints of a run with another key, until the next such: hours of training are not ours."""
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir(parents=True)
        _move_checkpoints(folder, self.aside)
        logger.warning(
            "%s: parameters, code or data have changed since its checkpoints were written, so training begins anew. "
            "They lie in %s: set back what changed to go on from them, or delete them.",
            self.variant,
            relative(self.aside),
        )

    def publish(self) -> bool:
        """Rename the ended attempt into its place, unless it failed and a good result stands there. Needs the lock."""
        result, attempt = self.result(), find_manifest(self.attempt)
        if result and result["status"] == FINISHED and attempt and attempt["status"] != FINISHED:
            return False
        if attempt and attempt["status"] == FINISHED:
            shutil.rmtree(self.attempt / CHECKPOINTS, ignore_errors=True)  # gigabytes, and nothing goes on from them
        if self.published.is_dir():
            if self.previous.is_dir():
                shutil.rmtree(self.previous)
            self.published.rename(self.previous)
        self.attempt.rename(self.published)
        shutil.rmtree(self.previous, ignore_errors=True)
        return True


def read_key(folder: Path) -> str:
    """The key of the run in `folder`."""
    return find_manifest(folder)["key"]


def _move_checkpoints(source: Path, target: Path) -> None:
    """They belong to a run only beside its manifest: at every moment one of the two folders has both."""
    shutil.copyfile(source / MANIFEST, target / MANIFEST)
    (source / CHECKPOINTS).rename(target / CHECKPOINTS)


def clear_folder(folder: Path, kept: Collection[str]) -> None:
    """Remove all that is in `folder` but what has one of the `kept` names."""
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _locked(file: IO[str], path: Path) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
