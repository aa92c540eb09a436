"""What a variant will cost before it is run: training FLOPs, memory, hours on a GPU. Estimates, and said to be.

    python -m nbutils check params/cosine.yaml --gpu A100 --utilisation 0.4

FLOPs of one token, forward and backward, as PaLM counts them (Chowdhery et al. 2022, appendix B; Kaplan et al. 2020):

    6 N + 12 L d T     N parameters that are multiplied with, L layers, d width of all heads together, T block length

Twice as many operations backward as forward; attention without the saving of a causal mask. An input embedding that is
not also the output matrix is looked up, not multiplied, and does not count. The expected embedding of the cosine term
multiplies with the embedding matrix as often as an output layer does: 6 V d more.

A teacher only runs forward, a third of that, and only its weights are in memory, 4 bytes each:

    2 N + 4 L d T      for each live teacher of a student
    2 V d              where its hidden states are stored (teacher_cache hidden): its output layer, V tokens of width d
    0                  where its most probable tokens are (topk)

Storing them is one forward pass over the data, paid once for all students that read them. No run counts it, nor any
evaluation but that by judges: interaction_cost.py tells what runs with judges count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nbutils.batch.preflight import START, data_facts
from nbutils.foundation import ParameterError, Unreachable, did_you_mean, resolve
from nbutils.models import TOKENIZERS
from nbutils.runs import Plan, Variant

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets (without sparsity).
PEAK = {
    "A10": 125e12,
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100-PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX3090": 71e12,
    "RTX4090": 165e12,
}
FROZEN_BYTES = 4  # a parameter of a teacher, in float32
TEACHERS = ("teacher", "second_teacher")  # parameters: a run, a folder or a Hub name
TRAINING_BYTES = 16  # a parameter in float32: weight 4, gradient 4, AdamW's two moments 8
ACTIVATION_BYTES = 34  # a token, layer and unit of width in 16 bit, attention scores not kept (Korthikanti et al. 2022)


@dataclass(frozen=True)
class Cost:
    """The estimate for one training run. `tokens`, `flops` and `hours` are None where they depend on unprepared data.

    `hours` are GPU-hours: with several processes, those of all their GPUs together. `memory` is bytes on one GPU,
    without the logits of a chunk and the library's own. `left_out` names what else is not counted.
    """

    parameters: int
    tokens: int | None
    flops: float | None
    memory: float
    hours: float | None
    left_out: tuple[str, ...] = ()


def check_gpu(gpu: str, utilisation: float) -> None:
    """Raise ParameterError for a GPU that is not in PEAK or a utilisation outside (0, 1]."""
    if gpu not in PEAK:
        raise ParameterError(f"There is no data on a GPU {gpu!r}. {did_you_mean(gpu, PEAK)}")
    if not 0 < utilisation <= 1:
        raise ParameterError(f"utilisation is {utilisation}; it is the fraction of the GPU's peak in use, in (0, 1].")


def _student(variant: Variant, plan: Plan, data: Mapping[str, Any]) -> tuple[PretrainedConfig, int] | None:
    """The model that a run trains: the one it begins with, where it names one."""
    from nbutils.models import model_of

    params = variant.params
    if START in variant.needs:
        return _model_of(plan.variant(variant.needs[START]).params, data)
    if params.get(START):
        return _model(model_of(params[START]), 0, data["block_size"])
    return _model_of(params | {"from_scratch": True} if START in params else params, data)


def _model_of(params: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[PretrainedConfig, int] | None:
    """Configuration and parameters of the model that a training run makes; None where its vocabulary is not known."""
    vocab_size = 0  # pretrained models keep their own vocabulary
    if params.get("from_scratch") and not (vocab_size := _vocabulary(data)):
        return None
    return _model(params["model_name"], vocab_size, data["block_size"])


def _vocabulary(data: Mapping[str, Any]) -> int:
    """Tokens of the vocabulary of `data`, 0 where they are not known: that of a Hub's tokenizer we know nothing of."""
    tokenizer = data.get("tokenizer", "train")
    if tokenizer in ("train", "unigram"):
        return data["vocab_size"]
    if resolve(tokenizer).is_dir():
        from nbutils.data import load_tokenizer

        return len(load_tokenizer(tokenizer))
    return TOKENIZERS.get(tokenizer, 0)


