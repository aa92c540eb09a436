"""Training: exact accumulation, repeatability, A/A pairs, metrics.csv, evaluation, several ranks.

python -m pytest tests/test_training.py
"""

import math
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_training import VOCAB, blocks, config, model, trained, weights
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from nbutils.evaluation.perplexity import evaluate
from nbutils.foundation.errors import ModelError, RankKilled
from nbutils.objectives import ObjectiveModel, cosine_mixing
from nbutils.training.launching import RankFailed, launch
from nbutils.training.tracking import BestModel
from nbutils.training.trainer import ObjectiveTrainer, training_arguments


def test_gradient_accumulation_changes_nothing(tmp_path):
    whole = trained(config(tmp_path / "a"))
    parts = trained(config(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in "ab")
    for column in ("loss", "ce_loss", "cosine_loss", "grad_norm", "eval_ce_loss", "tokens_seen"):
        np.testing.assert_allclose(one[column], two[column], rtol=1e-4, err_msg=column)


def test_logged_loss_is_the_mean_over_tokens_of_the_mix(tmp_path):
    trained(config(tmp_path, objective=cosine_mixing(0.3)))
    rows = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="loss")
    np.testing.assert_allclose(rows["loss"], 0.7 * rows["ce_loss"] + 0.3 * rows["cosine_loss"], rtol=1e-5)
    assert rows["ce_loss"].iloc[0] == pytest.approx(math.log(VOCAB), rel=0.05)


def test_first_step_is_the_textbook_step(tmp_path):
    """One AdamW step of the Trainer against the same step written out with full logits."""
    settings = config(tmp_path, objective=cosine_mixing(0.0), max_steps=1, max_grad_norm=0.0, warmup_ratio=0.0)
    start = model(settings.objective)
    trainer = trained(settings)
    order = np.random.default_rng(np.random.SeedSequence((settings.seed, 0))).permutation(96)
    batch = torch.tensor(blocks(96)["input_ids"])[list(order)[:8]]
    logits = start.model(batch).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    decayed = [p for name, p in start.named_parameters() if "bias" not in name and "ln_" not in name]
    plain = [p for name, p in start.named_parameters() if "bias" in name or "ln_" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=settings.learning_rate).step()
    wanted = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    torch.testing.assert_close(weights(trainer), wanted, rtol=1e-3, atol=5e-5)  # a sixtieth of the step


def test_the_same_config_gives_the_same_weights_and_metrics(tmp_path):
    runs = [trained(config(tmp_path / name), dropout=0.1) for name in "ab"]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    frames = [
        pd.read_csv(tmp_path / name / "metrics.csv").drop(columns=["wall_seconds", "tokens_per_second"])
        for name in "ab"
    ]
    pd.testing.assert_frame_equal(*frames)


