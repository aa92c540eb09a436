"""Objectives: the chunked head against the textbook forms in float64, gradcheck, masks, accumulation, precision.

python -m pytest tests/objectives
"""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from nbutils.data.batches import IGNORE_INDEX
from nbutils.foundation.errors import ParameterError
from nbutils.models import products
from nbutils.objectives import (
    Accuracy,
    CosineProxy,
    CrossEntropy,
    UnigramCosine,
    WeightedTerm,
    chunked_head,
    cosine_mixing,
    head,
    term_values,
)
from nbutils.objectives.terms.cosine import ExpectedEmbeddingCosine
from nbutils.objectives.terms.cosine import expected_embedding_cosine as textbook_expected_embedding_cosine
from nbutils.objectives.terms.cross_entropy import cross_entropy as textbook_cross_entropy

POSITIONS, VOCAB, WIDTH = 23, 37, 8
MIXES = {
    "cross entropy": [(CrossEntropy(), 1.0)],
    "cosine": [(ExpectedEmbeddingCosine(), 1.0)],
    "cosine T=0.7": [(ExpectedEmbeddingCosine(0.7), 1.0)],
    "cosine T=1.5 top-5": [(ExpectedEmbeddingCosine(1.5, 5), 1.0)],
    "mix": [(CrossEntropy(), 0.3), (ExpectedEmbeddingCosine(1.5), 0.7)],
    "mix top-5": [(CrossEntropy(), 0.5), (ExpectedEmbeddingCosine(1.0, 5), 0.5)],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several uneven chunks even at these sizes: 23 positions in chunks of 5."""
    monkeypatch.setattr(products, "CHUNK_BYTES", 4 * VOCAB * 5)
    monkeypatch.setattr(products, "ROW_BLOCK", 1)
    monkeypatch.setattr("nbutils.objectives.terms.cosine.GATHER_BYTES", 8 * 5 * WIDTH * 2)
    monkeypatch.setattr("nbutils.objectives.terms.cosine.VOCAB_BLOCK", 10)


def example(dtype=torch.float64, tied=False, ignored=6, shape=(POSITIONS, VOCAB, WIDTH)):
    positions, vocab, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    embeddings = weight if tied else torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (positions,), generator=generator)
    labels[torch.randperm(positions, generator=generator)[:ignored]] = IGNORE_INDEX
    leaves = [
        tensor.to(dtype).requires_grad_() for tensor in ((hidden, weight) if tied else (hidden, weight, embeddings))
    ]
    return leaves[0], leaves[1], leaves[-1], labels, leaves


def weighted(mix, labels, count=None):
    count = torch.tensor(count or (labels != IGNORE_INDEX).sum().item())
    return [WeightedTerm(term, weight, count) for term, weight in mix]


def textbook(mix, hidden, weight, embeddings, labels):
    kept = labels != IGNORE_INDEX
    logits = hidden[kept] @ weight.t()
    total = 0
    for term, share in mix:
        if isinstance(term, CrossEntropy):
            values = textbook_cross_entropy(logits, labels[kept])
        else:
            values = textbook_expected_embedding_cosine(logits, embeddings, labels[kept], term.temperature, term.top_k)
        total = total + share * values.mean()
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_loss_and_all_gradients_equal_the_textbook_form(mix, tied):
    hidden, weight, embeddings, labels, leaves = example(tied=tied)
    loss, _ = chunked_head(hidden, weight, embeddings, labels, weighted(mix, labels))
    expected = textbook(mix, hidden, weight, embeddings, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(3.7 * loss, leaves, allow_unused=True)
    references = torch.autograd.grad(3.7 * expected, leaves, allow_unused=True)
    for gradient, wanted in zip(gradients, references, strict=True):
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_gradcheck(mix):
    hidden, weight, embeddings, labels, _ = example(shape=(7, 11, 3), ignored=2)

    class Once(torch.autograd.Function):
        """gradcheck walks backward often over one graph, the head allows it once: build the graph anew each time."""

        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return chunked_head(*leaves, labels, weighted(mix, labels))[0]

        @staticmethod
        def backward(ctx, d_loss):
            leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
            with torch.enable_grad():
                loss, _ = chunked_head(*leaves, labels, weighted(mix, labels))
            return torch.autograd.grad(loss, leaves, d_loss, materialize_grads=True)

    assert torch.autograd.gradcheck(Once.apply, (hidden, weight, embeddings), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_a_chunk_is_whole_blocks_and_no_larger_than_its_budget(monkeypatch):
    monkeypatch.setattr(products, "ROW_BLOCK", 64)
    monkeypatch.setattr(products, "CHUNK_BYTES", 40 * 2**20)
    assert products.chunk_rows(50257, 10_000) == 192  # GPT-2
    assert products.chunk_rows(128_256, 10_000) == 64  # Llama 3
    assert products.chunk_rows(10**6, 10_000) == 64  # never less than a block
    assert products.chunk_rows(50257, 40) == 40 and products.chunk_rows(50257, 0) == 1


def test_buffers_of_an_earlier_chunk_do_not_leak_into_the_next(monkeypatch):
    """Every chunk overwrites the same memory: whatever it held must not matter."""
    hidden, weight, embeddings, labels, leaves = example()
    terms = weighted(MIXES["mix top-5"], labels)
    wanted = torch.autograd.grad(chunked_head(hidden, weight, embeddings, labels, terms)[0], leaves)
    take = head.Buffers.take
    monkeypatch.setattr(head.Buffers, "take", lambda *arguments: take(*arguments).fill_(torch.nan))
    found = torch.autograd.grad(chunked_head(hidden, weight, embeddings, labels, terms)[0], leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_reference_forms_equal_torch():
    hidden, weight, embeddings, labels, _ = example(ignored=0)
    logits = hidden @ weight.t()
    torch.testing.assert_close(textbook_cross_entropy(logits, labels).mean(), cross_entropy(logits, labels))
    mu = sum(logits.softmax(-1)[:, j : j + 1] * embeddings[j] for j in range(VOCAB))
    wanted = 1 - cosine_similarity(mu, embeddings[labels])
    torch.testing.assert_close(textbook_expected_embedding_cosine(logits, embeddings, labels), wanted)
    everything = textbook_expected_embedding_cosine(logits, embeddings, labels, top_k=VOCAB)
    torch.testing.assert_close(everything, wanted)


def test_gold_probability_one_has_cosine_distance_zero():
    labels = torch.tensor([3])
    embeddings = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    logits = torch.full((1, VOCAB), -1e4, dtype=torch.float64)
    logits[0, 3] = 0
    assert textbook_expected_embedding_cosine(logits, embeddings, labels).item() == pytest.approx(0, abs=1e-12)


def test_a_zero_embedding_has_cosine_zero_and_no_gradient():
    hidden, weight, embeddings, labels, leaves = example(ignored=0)
    with torch.no_grad():
        embeddings[labels[0]] = 0
    loss, _ = chunked_head(hidden, weight, embeddings, labels, weighted([(ExpectedEmbeddingCosine(), 1.0)], labels))
    gradients = torch.autograd.grad(loss, leaves)
    assert all(gradient.abs().max() < 100 for gradient in gradients)
    values = term_values(hidden, weight, embeddings, labels, {"cosine": ExpectedEmbeddingCosine()})
    assert values["cosine"][0] == 1


def test_a_top_k_beyond_the_vocabulary_is_all_of_it():
    hidden, weight, embeddings, labels, _ = example(ignored=0)
    logits = hidden @ weight.t()
    wanted = textbook_expected_embedding_cosine(logits, embeddings, labels)
    torch.testing.assert_close(textbook_expected_embedding_cosine(logits, embeddings, labels, top_k=512), wanted)
    values = term_values(hidden, weight, embeddings, labels, {"cosine": ExpectedEmbeddingCosine(top_k=512)})
    torch.testing.assert_close(values["cosine"], wanted)


def test_detached_embeddings_receive_the_output_gradient_alone():
    mix = [(ExpectedEmbeddingCosine(detach_embeddings=True), 1.0)]
    hidden, weight, _, labels, leaves = example(tied=True)
    loss, _ = chunked_head(hidden, weight, weight, labels, weighted(mix, labels))
    wanted = textbook(mix, hidden, weight, weight.detach(), labels)
    for gradient, reference_ in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, reference_, rtol=1e-9, atol=1e-12)


def test_a_masked_row_changes_neither_loss_nor_gradients_whatever_it_holds():
    hidden, weight, embeddings, labels, leaves = example()
    terms = weighted(MIXES["mix"], labels)
    before = torch.autograd.grad(chunked_head(hidden, weight, embeddings, labels, terms)[0], leaves)
    other = hidden.detach().clone()
    other[labels == IGNORE_INDEX] = torch.nan
    other.requires_grad_()
    after = torch.autograd.grad(chunked_head(other, weight, embeddings, labels, terms)[0], [other, weight, embeddings])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not before[0][labels == IGNORE_INDEX].any()


def test_nothing_to_score_gives_zero_and_zero_gradients():
    hidden, weight, embeddings, labels, leaves = example()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    loss, sums = chunked_head(hidden, weight, embeddings, nothing, weighted(MIXES["mix"], labels))
    gradients = torch.autograd.grad(loss, leaves)
    assert loss == 0 and set(sums) == {"ce", "cosine"}
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_accumulation_over_uneven_parts_is_exact(parts):
    hidden, weight, embeddings, labels, leaves = example(torch.float32)
    whole = torch.autograd.grad(
        chunked_head(hidden, weight, embeddings, labels, weighted(MIXES["mix"], labels))[0], leaves
    )
    count = (labels != IGNORE_INDEX).sum().item()
    loss = sum(
        chunked_head(h, weight, embeddings, y, weighted(MIXES["mix"], y, count))[0]
        for h, y in zip(hidden.tensor_split(parts), labels.tensor_split(parts), strict=True)
    )
    for gradient, wanted in zip(torch.autograd.grad(loss, leaves), whole, strict=True):
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


def test_terms_with_counts_of_their_own_are_averaged_over_them():
    hidden, weight, embeddings, labels, leaves = example()
    terms = [
        WeightedTerm(CrossEntropy(), 0.5, torch.tensor(11)),
        WeightedTerm(ExpectedEmbeddingCosine(), 2.0, torch.tensor(5)),
    ]
    loss, sums = chunked_head(hidden, weight, embeddings, labels, terms)
    torch.testing.assert_close(loss, 0.5 * sums["ce"] / 11 + 2.0 * sums["cosine"] / 5)
    kept = labels != IGNORE_INDEX
    logits = hidden[kept] @ weight.t()
    wanted = 0.5 * textbook_cross_entropy(logits, labels[kept]).sum() / 11
    wanted = wanted + 2.0 * textbook_expected_embedding_cosine(logits, embeddings, labels[kept]).sum() / 5
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_weight_zero_costs_nothing_and_leaves_plain_cross_entropy():
    hidden, weight, embeddings, labels, _ = example()
    loss, sums = chunked_head(
        hidden,
        weight,
        embeddings,
        labels,
        weighted([*MIXES["cross entropy"], (ExpectedEmbeddingCosine(), 0.0)], labels),
    )
    assert set(sums) == {"ce"}
    torch.testing.assert_close(loss, cross_entropy(hidden @ weight.t(), labels))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("mix", [MIXES["mix"], MIXES["mix top-5"]], ids=["mix", "mix top-5"])
def test_autocast_stays_within_the_rounding_of_its_operands(mix, dtype, bound):
    hidden, weight, embeddings, labels, leaves = example(torch.float32)
    exact = example(torch.float64)
    wanted = torch.autograd.grad(textbook(mix, *exact[:3], labels), exact[4])
    with torch.autocast("cpu", dtype):
        loss, sums = chunked_head(hidden, weight, embeddings, labels, weighted(mix, labels))
    assert loss.dtype == torch.float32 and sums["ce"].dtype == torch.float32
    for gradient, reference_ in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference_).norm() <= bound * reference_.norm()


def test_float16_loss_scaling_reaches_tiny_gradients():
    """1/count is far below float16's smallest number: the stored gradients must not be divided by it before scaling."""
    hidden, weight, embeddings, labels, _ = example(torch.float32)
    terms = [WeightedTerm(CrossEntropy(), 1.0, torch.tensor(2**26))]
    with torch.autocast("cpu", torch.float16):
        loss, _ = chunked_head(hidden, weight, embeddings, labels, terms)
    gradient = torch.autograd.grad(loss * 2.0**26, hidden)[0]
    wanted = torch.autograd.grad(cross_entropy(hidden @ weight.t(), labels, reduction="sum"), hidden)[0]
    assert (gradient - wanted).norm() <= 3e-3 * wanted.norm()


def test_a_confident_row_keeps_its_precision():
    hidden = torch.tensor([[12.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    loss, _ = chunked_head(hidden, weight, None, torch.tensor([0]), weighted(MIXES["cross entropy"], torch.tensor([0])))
    wanted = cross_entropy(hidden.double() @ weight.double().t(), torch.tensor([0]))
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)


def test_values_per_position_equal_the_references():
    hidden, weight, embeddings, labels, _ = example()
    measures = {
        "ce": CrossEntropy(),
        "correct": Accuracy(),
        "proxy": CosineProxy(),
        "T": ExpectedEmbeddingCosine(2.0, 5),
    }
    values = term_values(hidden, weight, embeddings, labels, measures)
    kept = labels != IGNORE_INDEX
    logits = (hidden @ weight.t())[kept]
    wanted = {
        "ce": textbook_cross_entropy(logits, labels[kept]),
        "correct": (logits.argmax(-1) == labels[kept]).double(),
        "proxy": 1 - textbook_expected_embedding_cosine(logits, embeddings, labels[kept]),
        "T": textbook_expected_embedding_cosine(logits, embeddings, labels[kept], 2.0, 5),
    }
    for name, value in values.items():
        torch.testing.assert_close(value[kept], wanted[name], msg=name)
        assert not value[~kept].any()


def test_collapsed_embeddings_raise_the_raw_proxy_and_not_the_centred_one():
    hidden, weight, embeddings, labels, _ = example(ignored=0)
    frequencies = torch.bincount(labels, minlength=VOCAB).double() / POSITIONS
    measures = {"raw": CosineProxy(), "centred": CosineProxy(frequencies), "unigram": UnigramCosine(frequencies)}
    before = term_values(hidden, weight, embeddings, labels, measures)
    after = term_values(hidden, weight, embeddings.detach() + 100.0, labels, measures)
    assert after["raw"].mean() > 0.99 > before["raw"].mean()
    assert after["unigram"].mean() > 0.99
    torch.testing.assert_close(after["centred"], before["centred"])
    mean = embeddings[labels].mean(0)
    logits = hidden @ weight.t()
    wanted = 1 - textbook_expected_embedding_cosine(logits, embeddings - mean, labels)
    torch.testing.assert_close(before["centred"], wanted)
    unigram = frequencies.log().expand(POSITIONS, -1)
    wanted = 1 - textbook_expected_embedding_cosine(unigram, embeddings, labels)
    torch.testing.assert_close(before["unigram"], wanted)


def test_a_second_backward_is_refused():
    hidden, weight, embeddings, labels, leaves = example()
    loss, _ = chunked_head(hidden, weight, embeddings, labels, weighted(MIXES["mix"], labels))
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": 1.5}, r"alpha is 1\.5.*\[0, 1\]"),
        ({"alpha": -0.1}, r"\[0, 1\]"),
        ({"alpha": 0.5, "temperature": 0}, "temperature is 0"),
        ({"alpha": 0.5, "ramp": 2}, "alpha_ramp is 2"),
        ({"alpha": 0.5, "top_k": -1}, "cos_topk is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        cosine_mixing(**settings)


def test_the_ramp_leads_from_cross_entropy_to_alpha():
    objective = cosine_mixing(0.8, ramp=0.1)
    assert objective.weights_at(0) == (1.0, 0.0)
    assert objective.weights_at(0.05) == pytest.approx((0.6, 0.4))
    assert objective.weights_at(0.1) == objective.weights_at(1) == pytest.approx((0.2, 0.8))
    assert cosine_mixing(0.8).weights_at(0) == pytest.approx((0.2, 0.8))
