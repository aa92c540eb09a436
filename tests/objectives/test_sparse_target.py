"""Cross entropy against sparse soft targets: against PyTorch's own on full rows, in float64 and by autograd.

python -m pytest tests/test_sparse_target.py
"""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from small_training import VOCAB, blocks, config, model, trained
from torch.nn.functional import cross_entropy, kl_div

from nbutils.benchmarks.comparisons import random_targets
from nbutils.data.batches import IGNORE_INDEX
from nbutils.evaluation.perplexity import evaluate
from nbutils.evaluation.prefix_study import (
    UnsmoothedLogits,
    choose_mixing,
    gold_probabilities,
    predicted_costs,
    smoothing_facts,
    unsmoothing_of,
)
from nbutils.models import products
from nbutils.objectives import (
    CrossEntropy,
    PrefixMass,
    SparseTargets,
    WeightedTerm,
    chunked_head,
    smoothing,
    term_values,
)
from nbutils.objectives.check import compare_with_textbook
from nbutils.objectives.prefixes import PrefixTable, SmoothedTargets, Smoothing, Unsmoothing, smoothed_targets
from nbutils.objectives.terms.sparse_target import SmoothedCrossEntropy, TargetDivergence
from nbutils.training.audit import audit_batch

WIDTH, POSITIONS = 8, 41


def table_of(vocab: int) -> PrefixTable:
    """Token i has the length i // 4 + 1; the prefixes of 8 and 9 are 0 and 4, all other tokens stand alone."""
    rows = [[0, 4, y] if y in (8, 9) else [y] for y in range(vocab)]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    lengths = (np.arange(vocab) // 4 + 1).astype(np.int32)
    none = np.zeros(vocab, bool)
    return PrefixTable(offsets, np.concatenate(rows).astype(np.int32), lengths, none, ~none)


def with_background(vocab: int) -> SmoothedTargets:
    return smoothed_targets(table_of(vocab), Smoothing("mixed_uniform", eps=0.4, over="uniform"))


@pytest.fixture(params=["prefixes", "random rows", "background"])
def targets(request) -> SmoothedTargets:
    if request.param == "prefixes":
        return smoothed_targets(table_of(50), Smoothing("unnormalised", tau=1.0))
    return random_targets(50) if request.param == "random rows" else with_background(50)


@pytest.fixture
def problem(monkeypatch):
    """Hidden states, matrix and labels in float64, in several uneven chunks; a few labels are not scored."""
    monkeypatch.setattr(products, "CHUNK_BYTES", 4 * 50 * 7)
    monkeypatch.setattr(products, "ROW_BLOCK", 1)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (POSITIONS,), generator=generator)
    labels[[2, 30]] = IGNORE_INDEX
    labels[[5, 17]] = torch.tensor([8, 9])
    return hidden, weight, labels


def test_value_and_gradients_are_those_of_pytorch_on_full_rows(problem, targets):
    hidden, weight, labels = problem
    sparse = SparseTargets(targets)
    kept = labels >= 0
    term = WeightedTerm(SmoothedCrossEntropy(sparse), 0.7, kept.sum())
    loss, sums = chunked_head(hidden, weight, None, labels, [term])
    full = sparse.dense(labels[kept])
    assert torch.allclose(full.sum(-1), torch.ones(len(full), dtype=torch.float64), atol=1e-12)
    wanted = 0.7 * cross_entropy(hidden[kept] @ weight.t(), full)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert sums["prefix"].item() == pytest.approx(wanted.item() * kept.sum().item() / 0.7, rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)


def test_full_rows_are_those_of_the_table(targets):
    """By a plain loop over the table, in numpy."""
    dense = SparseTargets(targets).dense(torch.arange(50)).numpy()
    for gold in range(50):
        row = np.full(50, targets.background[gold], np.float64)
        entries = slice(targets.offsets[gold], targets.offsets[gold + 1])
        row[targets.tokens[entries]] += targets.weights[entries]
        assert np.allclose(dense[gold], row, atol=2e-7)


def test_gradients_are_those_of_finite_differences(problem, targets):
    """Along random directions; gradcheck itself walks backward twice over a graph, which the head refuses."""
    hidden, weight, labels = problem
    term = WeightedTerm(SmoothedCrossEntropy(SparseTargets(targets)), 1.0, torch.tensor(3))

    def loss(*leaves):
        return chunked_head(*leaves, None, labels, [term])[0]

    gradients = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        steps = [1e-6 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in (hidden, weight)]
        numeric = (loss(hidden + steps[0], weight + steps[1]) - loss(hidden - steps[0], weight - steps[1])) / 2
        along = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
        assert numeric.item() == pytest.approx(along.item(), rel=1e-6)