def test_an_a_a_pair_differs_in_dropout_alone(tmp_path, monkeypatch):
    seen = {}
    original = ObjectiveTrainer.compute_loss

    def recording(self, model, inputs, **kwargs):
        seen.setdefault(self.args.output_dir, []).append(inputs["input_ids"])
        return original(self, model, inputs, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", recording)
    with_noise = [trained(config(tmp_path / str(n), noise_seed=n), dropout=0.1) for n in (0, 1)]
    without = [trained(config(tmp_path / f"no{n}", noise_seed=n)) for n in (0, 1)]
    orders = list(seen.values())
    assert all(torch.equal(a, b) for order in orders[1:] for a, b in zip(orders[0], order, strict=True))
    assert not torch.equal(weights(with_noise[0]), weights(with_noise[1]))
    assert torch.equal(weights(without[0]), weights(without[1]))


def test_training_learns_and_keeps_the_best_model(tmp_path):
    settings = config(tmp_path, max_steps=60, eval_steps=20, objective=cosine_mixing(0.2))
    trainer = trained(settings, blocks(480))
    rows = pd.read_csv(tmp_path / "metrics.csv")
    evaluations = rows["eval_ce_loss"].dropna()
    assert evaluations.iloc[-1] < 0.75 * rows["ce_loss"].iloc[0]
    assert rows["step"].is_monotonic_increasing and len(evaluations) == 3
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "model_best")
    measured = evaluate(ObjectiveModel(best, settings.objective), blocks(8, 1), 4).metrics("eval")
    assert measured["eval_ce_loss"] == pytest.approx(evaluations.min(), rel=1e-5) == trainer.best_model.value


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_equals_the_textbook_per_document(batch_size):
    objective = cosine_mixing(0.25, temperature=2.0)
    subject, data = model(objective), blocks(8)
    result = evaluate(subject, data, batch_size)
    tokens, owners = torch.tensor(data["input_ids"]), np.array(data["document_ids"])[:, 1:].ravel()
    with torch.no_grad():
        logits = subject.model(tokens).logits[:, :-1].flatten(0, 1)
    losses = cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    wanted = pd.Series(losses.numpy()).groupby(owners).agg(["sum", "size"])
    np.testing.assert_allclose(result.per_document["ce_sum"], wanted["sum"], rtol=1e-5)
    np.testing.assert_array_equal(result.per_document["tokens"], wanted["size"])
    metrics = result.metrics("eval")
    assert metrics["eval_ce_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert metrics["eval_token_acc"] == pytest.approx(
        (logits.argmax(-1) == tokens[:, 1:].flatten()).float().mean().item()
    )
    mixed = 0.75 * metrics["eval_ce_loss"] + 0.25 * metrics["eval_cosine_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixed)


def test_sums_are_kept_for_the_documents_of_the_split_alone():
    """Held-out documents of a large corpus have large numbers, far apart."""
    subject, data = model(cosine_mixing(0.25)), blocks(8)
    spread = data.map(lambda row: {"document_ids": [10**6 + 77_777 * number for number in row["document_ids"]]})
    near, far = evaluate(subject, data, 4).per_document, evaluate(subject, spread, 4).per_document
    assert (far["document"] == 10**6 + 77_777 * near["document"]).all()
    pd.testing.assert_frame_equal(far.drop(columns="document"), near.drop(columns="document"))


def test_a_model_that_diverged_has_no_score_and_is_never_the_best(tmp_path):
    objective = cosine_mixing(0.0)
    subject, data = model(objective), blocks(8)
    with torch.no_grad():
        subject.embeddings.weight[5] = torch.nan  # some documents hold token 5, some do not
    metrics = evaluate(subject, data, 4).metrics("eval")
    assert math.isnan(metrics["eval_ce_loss"]) and math.isnan(metrics["eval_perplexity"])
    best = BestModel(tmp_path / "best", subject.model)
    best.on_evaluate(None, TrainerState(), None, {"eval_ce_loss": 3.0})
    kept = (tmp_path / "best" / "model.safetensors").read_bytes()
    with torch.no_grad():
        subject.embeddings.weight.fill_(torch.nan)
    best.on_evaluate(None, None, None, metrics)
    assert best.value == 3.0 and (tmp_path / "best" / "model.safetensors").read_bytes() == kept


def test_a_ramped_terms_logged_value_does_not_depend_on_how_often_it_is_logged(tmp_path):
    frames = {}
    for steps in (1, 3):
        settings = config(tmp_path / str(steps), objective=cosine_mixing(0.5, ramp=1.0), logging_steps=steps)
        trained(replace(settings, learning_rate=1e-12))
        frames[steps] = pd.read_csv(tmp_path / str(steps) / "metrics.csv").dropna(subset="loss")
    every = frames[1]["cosine_loss"]
    assert math.isnan(every.iloc[0])  # of weight 0 in the first step
    np.testing.assert_allclose(frames[3]["cosine_loss"].iloc[0], every.iloc[1:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(frames[3]["cosine_loss"].iloc[1], every.iloc[3:6].mean(), rtol=1e-5)


def test_saving_the_best_model_is_not_training_time(tmp_path, monkeypatch):
    save = BestModel.on_evaluate

    def slow(self, *arguments, **named):
        time.sleep(0.5)
        return save(self, *arguments, **named)

    monkeypatch.setattr(BestModel, "on_evaluate", slow)
    assert trained(config(tmp_path)).evaluation_seconds > 1.0  # two evaluations


def test_several_visible_gpus_do_not_mean_data_parallel(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4)))
    assert training_arguments(config(tmp_path), 96)._n_gpu <= 1


@dataclass(frozen=True)
class RankJob:
    folder: Path
    error: Exception | None = None


def train_in_rank(job):
    trainer = trained(config(job.folder, per_device_train_batch_size=4, max_steps=1, eval_steps=1))
    rank = trainer.args.process_index
    torch.save(weights(trainer), job.folder / f"weights{rank}.pt")
    if job.error and rank == 1:
        raise job.error
    return rank


@pytest.mark.slow
def test_two_ranks_agree_after_a_step_and_with_one_rank_on_the_same_batch(tmp_path):
    assert launch(train_in_rank, RankJob(tmp_path), processes=2, log_folder=tmp_path) == 0
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone = trained(config(tmp_path / "alone", per_device_train_batch_size=8, max_steps=1, eval_steps=1))
    torch.testing.assert_close(first, weights(alone), rtol=1e-3, atol=1e-5)
    both, one = (pd.read_csv(folder / "metrics.csv") for folder in (tmp_path, tmp_path / "alone"))
    for column in ("loss", "ce_loss", "cosine_loss", "tokens_seen", "eval_ce_loss", "eval_loss", "eval_token_acc"):
        np.testing.assert_allclose(both[column], one[column], rtol=1e-4, err_msg=column)


def all_reduce_until_somebody_is_gone(ending: str) -> None:
    """Rank 1 ends in the middle of what both do together; rank 0 then sees a closed connection, no more."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for step in range(10_000):
        if rank == 1 and step == 20:
            if ending == "error":
                raise ValueError("diverged")
            os.kill(os.getpid(), getattr(signal, ending))
        torch.distributed.all_reduce(torch.ones(8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "raised", "message"),
    [
        ("SIGKILL", RankKilled, "Rank 1 was ended first, by SIGKILL, most often because the machine ran out of memory"),
        pytest.param(
            *("SIGSEGV", RankFailed, "Rank 1 failed first: SIGSEGV, a crash in compiled code"), marks=pytest.mark.soak
        ),
    ],
)
def test_the_rank_that_ended_first_is_named_whatever_the_others_saw(tmp_path, ending, raised, message):
    with pytest.raises(raised, match=message):
        launch(all_reduce_until_somebody_is_gone, ending, processes=2, log_folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, raised, message",
    [
        pytest.param(
            *(ValueError("had enough"), RankFailed, "Rank 1 failed first: ValueError: had enough"),
            marks=pytest.mark.soak,
        ),
        (ModelError("no such model"), ModelError, "^no such model$"),
    ],
)
def test_the_rank_that_failed_first_is_named_and_a_users_mistake_stays_one(tmp_path, error, raised, message):
    with pytest.raises(raised, match=message):
        launch(train_in_rank, RankJob(tmp_path, error), processes=2, log_folder=tmp_path)
