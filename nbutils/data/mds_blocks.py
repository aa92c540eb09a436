"""Blocks as MosaicML's MDS shards: written with its MDSWriter, read at random with its LocalDataset.

    index.json          the shards: their columns, sizes and hashes
    shard.00000.mds     at most SHARD_BYTES: rows of `tokens` and `document_ids` (uint32; of blocks block_size of each,
                        of questions and answers any number, with int32 `labels`)

LocalDataset is the part of the library that reads one file at a place: no order of its own, no background process and
no shared memory, so that a killed run leaves nothing behind, and any number of processes may read at once. A shard is
compared with its hash when the first of its rows is read, once in a process.
"""

from __future__ import annotations

import importlib
import json
import mmap
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nbutils.foundation import CorpusError, ParameterError, relative

PACKAGES = ("brotli", "catalogue", "snappy", "xxhash", "zstd")  # modules that mosaicml-streaming imports
INSTALL = "pip install --no-deps -r requirements-streaming.txt"
INDEX = "index.json"
HASH = "xxh3_64"  # as fast as the disk
SHARD_BYTES = 1 << 26  # the library's own
STORED = {"input_ids": "tokens", "document_ids": "document_ids", "labels": "labels"}  # {column: its name in MDS}
DTYPES = {"tokens": "uint32", "document_ids": "uint32", "labels": "int32"}  # labels may be negative
CURE = "Prepare the data again with 01_data_prep, or copy the folder again."


def missing_packages() -> list[str]:
    """What MDS shards need and is not installed here; imports none of it."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    try:
        version("mosaicml-streaming")
    except PackageNotFoundError:
        missing.insert(0, "mosaicml-streaming")
    return missing


def require_streaming() -> None:
    """Raises ParameterError, with the install command, where MosaicML Streaming is not there."""
    if missing := missing_packages():
        raise ParameterError(
            f"storage mds needs MosaicML Streaming, and {', '.join(missing)} is not installed here. Install it with "
            f"`{INSTALL}`, or prepare the data with storage arrow: the blocks and their order are the same."
        )


def streaming_module(name: str) -> ModuleType:
    """A module of MosaicML Streaming, imported without streaming/__init__.py.

    That one imports data sets of images and with them torchvision, which no part of this needs and which does not load
    beside every torch.
    """
    require_streaming()
    if name not in sys.modules:
        whole = sys.modules.get("streaming")
        if whole is None:
            sys.modules["streaming"] = module_from_spec(find_spec("streaming"))  # not executed
        try:
            return importlib.import_module(name)
        finally:
            if whole is None:  # whoever imports it elsewhere gets all of it
                del sys.modules["streaming"]
    return sys.modules[name]


class MdsWriter:
    """Writes rows of a split into `folder`, a shard at a time; a context manager. Without an end there is no index."""

    def __init__(self, folder: Path, names: Sequence[str], block_size: int | None) -> None:
        """names: of the columns; block_size: tokens in each row, None where rows have any length."""
        shape = f":{block_size}" if block_size else ""
        columns = {STORED[name]: f"ndarray:{DTYPES[STORED[name]]}{shape}" for name in names}
        writer = streaming_module("streaming.base.format.mds").MDSWriter
        self._writer = writer(columns=columns, out=str(folder), hashes=[HASH], size_limit=SHARD_BYTES)

    def write(self, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Rows: for each column an array (rows, block_size), or one array for each row."""
        stored = {STORED[name]: [row.astype(DTYPES[STORED[name]]) for row in rows] for name, rows in columns.items()}
        for values in zip(*stored.values(), strict=True):
            self._writer.write(dict(zip(stored, values, strict=True)))

    def __enter__(self) -> MdsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._writer.finish()
        else:
            self._writer.cancel_future_jobs()


