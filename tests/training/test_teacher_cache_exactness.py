"""What a teacher said, stored: near enough to the live teacher, and served from its own positions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_teachers import BLOCK, LENGTHS, VOCAB, questions, teacher_of, text

from nbutils.data.batches import IGNORE_INDEX, RandomChunks, collate
from nbutils.data.preparation import PreparedData
from nbutils.foundation.errors import RunError
from nbutils.models.teacher_cache import WithTeacher, build_cache
from nbutils.models.teacher_cache.building import top_tokens
from nbutils.models.teacher_target import TeacherStates
from nbutils.models.teachers import LiveTeacher
from nbutils.objectives import ObjectiveModel, distillation
from nbutils.objectives.terms.distillation import distillation_over_top as textbook_distillation_over_top
from nbutils.training.cache_exactness import exactness

pytestmark = pytest.mark.usefixtures("own_runs")


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    return teacher_of(1)


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    return text(tmp_path / "data")


def student_of(teacher, temperature: float = 2.0, positions: str = "all") -> ObjectiveModel:
    return ObjectiveModel(
        teacher_of(7, width=16).models[0], distillation(positions=positions, temperature=temperature), teacher
    )


def rows_of(data: PreparedData, split: str = "train"):
    return data.blocks[split].with_format(
        "numpy", columns=[n for n in ("input_ids", "labels") if n in data.blocks[split].column_names]
    )


def step(student: ObjectiveModel, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The distillation term's sum over a batch, and all gradients of the student in one row."""
    student.model.requires_grad_(True).zero_grad()
    counts = {"ce": torch.tensor(1), "kl": torch.tensor(1)}
    out = student(batch.pop("input_ids"), batch.pop("labels"), counts, **batch)
    out["loss"].backward()
    return out["kl"].item(), torch.cat([p.grad.flatten() for p in student.model.parameters()])


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- exactness


@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["one teacher", "two teachers"])
def test_a_student_of_hidden_states_learns_what_the_live_teacher_would_teach(seeds, data: PreparedData) -> None:
    live = teacher_of(*seeds)
    cache = build_cache(live, data, "hidden", 2.0, 0, batch_size=4)
    batch = collate(WithTeacher(rows_of(data), cache, "train").__getitems__([5, 0, 8]))
    said = cache.target(batch["input_ids"], batch)
    assert len(said.hidden) == len(seeds)
    plain = {name: batch[name] for name in ("input_ids", "labels")}
    value, gradient = step(student_of(cache), batch)
    wanted, wanted_gradient = step(student_of(live), plain)
    assert abs(value - wanted) / wanted < 1e-3
    assert difference(gradient, wanted_gradient) < 1e-3


def test_with_every_token_kept_top_k_is_the_live_teacher(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "topk", 2.0, VOCAB, batch_size=4)
    rows = rows_of(data)
    value, gradient = step(student_of(cache), collate(WithTeacher(rows, cache, "train").__getitems__([1, 4])))
    wanted, wanted_gradient = step(student_of(teacher), collate([rows[1], rows[4]]))
    assert value == pytest.approx(wanted, rel=2e-3)
    assert difference(gradient, wanted_gradient) < 2e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_stores_averaged_logits_at_the_temperature_and_the_mass_of_all_others(
    temperature: float, data: PreparedData
) -> None:
    live = teacher_of(1, 2)
    cache = build_cache(live, data, "topk", temperature, 5, batch_size=2)
    blocks = torch.from_numpy(rows_of(data, "train")[:]["input_ids"].astype(np.int64))
    logits = sum(model(blocks).logits.double() for model in live.models).flatten(0, 1) / 2  # the models' own head
    p = (logits / temperature).softmax(-1)
    top, columns = p.topk(5)
    stored = cache.stored("train", 0, len(p))
    assert (stored["teacher_columns"] == columns.numpy()).all()
    assert stored["teacher_columns"].dtype == np.uint16
    log_probabilities = torch.from_numpy(stored["teacher_log_probabilities"].astype(np.float64))
    wanted = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(log_probabilities, wanted.log(), rtol=1e-3, atol=1e-4)
    assert log_probabilities.exp().sum(-1).sub(1).abs().max() < 5e-3
    assert set(cache.stored("test", 0, 1)) == {"teacher_hidden_0", "teacher_hidden_1"}  # judged at any temperature


def test_the_term_over_top_tokens_is_the_textbook_s(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "topk", 2.0, 6, batch_size=4)
    batch = collate([WithTeacher(rows_of(data), cache, "train")[2]])
    student = student_of(cache)
    said = cache.target(batch["input_ids"], batch).rows(torch.arange(BLOCK))
    logits = student.model(batch["input_ids"]).logits[0]
    wanted = textbook_distillation_over_top(logits, said.columns, said.log_probabilities, 2.0).sum()
    value, _ = step(student, batch)
    assert value == pytest.approx(wanted.item(), rel=1e-4)


def test_a_token_that_cannot_be_is_stored_as_a_number() -> None:
    sure = TeacherStates((torch.eye(3)[:1],), (torch.tensor([[900.0, 0, 0], [0, 0, 0], [-900, 0, 0]]),))
    said = top_tokens(sure, 3, 3, 1.0)
    assert said.log_probabilities.isfinite().all()
    assert said.log_probabilities.float().exp().tolist() == [[1, 0, 0, 0]]


