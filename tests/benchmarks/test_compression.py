"""Compression: sizes and speeds of teacher and student.

python -m pytest tests/benchmarks/test_compression.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_words import WORDS

from nbutils.benchmarks.throughput import (
    NUMBERS,
    SavedModel,
    Workload,
    bytes_on_disk,
    compression_numbers,
    sizes_and_speeds,
)
from nbutils.foundation.errors import ModelError
from nbutils.models.loading import load_model

SHORT = Workload(prompts=2, prompt_tokens=5, new_tokens=4, rounds=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher (tiny) and a student (micro), 24 and 16 positions."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name, size, positions in (("teacher", "tiny", 24), ("student", "micro", 16)):
        load_model(size, WORDS, positions, from_scratch=True).save_pretrained(root / name)
    return root


def test_the_table_of_two_folders(folders):
    table = sizes_and_speeds([folders / "teacher", str(folders / "student")], SHORT)
    for name, (_, row) in zip(("teacher", "student"), table.iterrows(), strict=True):
        stored = load_file(folders / name / "model.safetensors")  # shared matrices are stored once
        assert row["parameters"] == sum(each.numel() for each in stored.values())
        assert row["bytes_on_disk"] == (folders / name / "model.safetensors").stat().st_size
    assert (table[["generation_tokens_per_second", "scoring_tokens_per_second"]] > 0).all().all()


def test_the_numbers_of_a_run(folders):
    student = load_model(str(folders / "student"), WORDS, 16, from_scratch=False).train()
    before = torch.random.get_rng_state()
    numbers = compression_numbers([folders / "teacher"], SavedModel(folders / "student", student), SHORT)
    assert numbers.keys() == {*NUMBERS, *(f"teacher_{name}" for name in NUMBERS)}
    assert numbers["parameters"] == student.num_parameters() < numbers["teacher_parameters"]
    assert numbers["bytes_on_disk"] < numbers["teacher_bytes_on_disk"]
    assert student.training and torch.equal(before, torch.random.get_rng_state())
    assert json.loads(json.dumps(numbers)) == numbers


def test_speed_is_tokens_over_seconds_and_no_end_token_stops_it(folders, monkeypatch):
    model = load_model(str(folders / "student"), WORDS, 16, from_scratch=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[WORDS.eos_token_id] * 100)
    shapes, sides = [], []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: shapes.append(generate(*a, **k).shape) or shapes[-1])

    def timed(steps, rounds):
        sides.append((list(steps), rounds))
        for step in steps.values():
            step()
        return {0: 2.0, 1: 0.5}

    monkeypatch.setattr("nbutils.benchmarks.throughput.interleaved", timed)
    models = [folders / "teacher", SavedModel(folders / "student", model)]
    table = sizes_and_speeds(models, Workload(prompts=3, prompt_tokens=100, new_tokens=100, rounds=7))
    assert sides == [([0, 1], 7)] * 2  # in turns, so that a busy machine slows both
    assert shapes == [(3, 16)]  # 8 tokens and 8 new ones: the student has 16 positions, and all do the same
    assert table["generation_tokens_per_second"].tolist() == [3 * 8 / 2.0, 3 * 8 / 0.5]
    assert table["scoring_tokens_per_second"].tolist() == [3 * 8 / 2.0, 3 * 8 / 0.5]


def test_weights_in_parts_are_added_up(folders, tmp_path):
    model = load_model(str(folders / "teacher"), WORDS, 16, from_scratch=False)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    parts = list(tmp_path.glob("model-*.safetensors"))
    (tmp_path / "optimizer.bin").write_bytes(b"x" * 1000)
    assert len(parts) > 1
    assert bytes_on_disk(tmp_path) == sum(part.stat().st_size for part in parts)
    parts[0].unlink()
    with pytest.raises(ModelError, match=rf"lacks {parts[0].name}. Save or download it again"):
        bytes_on_disk(tmp_path)


def test_a_hub_model_is_found_in_the_cache(tmp_path, monkeypatch):
    weights = tmp_path / "blob"
    weights.write_bytes(b"x" * 123)
    cached = {("some/model", "model.safetensors"): str(weights)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: cached.get((name, file)))
    assert bytes_on_disk("some/model") == 123


@pytest.mark.parametrize("name", ["nothing-here", "no/such/folder"])
def test_a_folder_without_weights_is_named(tmp_path, name):
    for folder in (tmp_path, name):
        with pytest.raises(ModelError, match=rf"{folder} holds no weights .* Give a folder written by save_pretrained"):
            bytes_on_disk(folder)
    with pytest.raises(ModelError, match=r"is not a model folder"):
        sizes_and_speeds([tmp_path])
