"""Blocks as MDS shards: python -m pytest tests/test_mds.py"""

from __future__ import annotations

import importlib.metadata
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbutils.data import mds_blocks as mds
from nbutils.data.batches import RandomChunks
from nbutils.data.mds_blocks import MdsBlocks, require_streaming, streaming_module
from nbutils.data.packing import Blocks, load_blocks, pack_examples, save_blocks
from nbutils.data.preparation import DataConfig, PreparedData, check_config, load_data, prepare_data
from nbutils.foundation.errors import CorpusError, ParameterError
from nbutils.training.rows import training_rows

try:
    require_streaming()
except ParameterError as error:
    pytest.skip(str(error), allow_module_level=True)

BLOCK, COUNT = 16, 300


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 300 blocks as Arrow and as MDS, the latter in several shards."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 128_256, (COUNT, BLOCK), dtype=np.int32)
    blocks = Blocks(tokens, np.sort(generator.integers(0, 40, (COUNT, BLOCK), dtype=np.int32), 0), 0)
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mds, "SHARD_BYTES", 8192)
        for storage in ("arrow", "mds"):
            save_blocks(blocks, folder / storage, storage)
    assert len(list((folder / "mds").glob("*.mds"))) > 3
    return {storage: folder / storage for storage in ("arrow", "mds")}