def test_exactness_is_reported(teacher: LiveTeacher, data: PreparedData) -> None:
    hidden = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    found = exactness(hidden, teacher, student_of(hidden), data)
    assert 0 < found["teacher_cache_kl_error"] < 1e-3
    assert 0 < found["teacher_cache_gradient_error"] < 1e-3
    assert found["teacher_cache_bytes_per_token"] == 2 * 32
    assert found["teacher_cache_seconds"] > 0
    top = build_cache(teacher, data, "topk", 2.0, 4, batch_size=4)
    less = exactness(top, teacher, student_of(top), data)
    assert less["teacher_cache_bytes_per_token"] == 4 * 2 + 5 * 2
    assert less["teacher_cache_gradient_error"] > 10 * found["teacher_cache_gradient_error"]
    assert 0 < less["teacher_cache_context_kl"] < found["teacher_cache_context_kl"]  # bins hide a part of it


def test_what_another_context_changes_is_the_divergence_from_the_chunk_s_own(
    teacher: LiveTeacher, data: PreparedData
) -> None:
    """One chunk, in the middle of blocks 0 and 1, by the models' own logits."""
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    blocks = torch.from_numpy(rows_of(data)[:2]["input_ids"].astype(np.int64))
    half = BLOCK // 2
    model = teacher.models[0]
    live = (model(blocks.flatten()[half : half + BLOCK][None]).logits[0] / 2).softmax(-1)
    stored = (model(blocks).logits.flatten(0, 1)[half : half + BLOCK] / 2).softmax(-1)
    wanted = (live * (live / stored).log()).sum(-1).mean().item()
    found = exactness(cache, teacher, student_of(cache), data, examples=1)
    assert found["teacher_cache_context_kl"] == pytest.approx(wanted, rel=1e-2)


# ---- positions


def test_random_chunks_are_served_from_their_positions(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    whole = cache.stored("train", 0, 9 * BLOCK)["teacher_hidden_0"]
    chunks = RandomChunks(data.blocks["train"], BLOCK, seed=5)
    rows = WithTeacher(chunks, cache, "train")
    for epoch in (0, 1):
        rows.set_epoch(epoch)  # as the data loader does
        assert chunks.epoch == epoch
        for index, item in enumerate(rows.__getitems__(range(len(rows)))):
            start = chunks.position(index)
            assert (item["teacher_hidden_0"] == whole[start : start + BLOCK]).all()
            assert (item["input_ids"] == chunks.tokens(start)).all()
    batch = collate([rows[0], rows[1]])
    assert cache.target(batch["input_ids"], batch).hidden[0].shape == (2 * BLOCK, 32)


def test_answers_of_any_length_are_served_and_their_padding_scores_nothing(
    teacher: LiveTeacher, tmp_path: Path
) -> None:
    data = questions(tmp_path / "questions")
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=3)
    rows = WithTeacher(rows_of(data), cache, "train")
    assert [len(row["teacher_hidden_0"]) for row in rows] == LENGTHS["train"]
    batch = collate(rows.__getitems__([2, 0, 1]))
    assert (batch["labels"][0, 3:] == IGNORE_INDEX).all()
    live = collate([rows_of(data)[index] for index in (2, 0, 1)])
    value, gradient = step(student_of(cache), batch)
    wanted, wanted_gradient = step(student_of(teacher), live)
    assert value == pytest.approx(wanted, rel=1e-3)
    assert difference(gradient, wanted_gradient) < 1e-3
    found = exactness(cache, teacher, student_of(cache, positions="answers"), data)
    assert found["teacher_cache_gradient_error"] < 1e-3
    assert "teacher_cache_context_kl" not in found


def test_the_cache_is_mapped_and_not_loaded(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    item = WithTeacher(rows_of(data), cache, "train")[3]["teacher_hidden_0"]
    assert isinstance(item.base, np.memmap) or isinstance(item.base.base, np.memmap)
    assert np.shares_memory(item, cache.arrays["train"]["teacher_hidden_0"])
    assert item.dtype == np.float16
    assert set(cache.arrays) == {"train", "validation", "test"}
    assert not hasattr(cache, "models")


def test_what_the_cache_does_not_hold_is_told(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    with pytest.raises(RunError, match=r"said on train and validation and test, and nothing of other. Use the"):
        cache.stored("other", 0, BLOCK)
    with pytest.raises(RunError, match=r"Positions 100 to 112 .* has 108. It is a cache of other data"):
        cache.stored("train", 100, BLOCK)
    with pytest.raises(RunError, match="does not hold these 3 train examples: it was made of 9"):
        WithTeacher(rows_of(data).select(range(3)), cache, "train")[0]
    with pytest.raises(RunError, match=r"brings no teacher_hidden_0 of that shape .* WithTeacher"):
        cache.target(torch.zeros(1, BLOCK, dtype=torch.long), {})


def test_a_padded_vocabulary_is_cut_to_the_tokens_of_the_data(data: PreparedData) -> None:
    padded = teacher_of(1, vocab=80)
    padded.models[0].lm_head.weight[VOCAB:] = 9 * padded.models[0].lm_head.weight[:13]  # loud entries nobody has
    cache = build_cache(padded, data, "topk", 2.0, 5, batch_size=4)
    assert cache.stored("train", 0, 108)["teacher_columns"].max() < VOCAB
    found = exactness(cache, padded, student_of(cache), data)
    assert math.isfinite(found["teacher_cache_context_kl"])
