"""Models: sizes of published ones, what is refused and how it is said, samples.

python -m pytest tests/test_models.py
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_words import WORDS, tokenizer
from transformers import AutoModelForCausalLM

from nbutils.evaluation.generation import sample_continuations
from nbutils.foundation.errors import ModelError, UnreachableModelError
from nbutils.models.loading import build_config, check_model, count_parameters, head_matrices, load_model
from nbutils.models.teachers import check_teacher


@pytest.mark.parametrize(
    "name, published",
    [("distilgpt2", 81_912_576), ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080)],
)
def test_sizes_of_published_models(name, published):
    assert count_parameters(build_config(name, 0, 1024)) == published


def test_the_small_configuration_has_10_to_20_million_parameters_with_gpt2s_vocabulary():
    assert 10e6 < count_parameters(build_config("small", 50257, 512)) < 20e6


@pytest.mark.parametrize(
    ("name", "millions"),  # as their names and papers say, with their vocabulary of 16,000
    [("babyllama-58m", 58), ("babyllama-gpt2-705m", 705), ("babyllama-llama-360m", 360), ("smolllama-345m", 345)],
)
def test_the_shapes_of_published_studies_have_the_parameters_they_are_named_after(name, millions):
    assert round(count_parameters(build_config(name, 16_000, 128)) / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", ["micro", "tiny", "small", "study", "babyllama-58m"])
def test_configurations_run(name):
    torch.manual_seed(0)
    model = load_model(name, WORDS, 16, from_scratch=True)
    assert model(torch.zeros(1, 16, dtype=torch.long)).logits.shape == (1, 16, 50)
    assert model.config.eos_token_id == WORDS.eos_token_id


def test_weights_from_scratch_follow_torchs_seed():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(next(load_model("micro", WORDS, 16, from_scratch=True).parameters()))
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_a_saved_model_is_loaded_with_its_weights_and_the_wanted_dropout(tmp_path):
    model = load_model("micro", WORDS, 16, from_scratch=True)
    model.save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), WORDS, 16, from_scratch=False, dropout=0.25)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.config.resid_pdrop == loaded.transformer.h[0].mlp.dropout.p == 0.25


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(tmp_path):
    load_model("micro", WORDS, 16, from_scratch=True).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"has 50 tokens, the tokenizer of the data 60.*Prepare the data with tokenizer"
    ):
        load_model(str(tmp_path), tokenizer([f"w{i}" for i in range(60)]), 16, from_scratch=False)
    WORDS.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="as many tokens, but other ones"):
        load_model(str(tmp_path), tokenizer([f"v{i}" for i in range(50)]), 16, from_scratch=False)


def test_a_padded_vocabulary_is_accepted(tmp_path):
    AutoModelForCausalLM.from_config(build_config("micro", 64, 16)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), WORDS, 16, from_scratch=False).config.vocab_size == 64


@pytest.mark.parametrize(
    "name, from_scratch, block_size, message",
    [
        ("micro", False, 16, "is a configuration and has no pretrained weights. Set from_scratch to true"),
        ("distilgpt2", True, 2048, "block_size 2048 is longer than the 1024 positions of 'distilgpt2'"),
        ("./nowhere", True, 16, r"is not a model folder, it has none of config.json"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(name, from_scratch, block_size, message):
    with pytest.raises(ModelError, match=message):
        check_model(name, from_scratch, block_size)


def test_an_unknown_name_without_a_network_names_the_local_cure(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    cause = r"^The model '{}' cannot be loaded \(Name or service not known\)\. "
    cure = "Check the name on the Hugging Face Hub; without a network, give a folder written by save_pretrained"
    near = cause.format("distil-gpt-2") + rf"Did you mean 'distilgpt2'\? {cure}\.$"
    with pytest.raises(UnreachableModelError, match=near):
        check_model("distil-gpt-2", True, 16)
    far = cause.format("nowhere") + f"{cure}, or train one of our configurations from scratch: micro, tiny, "
    with pytest.raises(UnreachableModelError, match=far):
        check_model("nowhere", True, 16)
    with pytest.raises(UnreachableModelError, match=r"^The teacher cannot be used\. The model 'nowhere' cannot"):
        check_teacher("nowhere", 16)


def test_a_model_in_the_hubs_cache_is_used_without_a_network(tmp_path, monkeypatch):
    """A cache as the Hub's client lays it out, under the model's real name."""
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    load_model("micro", WORDS, 16, from_scratch=True).save_pretrained(snapshot)
    WORDS.save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert load_model("someone/tiny", WORDS, 16, from_scratch=False).config.vocab_size == 50


def test_logits_that_are_more_than_a_product_are_refused():
    model = load_model("micro", WORDS, 16, from_scratch=True)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping changes the logits"):
        head_matrices(model)
    model.config.final_logit_softcapping = None
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(50))
    with pytest.raises(ModelError, match="output layer has a bias"):
        head_matrices(model)


def test_samples_have_the_same_prompts_for_every_model_and_repeat():
    tokens = np.random.default_rng(0).integers(1, 50, (9, 16)).astype(np.int32)
    blocks = Dataset.from_dict({"input_ids": tokens.tolist(), "document_ids": (tokens * 0 + 3).tolist()})
    torch.manual_seed(0)
    models = [load_model("micro", WORDS, 16, from_scratch=True) for _ in range(2)]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (sample_continuations(m, WORDS, blocks, number=3) for m in (models[0], models[0], models[1]))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again
    assert (
        [s["prompt"] for s in first] == [s["prompt"] for s in other] == [WORDS.decode(tokens[i, :8]) for i in (0, 4, 8)]
    )
    assert [s["reference"] for s in first] == [WORDS.decode(tokens[i, 8:]) for i in (0, 4, 8)]
    assert [s["completion"] for s in first] != [s["completion"] for s in other]
    assert all(s["document"] == 3 for s in first)


def test_no_samples_are_asked_of_a_model_that_diverged_or_when_none_are_wanted(caplog):
    tokens = np.ones((2, 16), np.int32)
    blocks = Dataset.from_dict({"input_ids": tokens.tolist(), "document_ids": tokens.tolist()})
    model = load_model("micro", WORDS, 16, from_scratch=True)
    assert sample_continuations(model, WORDS, blocks, number=0) == []
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)
    assert sample_continuations(model, WORDS, blocks, number=2) == []
    assert "it diverged" in caplog.text
