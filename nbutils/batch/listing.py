"""What `check` prints: a plan's stages with their parameters, its variants with tokens and costs, its contrasts.

`check --names` prints the variants alone, for scripts that hand them to a scheduler.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from nbutils.batch.cost import Cost, estimate
from nbutils.batch.preflight import check_variant, place_of, remarks
from nbutils.batch.progress import text_table
from nbutils.foundation import RUNS, Unreachable, WorkbookError, relative
from nbutils.runs import Comparison, Plan, Stage

WIDTH = 110
LEAST_HOURS = 0.001  # less is not worth a number
HEADER = ("variant", "parameters", "tokens", "training FLOPs", "memory", "GPU-hours")


def variant_names(plan: Plan) -> str:
    """A line for each variant, in the order of the plan; nothing is checked, so that it is there at once.

    Columns, with tabs between them: stage, notebook, variant, the stages it needs (with commas between them), the GPUs
    it takes where there are some, the cores it asks for, the folder of the plan's runs; - where there is nothing.
    """
    needs = {stage.name: ",".join(dict.fromkeys(stage.needs.values())) for stage in plan.stages}
    rows = (
        (
            variant.stage,
            relative(variant.notebook),
            variant.name,
            needs[variant.stage] or "-",
            variant.resources.gpus_for(variant.params, there=1),
            variant.resources.cpus or "-",
            relative(RUNS / plan.name),
        )
        for variant in plan.variants
    )
    return "\n".join("\t".join(map(str, row)) for row in rows)


def plan_listing(plan: Plan, gpu: str, utilisation: float) -> str:
    """The listing of a plan. Raises WorkbookError, naming the variant, where one could not run anywhere.

    What only cannot be reached from here is told at the end: a plan can be looked at without a network.
    """
    unreachable: dict[str, str] = {}
    for variant in plan.variants:
        try:
            check_variant(variant, plan)
        except Unreachable as error:
            unreachable.setdefault(str(error), place_of(variant, plan))
        except WorkbookError as error:
            raise type(error)(f"{place_of(variant, plan)}: {error}") from None
    costs = {variant.name: estimate(variant, plan, gpu, utilisation) for variant in plan.variants}
    counts = {"stage": plan.stages, "variant": plan.variants, "contrast": plan.contrasts}
    told = ", ".join(f"{len(each)} {word}{'' if len(each) == 1 else 's'}" for word, each in counts.items())
    parts = [f"{plan.name} ({relative(plan.file)}): {told}"]
    parts += [_stage_listing(stage, plan, costs) for stage in plan.stages]
    parts += ["\n".join(_contrast_lines(plan))] if plan.comparisons else []
    parts += ["\n".join(remarks(plan))] if remarks(plan) else []
    warnings = [f"It would not run here and now. {place}: {message}" for message, place in unreachable.items()]
    return "\n\n".join([*parts, "\n".join(_total_lines(costs, gpu, utilisation)), *warnings])


def _stage_listing(stage: Stage, plan: Plan, costs: dict[str, Cost | None]) -> str:
    variants = [variant for variant in plan.variants if variant.stage == stage.name]
    shared = {name: value for name, value in variants[0].params.items() if name not in stage.matrix}
    lines = [f"stage {stage.name}: {relative(stage.notebook)}"]
    lines += [f"  needs     {name} from {needed}" for name, needed in stage.needs.items()]
    lines += [f"  varies    {name}: {', '.join(map(str, values))}" for name, values in stage.matrix.items()]
    lines += _wrapped("  set       ", {name: value for name, value in shared.items() if name in stage.params})
    lines += _wrapped("  defaults  ", {name: value for name, value in shared.items() if name not in stage.params})
    rows = [(variant.name, *_cost_cells(costs[variant.name])) for variant in variants]
    return "\n".join([*lines, textwrap.indent(text_table(HEADER, rows), "  ")])


def _wrapped(label: str, params: dict[str, Any]) -> list[str]:
    told = ", ".join(f"{name}={value!r}" for name, value in params.items())
    return textwrap.wrap(label + told, WIDTH, subsequent_indent=" " * len(label)) if params else []


def _cost_cells(cost: Cost | None) -> tuple[str, ...]:
    if cost is None:
        return ("-",) * (len(HEADER) - 1)
    tokens = "by the data" if cost.tokens is None else f"{cost.tokens:,}"
    hours = "-" if cost.hours is None else _hours(cost.hours)
    return quantity(cost.parameters), tokens, quantity(cost.flops), quantity(cost.memory, "B"), hours


def quantity(value: float | None, unit: str = "") -> str:
    """`1.23 M`, `4.5 PFLOP`; a dash where there is no value."""
    if value is None:
        return "-"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def _hours(hours: float) -> str:
    return f"{hours:.3g}" if hours >= LEAST_HOURS else f"under {LEAST_HOURS}"


def _contrast_lines(plan: Plan) -> Iterator[str]:
    for contrast in plan.contrasts:
        primary = ", primary" if contrast.primary else ""
        yield f"contrast {contrast.name}{primary}: {contrast.question}"
        against = f"{contrast.control_metric} of " * bool(contrast.control_metric)
        against += f"{contrast.control_stage} " * bool(contrast.control_stage)
        yield (
            f"  {_sides(contrast, plan, against)}; {contrast.better} is better, claim: {contrast.claim}, "
            f"smallest effect {contrast.smallest_effect:g}"
        )
    if plan.noise_floor:
        yield f"noise floor, of stage {plan.noise_floor.stage}: differences inside it are not told from noise"
        yield f"  {_sides(plan.noise_floor, plan)}"


def _sides(comparison: Comparison, plan: Plan, against: str = "") -> str:
    """`test_ce_loss: alpha 0.5 against alpha 0.0, 3 pairs`; `against` is what is to be said of the control first."""
    treatment, control = (
        ", ".join(f"{name} {value}" for name, value in side.items()) or "every run"
        for side in (comparison.treatment, comparison.control)
    )
    pairs = len(comparison.pairs(plan.variants))
    return f"{comparison.metric}: {treatment} against {against}{control}, {pairs} pair{'s' * (pairs != 1)}"


def _total_lines(costs: dict[str, Cost | None], gpu: str, utilisation: float) -> Iterator[str]:
    known = [cost for cost in costs.values() if cost and cost.flops is not None]
    if not any(costs.values()):
        yield "No stage trains a model whose size is known before the data are. Nothing was started."
        return
    flops, hours = sum(cost.flops for cost in known), sum(cost.hours for cost in known)
    time = f"{_hours(hours)} hours of one {gpu} at {utilisation:.0%} of its peak"
    yield f"In all {quantity(flops, 'FLOP')} in {len(known)} training runs, {time}."
    unknown = sum(cost is not None and cost.flops is None for cost in costs.values())
    if unknown:
        yield f"Not counted: {unknown} runs whose tokens are known once the data stage has run."
    for left_out in dict.fromkeys(told for cost in costs.values() if cost for told in cost.left_out):
        yield f"Not counted: {left_out}."
    yield (
        "Memory is weights, gradients, AdamW, the teacher and, roughly, activations; the formulas are in "
        "nbutils/batch/cost.py. Nothing was started."
    )
