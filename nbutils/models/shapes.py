"""Shapes of models: our own configurations, those of published studies, and those of models on the Hugging Face Hub.

They stand here so that costs can be estimated and models be made from scratch with no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Shape:
    """Width, layers and heads of a GPT-2 or, with an `intermediate` width, a Llama style model."""

    width: int
    layers: int
    heads: int
    intermediate: int = 0
    key_value_heads: int = 0  # 0: as many as heads
    tied: bool = False  # Llama style: the output matrix is the embedding matrix, as it always is in GPT-2
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6

    def config(self, vocab_size: int, positions: int) -> PretrainedConfig:
        """The transformers configuration; the end token is the tokenizer's, set where there is one."""
        from transformers import GPT2Config, LlamaConfig

        common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
        if not self.intermediate:
            sizes = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads}
            return GPT2Config(**common, **sizes, n_positions=positions)
        return LlamaConfig(
            **common,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_epsilon,
        )


# Random weights only
CONFIGURATIONS = {
    "micro": Shape(64, 2, 2),  # for tests and the quick plan
    "tiny": Shape(128, 4, 4),  # nanoGPT's setting for a CPU: 0.8 M parameters without its vocabulary
    "small": Shape(256, 6, 8),  # 4.7 M without its vocabulary, 17.6 M with GPT-2's
    "study": Shape(512, 4, 8),  # the cosine study's own model from scratch
    # Llama 3's style (arXiv 2407.21783), its vocabulary's 197 M of 474 M parameters shared by input and output
    "llama3-474m": Shape(1536, 11, 12, 4096, 4, tied=True, rope_theta=1e6, norm_epsilon=1e-5),
    "llama3-micro": Shape(64, 2, 4, 176, 2, tied=True, rope_theta=1e6, norm_epsilon=1e-5),  # the same at a small size
    "babyllama-58m": Shape(512, 16, 8, intermediate=1024),  # BabyLlama's student (arXiv 2308.02019)
    "babyllama-gpt2-705m": Shape(1536, 24, 16),  # its teachers
    "babyllama-llama-360m": Shape(1024, 24, 8, intermediate=3072),
    "smolllama-345m": Shape(960, 32, 15, intermediate=2560, key_value_heads=5),  # BabyLlama-2 (arXiv 2409.17312)
}
# Models whose weights the Hugging Face Hub has
PUBLISHED = {
    "distilgpt2": Shape(768, 6, 12),
    "gpt2": Shape(768, 12, 12),
    "gpt2-medium": Shape(1024, 24, 16),
    "gpt2-large": Shape(1280, 36, 20),
    "gpt2-xl": Shape(1600, 48, 25),
}
PUBLISHED_VOCABULARY, PUBLISHED_POSITIONS = 50257, 1024
# Tokens of the tokenizers on the Hub that our plans name
TOKENIZERS = dict.fromkeys(PUBLISHED, PUBLISHED_VOCABULARY) | {"meta-llama/Meta-Llama-3-8B": 128256}
