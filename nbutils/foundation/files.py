"""Files that others read: whole or not there; their hashes; and locks that end with their holder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from nbutils.foundation.errors import RunError
from nbutils.foundation.places import relative

CHUNK = 1 << 20  # bytes read at a time

MANIFEST = "manifest.json"


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `path` under another name, then rename: a reader or a crash sees the old file or the new, nothing between.

    Text is written as UTF-8; half a character, which that cannot hold, as its escape, \\ud800, which JSON reads back.
    The file gets the permissions any new file has.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_tree(folder: Path, without: Collection[str] = ()) -> None:
    """Have the system write all in `folder` to its disk, but for what is named in `without` there.

    A record that is written then cannot outlive, in a power cut, what it speaks of. Raises OSError where the disk fails
    or is full. What cannot be opened is passed over.
    """
    for path, folders, files in os.walk(folder):
        if path == os.fspath(folder):
            folders[:] = [each for each in folders if each not in without]
            files = [each for each in files if each not in without]
        for name in files:
            _flush(Path(path, name), os.O_RDONLY)
        _flush(Path(path), os.O_DIRECTORY)


def _flush(path: Path, how: int) -> None:
    try:
        descriptor = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK)  # no link, and no wait for a pipe's other end
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # neither a file nor a folder, or where that cannot be done
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. NumPy and torch scalars become numbers, NaN and infinities null, paths text."""
    atomic_write(path, json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def now() -> str:
    """The time, ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return str(value) if isinstance(value, Path) else value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read again only when its size or time of change is another."""
    status = path.stat()
    return _file_sha256(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _file_sha256(path: Path, modified: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_sha256(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_of_hashes((path.relative_to(folder).as_posix(), file_sha256(path)) for path in files)


def sha256_of_hashes(hashes: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(hashes)).encode()).hexdigest()


def lock(file: IO[str], how: int, path: Path) -> None:
    """flock(2) on the open file at `path`. Raises BlockingIOError where `how` says not to wait and it is held.

    Raises RunError where the file system has no locks.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise RunError(
            f"{relative(path.parent)} lies on a file system that locks no files ({error.strerror}), so nothing would "
            "keep two runs from writing over each other. Have it mounted with flock (NFS: version 3 or later), or name "
            "a folder elsewhere with --out."
        ) from None


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, after waiting for whoever has it. Raises RunError where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        lock(file, fcntl.LOCK_EX, path)
        yield


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock at `path` together with all who want no more. Raises RunError where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:  # on NFS one who shares a lock must be able to read
        lock(file, fcntl.LOCK_SH, path)
        yield


def is_held(path: Path, by_anyone: bool = False) -> bool:
    """Whether a living process holds the lock at `path`: exclusively, or `by_anyone`. None where there are none."""
    try:
        with path.open("r+b" if by_anyone else "rb") as file:
            fcntl.flock(file, (fcntl.LOCK_EX if by_anyone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not there, not ours to open, or on a file system without locks
        return False
    return False
