"""What a teacher said, stored: near enough to the live teacher, made once, and never taken for another's."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, GPT2Config

from nbutils import places
from nbutils.batches import collate
from nbutils.chunks import RandomChunks
from nbutils.distillation_settings import check_cache
from nbutils.errors import ModelError, ParameterError, RunError
from nbutils.objectives import IGNORE_INDEX, UNLABELLED, ObjectiveModel, distillation, reference
from nbutils.packing import Blocks, load_blocks, save_blocks
from nbutils.preparation import PreparedData
from nbutils.teacher_cache import TeacherCache, WithTeacher, build_cache, building, open_cache
from nbutils.teacher_cache.exactness import exactness
from nbutils.teachers import LiveTeacher

VOCAB, BLOCK = 67, 12
LENGTHS = {"train": [7, 12, 3, 9, 5], "validation": [4, 10]}


def teacher_of(*seeds: int, width: int = 32, vocab: int = VOCAB) -> LiveTeacher:
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=vocab, n_positions=BLOCK, n_embd=width, n_layer=2, n_head=2)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model.lm_head.weight.mul_(15)  # a teacher with opinions
        models.append(model)
    return LiveTeacher(tuple(models))


def text(folder: Path, seed: int = 0) -> PreparedData:
    draw = np.random.default_rng(seed)
    for split, blocks in (("train", 9), ("validation", 4), ("test", 3)):
        ids = draw.integers(0, VOCAB, (blocks, BLOCK), dtype=np.int32)
        save_blocks(Blocks(ids, np.zeros_like(ids), 0), folder / split)
    return prepared(folder, {split: load_blocks(folder / split) for split in ("train", "validation", "test")}, "lm")


def questions(folder: Path) -> PreparedData:
    draw, blocks = np.random.default_rng(3), {}
    features = Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    for split, lengths in LENGTHS.items():
        ids = [draw.integers(0, VOCAB, length).tolist() for length in lengths]
        labels = [[UNLABELLED] * 2 + row[2:] for row in ids]
        blocks[split] = Dataset.from_dict({"input_ids": ids, "labels": labels}, features)
    return prepared(folder, blocks, "qa")


def prepared(folder: Path, blocks: dict[str, Dataset], task: str) -> PreparedData:
    card = {"fingerprint": f"data of {folder.name}", "vocab_size": VOCAB, "block_size": BLOCK, "task": task}
    return PreparedData(folder, card, None, blocks, None)


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    return teacher_of(1)


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    return text(tmp_path / "data")


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(places, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


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
    wanted = reference.distillation_over_top(logits, said.columns, said.log_probabilities, 2.0).sum()
    value, _ = step(student, batch)
    assert value == pytest.approx(wanted.item(), rel=1e-4)


def test_a_token_that_cannot_be_is_stored_as_a_number() -> None:
    from nbutils.objectives import TeacherStates
    from nbutils.teacher_cache.building import top_tokens

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


# ---- made once, and for one teacher and one corpus


def test_a_cache_is_found_again_and_keyed_by_all_that_decides_it(
    teacher: LiveTeacher, tmp_path: Path, data: PreparedData
) -> None:
    first = build_cache(teacher, data, "topk", 2.0, 5, batch_size=4)
    assert build_cache(teacher, data, "topk", 2.0, 5, batch_size=2).card == first.card
    others = [
        build_cache(teacher_of(2), data, "topk", 2.0, 5, batch_size=4),
        build_cache(teacher, text(tmp_path / "others", 1), "topk", 2.0, 5, batch_size=4),
        build_cache(teacher, data, "topk", 1.0, 5, batch_size=4),
        build_cache(teacher, data, "topk", 2.0, 6, batch_size=4),
        build_cache(teacher, data, "hidden", 2.0, 5, batch_size=4),
    ]
    assert len({cache.folder for cache in [first, *others]}) == 6
    assert build_cache(teacher, data, "hidden", 1.0, 9, batch_size=4).folder == others[-1].folder  # neither counts


def test_a_cache_of_another_teacher_or_of_other_data_is_refused(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    mine, theirs = teacher.fingerprint(), teacher_of(2).fingerprint()
    assert open_cache(cache.folder, mine, "data of data").card == cache.card
    told = rf"another teacher: .* GPT2LMHeadModel \(fingerprint {mine[:12]}\), and this run's .* {theirs[:12]}\. Leave"
    with pytest.raises(RunError, match=told):
        open_cache(cache.folder, theirs, "data of data")
    with pytest.raises(RunError, match=r"another data: .*data \(fingerprint data of dat.* has the fingerprint others"):
        open_cache(cache.folder, mine, "others")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "cache.json").write_text("{"), "is no teacher's cache: cache.json is missing or dam"),
        (lambda folder: (folder / "heads.safetensors").write_bytes(b"1"), "heads.safetensors is missing or damaged"),
        (lambda folder: os.truncate(folder / "train" / "teacher_hidden_0.npy", 900), "hidden_0.npy is missing or dam"),
        (lambda folder: (folder / "validation" / "offsets.npy").unlink(), "offsets.npy is missing or damaged"),
        (
            lambda folder: np.save(folder / "train" / "teacher_hidden_0.npy", np.zeros((5, 32), np.float16)),
            r"holds \(5, 32\) numbers of float16, and cache.json says \(108, 32\)",
        ),
        (
            lambda folder: (folder / "cache.json").write_text(json.dumps({"format": 0})),
            "has format 0, and 2 is read here",
        ),
    ],
    ids=["card", "heads", "torn", "missing", "size", "format"],
)
def test_a_damaged_cache_is_refused_and_made_anew(harm, told: str, teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    before = cache.stored("train", 0, 108)["teacher_hidden_0"].copy()
    shutil.copytree(cache.folder, damaged := cache.folder.with_name("copy"))
    harm(damaged)
    with pytest.raises(RunError, match=told + r"(.|\n)*Delete the folder and run again"):
        open_cache(damaged, teacher.fingerprint(), "data of data")
    shutil.rmtree(cache.folder)
    damaged.rename(cache.folder)
    again = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    assert (again.stored("train", 0, 108)["teacher_hidden_0"] == before).all()


class WatchedTeacher(LiveTeacher):
    """Writes a line for each batch it is run on, slowly; with `dies_at`, kills its process there."""

    def target(self, input_ids, stored):
        log = Path(os.environ["WATCHED"])
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(log.read_text().split()) == int(os.environ.get("DIES_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return super().target(input_ids, stored)


def watched_build(runs: Path, folder: Path, log: Path, dies_at: int) -> TeacherCache:
    """A build that can be seen from outside; what a process of its own is started with."""
    os.environ |= {"WATCHED": str(log), "DIES_AT": str(dies_at)}
    torch.set_num_threads(1)
    places.RUNS = runs
    data = prepared(folder, {split: load_blocks(folder / split) for split in ("train", "validation")}, "lm")
    return build_cache(WatchedTeacher(teacher_of(1).models), data, "hidden", 2.0, 0, batch_size=1)


@pytest.mark.parametrize("dies_at", [-1, 6], ids=["one builds", "one is killed"])
def test_while_another_process_builds_the_cache_is_waited_for(
    dies_at: int, runs: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WATCHED", "DIES_AT"):
        monkeypatch.setenv(name, "")  # as they were, afterwards
    log, caches = runs.parent / "batches.log", runs / "teacher_cache"
    other = multiprocessing.get_context("spawn").Process(target=watched_build, args=(runs, data.folder, log, dies_at))
    other.start()
    while not log.is_file():
        time.sleep(0.02)
    assert [path.name for path in caches.iterdir() if not path.name.startswith(".")] == []  # half a cache is none
    cache = watched_build(runs, data.folder, log, -1)
    other.join()
    assert other.exitcode == (0 if dies_at < 0 else -signal.SIGKILL)
    runners = log.read_text().split()  # a line for each block of train and validation that the teacher was run on
    ours = runners.count(str(os.getpid()))
    assert (ours, len(runners) - ours) == ((0, 13) if dies_at < 0 else (13, 6))
    assert list((caches / ".making").iterdir()) == []
    whole = cache.stored("train", 0, 108)["teacher_hidden_0"]
    assert np.isfinite(whole).all()
    assert (np.abs(whole).sum(-1) > 0).all()


# ---- what cannot be


def test_disk_and_rights_are_told_and_nothing_stays(
    teacher: LiveTeacher, data: PreparedData, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
        with pytest.raises(RunError, match=r"disk is full: .* needs \d+ MiB, 0 MiB are free. Free space .* topk"):
            build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    with monkeypatch.context() as patch:  # the disk fills while the files are written
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(building.os, "fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(RunError, match="disk is full"):
            build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    assert [path.name for path in (runs / "teacher_cache").iterdir() if path.name[0] != "."] == []
    assert list((runs / "teacher_cache" / ".making").iterdir()) == []
    shutil.rmtree(runs)
    runs.write_text("a file in the folder's place")
    with pytest.raises(RunError, match=r"cannot be written \(.+\)\. Mend the folder's permissions, or set teacher_cac"):
        build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)


def test_hidden_states_beyond_float16_are_refused(data: PreparedData) -> None:
    loud = teacher_of(1)
    loud.models[0].transformer.ln_f.weight.fill_(1e6)
    with pytest.raises(ModelError, match=r"hidden states reach [\d.e+]+, and float16 ends at 65504. Set teacher_cache"):
        build_cache(loud, data, "hidden", 2.0, 0, batch_size=4)


def test_settings_that_cannot_be(teacher: LiveTeacher, data: PreparedData) -> None:
    with pytest.raises(ParameterError, match=r"teacher_cache is 'hiden'. Did you mean 'hidden'"):
        check_cache("hiden")
    with pytest.raises(ParameterError, match=r"divergence reverse needs .* every token.* Set teacher_cache to hidden"):
        check_cache("topk", "reverse", 8)
    with pytest.raises(ParameterError, match="cache_top_k is 0; give the number of tokens"):
        check_cache("topk", top_k=0)
    with pytest.raises(ParameterError, match="cache_top_k is 68, and teacher and data share 67 tokens"):
        build_cache(teacher, data, "topk", 2.0, VOCAB + 1, batch_size=4)
    check_cache("hidden", "reverse")


def test_a_padded_vocabulary_is_cut_to_the_tokens_of_the_data(data: PreparedData) -> None:
    padded = teacher_of(1, vocab=80)
    padded.models[0].lm_head.weight[VOCAB:] = 9 * padded.models[0].lm_head.weight[:13]  # loud entries nobody has
    cache = build_cache(padded, data, "topk", 2.0, 5, batch_size=4)
    assert cache.stored("train", 0, 108)["teacher_columns"].max() < VOCAB
    found = exactness(cache, padded, student_of(cache), data)
    assert math.isfinite(found["teacher_cache_context_kl"])


def test_the_matrices_alone_stay_in_memory(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    assert isinstance(cache, TeacherCache)
    (weight,) = cache.to("cpu").weights
    assert weight.dtype == torch.float32
    assert torch.equal(weight, teacher.models[0].lm_head.weight)
