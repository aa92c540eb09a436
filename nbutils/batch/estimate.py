"""The estimate of one variant, by what kind of run it is: a training (cost.py) or one with a judge."""

from __future__ import annotations

from nbutils.batch.cost import (
    PEAK,
    Cost,
    _student,
    _taught_by,
    check_gpu,
    flops_per_token,
    teacher_flops_per_token,
    teacher_memory,
    training_memory,
    training_tokens,
)
from nbutils.batch.interaction_cost import Model, interaction_cost
from nbutils.batch.preflight import INTERACTION, data_facts
from nbutils.runs import Plan, Variant


def estimate(variant: Variant, plan: Plan, gpu: str, utilisation: float) -> Cost | None:
    """The cost of `variant`, None where it trains no model or its vocabulary or block length is not known yet.

    Raises ModelError for a model that cannot be found, ParameterError as `check_gpu` does.
    """
    check_gpu(gpu, utilisation)
    params, data = variant.params, data_facts(variant, plan)
    if not {"model_name", "per_device_train_batch_size"} <= params.keys() or not data.get("block_size"):
        return None
    block_size, model = data["block_size"], _student(variant, plan, data)
    if model is None:
        return None
    if {*INTERACTION} <= params.keys():
        return interaction_cost(variant, plan, Model(*model), block_size, gpu, utilisation)
    teachers, left_out = _taught_by(variant, plan, block_size)
    tokens, cache = training_tokens(params, data), params.get("teacher_cache", "off")
    of_token = flops_per_token(*model, block_size, params)
    of_token += sum(teacher_flops_per_token(*teacher, block_size, cache) for teacher in teachers)
    flops = None if tokens is None else tokens * of_token
    hours = None if flops is None else flops / (PEAK[gpu] * utilisation) / 3600
    memory = training_memory(*model, block_size, params) + sum(teacher_memory(*each, cache) for each in teachers)
    return Cost(model[1], tokens, flops, memory, hours, left_out)