def test_a_one_hot_target_is_cross_entropy(problem):
    hidden, weight, labels = problem
    plain = SparseTargets(smoothed_targets(table_of(50), Smoothing("none")))
    count = (labels >= 0).sum()
    found = [
        chunked_head(hidden, weight, None, labels, [WeightedTerm(term, 1.0, count)])[0]
        for term in (SmoothedCrossEntropy(plain), CrossEntropy())
    ]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-13)


def test_divergence_is_that_of_pytorch_and_zero_where_the_target_is_learnt(problem, targets):
    hidden, weight, labels = problem
    sparse = SparseTargets(targets)
    measures = {"kl": TargetDivergence(sparse)}
    values = term_values(hidden.detach(), weight.detach(), weight.detach(), labels, measures)["kl"]
    kept = labels >= 0
    full = sparse.dense(labels[kept])
    log_p = (hidden[kept] @ weight.t()).log_softmax(-1).detach()
    assert torch.allclose(values[kept], kl_div(log_p, full, reduction="none").sum(-1), atol=2e-6)  # H(q) in float32
    assert (values[~kept] == 0).all()
    learnt = sparse.dense(torch.tensor([8])).clamp_min(1e-30).log()
    value = term_values(learnt, torch.eye(50).double(), torch.eye(50).double(), torch.tensor([8]), measures)["kl"]
    assert value.item() == pytest.approx(0, abs=1e-6)


def test_a_sure_and_right_model_keeps_its_precision_in_float32():
    """L of a one-hot target where p(gold) = 1 - 1e-6: a difference of log-sums would lose it."""
    plain = SparseTargets(smoothed_targets(table_of(50), Smoothing("none")))
    logits = torch.zeros(1, 50)
    logits[0, 3] = math.log(49 / 1e-6)
    measures = {"prefix": SmoothedCrossEntropy(plain)}
    value = term_values(logits, torch.eye(50), torch.eye(50), torch.tensor([3]), measures)["prefix"]
    assert value.item() == pytest.approx(1e-6, rel=0.25)  # 4 units in the last place of p


def test_prefix_mass_counts_strict_prefixes_of_the_tokens_asked_about():
    prefixes = SparseTargets(smoothed_targets(table_of(12), Smoothing("normalised")))
    scored = torch.zeros(12, dtype=torch.bool)
    scored[8] = True
    p = torch.arange(1.0, 13) / 78  # token i has (i + 1) / 78
    labels = torch.tensor([8, 9, 3, IGNORE_INDEX])
    measure = PrefixMass(prefixes, scored)
    values = term_values(p.log().expand(4, 12), torch.eye(12), torch.eye(12), labels, {"mass": measure})["mass"]
    assert values.tolist() == pytest.approx([(1 + 5) / 78, 0, 0, 0])
    assert measure.units(labels.view(1, 4)).tolist() == [[True, False, False, False]]


def test_evaluation_divides_each_measure_by_its_own_tokens():
    """Sums over documents, by hand from the model's own probabilities."""
    targets = smoothed_targets(table_of(VOCAB), Smoothing("normalised", tau=1.0))
    sparse = SparseTargets(targets)
    scored = torch.zeros(VOCAB, dtype=torch.bool)
    scored[8:10] = True
    rows, subject = blocks(6), model(smoothing(targets))
    found = evaluate(subject, rows, 4, further={"prefix_mass": PrefixMass(sparse, scored)}).metrics("eval")
    ids = torch.tensor(np.array(rows["input_ids"]))
    p = subject.model.eval()(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1).double()
    gold = ids[:, 1:].flatten()
    divergence = kl_div(p, sparse.dense(gold), reduction="none").sum(-1).mean().item()
    asked = scored[gold]
    mass = p.exp()[asked][:, [0, 4]].sum(-1).mean().item()
    assert found["eval_kl_to_target"] == pytest.approx(divergence, abs=1e-5)
    assert found["eval_prefix_mass"] == pytest.approx(mass, rel=1e-4)
    soft = -(sparse.dense(gold) * p).sum(-1).mean().item()
    assert found["eval_prefix_loss"] == found["eval_loss"] == pytest.approx(soft, rel=1e-5)


def test_training_on_a_soft_target_comes_nearer_to_it(tmp_path):
    targets = smoothed_targets(table_of(VOCAB), Smoothing("normalised", tau=1.0))
    trained(config(tmp_path, objective=smoothing(targets), max_steps=12, learning_rate=1e-2))
    columns = pd.read_csv(tmp_path / "metrics.csv")
    divergence = columns["eval_kl_to_target"].dropna().tolist()
    assert divergence[-1] < divergence[0]
    assert columns["prefix_loss"].notna().any() and columns["eval_prefix_loss"].notna().any()


