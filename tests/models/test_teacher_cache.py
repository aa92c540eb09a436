"""What a teacher said, stored: made once, waited for, and never taken for another's."""

from __future__ import annotations

import errno
import json
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
from small_teachers import VOCAB, prepared, teacher_of, text

from nbutils.data.packing import load_blocks
from nbutils.data.preparation import PreparedData
from nbutils.foundation import places
from nbutils.foundation.errors import ModelError, ParameterError, RunError
from nbutils.models.teacher_cache import TeacherCache, build_cache, building, open_cache
from nbutils.models.teachers import LiveTeacher, check_cache

pytestmark = pytest.mark.usefixtures("own_runs")


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    return teacher_of(1)


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    return text(tmp_path / "data")


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
    """Writes a line for each batch and goes on, slowly, once it may; with `DIES_AT`, kills its process there."""

    def target(self, input_ids, stored):
        log = Path(os.environ["WATCHED"])
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(log.read_text().split()) == int(os.environ.get("DIES_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        while not log.with_suffix(".go").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        return super().target(input_ids, stored)


def watched_build(runs: Path, folder: Path, log: Path, dies_at: int) -> TeacherCache:
    """A build that can be seen from outside; what a process of its own is started with."""
    os.environ |= {"WATCHED": str(log), "DIES_AT": str(dies_at)}
    torch.set_num_threads(1)
    places.RUNS = runs
    data = prepared(folder, {split: load_blocks(folder / split) for split in ("train", "validation")}, "lm")
    return build_cache(WatchedTeacher(teacher_of(1).models), data, "hidden", 2.0, 0, batch_size=1)


@pytest.mark.parametrize(
    "dies_at", [pytest.param(-1, marks=pytest.mark.soak, id="one builds"), pytest.param(6, id="one is killed")]
)
def test_while_another_process_builds_the_cache_is_waited_for(
    dies_at: int, own_runs: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WATCHED", "DIES_AT"):
        monkeypatch.setenv(name, "")  # as they were, afterwards
    log, caches = own_runs.parent / "batches.log", own_runs / "teacher_cache"
    given = (own_runs, data.folder, log, dies_at)
    other = multiprocessing.get_context("spawn").Process(target=watched_build, args=given, daemon=True)
    other.start()
    while not log.is_file():
        assert other.is_alive()
        time.sleep(0.02)
    assert [path.name for path in caches.iterdir() if not path.name.startswith(".")] == []  # half a cache is none
    log.with_suffix(".go").touch()
    cache = watched_build(own_runs, data.folder, log, -1)
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
    teacher: LiveTeacher, data: PreparedData, own_runs: Path, monkeypatch: pytest.MonkeyPatch
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
    assert [path.name for path in (own_runs / "teacher_cache").iterdir() if path.name[0] != "."] == []
    assert list((own_runs / "teacher_cache" / ".making").iterdir()) == []
    shutil.rmtree(own_runs)
    own_runs.write_text("a file in the folder's place")
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


def test_the_matrices_alone_stay_in_memory(teacher: LiveTeacher, data: PreparedData) -> None:
    cache = build_cache(teacher, data, "hidden", 2.0, 0, batch_size=4)
    assert isinstance(cache, TeacherCache)
    (weight,) = cache.to("cpu").weights
    assert weight.dtype == torch.float32
    assert torch.equal(weight, teacher.models[0].lm_head.weight)