@pytest.fixture
def damaged(both: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the MDS blocks, to be damaged."""
    for file in both["mds"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreparedData]:
    config = DataConfig(max_documents=90, vocab_size=300, block_size=32)
    folder = tmp_path_factory.mktemp("prepared")
    return {kind: prepare_data(replace(config, storage=kind), folder / kind) for kind in ("arrow", "mds")}


# ---- the same rows


def test_rows_are_the_same_however_they_are_asked_for(both: dict[str, Path]) -> None:
    arrow, shards = (load_blocks(both[kind], BLOCK) for kind in ("arrow", "mds"))
    assert len(arrow) == len(shards) == COUNT and set(arrow.column_names) == set(shards.column_names)
    assert arrow[:] == shards[:]
    keys = (0, -1, COUNT - 1, slice(5, 60, 7), [3, 299, 3], np.array([8, 2]), range(4))
    for one, other in ((arrow, shards), (arrow.select(range(9, 40)), shards.select(range(9, 40)))):
        for key in keys[:2] + keys[3:4] + keys[5:] if len(one) < COUNT else keys:
            assert one[key] == other[key]
            for columns in (None, ["input_ids"]):
                expected, found = (each.with_format("numpy", columns=columns)[key] for each in (one, other))
                assert expected.keys() == found.keys()
                for name, array in expected.items():
                    np.testing.assert_array_equal(found[name], array, strict=True)
    with pytest.raises(IndexError):
        shards[COUNT]
    assert shards.__getitems__([4, 1]) == arrow.__getitems__([4, 1])
    row = shards.with_format("numpy")[0]["input_ids"]
    row[0] = 7  # the library's own arrays are read-only
    assert shards.with_format("numpy")[0]["input_ids"][0] == arrow[0]["input_ids"][0]


def test_the_library_reads_what_is_written_and_its_writer_what_is_read(both: dict[str, Path], tmp_path: Path) -> None:
    data = streaming_module("streaming.base.local").LocalDataset(str(both["mds"]))
    arrow = load_blocks(both["arrow"])
    for number in (0, 150, COUNT - 1):
        assert data[number]["tokens"].dtype == np.uint32
        assert data[number]["tokens"].tolist() == arrow[number]["input_ids"]
    columns = {"tokens": f"ndarray:uint32:{BLOCK}", "document_ids": f"ndarray:uint32:{BLOCK}"}
    writer = streaming_module("streaming.base.format.mds").MDSWriter
    with writer(columns=columns, out=str(tmp_path / "own"), hashes=["xxh3_64"]) as out:
        for number in range(COUNT):
            out.write(data[number])
    assert load_blocks(tmp_path / "own", BLOCK)[:] == arrow[:]


def test_questions_and_answers_of_any_length(tmp_path: Path) -> None:
    prompts, answers = ([np.arange(n, dtype=np.int32) for n in lengths] for lengths in ((3, 1, 7), (2, 5, 1)))
    examples = pack_examples(prompts, answers, [4, 7, 9], 99)
    for storage in ("arrow", "mds"):
        save_blocks(examples, tmp_path / storage, storage)
    arrow, shards = (load_blocks(tmp_path / storage) for storage in ("arrow", "mds"))
    assert arrow[:] == shards[:] and min(min(labels) for labels in shards[:]["labels"]) < 0
    assert len({len(row) for row in shards.with_format("numpy")[:]["input_ids"]}) == 3


def test_prepared_data_are_the_same_data(prepared: dict[str, PreparedData]) -> None:
    arrow, shards = prepared["arrow"], prepared["mds"]
    assert isinstance(shards.blocks["train"], MdsBlocks)
    assert {**arrow.card, "config": 0} == {**shards.card, "config": 0}  # the fingerprint is that of the content
    for split in arrow.blocks:
        assert arrow.blocks[split][:] == shards.blocks[split][:]


def test_every_reader_reads_them(prepared: dict[str, PreparedData], tmp_path: Path) -> None:
    """A training with random chunks, its evaluation and its samples: the same numbers to the last bit."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from nbutils.evaluation.generation import sample_continuations
    from nbutils.evaluation.perplexity import evaluate_run
    from nbutils.models.loading import build_config
    from nbutils.objectives import ObjectiveModel, cosine_mixing
    from nbutils.training.trainer import ObjectiveTrainer, TrainingConfig

    found = {}
    for kind, data in prepared.items():
        settings = {"data_folder": data.folder, "run_folder": tmp_path / kind, "objective": cosine_mixing(0.5)}
        config = TrainingConfig(**settings, max_steps=3, dropout=0.0, random_chunks=True, eval_steps=3)
        set_seed(1)
        model = AutoModelForCausalLM.from_config(build_config("micro", len(data.tokenizer), 32, 0.0))
        subject = ObjectiveModel(model, config.objective)
        _, train_rows, eval_rows = training_rows(config, data, model)
        ObjectiveTrainer(config, subject, train_rows, eval_rows).train()
        metrics, documents, _ = evaluate_run(subject, data, 16)
        del metrics["evaluation_seconds"]
        samples = sample_continuations(model, data.tokenizer, data.blocks["validation"], 2, 8, 8)
        weights = torch.cat([parameter.detach().flatten() for parameter in subject.parameters()])
        found[kind] = metrics, documents.to_csv(), samples, weights.numpy().tobytes()
    assert found["arrow"] == found["mds"]


def test_chunks_at_random_places(both: dict[str, Path]) -> None:
    arrow, shards = (RandomChunks(load_blocks(both[kind]), BLOCK, seed=3) for kind in ("arrow", "mds"))
    for epoch in (0, 1):
        arrow.set_epoch(epoch)
        shards.set_epoch(epoch)
        for index in (*range(0, COUNT - 1, 5), COUNT - 2):
            expected, found = arrow[index], shards[index]
            assert found["position"] == expected["position"]
            np.testing.assert_array_equal(found["input_ids"], expected["input_ids"], strict=True)
    again = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(again[7]["input_ids"], shards[7]["input_ids"])
    with pytest.raises(ValueError, match="not of 8 tokens"):
        RandomChunks(load_blocks(both["mds"]), 8, seed=0)
    with pytest.raises(ValueError, match="selected"):
        RandomChunks(load_blocks(both["mds"]).select([2, 1]), BLOCK, seed=0)


# ---- processes

READ = """
import sys, time
from pathlib import Path
from nbutils.data.packing import load_blocks
blocks = load_blocks(Path(sys.argv[1]), 16)
print(sum(map(sum, blocks[:]["input_ids"])), "torchvision" in sys.modules, flush=True)
while len(sys.argv) > 2:
    blocks[0]
"""


def test_readers_at_once_hold_no_shared_memory_that_a_kill_could_leave(both: dict[str, Path]) -> None:
    total = sum(map(sum, load_blocks(both["arrow"])[:]["input_ids"]))
    forever = [sys.executable, "-c", READ, str(both["mds"]), "on"]
    readers = [subprocess.Popen(forever, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline().split() == [str(total), "False"]
        held = Path(f"/proc/{reader.pid}/maps")
        shared = [line for line in held.read_text().splitlines() if "/dev/shm/" in line] if held.exists() else []
        assert not [line for line in shared if "__KMP" not in line]  # an OpenMP library registers itself there
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    assert sum(map(sum, load_blocks(both["mds"])[:]["input_ids"])) == total


def test_loader_workers_read_them(both: dict[str, Path]) -> None:
    from torch.utils.data import DataLoader

    rows = load_blocks(both["mds"]).with_format("numpy", columns=["input_ids"])
    rows[0]
    loader = DataLoader(rows, batch_size=50, num_workers=2, multiprocessing_context="fork")
    read = np.concatenate([batch["input_ids"].numpy() for batch in loader])
    assert read.tolist() == load_blocks(both["arrow"])[:]["input_ids"]


# ---- bad input


def test_a_missing_shard_is_named(damaged: Path) -> None:
    (damaged / "shard.00002.mds").unlink()
    with pytest.raises(CorpusError, match=r"MDS shard .*shard.00002.mds is missing, one of \d.*Prepare the data again"):
        load_blocks(damaged, BLOCK)


def test_a_shard_that_was_cut_is_named(damaged: Path) -> None:
    file = damaged / "shard.00001.mds"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorpusError, match=r"shard.00001.mds is damaged: it has [\d,]+ bytes, its index says [\d,]+"):
        load_blocks(damaged, BLOCK)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_wrong_byte_is_found_before_a_row_of_its_shard_is_used(damaged: Path, place: int) -> None:
    file = damaged / "shard.00001.mds"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    blocks = load_blocks(damaged, BLOCK)
    first = mds._read_index(damaged, BLOCK)[0]["samples"]
    assert blocks[first - 1]
    for _ in range(2):  # it stays refused
        with pytest.raises(
            CorpusError, match=r"shard.00001.mds is damaged: its xxh3_64 is \w+, and the index says \w+"
        ):
            blocks[first]


def test_a_shard_that_goes_while_it_is_read(damaged: Path) -> None:
    blocks = load_blocks(damaged, BLOCK)
    (damaged / "shard.00001.mds").unlink()
    with pytest.raises(CorpusError, match=r"shard.00001.mds cannot be read"):
        blocks[:]


def test_blocks_of_another_size_are_refused(both: dict[str, Path], damaged: Path) -> None:
    with pytest.raises(
        CorpusError, match=f"hold tokens as ndarray:uint32:{BLOCK}, and the data card says block_size 32"
    ):
        load_blocks(damaged, 32)
    with pytest.raises(CorpusError, match=f"holds blocks of {BLOCK} tokens, and the data card says block_size 32"):
        load_blocks(both["arrow"], 32)
    (damaged / "index.json").write_text('{"shards": [')
    with pytest.raises(CorpusError, match=r"index.json is damaged"):
        load_blocks(damaged, BLOCK)


def test_a_cut_arrow_file_is_named(both: dict[str, Path], tmp_path: Path) -> None:
    whole = (both["arrow"] / "blocks.arrow").read_bytes()
    (tmp_path / "blocks.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"blocks.arrow is damaged"):
        load_blocks(tmp_path, BLOCK)


def test_damage_is_told_when_data_are_opened(prepared: dict[str, PreparedData], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(prepared["mds"].folder / "data", tmp_path / "data")
    (tmp_path / "data/blocks/test/shard.00000.mds").unlink()
    with pytest.raises(CorpusError, match=r"blocks/test/shard.00000.mds is missing"):
        load_data(tmp_path)


def test_auto_is_mds_where_the_package_is_and_arrow_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = pack_examples([np.arange(3, dtype=np.int32)], [np.arange(2, dtype=np.int32)], [0], 9)
    save_blocks(examples, tmp_path / "there", "auto")
    monkeypatch.setattr("nbutils.data.packing.missing_packages", lambda: ["zstd"])
    save_blocks(examples, tmp_path / "not", "auto")
    assert (tmp_path / "there" / "index.json").is_file() and (tmp_path / "not" / "blocks.arrow").is_file()


def test_without_the_package_the_install_command_is_told(
    prepared: dict[str, PreparedData], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(mds, "version", gone)
    told = (
        r"mosaicml-streaming is not installed here.*pip install --no-deps -r requirements-streaming.txt.*storage arrow"
    )
    with pytest.raises(ParameterError, match=told):
        check_config(DataConfig(storage="mds"))
    check_config(DataConfig())
    for name in [name for name in sys.modules if name.startswith("streaming.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ParameterError, match=told):
        load_data(prepared["mds"].folder).blocks["train"][0]


def test_a_users_own_import_gets_the_whole_package_and_torchvision_is_not_needed() -> None:
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from nbutils.data.mds_blocks import streaming_module\n"
        "streaming_module('streaming.base.local')\n"
        "assert 'streaming' not in sys.modules\n"
        "try: import streaming\n"
        "except ImportError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0 and "torchvision" in told.stdout, told.stderr
