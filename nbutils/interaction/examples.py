"""A round's examples as rows to train on: token ids with what each position is weighed by; kept in one file.

Columns that belong to a prediction stand at the position that makes it, as in nbutils/interaction/policy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from nbutils.data import IGNORE_INDEX, permutation
from nbutils.foundation import atomic_write
from nbutils.interaction.settings import ON_POLICY, PAIRED, Interaction

Example = dict[str, np.ndarray]
ROUND_FILE = "round.npz"  # in the run's folder: the examples of the round that is trained on
ROUND = "round"  # an entry of it: their round


def text_example(prompt: np.ndarray, completion: np.ndarray) -> Example:
    """A sequence of which every token but the first is scored by cross entropy."""
    tokens = np.concatenate([prompt, completion])
    return {"input_ids": tokens, "labels": tokens}


def pair_example(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Example:
    """A response preferred to another; cross entropy, where it has a weight, scores the whole chosen sequence."""
    first, second = (np.concatenate([prompt, each]) for each in (chosen, rejected))
    return text_example(prompt, chosen) | {
        "response": response_mask(len(prompt), len(first)),
        "rejected_ids": second,
        "rejected": response_mask(len(prompt), len(second)),
    }


def reward_example(prompt: np.ndarray, response: np.ndarray, **columns: np.ndarray) -> Example:
    """A sampled response with `columns` (time,) of its advantages and what they were made from."""
    tokens = np.concatenate([prompt, response])
    return {"input_ids": tokens, "labels": tokens, "response": response_mask(len(prompt), len(tokens)), **columns}


def response_mask(prompt: int, tokens: int) -> np.ndarray:
    """1 at positions whose next token is one of the response, float32 (tokens,)."""
    mask = np.zeros(tokens, np.float32)
    mask[prompt - 1 : tokens - 1] = 1
    return mask


class RoundRows:
    """The rows of one round after the other: each pass of it over the examples, empty rows where there are fewer.

    Of a prompt with three pairs each pass takes another, and a pass about as many of each kind; passes of imitation
    take those with human text and those with the correction in turn.
    make: in the first process, makes the examples of a round (counted from 0); a round that was begun is read from its
    file. wait: lets a process go on once all have come so far.
    """

    def __init__(self, settings: Interaction, file: Path) -> None:
        self.settings, self.file = settings, file
        self.make: Callable[[int], Sequence[Example]] | None = None
        self.wait: Callable[[], None] = lambda: None
        self.round = -1
        self.examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return self.settings.examples_per_round * self.settings.all_passes

    def set_epoch(self, epoch: int) -> None:
        """From here on the rows are those of round `epoch`."""
        if epoch == self.round:
            return
        if self.make and read_round(self.file, epoch) is None:
            write_round(self.file, epoch, self.make(epoch))
        self.wait()
        self.round, self.examples = epoch, read_round(self.file, epoch)

    @property
    def filled(self) -> int:
        """Rows of a pass that hold something."""
        return min(len(self.examples) // self.settings.turns, self.settings.examples_per_round)

    def __getitem__(self, index: int) -> dict[str, Any]:
        settings = self.settings
        number, row = divmod(index, settings.examples_per_round)
        if index >= len(self) or row >= self.filled:
            return self._empty()
        supervised = number < settings.all_passes - settings.passes
        turns = min(settings.turns, 2) if supervised else settings.turns
        example = self.examples[row * settings.turns + (number + row) % turns]
        if settings.method not in PAIRED:
            return example
        weights = (1.0, 0.0) if supervised else (settings.sft_weight, 1.0)
        return example | {"weights": np.array(weights, np.float32)}

    def _empty(self) -> dict[str, Any]:
        tokens, nothing, weightless = np.zeros(1, np.int64), np.full(1, IGNORE_INDEX), np.zeros(1, np.float32)
        row: dict[str, Any] = {"input_ids": tokens, "labels": nothing}
        if self.settings.method in PAIRED:
            row |= {"response": weightless, "rejected_ids": tokens, "rejected": weightless}
            row |= {"weights": np.zeros(2, np.float32)}
        if self.settings.method in ON_POLICY:
            row |= {name: weightless for name in reward_columns(self.settings.method)}
        return row


def reward_columns(method: str) -> tuple[str, ...]:
    """The columns of an on-policy example beside its tokens."""
    columns = ("response", "advantages")
    return (*columns, "old_log_probs", "old_values", "returns") if method == "ppo" else columns


class RoundOrder(Sampler[int]):
    """Indices of RoundRows: pass after pass, each in an order of its own that (seed, round, pass) decides.

    Rows that hold nothing come after all passes, so that steps are whole or idle; more of them fill the last
    micro-batches of several processes up to `filled` (see nbutils/data/order.py).
    """

    def __init__(self, rows: RoundRows, seed: int, filled: int = 1) -> None:
        self.rows, self.seed, self.filled, self.epoch = rows, seed, filled, 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.filled) * self.filled

    def __iter__(self) -> Iterator[int]:
        each, passes, real = self.rows.settings.examples_per_round, self.rows.settings.all_passes, self.rows.filled
        for number in range(passes):
            yield from (number * each + int(row) for row in permutation(real, self.seed, self.epoch * passes + number))
        yield from [len(self.rows)] * (len(self) - passes * real)

    def set_epoch(self, epoch: int) -> None:
        """The order of round `epoch` from here on; its examples are made or read now."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)


def write_round(file: Path, number: int, examples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Keep a round's examples: each column's values one after the other, and how many belong to each example."""
    arrays = {ROUND: np.array(number), "examples": np.array(len(examples))}
    for name in examples[0] if examples else ():
        arrays[f"values {name}"] = np.concatenate([each[name] for each in examples])
        arrays[f"lengths {name}"] = np.array([len(each[name]) for each in examples])
    content = BytesIO()
    np.savez(content, **arrays)
    atomic_write(file, content.getvalue())


def read_round(file: Path, number: int) -> list[Example] | None:
    """The examples of round `number`, None where the file holds another or there is none."""
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        if int(arrays[ROUND]) != number:
            return None
        names = [name.removeprefix("values ") for name in arrays.files if name.startswith("values ")]
        columns = {
            name: np.split(arrays[f"values {name}"], np.cumsum(arrays[f"lengths {name}"])[:-1]) for name in names
        }
        return [{name: columns[name][row] for name in names} for row in range(int(arrays["examples"]))]