def test_the_audit_of_a_large_vocabulary_takes_fewer_positions(monkeypatch):
    rows = blocks(4)
    assert audit_batch(rows, 3, VOCAB)["labels"].shape == (3, 16)
    monkeypatch.setattr("nbutils.training.audit.LARGEST_LOGITS", 40 * VOCAB)
    assert audit_batch(rows, 3, VOCAB)["labels"].shape == (2, 16)
    monkeypatch.setattr("nbutils.training.audit.LARGEST_LOGITS", 5 * VOCAB)
    assert audit_batch(rows, 3, VOCAB)["input_ids"].tolist() == [rows[0]["input_ids"][-5:]]
    question = {"input_ids": np.arange(16), "labels": np.array([-1] * 10 + [10, 11, 12] + [-100] * 3)}
    assert audit_batch([question], 1, VOCAB)["labels"].tolist() == [[-1, -1, 10, 11, 12]]


def test_the_notebooks_own_comparison_holds_and_terms_reach_other_processes(targets):
    objective = pickle.loads(pickle.dumps(smoothing(targets)))
    assert max(compare_with_textbook(objective).values()) < 1e-12


def test_the_control_has_no_soft_term():
    assert [term.name for term in smoothing(None).terms] == ["ce"]


def test_the_mixing_is_the_best_there_is():
    """Against a fine grid; and where un-smoothing only harms, the model as it is."""
    generator = np.random.default_rng(0)
    p = generator.uniform(0.01, 0.6, 400)
    unsmoothed = np.where(generator.random(400) < 0.1, 0, p * 1.4)
    gold = pd.DataFrame({"p": p, "unsmoothed": unsmoothed})
    grid = np.linspace(1e-4, 1, 20_001)
    costs = [-np.log((1 - d) * unsmoothed + d * p).mean() for d in grid]
    assert choose_mixing(gold) == pytest.approx(grid[int(np.argmin(costs))], abs=1e-3)
    assert choose_mixing(pd.DataFrame({"p": p, "unsmoothed": p * 0.5})) == 1.0


def test_gold_probabilities_are_the_inverse_of_the_models():
    """The smoothing of a model's own distribution, solved by numpy on full matrices, where nothing has to be cut."""
    targets = smoothed_targets(table_of(VOCAB), Smoothing("mixed_uniform", eps=1e-4))
    subject, rows = model(smoothing(targets)), blocks(3)
    found = gold_probabilities(subject, rows, Unsmoothing(targets, table_of(VOCAB).lengths), 2)
    ids = torch.tensor(np.array(rows["input_ids"]))
    p = subject.model.eval()(ids).logits[:, :-1].double().softmax(-1).flatten(0, 1).detach().numpy()
    matrix = SparseTargets(targets).dense(torch.arange(VOCAB)).numpy().T  # p = A P
    wanted = np.linalg.solve(matrix, p.T).T
    gold = ids[:, 1:].flatten().numpy()
    assert (wanted > 0).all()
    assert np.allclose(found["unsmoothed"], wanted[np.arange(len(gold)), gold], rtol=1e-4)
    assert np.allclose(found["p"], p[np.arange(len(gold)), gold], rtol=1e-4)
    assert found["token"].tolist() == gold.tolist() and not found["below_zero"].any()


def test_sampling_sees_the_unsmoothed_distribution():
    targets = smoothed_targets(table_of(12), Smoothing("normalised", tau=1.0))
    inverse = Unsmoothing(targets, table_of(12).lengths)
    text = torch.rand(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    smoothed = text @ SparseTargets(targets).dense(torch.arange(12))
    for mixing, wanted in ((0.0, text), (0.25, 0.75 * text + 0.25 * smoothed)):
        scores = UnsmoothedLogits(inverse, mixing)(None, smoothed.log() + 5)
        assert torch.allclose(scores.exp(), wanted, atol=1e-6)


def test_what_cannot_be_unsmoothed_and_what_the_control_goes_through():
    table, counts = table_of(12), np.ones(12)
    nothing_left = Smoothing("mixed_uniform", eps=1.0)
    targets = smoothed_targets(table, nothing_left)
    assert unsmoothing_of(nothing_left, targets, table) is None
    assert smoothing_facts(nothing_left, targets, counts)["effective_smoothing"] == pytest.approx(2 / 12)
    reference = smoothed_targets(table, Smoothing("normalised", tau=0.2)).gold_mass[8]
    for control in (Smoothing("none", tau=1.0), Smoothing("unnormalised", tau=0.05)):  # cross entropy, and its A/A null
        inverse = unsmoothing_of(control, smoothed_targets(table, control), table)
        assert inverse.targets.gold_mass[8] == reference < 1


def test_the_ceiling_is_that_of_the_tokens_a_split_is_scored_on():
    targets = smoothed_targets(table_of(12), Smoothing("mixed_uniform", eps=0.5))
    rows = Dataset.from_dict({"input_ids": [[1, 8, 9, 2]], "document_ids": [[0, 0, 0, 0]]})
    found = predicted_costs(targets, {"validation": rows, "test": rows.select([])}, ["validation", "test"])
    assert found == {"eval_predicted_cost": pytest.approx(2 / 3 * math.log(2))}  # of 8, 9 and 2; the first is context
