"""The GPUs that a batch shares out on this machine, by their ids: which there are, and what is none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nbutils.foundation import environment
from nbutils.foundation.errors import PlanError

VISIBLE = "CUDA_VISIBLE_DEVICES"
UUIDS = ("GPU-", "MIG-")  # what ids that are no numbers begin with
DEVICES = Path("/dev")


def machine_gpus() -> tuple[str, ...]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs kept as they are."""
    there = [str(number) for number in range(len(environment.gpus()))]
    given = os.environ.get(VISIBLE)
    if given is None or not there:
        return tuple(there)
    visible = []
    for each in (word.strip() for word in given.split(",")):
        if each not in there and not each.startswith(UUIDS):
            break  # as CUDA does: what stands behind an id that is none does not count
        visible.append(each)
    return tuple(visible)


def check_gpu_ids(gpus: Sequence[str], named: bool) -> None:
    """Raise PlanError where an id is empty, is given twice or, as somebody `named` them, is no GPU of this machine.

    A GPU that stands there twice could only go to one variant: the other would find none.
    """
    given = ",".join(gpus)
    cure = f"Name each once, with --gpus or {VISIBLE}, as 0,1."
    twice = next((each for each, times in Counter(gpus).items() if times > 1), None)
    if not all(each.strip() for each in gpus):
        raise PlanError(f"The GPUs to share out are {given!r}, and an id is empty. {cure}")
    if twice is not None:
        raise PlanError(f"The GPUs to share out are {given!r}, and {twice} is there twice. {cure}")
    for each in gpus if named else ():
        _check_there(each)


def _check_there(given: str) -> None:
    """Raise PlanError where the machine has no GPU of that number; of a UUID, where it has no GPU at all."""
    there = [str(number) for number in range(len(environment.gpus()))]
    unlisted = not there and any(DEVICES.glob("nvidia[0-9]*"))  # the driver without its tool
    if unlisted or given in there or (there and given.startswith(UUIDS)):
        return
    has = f"it has {', '.join(there)}. Name some of those with --gpus" if there else "it has none. Leave --gpus out"
    raise PlanError(f"There is no GPU {given} on this machine; {has}.")
