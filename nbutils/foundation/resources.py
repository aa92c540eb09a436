"""What a variant asks of the machine it runs on, said by its stage in a plan; none of it changes what it computes.

resources: {gpus: 2, cpus: 8, run_minutes: 600, cell_minutes: 480}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nbutils.foundation.errors import PlanError, did_you_mean

PROCESSES = "processes"  # the parameter of a notebook that trains; each process takes a GPU


@dataclass(frozen=True)
class Resources:
    """What one variant asks for; None where the plan does not say.

    gpus: of its own (not said: one for each training process, where there are any); cpus: cores, and so threads.
    run_minutes, cell_minutes: how long the variant and one of its cells may take; not said: for ever.
    """

    gpus: int | None = None
    cpus: int | None = None
    run_minutes: float | None = None
    cell_minutes: float | None = None

    def gpus_for(self, params: Mapping[str, Any], there: int) -> int:
        """GPUs that a variant with these parameters takes where so many are there, which may be more than there are.

        there: those that may yet be started count, too. Where there are none, processes train on cores.
        """
        if self.gpus is not None:
            return self.gpus
        return int(params.get(PROCESSES, 0)) if there else 0


def read_resources(where: str, given: Mapping[str, Any]) -> Resources:
    """The `resources` of a stage. Raises PlanError, `where` first, for what cannot be asked for."""
    names = [each.name for each in fields(Resources)]
    for name, value in given.items():
        if name not in names:
            raise PlanError(f"{where}: resources has no {str(name)!r}. {did_you_mean(str(name), names)}")
        whole, least = name in ("gpus", "cpus"), 0 if name == "gpus" else 1 if name == "cpus" else None
        fits = isinstance(value, int | None if whole else int | float | None) and not isinstance(value, bool)
        if not fits or (value is not None and (value < least if least is not None else not 0 < value < float("inf"))):
            asked = f"a whole number, at least {least}" if whole else "a number of minutes above 0"
            raise PlanError(f"{where}: resources {name} is {value!r}. Give {asked}.")
    return Resources(**given)
