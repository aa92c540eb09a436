"""Training with a teacher: the textbook step, the scale of evaluation, questions, early stopping, random chunks.

python -m pytest tests/test_distillation_training.py
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from small_training import BLOCK, VOCAB, blocks, config, model, trained, weights
from torch.nn.functional import cross_entropy
from transformers import Adafactor, TrainerControl, TrainerState, set_seed

from nbutils.data.batches import IGNORE_INDEX, UNLABELLED, collate
from nbutils.evaluation.perplexity import evaluate
from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.models.loading import load_model, load_trained, saved_model
from nbutils.models.teachers import LiveTeacher, load_teachers, model_of
from nbutils.objectives import ObjectiveModel, cosine_mixing, distillation
from nbutils.objectives.terms.distillation import distillation as textbook_distillation
from nbutils.training.launching import launch
from nbutils.training.rows import training_rows
from nbutils.training.tracking import BestModel, EarlyStopping, memory_mib, reset_peak_memory
from nbutils.training.trainer import ObjectiveTrainer, train


def a_teacher():
    return LiveTeacher((model(distillation("none"), seed=7).model.eval().requires_grad_(False),))


def questions(number=24):
    """Rows of different lengths: a prompt of 3 to 6 tokens, an answer, an end token (0) that is also the padding."""
    generator = np.random.default_rng(3)
    rows = {"input_ids": [], "labels": [], "document_ids": []}
    for document in range(number):
        prompt, answer = (generator.integers(1, VOCAB, size=generator.integers(3, 7)).tolist() for _ in range(2))
        rows["input_ids"].append([*prompt, *answer, 0])
        rows["labels"].append([*(UNLABELLED for _ in prompt), *answer, 0])
        rows["document_ids"].append([document] * (len(prompt) + len(answer) + 1))
    return Dataset.from_dict(rows)


def distilled(settings, rows=None, eval_rows=None):
    subject = ObjectiveModel(model(settings.objective).model, settings.objective, a_teacher())
    columns = ["input_ids", "labels"]
    rows = blocks(96) if rows is None else rows
    shown = rows.with_format("numpy", columns=[name for name in columns if name in rows.column_names])
    trainer = ObjectiveTrainer(settings, subject, shown, blocks(8, 1) if eval_rows is None else eval_rows)
    trainer.train()
    return trainer


def test_the_first_step_on_questions_is_the_textbook_step(tmp_path):
    """One AdamW step with full logits: cross entropy over answers and their end, KL over all real tokens."""
    objective = distillation(ce_weight=0.5664, kl_weight=0.1081, temperature=0.7)
    settings = config(tmp_path, objective=objective, max_steps=1, max_grad_norm=0.0, warmup_ratio=0.0)
    settings = replace(settings, per_device_train_batch_size=12, weight_decay=0.0, audit_blocks=0)
    trainer = distilled(settings, questions(), questions(6))
    sampler = np.random.default_rng(np.random.SeedSequence((settings.seed, 0))).permutation(24)
    order = list(sampler)[:12]
    start, teacher, rows = model(objective), a_teacher().models[0], questions()
    ce, kl = [], []
    for index in order:  # one by one: no padding at all
        tokens, labels = (torch.tensor(rows[index][name]) for name in ("input_ids", "labels"))
        logits, teacher_logits = (each(tokens[None]).logits[0] for each in (start.model, teacher))
        answers = labels[1:] >= 0
        ce.append(cross_entropy(logits[:-1][answers], tokens[1:][answers], reduction="none"))
        kl.append(textbook_distillation(logits, teacher_logits, 0.7))
    (0.5664 * torch.cat(ce).mean() + 0.1081 * torch.cat(kl).mean()).backward()
    torch.optim.AdamW(start.parameters(), lr=settings.learning_rate, weight_decay=0.0).step()
    wanted = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    torch.testing.assert_close(weights(trainer), wanted, rtol=1e-3, atol=1e-5)
    row = pd.read_csv(tmp_path / "metrics.csv").iloc[0]
    assert row["ce_loss"] == pytest.approx(torch.cat(ce).mean().item(), rel=1e-5)
    assert row["kl_loss"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert row["tokens_seen"] == sum(len(rows[i]["input_ids"]) for i in order)


@pytest.mark.parametrize("reduction", ["token", "batchmean"])
def test_accumulation_changes_nothing(tmp_path, reduction):
    settings = config(tmp_path / "a", objective=distillation(reduction=reduction))
    whole = distilled(settings, questions())
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = distilled(replace(settings, run_folder=tmp_path / "b", **smaller), questions())
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in "ab")
    for column in ("loss", "ce_loss", "kl_loss", "grad_norm", "eval_kl_loss", "eval_loss", "tokens_seen"):
        np.testing.assert_allclose(one[column], two[column], rtol=1e-4, err_msg=column)


@pytest.mark.parametrize("make", [questions, lambda: blocks(24)], ids=["questions", "text"])
@pytest.mark.parametrize("reduction", ["token", "batchmean"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_evaluation_has_the_scale_of_training(tmp_path, divergence, reduction, make):
    """Trained and evaluated on the same batch with a learning rate of nothing, the losses are the same."""
    rows = make()
    settings = config(tmp_path, objective=distillation(divergence, reduction=reduction), max_steps=1, eval_steps=1)
    distilled(replace(settings, learning_rate=1e-12, per_device_train_batch_size=24), rows, rows)
    logged = pd.read_csv(tmp_path / "metrics.csv")
    first, evaluated = logged.iloc[0], logged.dropna(subset="eval_loss").iloc[0]
    for name in ("loss", "ce_loss", "kl_loss"):
        assert evaluated[f"eval_{name}"] == pytest.approx(first[name], rel=1e-5), name


@pytest.mark.parametrize("batch_size", [1, 24])
def test_what_the_divergence_sums_belongs_to_its_own_document(batch_size):
    subject = ObjectiveModel(model(distillation()).model, distillation(), a_teacher())
    found = evaluate(subject, questions(), batch_size).per_document
    assert found["kl_units"].tolist() == [len(row) for row in questions()["input_ids"]]


def test_questions_are_scored_on_their_answers_by_document():
    subject, rows = model(distillation("none")), questions()
    result = evaluate(subject, rows, 5, bytes_of_tokens=np.full(VOCAB, 2.0))
    for document in range(24):
        tokens, labels = (torch.tensor(rows[document][name]) for name in ("input_ids", "labels"))
        answers = labels[1:] >= 0
        with torch.no_grad():
            logits = subject.model(tokens[None]).logits[0, :-1][answers]
        found = result.per_document.loc[document]
        wanted = cross_entropy(logits, tokens[1:][answers], reduction="sum").item()
        assert found["ce_sum"] == pytest.approx(wanted, rel=1e-5)
        assert found["tokens"] == answers.sum() and found["bytes"] == 2 * answers.sum()
    assert result.calibration["tokens"].sum() == result.per_document["tokens"].sum()


def test_the_teacher_is_measured_on_the_same_tokens_as_the_student():
    teacher, rows = a_teacher(), questions()
    subject = ObjectiveModel(model(distillation("none")).model, distillation("none"), teacher)
    metrics = evaluate(subject, rows, 7, bytes_of_tokens=np.ones(VOCAB)).metrics("eval")
    alone = evaluate(ObjectiveModel(teacher.models[0], distillation("none")), rows, 7).metrics("eval")
    for name in ("ce_loss", "token_acc", "perplexity"):
        assert metrics[f"teacher_eval_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-5)
    itself = ObjectiveModel(teacher.models[0], distillation("none"), teacher)
    same = evaluate(itself, rows, 7, bytes_of_tokens=np.ones(VOCAB)).metrics("eval")
    assert same["eval_kl_to_teacher"] == pytest.approx(0, abs=1e-6) and same["eval_agreement"] == 1
    assert metrics["eval_kl_to_teacher"] > 0.01 and metrics["eval_agreement"] < 1


def test_the_control_trains_as_the_control_of_other_studies_does(tmp_path):
    """Notebook 04 with alpha 0 and notebook 03 without divergence: one arm, so one study may borrow the other's."""
    one = trained(config(tmp_path / "a", objective=cosine_mixing(0.0)), dropout=0.1)
    other = trained(config(tmp_path / "b", objective=distillation("none")), dropout=0.1)
    assert torch.equal(weights(one), weights(other))