def _taught_by(
    variant: Variant, plan: Plan, block_size: int
) -> tuple[list[tuple[PretrainedConfig, int]], tuple[str, ...]]:
    """The teachers of a distillation, as `teachers_of` has them, and what cannot be counted."""
    params = variant.params
    if params.get("divergence", "none") == "none":
        return [], ()
    found, unknown = teachers_of(variant, plan, block_size, TEACHERS)
    left_out = [*unknown]
    if params.get("teacher_cache", "off") != "off":
        left_out.append("storing what a teacher says, one forward pass over the data for all students that read it")
    if "teacher" not in variant.needs and not params.get("teacher"):
        left_out.append("the small teacher that is made where none is named")
    return found, tuple(left_out)


def teachers_of(
    variant: Variant, plan: Plan, block_size: int, names: Sequence[str]
) -> tuple[list[tuple[PretrainedConfig, int]], tuple[str, ...]]:
    """Configuration and parameters of every teacher that the parameters `names` name, and those that are not known."""
    from nbutils.models import model_of

    params, found, left_out = variant.params, [], []
    for name in names:
        if name in variant.needs:
            needed = plan.variant(variant.needs[name])
            data = data_facts(needed, plan)
            known = "model_name" in needed.params and data.get("block_size")
            model = _model_of(needed.params, data) if known else None
            found += [model] if model else []
            left_out += [] if model else [f"the teacher of {needed.name}, whose size is not known yet"]
        elif params.get(name):
            try:
                found.append(_model(model_of(params[name]), 0, block_size))
            except Unreachable:
                left_out.append(f"the teacher {params[name]}, which cannot be reached from here")
    return found, tuple(left_out)


def training_tokens(params: Mapping[str, Any], data: Mapping[str, Any]) -> int | None:
    """Tokens trained on, over all processes; None where they depend on data that is not prepared.

    Of questions and answers, whose lengths differ, padding is not counted.
    """
    examples = data.get("task") == "qa"
    if examples and "splits" not in data:
        return None
    train = data["splits"]["train"] if examples else {}
    length = (train["tokens"] + train["end_tokens"]) / train["blocks"] if examples else data["block_size"]
    blocks = params["per_device_train_batch_size"] * params.get("processes", 1)
    if params.get("max_steps", 0) > 0:
        return round(params["max_steps"] * blocks * params.get("gradient_accumulation_steps", 1) * length)
    if "splits" not in data:
        return None
    return round(data["splits"]["train"]["blocks"] * length * params["num_train_epochs"])


def flops_per_token(config: PretrainedConfig, parameters: int, block_size: int, params: Mapping[str, Any]) -> float:
    """FLOPs to train on one token, by the formula at the top of this file."""
    embeddings = config.vocab_size * config.hidden_size
    mixture = 6 * embeddings if params.get("alpha", 0) > 0 and not params.get("cos_topk") else 0
    return 3 * _forward(config, parameters, block_size) + mixture


def teacher_flops_per_token(config: PretrainedConfig, parameters: int, block_size: int, cache: str = "off") -> float:
    """FLOPs of a teacher for each token that a student trains on, live or read from a cache of the kind `cache`."""
    stored = {"hidden": 2 * config.vocab_size * config.hidden_size, "topk": 0}
    return stored[cache] if cache in stored else _forward(config, parameters, block_size)


def _forward(config: PretrainedConfig, parameters: int, block_size: int) -> float:
    """2 N + 4 L d T: the forward pass of one token."""
    width = config.hidden_size
    multiplied = parameters - (0 if config.tie_word_embeddings else config.vocab_size * width)
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    return 2 * multiplied + 4 * config.num_hidden_layers * heads * block_size


def training_memory(config: PretrainedConfig, parameters: int, block_size: int, params: Mapping[str, Any]) -> float:
    """Bytes on one GPU: weights, gradients and AdamW states in float32, and activations in 16 bit, roughly."""
    tokens = params["per_device_train_batch_size"] * block_size
    return TRAINING_BYTES * parameters + ACTIVATION_BYTES * tokens * config.hidden_size * config.num_hidden_layers


def teacher_memory(config: PretrainedConfig, parameters: int, cache: str = "off") -> float:
    """Bytes of a teacher while a student trains: its weights, its output layer alone, or none where it is stored."""
    stored = {"hidden": config.vocab_size * config.hidden_size, "topk": 0}
    return FROZEN_BYTES * stored.get(cache, parameters)


@lru_cache(maxsize=64)
def _model(model_name: str, vocab_size: int, block_size: int) -> tuple[PretrainedConfig, int]:
    from nbutils.models import build_config, count_parameters

    config = build_config(model_name, vocab_size, block_size)
    return config, count_parameters(config)


def quantity(value: float | None, unit: str = "") -> str:
    """`1.23 M`, `4.5 PFLOP`; a dash where there is no value."""
    if value is None:
        return "-"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
