"""Checkpoints: what is torn is passed over, what belongs to another run is refused, a full disk loses nothing.

python -m pytest tests/test_checkpoints.py; 200 kills at random moments: python tests/kill_many.py --kills 200
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kill_many import CASES, configuration, left_behind, write_data

from nbutils.data.mds_blocks import missing_packages
from nbutils.foundation.errors import Preempted, RunError
from nbutils.training.checkpoints import Checkpoints, Torn, read_manifest, verify
from nbutils.training.resuming import belonging, load_trained_tensors, trained_tensors
from nbutils.training.tracking import Progress
from nbutils.training.trainer import TrainingConfig, train

HERE = Path(__file__).parents[1]
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbed."""
    return ended(settings(data, tmp_path_factory.mktemp("calm")))


def settings(data: Path, folder: Path, **changes: object) -> TrainingConfig:
    return configuration(data, folder, **{"max_steps": STEPS, **changes})


def ended(config: TrainingConfig) -> Path:
    """Run to the end; its folder, with its numbers."""
    (config.run_folder / "numbers.json").write_text(json.dumps(train(config)))
    return config.run_folder


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM arrives in the middle of this step."""

    def arrive(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "on_step_begin", arrive)


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stopped(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=f"asked to stop at step {step}; the state of"):
        stop_at(patch, step)
        train(config)


def store(config: TrainingConfig, data: Path, **changes: object) -> Checkpoints:
    fingerprint = json.loads((data / "data" / "card.json").read_text())["fingerprint"]
    belongs_to = belonging(replace(config, **changes), fingerprint, 1, False, False)
    return Checkpoints(config.run_folder / "checkpoints", belongs_to)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "kills", "cases"),
    [
        ("arrow", 2, ["plain"]),
        pytest.param("arrow", 20, list(CASES), marks=pytest.mark.soak),
        pytest.param("mds", 4, ["chunks", "two"], marks=pytest.mark.soak),
    ],
)
def test_kills_at_random_moments_change_not_a_bit(storage, kills, cases):
    """With one process and with two, chunks at random positions, accumulation, dropout, early stopping."""
    if storage == "mds" and (missing := missing_packages()):
        pytest.skip(f"{', '.join(missing)} not installed")
    words = [sys.executable, str(HERE / "kill_many.py"), "--kills", str(kills), "--storage", storage]
    for case in cases:
        words += ["--case", case]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same bytes") == len(cases)


def test_a_stop_between_checkpoints_is_saved_and_gone_on_from(data, calm, tmp_path, monkeypatch):
    config = settings(data, tmp_path, checkpoint_steps=0)
    for step, saved in ((3, [3]), (4, [3, 4]), (5, [3, 4, 5]), (7, [5, 7])):  # 3 and 6 are evaluated, and better each
        stopped(config, monkeypatch, step)
        assert saved_steps(tmp_path) == [f"step-{each}" for each in saved]
    assert left_behind(ended(config)) == left_behind(calm)


def test_a_stop_at_the_last_step_leaves_nothing_to_train(data, calm, tmp_path, monkeypatch):
    config = settings(data, tmp_path)
    stopped(config, monkeypatch, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", None)
        assert left_behind(ended(config)) == left_behind(calm)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_each_file_that_is_torn_has_the_checkpoint_passed_over(data, calm, tmp_path, damage, caplog):
    checkpoints = store(settings(data, calm), data)
    newest = checkpoints.newest()
    assert newest.name == f"step-{STEPS}"
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "manifest.json"} <= {path.name for path in files}
    for file in files:
        copy = tmp_path / "checkpoints"
        shutil.copytree(checkpoints.folder, copy)
        torn = copy / newest.name / file
        content = torn.read_bytes()
        torn.unlink()
        if damage == "cut":
            torn.write_bytes(content[: len(content) // 2])
        elif damage == "changed":
            middle = len(content) // 2
            torn.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        caplog.clear()
        found = replace(checkpoints, folder=copy).newest()
        assert found.name == f"step-{STEPS - 2}", file
        assert f"The checkpoint of step {STEPS} is passed over: {file.as_posix()}" in caplog.text
        shutil.rmtree(copy)


def test_a_run_with_a_torn_checkpoint_goes_on_from_the_one_before(data, calm, tmp_path, monkeypatch):
    config = settings(data, tmp_path)
    stopped(config, monkeypatch, 9)
    torn = tmp_path / "checkpoints" / "step-9" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (tmp_path / "checkpoints" / "step-9.new").mkdir()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("9,0.5,half a li")
    assert left_behind(ended(config)) == left_behind(calm)
    assert saved_steps(tmp_path) == ["step-10", "step-8"]


def test_without_a_whole_one_training_begins_anew(data, calm, tmp_path, caplog):
    config = settings(data, tmp_path)
    shutil.copytree(calm, tmp_path, dirs_exist_ok=True)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert left_behind(ended(config)) == left_behind(calm)
    assert caplog.text.count("is passed over: manifest.json cannot be read") >= 2


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.003 and is 0.0001. Set learning_rate back to go on from it"),
        ({"seed": 1, "dropout": 0.0}, "dropout was 0.2 and is 0.0; seed was 42 and is 1. Set dropout, seed back"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(data, calm, tmp_path, changes, told):
    shutil.copytree(calm / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(RunError) as caught:
        train(settings(data, tmp_path, **changes))
    assert f"checkpoints/step-{STEPS} was made in another run: {told}" in str(caught.value)
    assert f"or delete {tmp_path / 'checkpoints'} to train from the beginning." in str(caught.value)
    assert saved_steps(tmp_path) == saved_steps(calm)


def test_a_checkpoint_of_other_data_or_another_objective_is_refused(data, calm, tmp_path):
    other = store(settings(data, calm), data)
    with pytest.raises(RunError, match=r"was made in another run: data was '[0-9a-f]+' and is 'x'. Set data back"):
        replace(other, belongs_to={**other.belongs_to, "data": "x"}).newest()
    mixed = configuration(data, calm).objective
    changed = store(settings(data, calm), data, objective=replace(mixed, weights=(0.25, 0.75)))
    with pytest.raises(RunError, match=r"objective.weights.0 was 0.5 and is 0.25; objective.weights.1 was 0.5 and"):
        changed.newest()
    free = store(settings(data, calm), data, report_to=["x"], checkpoint_steps=7, checkpoints_kept=1)
    assert free.newest().name == f"step-{STEPS}"


FULL = """
import logging, resource, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from kill_many import configuration
from nbutils.training.trainer import train
logging.basicConfig(level=logging.INFO, format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
train(configuration(Path({data!r}), Path({run!r}), max_steps={steps}))
"""


@pytest.mark.slow
@pytest.mark.soak
def test_a_full_disk_loses_nothing_that_was_saved(data, calm, tmp_path, monkeypatch):
    """The system lets no file grow beyond a limit that the model fits in and the optimiser's state does not."""
    config = settings(data, tmp_path)
    stopped(config, monkeypatch, 5)
    before = saved_steps(tmp_path)
    limit = int(1.5 * (calm / "model" / "model.safetensors").stat().st_size)
    code = FULL.format(here=str(HERE), limit=limit, data=str(data), run=str(tmp_path), steps=STEPS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Training goes on from step 5" in done.stderr
    assert f"Step 6 could not be saved in {tmp_path / 'checkpoints'} (" in done.stderr
    assert " MiB there. What was saved before is whole, and training goes on." in done.stderr
    assert saved_steps(tmp_path) == before
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        verify(checkpoint, read_manifest(checkpoint))
    model = "model/model.safetensors"
    assert (tmp_path / model).read_bytes() == (calm / model).read_bytes()


def test_a_stop_that_cannot_be_saved_says_what_is_left(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "commit", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
    stop_at(monkeypatch, 3)
    with pytest.raises(Preempted, match=r"asked to stop at step 3; no state could be saved. Run it again to go on."):
        train(settings(data, tmp_path))
    assert saved_steps(tmp_path) == []


def test_a_resumed_run_has_the_best_model_of_its_checkpoint(data, tmp_path, monkeypatch):
    """What came after the checkpoint never happened: a better model of a later step is gone until it comes again."""
    config = settings(data, tmp_path, checkpoint_steps=0)
    stopped(config, monkeypatch, 4)
    first = (tmp_path / "model_best" / "model.safetensors").read_bytes()
    stopped(replace(config, checkpoint_steps=5), monkeypatch, 8)
    assert (tmp_path / "model_best" / "model.safetensors").read_bytes() != first  # that of step 6
    for step in (5, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step}")
    stopped(config, monkeypatch, 5)
    assert (tmp_path / "model_best" / "model.safetensors").read_bytes() == first
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("5,")


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"a": 1}, kept=2)
    for step, best in ((2, 0), (4, 4), (6, 4), (8, 4), (10, 4), (6, 4)):
        (checkpoints.begin(step) / "x").write_text("1")
        checkpoints.commit(step, best)
        assert checkpoints.newest().name == f"step-{step}"
        if step == 8:
            assert saved_steps(tmp_path) == ["step-4", "step-6", "step-8"]
    assert saved_steps(tmp_path) == ["step-4", "step-6"]  # gone back to 4, the later ones were of another course
    with pytest.raises(Torn, match="x has 1 bytes of 2"):
        verify(tmp_path / "checkpoints" / "step-6", {"files": {"x": {"bytes": 2, "sha256": ""}}})


def test_tied_weights_are_saved_once_and_frozen_ones_never(tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, set_seed

    from nbutils.models.loading import build_config

    models = []
    for seed in (1, 2):
        set_seed(seed)
        models.append(AutoModelForCausalLM.from_config(build_config("llama3-micro", 61, 16)))
        models[-1].model.layers[0].requires_grad_(False)
    save_file(trained_tensors(models[0]), tmp_path / "x")
    load_trained_tensors(models[1], tmp_path / "x")
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert models[1].lm_head.weight is models[1].model.embed_tokens.weight
    first, second = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert not torch.equal(first, second)