def test_padding_is_an_end_token_that_only_the_answers_own_end_is_scored_for():
    batch = collate([questions()[i] for i in range(24)])
    assert batch["input_ids"].shape == batch["labels"].shape
    for row, labels in zip(questions(), batch["labels"], strict=True):
        assert labels[len(row["input_ids"]) - 1] == 0  # the end token of the answer is learned
        assert (labels[len(row["input_ids"]) :] == IGNORE_INDEX).all()


def test_early_stopping_counts_evaluations_without_a_better_model(tmp_path):
    best = BestModel(tmp_path / "best", model(distillation("none")).model)
    stopping, control = EarlyStopping(2, best), TrainerControl()
    stopped = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.0]):
        metrics = {"eval_ce_loss": loss}
        best.on_evaluate(None, TrainerState(global_step=step), control, metrics)
        stopping.on_evaluate(None, TrainerState(global_step=step), control, metrics)
        stopped.append(control.should_training_stop)
    assert stopped == [False] * 5 + [True] * 2 and best.step == 6


def test_training_stops_early_and_is_still_audited(tmp_path):
    settings = config(tmp_path, objective=distillation("none"), max_steps=60, eval_steps=2, learning_rate=0.3)
    trainer = trained(replace(settings, early_stopping_patience=3))
    assert trainer.state.global_step < 60
    assert trainer.state.global_step == trainer.best_model.step + 6
    assert pd.read_csv(tmp_path / "audit.csv")["step"].max() == trainer.state.global_step


