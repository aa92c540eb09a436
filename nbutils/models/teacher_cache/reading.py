"""A teacher's cache, opened: memory-mapped arrays of what it said, and the objective's teacher made of them.

    runs/teacher_cache/<key>/
        cache.json                          whose words these are, of which data, in plain words
        heads.safetensors                   the teachers' output matrices, in their own precision
        <split>/offsets.npy                 (examples + 1,) int64: example i is at positions offsets[i]:offsets[i + 1]
        <split>/teacher_hidden_<i>.npy      hidden: (tokens, width) float16, the last hidden states of teacher i
        <split>/teacher_columns.npy         topk: (tokens, k) uint16 or int32, the most probable tokens first
        <split>/teacher_log_probabilities.npy   topk: (tokens, k + 1) float16, the last of all other tokens together

A split is one stream of tokens, example after example. Students train on `train` alone; validation and test, on which
they are evaluated, are hidden states in a cache of either kind. What stands at a position was said in the context of
the example, a block of text say, that holds it: a chunk that starts elsewhere in the stream is given the words for the
same tokens with another left context, and `exactness` says what this changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbutils.foundation import RunError, places, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nbutils.models.teacher_target import TeacherStates, TopTokens

FORMAT = 2  # of the files; a cache of another is made anew
CARD, HEADS, OFFSETS = "cache.json", "heads.safetensors", "offsets.npy"
COLUMNS, LOG_PROBABILITIES = "teacher_columns", "teacher_log_probabilities"
CURE = "Delete the folder and run again, and the cache is made anew."


@dataclass(eq=False)
class TeacherCache:
    """The `Teacher` of an objective that reads what was said; `arrays`, {split: {name: memory map}}, as listed above.

    `weights`: the teachers' output matrices, each (vocab, width).
    """

    folder: Path
    card: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray]]
    offsets: dict[str, np.ndarray]
    weights: tuple[Tensor, ...]

    @property
    def kind(self) -> str:
        return self.card["kind"]

    @property
    def bytes_per_token(self) -> int:
        """What one position of the train split takes on disk."""
        return sum(np.dtype(each["dtype"]).itemsize * each["width"] for each in self.card["arrays"]["train"].values())

    def stored(self, split: str, position: int, length: int) -> dict[str, np.ndarray]:
        """What was said at `length` positions from `position` of the split's stream: arrays (length, ...).

        They are views of the memory map, to be copied into a batch. Raises RunError where the cache does not hold them.
        """
        if split not in self.arrays:
            raise RunError(
                f"{places.relative(self.folder)} holds what the teacher said on {_words(self.arrays)}, and nothing of "
                f"{split}. Use the live teacher there."
            )
        tokens = int(self.offsets[split][-1])
        if not 0 <= position <= position + length <= tokens:
            raise RunError(
                f"Positions {position} to {position + length} were asked of {places.relative(self.folder)}, and its "
                f"{split} split has {tokens}. It is a cache of other data. {CURE}"
            )
        return {name: array[position : position + length] for name, array in self.arrays[split].items()}

    def target(self, input_ids: Tensor, stored: Mapping[str, Tensor]) -> TeacherStates | TopTokens:
        """For all positions of `input_ids` (batch, time), flat; `stored` has what `stored` gave, (batch, time, ...).

        Raises RunError where the batch brings nothing from the cache.
        """
        from nbutils.models.teacher_target import TeacherStates, TopTokens

        topk = COLUMNS in stored
        said = []
        for name in (COLUMNS, LOG_PROBABILITIES) if topk else (f"teacher_hidden_{i}" for i in range(len(self.weights))):
            if name not in stored or stored[name].shape[:2] != input_ids.shape:
                raise RunError(
                    f"A batch of shape {tuple(input_ids.shape)} brings no {name} of that shape from the teacher's "
                    "cache. Wrap its data set in WithTeacher, or use the live teacher for it."
                )
            said.append(stored[name].flatten(0, 1))
        return TopTokens(*said, self.card["temperature"]) if topk else TeacherStates(tuple(said), self.weights)

    def to(self, device: torch.device | str) -> TeacherCache:
        """The same cache, its output matrices moved to `device`."""
        self.weights = tuple(weight.to(device) for weight in self.weights)
        return self


class WithTeacher:
    """A map-style data set: the items of another, and with each what the teacher said at its positions.

    Items are dicts with input_ids (length,) and, for chunks of the stream, their position in it. Items without a
    position are the split's examples in stored order; RunError where there are not as many, or one has another length.
    """

    def __init__(self, dataset: Any, cache: TeacherCache, split: str) -> None:
        self.dataset, self.cache, self.split = dataset, cache, split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._with_teacher(range(len(self))[index], self.dataset[index])  # a range counts from the end, too

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, read together where the data set can; PyTorch's DataLoader asks for them so."""
        together = getattr(self.dataset, "__getitems__", None)
        rows = together(list(indices)) if together else [self.dataset[index] for index in indices]
        return [self._with_teacher(index, row) for index, row in zip(indices, rows, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Told to the data set below where it draws other items for each epoch; the data loader calls it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def _with_teacher(self, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        length = len(item["input_ids"])
        position = item["position"] if "position" in item else self._start(index, length)
        return {**item, **self.cache.stored(self.split, int(position), length)}

    def _start(self, index: int, length: int) -> int:
        offsets = self.cache.offsets.get(self.split, np.zeros(1, np.int64))
        if len(self.dataset) != len(offsets) - 1 or length != offsets[index + 1] - offsets[index]:
            raise RunError(
                f"{places.relative(self.cache.folder)} does not hold these {len(self.dataset)} {self.split} examples: "
                f"it was made of {len(offsets) - 1}, or of others. {CURE}"
            )
        return int(offsets[index])


def open_cache(folder: Path, teacher_fingerprint: str, data_fingerprint: str) -> TeacherCache:
    """The cache in `folder`, if it is of this teacher and these data.

    Raises RunError where there is none, it is damaged or unfinished, or of another teacher or other data.
    """
    card = read_card(folder)
    here = places.relative(folder)
    for what, given, wanted in (
        ("teacher", card["teacher_fingerprint"], teacher_fingerprint),
        ("data", card["data_fingerprint"], data_fingerprint),
    ):
        if given != wanted:
            raise RunError(
                f"{here} is the cache of another {what}: it was made of {_words(card[what])} (fingerprint "
                f"{given[:12]}), and this run's {what} has the fingerprint {wanted[:12]}. Leave the choice of the "
                f"folder to the workbook, or give the {what} it was made of."
            )
    arrays, offsets = {}, {}
    for split, tokens in card["splits"].items():
        layout = card["arrays"][split]
        expected = {name: ((tokens, each["width"]), np.dtype(each["dtype"])) for name, each in layout.items()}
        arrays[split] = {name: _mapped(folder / split / f"{name}.npy", *what) for name, what in expected.items()}
        offsets[split] = _mapped(folder / split / OFFSETS, (card["examples"][split] + 1,), np.dtype(np.int64))
    return TeacherCache(folder, card, arrays, offsets, _heads(folder))


def read_card(folder: Path) -> dict[str, Any]:
    """The content of `folder`/cache.json. Raises RunError where there is none or one of another format."""
    try:
        card = read_json(folder / CARD)
        version = card["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{places.relative(folder)} is no teacher's cache: {CARD} is missing or damaged "
            f"({type(error).__name__}). {CURE}"
        ) from None
    if version != FORMAT:
        raise RunError(f"{places.relative(folder)} has format {version}, and {FORMAT} is read here. {CURE}")
    return card


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A .npy file, memory-mapped, which must be whole and have this shape and type."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{places.relative(path)} is missing or damaged ({error}). {CURE}") from None
    if array.shape != shape or array.dtype != dtype:
        raise RunError(
            f"{places.relative(path)} holds {array.shape} numbers of {array.dtype}, and {CARD} says {shape} of "
            f"{dtype}: it is damaged. {CURE}"
        )
    return array.view(np.ndarray)  # the same memory without the subclass, whose slices cost more


def _heads(folder: Path) -> tuple[Tensor, ...]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        heads = load_file(folder / HEADS)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{places.relative(folder / HEADS)} is missing or damaged ({error}). {CURE}") from None
    return tuple(heads[f"head_{i}"] for i in range(len(heads)))


def _words(names: str | Sequence[str] | Mapping[str, Any]) -> str:
    return names if isinstance(names, str) else " and ".join(names)
