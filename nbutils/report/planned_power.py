"""What a plan's contrasts can show before any of its runs: effects detected by the planned pairs, from an A/A spread.

contrast mixing-perplexity: 5 pairs, level 0.04: 0.0123 nats per token or more with power 0.8 ...
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbutils.report.evidence import fill_slots
from nbutils.report.judging import level_of_look
from nbutils.report.registered import floor_of
from nbutils.report.statistics import POWER, detectable_in_spreads
from nbutils.runs import load_runs, measure, planned_pairs, registrations

if TYPE_CHECKING:
    from nbutils.runs import Plan


def power_lines(plan: Plan, folder: Path) -> Iterator[str]:
    """A heading and a line for each contrast: its pairs, its level, what they detect. Runs are those in `folder`.

    The spread of A/A pairs is that of finished runs of the plan; a treatment that does something may spread more.
    Contrasts that are not primary are taken at the level that Holm's rule leaves the smallest of their p values.
    """
    slots, _ = fill_slots([run for run in load_runs(folder) if run.plan == plan.name], plan)
    records, secondary = registrations(folder), sum(not each.primary for each in plan.contrasts)
    if plan.contrasts:
        yield f"What the planned pairs can show, with power {POWER}:"
    for contrast in plan.contrasts:
        pairs = planned_pairs([contrast], plan.variants)[contrast.name]
        known = {tuple(pair) for record in records for pair in record.pairs.get(contrast.name, ())}
        looks = len({len(record.pairs.get(contrast.name, ())) for record in records})
        look = max(1, looks + (not {*map(tuple, pairs)} <= known and bool(known)))
        level = level_of_look(look) / (1 if contrast.primary else secondary)
        told = f"  {contrast.name}: {len(pairs)} pairs at level {level:.2g}"
        if len(pairs) < 2:
            yield f"{told}: no verdict, an interval needs at least 2"
            continue
        detected = detectable_in_spreads(len(pairs), level)
        floor, quantity = floor_of(plan.noise_floor, contrast, slots), measure(contrast.metric)
        if floor is None or not np.isfinite(floor.differences).all():
            yield f"{told}: {detected:.2f} times the standard deviation of a pair's difference"
            continue
        effect = detected * float(np.sqrt(np.mean(np.square(floor.differences))))
        judged = "enough" if effect <= contrast.smallest_effect else "NOT enough"
        shown = f"{quantity.number(effect)} {quantity.difference_unit}".rstrip()
        asked = quantity.short(contrast.smallest_effect)
        yield f"{told}: {shown} if they spread as the A/A pairs do, {judged} for {asked}"