def test_adafactor_is_the_optimiser_when_asked_for(tmp_path):
    trainer = trained(config(tmp_path, objective=distillation("none"), optim="adafactor", max_steps=1, eval_steps=1))
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), Adafactor)


# ---- on prepared data ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from nbutils.data.preparation import DataConfig, load_data, prepare_data

    folder = tmp_path_factory.mktemp("data")
    prepare_data(DataConfig(max_documents=40, vocab_size=300, block_size=BLOCK), folder)
    return load_data(folder)


@pytest.fixture(scope="module")
def teacher_run(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    settings = config(folder, data_folder=prepared.folder, objective=distillation("none"), model_name="micro")
    train(replace(settings, audit_blocks=0))
    return folder


def test_a_student_learns_from_a_run_on_random_chunks(prepared, teacher_run, tmp_path):
    settings = config(tmp_path, data_folder=prepared.folder, objective=distillation(), model_name="micro")
    numbers = train(replace(settings, teachers=(str(teacher_run),), random_chunks=True, num_train_epochs=2))
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows["kl_loss"].dropna().gt(0).all() and rows["eval_kl_loss"].notna().any()
    assert math.isfinite(numbers["best_eval_ce_loss"]) and (tmp_path / "model_best" / "tokenizer.json").exists()
    assert model_of(str(teacher_run)) == str(teacher_run / "model_best")


def test_chunks_change_with_the_epoch_and_with_nothing_else(prepared, tmp_path):
    seen = []

    class Recording(ObjectiveTrainer):
        """Sees the batches and learns nothing, which takes no time."""

        def compute_loss(self, subject, inputs, *rest, **named):
            seen.append(inputs["input_ids"].clone())
            return sum(parameter.sum() * 0 for parameter in subject.parameters())

    settings = config(tmp_path, data_folder=prepared.folder, objective=distillation("none"), random_chunks=True)
    settings = replace(settings, max_steps=0, num_train_epochs=2, per_device_train_batch_size=256, eval_steps=10**6)
    settings = replace(settings, audit_blocks=0)
    for _ in range(2):
        set_seed(settings.seed)
        student = load_model("micro", prepared.tokenizer, BLOCK, from_scratch=True)
        teacher, rows, eval_rows = training_rows(settings, prepared, student)
        Recording(settings, ObjectiveModel(student, settings.objective, teacher), rows, eval_rows).train()
    half, epoch = len(seen) // 2, len(seen) // 4
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    first, second = (set(map(tuple, torch.cat(part).tolist())) for part in (seen[:epoch], seen[epoch:half]))
    assert len(first & second) < 0.2 * len(first)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"teachers": ()}, ParameterError, "divergence forward needs a teacher"),
        ({"teachers": ("tiny",)}, ModelError, "'tiny' is a configuration and has no weights.*02_teacher_finetune"),
        ({"teacher_cache": "disk"}, ParameterError, "teacher_cache is 'disk'"),
        (
            {"teacher_cache": "topk", "objective": distillation("jsd")},
            ParameterError,
            "divergence jsd needs the teacher's probability of every token",
        ),
    ],
)
def test_what_does_not_fit_is_refused(prepared, teacher_run, tmp_path, changes, error, message):
    settings = config(tmp_path, data_folder=prepared.folder, objective=distillation(), model_name="micro")
    settings = replace(settings, **({"teachers": (str(teacher_run),)} | changes))
    student = load_model("micro", prepared.tokenizer, BLOCK, from_scratch=True)
    with pytest.raises(error, match=message):
        training_rows(settings, prepared, student)


