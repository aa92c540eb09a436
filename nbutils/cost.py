"""What a variant will cost before it is run: training FLOPs, memory, hours on a GPU. Estimates, and said to be.

    python -m nbutils check params/cosine.yaml --gpu A100 --utilisation 0.4

FLOPs of one token, forward and backward, as PaLM counts them (Chowdhery et al. 2022, appendix B; Kaplan et al. 2020):

    6 N + 12 L d T     N parameters that are multiplied with, L layers, d width of all heads together, T block length

Twice as many operations backward as forward; attention without the saving of a causal mask. An input embedding that is
not also the output matrix is looked up, not multiplied, and does not count. The expected embedding of the cosine term
multiplies with the embedding matrix as often as an output layer does: 6 V d more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nbutils.errors import ParameterError, did_you_mean
from nbutils.plans import Plan, Variant
from nbutils.preflight import data_facts

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
TRAINING_BYTES = 16  # a parameter in float32: weight 4, gradient 4, AdamW's two moments 8
ACTIVATION_BYTES = 34  # a token, layer and unit of width in 16 bit, attention scores not kept (Korthikanti et al. 2022)


@dataclass(frozen=True)
class Cost:
    """The estimate for one training run. `tokens`, `flops` and `hours` are None where they depend on unprepared data.

    `memory` is bytes on one GPU, without the logits of a chunk and the library's own.
    """

    parameters: int
    tokens: int | None
    flops: float | None
    memory: float
    hours: float | None


def check_gpu(gpu: str, utilisation: float) -> None:
    """Raise ParameterError for a GPU that is not in PEAK or a utilisation outside (0, 1]."""
    if gpu not in PEAK:
        raise ParameterError(f"There is no data on a GPU {gpu!r}. {did_you_mean(gpu, PEAK)}")
    if not 0 < utilisation <= 1:
        raise ParameterError(f"utilisation is {utilisation}; it is the fraction of the GPU's peak in use, in (0, 1].")


def estimate(variant: Variant, plan: Plan, gpu: str, utilisation: float) -> Cost | None:
    """The cost of `variant`, None where it trains no model or its vocabulary or block length is not known yet.

    Raises ModelError for a model that cannot be found, ParameterError as `check_gpu` does.
    """
    check_gpu(gpu, utilisation)
    params, data = variant.params, data_facts(variant, plan)
    if not {"model_name", "per_device_train_batch_size"} <= params.keys() or not data.get("block_size"):
        return None
    block_size, vocab_size = data["block_size"], 0  # pretrained models keep their own vocabulary
    if params.get("from_scratch"):
        if data.get("tokenizer", "train") not in ("train", "unigram"):
            return None  # that tokenizer has the tokens it has, whatever vocab_size says
        vocab_size = data["vocab_size"]
    config, parameters = _model(params["model_name"], vocab_size, block_size)
    tokens = training_tokens(params, data)
    flops = None if tokens is None else tokens * flops_per_token(config, parameters, block_size, params)
    hours = None if flops is None else flops / (PEAK[gpu] * utilisation * params.get("processes", 1)) / 3600
    return Cost(parameters, tokens, flops, training_memory(config, parameters, block_size, params), hours)


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
    width, embeddings = config.hidden_size, config.vocab_size * config.hidden_size
    multiplied = parameters - (0 if config.tie_word_embeddings else embeddings)
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    mixture = 6 * embeddings if params.get("alpha", 0) > 0 and not params.get("cos_topk") else 0
    return 6 * multiplied + 12 * config.num_hidden_layers * heads * block_size + mixture


def training_memory(config: PretrainedConfig, parameters: int, block_size: int, params: Mapping[str, Any]) -> float:
    """Bytes on one GPU: weights, gradients and AdamW states in float32, and activations in 16 bit, roughly."""
    tokens = params["per_device_train_batch_size"] * block_size
    return TRAINING_BYTES * parameters + ACTIVATION_BYTES * tokens * config.hidden_size * config.num_hidden_layers


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