class MdsBlocks:
    """A split in MDS shards, with what of a datasets.Dataset's interface the workbook reads it by.

    len, [row], [slice or rows], with_format("numpy", columns), select; the rows are the same as with Arrow.
    """

    def __init__(self, folder: Path, block_size: int | None = None) -> None:
        """Raises CorpusError where a shard is missing or cut off, or the blocks are not of `block_size`."""
        self.folder = folder
        self.format, self._rows = None, None
        self._shards = _read_index(folder, block_size)
        first = self._shards[0]["column_names"]
        self.column_names = [name for name, stored in STORED.items() if stored in first]
        self._samples = sum(shard["samples"] for shard in self._shards)
        self._reader: Any = None
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self._samples if self._rows is None else len(self._rows)

    def __getitem__(self, key: int | slice | Sequence[int]) -> dict[str, Any]:
        if isinstance(key, int | np.integer):
            return self._row(range(len(self))[key])
        numbers = range(len(self))[key] if isinstance(key, slice) else [range(len(self))[int(each)] for each in key]
        rows = [self._row(number) for number in numbers]
        columns = {name: [row[name] for row in rows] for name in self.column_names}
        return {name: _stacked(column) for name, column in columns.items()} if self.format else columns

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, as PyTorch's DataLoader asks for them."""
        return [self[int(number)] for number in numbers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # a worker process opens the shards itself

    def with_format(self, kind: str | None, columns: Sequence[str] | None = None) -> MdsBlocks:
        """The same rows as int64 arrays of `columns` (kind "numpy"), or as lists of all (None)."""
        other = self._copy()
        other.format = kind
        other.column_names = list(columns or self.column_names)
        return other

    def select(self, numbers: Sequence[int]) -> MdsBlocks:
        """These rows alone."""
        other = self._copy()
        other._rows = [self._place(range(len(self))[int(number)]) for number in numbers]
        return other

    @property
    def is_stream(self) -> bool:
        """Whether the rows are all of the split's, in their order."""
        return self._rows is None

    def _copy(self) -> MdsBlocks:
        other = object.__new__(MdsBlocks)
        other.__dict__.update(self.__dict__)  # what is verified is shared
        return other

    def _place(self, number: int) -> int:
        return number if self._rows is None else self._rows[number]

    def _row(self, number: int) -> dict[str, Any]:
        if self._reader is None:
            self._reader = streaming_module("streaming.base.local").LocalDataset(str(self.folder))
        shard, index = self._reader.spanner[self._place(number)]
        if shard not in self._verified:
            _verify(self.folder, self._shards[shard]["raw_data"])
            self._verified.add(shard)
        row = self._reader.shards[shard][index]
        arrays = {name: row[STORED[name]].astype(np.int64) for name in self.column_names}  # the library's are read-only
        return arrays if self.format else {name: array.tolist() for name, array in arrays.items()}


def _stacked(rows: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return np.stack(rows) if rows and len({len(row) for row in rows}) == 1 else rows


def _read_index(folder: Path, block_size: int | None) -> list[dict[str, Any]]:
    """The shards of index.json, all of them there in their sizes. Raises CorpusError."""
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
        facts = [(shard["raw_data"]["basename"], shard["raw_data"]["bytes"]) for shard in shards]
        encodings = dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorpusError(f"{relative(folder / INDEX)} is damaged ({type(error).__name__}: {error}). {CURE}") from None
    for name, size in facts:
        path = folder / name
        if not path.is_file():
            raise CorpusError(f"The MDS shard {relative(path)} is missing, one of {len(facts)}. {CURE}")
        if (found := path.stat().st_size) != size:
            raise CorpusError(
                f"The MDS shard {relative(path)} is damaged: it has {found:,} bytes, its index says {size:,}. {CURE}"
            )
    wanted = f"ndarray:{DTYPES['tokens']}:{block_size}"
    if block_size and encodings.get("tokens") != wanted:
        raise CorpusError(
            f"The MDS shards in {relative(folder)} hold tokens as {encodings.get('tokens')}, and the data card says "
            f"block_size {block_size}: they are of other data. {CURE}"
        )
    return shards


def _verify(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises CorpusError where the shard's content is not what its hash says."""
    import xxhash

    path = folder / info["basename"]
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = getattr(xxhash, HASH)(content).hexdigest()
    except (OSError, ValueError) as error:
        raise CorpusError(f"The MDS shard {relative(path)} cannot be read ({error}). {CURE}") from None
    if found != (told := info["hashes"].get(HASH)):
        raise CorpusError(
            f"The MDS shard {relative(path)} is damaged: its {HASH} is {found}, and the index says {told}. {CURE}"
        )