def test_a_folder_that_is_no_model_and_another_vocabulary_are_refused(prepared, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError, match=r"The teacher cannot be used.*nothing"):
        load_teachers([str(tmp_path / "nothing")], prepared.tokenizer, BLOCK)
    model(distillation("none")).model.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=rf"has {VOCAB} tokens, the tokenizer of the data {len(prepared.tokenizer)}"):
        load_teachers([str(tmp_path / "other")], prepared.tokenizer, BLOCK)


def test_what_ran_before_training_does_not_count_as_its_memory():
    big = torch.ones(80 * 2**20)
    high = memory_mib()
    del big
    reset_peak_memory()
    assert memory_mib() < high - 200


def test_a_teacher_that_diverged_has_no_finite_perplexity():
    from nbutils.evaluation.perplexity import perplexity

    assert math.isnan(perplexity(math.nan)) and perplexity(1e4) == math.inf and perplexity(0.0) == 1


def test_a_student_that_diverged_leaves_its_last_model_and_no_best(prepared, tmp_path):
    settings = config(tmp_path, data_folder=prepared.folder, objective=distillation("none"), model_name="micro")
    numbers = train(replace(settings, learning_rate=1e30, max_grad_norm=0.0, eval_steps=6, audit_blocks=0))
    assert numbers["best_step"] == 0 and not (tmp_path / "model_best").exists()
    assert model_of(str(tmp_path)) == str(tmp_path / "model")
    diverged = ObjectiveModel(load_trained(saved_model(tmp_path)), settings.objective)
    assert math.isnan(evaluate(diverged, prepared.blocks["validation"], 8).metrics("eval")["eval_ce_loss"])


@dataclass(frozen=True)
class StoppingJob:
    folder: Path


def train_until_it_is_no_better(job):
    settings = config(job.folder, objective=distillation("none"), max_steps=60, eval_steps=2, learning_rate=0.3)
    return trained(replace(settings, early_stopping_patience=2, per_device_train_batch_size=4)).state.global_step


@pytest.mark.slow
@pytest.mark.soak
def test_two_ranks_stop_together(tmp_path):
    assert launch(train_until_it_is_no_better, StoppingJob(tmp_path), processes=2, log_folder=tmp_path) < 60


@pytest.fixture(scope="module")
def live(prepared, teacher_run, tmp_path_factory):
    """Settings and result of a student of a live teacher."""
    folder = tmp_path_factory.mktemp("student") / "live"
    settings = config(folder, data_folder=prepared.folder, objective=distillation(), model_name="micro")
    settings = replace(settings, teachers=(str(teacher_run),), audit_blocks=1)
    return settings, train(settings)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_student_learns_from_the_cache_almost_as_from_the_live_teacher(live, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("nbutils.foundation.places.RUNS", tmp_path / "runs")
    settings, alone = live
    cached = replace(settings, run_folder=tmp_path / "cached", teacher_cache=kind, cache_top_k=280)
    numbers = train(cached)
    assert numbers["best_eval_ce_loss"] == pytest.approx(alone["best_eval_ce_loss"], rel=2e-3)
    assert numbers["teacher_cache_kl_error"] < 1e-2
    assert numbers["teacher_cache_gradient_error"] < {"hidden": 1e-2, "topk": 0.15}[kind]  # float16 log-probabilities
    rows = [pd.read_csv(folder / "metrics.csv") for folder in (settings.run_folder, cached.run_folder)]
    np.testing.assert_allclose(rows[1]["kl_loss"].dropna(), rows[0]["kl_loss"].dropna(), rtol=2e-2, atol=2e-5)
    np.testing.assert_allclose(rows[1]["eval_kl_loss"].dropna(), rows[0]["eval_kl_loss"].dropna(), rtol=2e-2, atol=2e-5)
    monkeypatch.setattr(LiveTeacher, "target", lambda *_: pytest.fail("the teacher ran again"))
    again = train(replace(cached, run_folder=tmp_path / "again"))
    assert again["teacher_cache_kl_error"] == numbers["teacher_cache_kl_error"]
    audit = pd.read_csv(tmp_path / "cached" / "audit.csv")
    assert audit["applied_error"].max() < 1e-3  # the cached target is the textbook's too
