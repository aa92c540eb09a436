"""Models: pretrained by name or folder, or from a configuration with random weights; their files of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbutils.data import load_tokenizer
from nbutils.foundation import ModelError, locate, resolve, unusable
from nbutils.models.shapes import CONFIGURATIONS, PUBLISHED, PUBLISHED_POSITIONS, PUBLISHED_VOCABULARY

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What from_pretrained reads, in its order; an index names the files that hold the parts.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

LARGEST_PADDING = (
    128  # models pad their vocabulary up to a multiple of 128 for speed; a larger gap is another vocabulary
)

CURE = "Check the name on the Hugging Face Hub; without a network, give a folder written by save_pretrained"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def build_config(model_name: str, vocab_size: int, block_size: int, dropout: float = 0.1) -> PretrainedConfig:
    """The configuration `model_name` stands for: one of ours, a published model's, or that of a folder or Hub name.

    Ours get `block_size` positions; all get `vocab_size` tokens, or keep their own where it is 0. Needs the network for
    Hub names that are not in `PUBLISHED` alone. Raises ModelError where there is no such model.
    """
    from transformers import AutoConfig

    shape = CONFIGURATIONS.get(model_name) or PUBLISHED.get(model_name)
    if shape is None:
        config = _load(model_name, AutoConfig.from_pretrained, ["config.json"])
        config.vocab_size = vocab_size or config.vocab_size
    else:
        positions = block_size if model_name in CONFIGURATIONS else PUBLISHED_POSITIONS
        config = shape.config(vocab_size or PUBLISHED_VOCABULARY, positions)
    return _with_dropout(config, dropout)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the causal model of `config`, shared matrices once; takes no memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def output_vocabulary(model_name: str, tokenizer: PreTrainedTokenizerBase, from_scratch: bool) -> int:
    """Columns of the logits of the model that `load_model` gives: pretrained vocabularies may be padded."""
    return len(tokenizer) if from_scratch else build_config(model_name, 0, 0).vocab_size


def load_model(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    from_scratch: bool,
    dropout: float = 0.1,
    quantised: bool = False,
) -> PreTrainedModel:
    """A causal model in float32: pretrained, or with random weights drawn from torch's generator.

    `quantised` loads pretrained weights in 8 bits, of which only what stays unquantised (embeddings, norms) is trained.

    Raises ModelError where there is none of that name, it has fewer positions than `block_size`, or its vocabulary is
    not the tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model(model_name, from_scratch, block_size)
    if from_scratch:
        config = build_config(model_name, len(tokenizer), block_size, dropout)
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        config.pad_token_id = None
        return AutoModelForCausalLM.from_config(config)
    config = _with_dropout(_load(model_name, AutoConfig.from_pretrained, ["config.json"]), dropout)
    check_vocabulary(model_name, config.vocab_size, tokenizer)
    settings = {"quantization_config": eight_bits()} if quantised else {}
    return _load(model_name, AutoModelForCausalLM.from_pretrained, WEIGHTS, config=config, dtype="float32", **settings)


def eight_bits() -> BitsAndBytesConfig:
    """The setting that loads weights in 8 bits. Raises ModelError where bitsandbytes or a GPU is missing."""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not torch.cuda.is_available():
        raise ModelError("quantised needs a GPU, and there is none here. Set quantised to false.")
    if not is_bitsandbytes_available():
        raise ModelError("quantised needs bitsandbytes. Install it (pip install bitsandbytes), or set it to false.")
    return BitsAndBytesConfig(load_in_8bit=True)


