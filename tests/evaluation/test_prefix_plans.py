"""The plans of the prefix study: what they hold, what they cost, and what `check` says of their cells.

python -m pytest tests/test_prefix_plans.py
"""

import pytest

from nbutils.batch.cost import estimate
from nbutils.batch.listing import plan_listing
from nbutils.batch.preflight import remarks
from nbutils.data.tokenization import character_tokenizer
from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.foundation.places import PARAMS
from nbutils.models.loading import build_config, count_parameters, load_model
from nbutils.runs.plans import load_plan

LLAMA3 = 473_860_608  # by the formula of each matrix: test_models counts our other shapes


def test_the_llama_3_style_model_is_the_studys():
    config = build_config("llama3-474m", 128_256, 2048)
    width, mlp, layers = 1536, 4096, 11
    layer = 2 * width * width + 2 * width * (4 * 128) + 3 * width * mlp + 2 * width
    assert count_parameters(config) == 128_256 * width + layers * layer + width == LLAMA3
    assert config.rope_parameters["rope_theta"] == 1e6 and config.rms_norm_eps == 1e-5
    assert (config.max_position_embeddings, config.num_key_value_heads) == (2048, 4)
    assert config.tie_word_embeddings


def test_begin_and_end_are_the_tokenizers():
    tokenizer = character_tokenizer(["abc"])
    config = load_model("llama3-micro", tokenizer, 16, from_scratch=True).config
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id
    tokenizer.bos_token = "a"
    config = load_model("llama3-micro", tokenizer, 16, from_scratch=True).config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_real_plan_is_priced_without_a_network():
    """By hand: 6 N + 12 L d T FLOPs a token, 16 bytes a parameter and 34 an activation."""
    plan = load_plan(PARAMS / "prefix.yaml")
    runs = [variant for variant in plan.variants if variant.stage == "prefix"]
    assert len(runs) == 65
    cost = estimate(runs[0], plan, "H100", 0.4)
    assert cost.parameters == LLAMA3
    assert cost.tokens == 19_073 * 8 * 4 * 8 * 2048 == 9_999_745_024
    assert cost.flops == pytest.approx(cost.tokens * (6 * LLAMA3 + 12 * 11 * 1536 * 2048))
    assert cost.hours == pytest.approx(cost.flops / (989e12 * 0.4) / 3600)
    assert cost.memory == 16 * LLAMA3 + 34 * 8 * 2048 * 1536 * 11
    assert len({variant.params["max_steps"] for variant in runs}) == 1, "every arm gets the same budget"


def test_check_names_the_cells_that_do_not_smooth_and_those_that_only_do():
    lines = remarks(load_plan(PARAMS / "prefix.yaml"))
    assert [line.split(" equals")[0] for line in lines if "A/A null" in line] == [
        "prefix: smoothing unnormalised, tau 0.05 (5 runs)",
        "prefix: smoothing unnormalised, tau 0.1 (1 run)",
    ]
    assert sum("cannot be taken out again" in line for line in lines) == 3
    assert remarks(load_plan(PARAMS / "quick-prefix.yaml"))[0].endswith("an A/A null, whose effect is the noise floor.")
    listing = plan_listing(load_plan(PARAMS / "quick-prefix.yaml"), "A100", 0.4)
    assert "tau 0.05 (3 runs) equals plain cross entropy" in listing


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("smoothing: normalized", "Did you mean 'normalised'"),
        ("tau: 0.0", "'tau' must be > 0"),
        ("eps: 1.5", "eps"),
        ("smoothed_over: prefix", "Did you mean 'prefixes'"),
        ("tasks: [hellaswog]", "Did you mean 'hellaswag'"),
        ("tasks: [piqa], tasks_folder: nowhere", "no folder nowhere"),
    ],
)
def test_mistakes_are_told_before_a_kernel_starts(tmp_path, changed, words):
    text = f"name: p\nstages:\n  - {{name: prefix, notebook: 05_prefix_smoothing, params: {{{changed}}}}}\n"
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ParameterError, match=words):
        plan_listing(load_plan(tmp_path / "p.yaml"), "A100", 0.4)


def test_blocks_longer_than_a_models_positions_are_refused(tmp_path):
    config = build_config("llama3-micro", 50, 64)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="block_size 128 is longer than the 64 positions"):
        load_model(str(tmp_path), character_tokenizer(["abc"]), 128, from_scratch=True)