def saved_model(run_folder: Path, which: str = "best") -> Path | None:
    """The folder of a run's model: the "best" by validation, or the "last", which also stands in for a best that a run
    that diverged does not have. None where there is neither."""
    folders = [run_folder / "model_best"] * (which == "best") + [run_folder / "model"]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load_trained(folder: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """The model in a folder, or of a Hub name, in evaluation mode, on the GPU where there is one.

    dtype: a torch type, or "auto" for the one its weights were saved in.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _load(str(folder), AutoModelForCausalLM.from_pretrained, WEIGHTS, dtype=dtype).to(device).eval()


def check_model(model_name: str, from_scratch: bool, block_size: int) -> None:
    """What can be known of a model before a kernel starts. Raises ModelError with cause and cure."""
    if model_name in CONFIGURATIONS and not from_scratch:
        raise ModelError(
            f"model_name {model_name!r} is a configuration and has no pretrained weights. Set from_scratch to true, "
            "or give the name or the folder of a pretrained model."
        )
    config = build_config(model_name, 0, block_size)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ModelError(
            f"block_size {block_size} is longer than the {positions} positions of {model_name!r}. "
            f"Prepare the data with block_size {positions} or less."
        )


def check_vocabulary(model_name: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """A pretrained model must have been trained with the tokenizer of the data. Raises ModelError."""
    cure = f"Prepare the data with tokenizer {model_name!r}, or train from scratch (from_scratch true)."
    if not len(tokenizer) <= vocab_size < len(tokenizer) + LARGEST_PADDING:
        raise ModelError(f"{model_name!r} has {vocab_size} tokens, the tokenizer of the data {len(tokenizer)}. {cure}")
    own = _own_tokenizer(model_name)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{model_name!r} and the tokenizer of the data have as many tokens, but other ones. {cure}")


def _own_tokenizer(model_name: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(model_name)
    except ModelError:  # a model folder need not hold a tokenizer; then sizes must do
        return None


def _with_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def _load(model_name: str, loader: Callable[..., Any], files: Sequence[str], **settings: Any) -> Any:
    """loader(folder, run or Hub name), of a run its last model.

    Raises ModelError with the cure where there is no such model or it cannot be read.
    """
    of_run = saved_model(resolve(model_name), "last")
    cure = _cure(model_name)
    place = locate(str(of_run or model_name), files, "model", cure)
    try:
        return loader(place.name, **place.settings, **settings)
    except (OSError, ValueError) as error:
        raise ModelError(unusable(model_name, "model", error, cure)) from error


def _cure(model_name: str) -> str:
    """The nearest name first, where one is near: it stands at the end of a long line, which may be cut."""
    near = get_close_matches(model_name, [*CONFIGURATIONS, *PUBLISHED], n=1)
    if near:
        return f"Did you mean {near[0]!r}? {CURE}."
    return f"{CURE}, or train one of our configurations from scratch: {', '.join(CONFIGURATIONS)}."


def head_matrices(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The modules that hold W and E. Refuses models whose logits are more than h Wᵀ, which the head would drop."""
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(output, "bias", None) is not None:
        raise ModelError(
            f"{model.config.model_type}: its output layer has a bias, which the chunked head does not add."
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{model.config.model_type}: the setting {name} changes the logits after the output matrix; "
                "the chunked head does not apply it. Choose a model without it."
            )
    return output, embeddings


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a model's weights; [] of a Hub model that is not on this machine yet, or of no model.

    Raises ModelError where some of several files are missing.
    """
    for name in WEIGHT_FILES:
        path = _file(folder, name)
        if path is None:
            continue
        if path.suffix != ".json":
            return [path]
        parts = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        files = {part: _file(folder, part) for part in sorted(parts)}
        missing = [part for part, file in files.items() if file is None]
        if missing:
            raise ModelError(f"The model in {folder} lacks {', '.join(missing)}. Save or download it again.")
        return list(files.values())
    return []


def _file(folder: str | Path, name: str) -> Path | None:
    """A file of a model folder, or of a Hub name in the local cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if resolve(str(folder)).is_dir():
        path = resolve(str(folder)) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(str(folder), name)
    except HFValidationError:  # no name the Hub could have
        return None
    return Path(cached) if isinstance(cached, str) else None
