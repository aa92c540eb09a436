"""Distillation: the chunked term against probability space, its limits, masks, vocabularies and precision.

python -m pytest tests/test_distillation.py
"""

import pytest
import torch
from torch.nn.functional import kl_div

from nbutils.data.batches import IGNORE_INDEX, UNLABELLED
from nbutils.models import products
from nbutils.models.teacher_target import TeacherStates, TopTokens
from nbutils.objectives import CrossEntropy, Distillation, WeightedTerm, chunked_head, next_tokens
from nbutils.objectives.terms.distillation import distillation as textbook_distillation

BATCH, TIME, VOCAB, WIDTH, TEACHER_WIDTH = 3, 8, 37, 6, 10
POSITIONS = BATCH * TIME
TERMS = {
    "forward": Distillation(),
    "forward T=0.7": Distillation(0.7),
    "reverse": Distillation(2.0, "reverse"),
    "jsd": Distillation(1.5, "jsd", 0.3),
    "answers": Distillation(positions="answers"),
    "batchmean": Distillation(reduction="batchmean"),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several uneven chunks even at these sizes: of 5 positions."""
    monkeypatch.setattr(products, "CHUNK_BYTES", 4 * VOCAB * 5)
    monkeypatch.setattr(products, "ROW_BLOCK", 1)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(dtype=torch.float64):
    """Leaves h and W, labels (batch, time) with a prompt and padding, and a teacher."""
    hidden, weight = random(POSITIONS, WIDTH, dtype=dtype), random(VOCAB, WIDTH, seed=1, dtype=dtype)
    labels = torch.randint(VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(2))
    labels[:, :2], labels[1, 6:], labels[2, 5:] = UNLABELLED, IGNORE_INDEX, IGNORE_INDEX
    teacher = TeacherStates(
        (random(POSITIONS, TEACHER_WIDTH, seed=3, dtype=dtype),), (random(VOCAB, TEACHER_WIDTH, seed=4, dtype=dtype),)
    )
    return hidden.requires_grad_(), weight.requires_grad_(), labels, teacher


def loss_of(terms, hidden, weight, labels, teacher, counts=None):
    parts = [
        WeightedTerm(term, share, counts[term.name] if counts else term.units(labels).sum()) for term, share in terms
    ]
    return chunked_head(hidden, weight, None, labels.flatten(), parts, teacher)[0]


def assert_gradients_close(loss, wanted, leaves, **tolerance):
    found = torch.autograd.grad(loss, leaves)
    assert all(gradient.isfinite().all() for gradient in found)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves), **tolerance)


def in_probability_space(term, logits, teacher_logits):
    """T^2 D(t, p) per row, written out anew: sums of p log(p / q) over the vocabulary."""
    p, t = (logits / term.temperature).softmax(-1), (teacher_logits / term.temperature).softmax(-1)
    if term.divergence == "forward":
        value = (t * (t / p).log()).sum(-1)
    elif term.divergence == "reverse":
        value = (p * (p / t).log()).sum(-1)
    else:
        m = term.beta * t + (1 - term.beta) * p
        value = term.beta * (t * (t / m).log()).sum(-1) + (1 - term.beta) * (p * (p / m).log()).sum(-1)
    return term.temperature**2 * value


def textbook(term, hidden, weight, labels, teacher):
    rows = term.rows(labels).flatten()
    logits = (hidden @ weight.t())[rows]
    teacher_logits = (teacher.hidden[0] @ teacher.weights[0].t())[rows]
    sequences = term.rows(labels).any(-1).sum()
    return in_probability_space(term, logits, teacher_logits).sum() / (
        sequences if term.reduction == "batchmean" else rows.sum()
    )


@pytest.mark.parametrize("ce", [0.0, 0.4])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_value_and_gradients_equal_probability_space(term, ce):
    hidden, weight, labels, teacher = example()
    loss = loss_of([(term, 0.6), (CrossEntropy(), ce)], hidden, weight, labels, teacher)
    scored = labels.flatten() >= 0
    logits = (hidden @ weight.t())[scored]
    wanted = 0.6 * textbook(term, hidden, weight, labels, teacher)
    wanted = wanted + ce * torch.nn.functional.cross_entropy(logits, labels.flatten()[scored])
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    assert_gradients_close(loss, wanted, (hidden, weight), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_reference_forms_equal_torchs_kl_div(divergence):
    logits, teacher_logits = random(5, VOCAB), random(5, VOCAB, seed=9)
    p, t = (logits / 2).softmax(-1), (teacher_logits / 2).softmax(-1)
    m = 0.3 * t + 0.7 * p

    def kl(target, other):
        return kl_div(other.log(), target, reduction="none").sum(-1)

    wanted = {"forward": kl(t, p), "reverse": kl(p, t), "jsd": 0.3 * kl(t, m) + 0.7 * kl(p, m)}[divergence]
    torch.testing.assert_close(textbook_distillation(logits, teacher_logits, 2.0, divergence, 0.3), 4 * wanted)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_a_student_that_equals_its_teacher_has_value_and_gradient_zero(term, dtype, bound):
    hidden, weight, labels, _ = example(dtype)
    teacher = TeacherStates((hidden.detach(),), (weight.detach(),))
    loss = loss_of([(term, 1.0)], hidden, weight, labels, teacher)
    assert abs(loss.item()) < 10 * bound * (TIME if term.reduction == "batchmean" else 1)
    assert all(gradient.abs().max() < 10 * bound for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_the_gradient_keeps_its_size_as_the_temperature_grows():
    """Without T^2 it would be 16 times smaller at T = 4 than at T = 1, with T alone 4 times."""
    norms = []
    for temperature in (1.0, 4.0):
        hidden, weight, labels, teacher = example()
        with torch.no_grad():
            weight.mul_(0.3), teacher.weights[0].mul_(0.3)  # not too peaked, as Hinton's argument assumes
        loss = loss_of([(Distillation(temperature), 1.0)], hidden, weight, labels, teacher)
        norms.append(torch.autograd.grad(loss, hidden)[0].norm())
    assert 0.5 < norms[1] / norms[0] < 2


def test_batchmean_weighs_a_block_as_many_times_as_it_has_tokens():
    """`KLDivLoss("batchmean")` on (batch, time, vocab) divides by the batch: BabyLlama's 128 at 128 tokens."""
    logits, teacher_logits = random(2, 128, 11), random(2, 128, 11, seed=5)
    p, t = (logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1)
    babyllama = 4 * kl_div(p, t, reduction="batchmean")
    identity = torch.eye(11, dtype=torch.float64)
    teacher = TeacherStates((teacher_logits.flatten(0, 1),), (identity,))
    labels = next_tokens(torch.zeros(2, 128, dtype=torch.long))
    for reduction, ratio in (("batchmean", 1), ("token", 128)):
        term = Distillation(reduction=reduction)
        loss = loss_of([(term, 1.0)], logits.flatten(0, 1), identity, labels, teacher)
        torch.testing.assert_close(ratio * loss, babyllama)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_padding_changes_nothing_whatever_it_holds(term):
    hidden, weight, labels, teacher = example()
    terms = [(term, 0.6), (CrossEntropy(), 0.4)]
    before = torch.autograd.grad(loss_of(terms, hidden, weight, labels, teacher), (hidden, weight))
    padding = (labels == IGNORE_INDEX).flatten()
    with torch.no_grad():
        hidden[padding], teacher.hidden[0][padding] = torch.nan, torch.nan
    after = torch.autograd.grad(loss_of(terms, hidden, weight, labels, teacher), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not before[0][padding].any()


def test_more_padding_changes_neither_reduction():
    hidden, weight, labels, teacher = example()
    empty = torch.full_like(labels, IGNORE_INDEX)
    longer = TeacherStates((torch.cat([teacher.hidden[0]] * 2),), teacher.weights)
    for term in TERMS.values():
        loss = loss_of([(term, 1.0)], hidden, weight, labels, teacher)
        padded = loss_of([(term, 1.0)], torch.cat([hidden] * 2), weight, torch.cat([labels, empty]), longer)
        torch.testing.assert_close(loss, padded)


def test_prompts_are_for_the_teacher_alone_and_answers_for_both():
    _, _, labels, _ = example()
    answers = (labels >= 0).sum()
    assert CrossEntropy().rows(labels).sum() == Distillation(positions="answers").rows(labels).sum() == answers
    assert Distillation().rows(labels).sum() == (labels != IGNORE_INDEX).sum() == answers + 6


@pytest.mark.parametrize("splits", [[24], [8, 16], [8, 8, 8]])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_accumulation_over_uneven_parts_is_exact(term, splits):
    hidden, weight, labels, teacher = example(torch.float32)
    terms = [(term, 0.6), (CrossEntropy(), 0.4)]
    counts = {each.name: each.units(labels).sum() for each, _ in terms}
    whole = torch.autograd.grad(loss_of(terms, hidden, weight, labels, teacher), (hidden, weight))
    rows = torch.arange(POSITIONS).split(splits)
    loss = sum(
        loss_of(terms, hidden[some], weight, labels.view(-1, TIME)[some[::TIME] // TIME], teacher.rows(some), counts)
        for some in rows
    )
    for found, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), whole, strict=True):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_nothing_to_score_gives_zero_and_zero_gradients():
    hidden, weight, labels, teacher = example()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    loss = loss_of([(Distillation(), 1.0)], hidden, weight, nothing, teacher)
    assert loss == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_several_teachers_speak_through_the_mean_of_their_logits():
    hidden, weight, labels, first = example()
    second = TeacherStates((random(POSITIONS, 4, seed=7),), (random(VOCAB, 4, seed=8),))
    both = TeacherStates(first.hidden + second.hidden, first.weights + second.weights)
    logits = [teacher.hidden[0] @ teacher.weights[0].t() for teacher in (first, second)]
    mean = TeacherStates(((logits[0] + logits[1]) / 2,), (torch.eye(VOCAB, dtype=torch.float64),))
    for term in TERMS.values():
        losses = [loss_of([(term, 1.0)], hidden, weight, labels, teacher) for teacher in (both, mean)]
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_a_token_that_the_teacher_lacks_has_probability_zero(divergence):
    """A student padded from 37 to 40 tokens: the textbook with -inf, and 0 log 0 = 0."""
    hidden, _, labels, teacher = example()
    padded = random(VOCAB + 3, WIDTH, seed=11).requires_grad_()
    term = Distillation(2.0, divergence, 0.3)
    loss = loss_of([(term, 1.0)], hidden, padded, labels, teacher)
    rows = term.rows(labels).flatten()
    teacher_logits = (teacher.hidden[0] @ teacher.weights[0].t())[rows]
    full = torch.cat([teacher_logits, torch.full((len(teacher_logits), 3), -torch.inf, dtype=torch.float64)], -1)
    t, p = (full / 2).softmax(-1), (hidden @ padded.t() / 2)[rows].softmax(-1)
    m = 0.3 * t + 0.7 * p
    forward = kl_div(p.log(), t, reduction="none").sum(-1)
    jsd = 0.3 * kl_div(m.log(), t, reduction="none").sum(-1) + 0.7 * kl_div(m.log(), p, reduction="none").sum(-1)
    wanted = 4 * (forward if divergence == "forward" else jsd).mean()
    torch.testing.assert_close(loss, wanted)
    assert_gradients_close(loss, wanted, (hidden, padded))


def test_a_token_that_the_student_lacks_is_cut_off():
    hidden, weight, labels, teacher = example()
    padded = TeacherStates(teacher.hidden, (torch.cat([teacher.weights[0], random(4, TEACHER_WIDTH) + 50]),))
    for term in TERMS.values():
        losses = [loss_of([(term, 1.0)], hidden, weight, labels, each) for each in (teacher, padded)]
        torch.testing.assert_close(*losses)


# ---- the most probable tokens alone --------------------------------------------------------------------------------


def top_tokens(teacher, k, temperature):
    """The k most probable tokens of the teacher and the log of all others' mass, computed in float64."""
    log_p = (teacher.hidden[0] @ teacher.weights[0].t() / temperature).log_softmax(-1)
    top, columns = log_p.topk(k)
    rest = log_p.scatter(-1, columns, -torch.inf).logsumexp(-1, keepdim=True)
    return TopTokens(columns, torch.cat([top, rest], -1), temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rest_of_the_mass_is_one_bin(temperature):
    hidden, weight, labels, teacher = example()
    term, top = Distillation(temperature), top_tokens(teacher, 5, temperature)
    loss = loss_of([(term, 1.0)], hidden, weight, labels, top)
    rows = term.rows(labels).flatten()
    p = (hidden @ weight.t() / temperature)[rows].softmax(-1)
    t = (teacher.hidden[0] @ teacher.weights[0].t() / temperature)[rows].softmax(-1)
    value = 0
    for row_p, row_t, columns in zip(p, t, top.columns[rows], strict=True):
        others = [token for token in range(VOCAB) if token not in columns.tolist()]
        value = value + sum(row_t[token] * (row_t[token] / row_p[token]).log() for token in columns)
        value = value + row_t[others].sum() * (row_t[others].sum() / row_p[others].sum()).log()
    wanted = temperature**2 * value / rows.sum()
    torch.testing.assert_close(loss, wanted)
    assert_gradients_close(loss, wanted, (hidden, weight))


def test_more_tokens_bring_the_stored_teacher_nearer_and_all_but_one_are_exact():
    hidden, weight, labels, teacher = example()
    live = loss_of([(Distillation(), 1.0)], hidden, weight, labels, teacher)
    gaps = [
        (live - loss_of([(Distillation(), 1.0)], hidden, weight, labels, top_tokens(teacher, k, 2.0))).item()
        for k in (1, 5, 15, VOCAB - 1)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > gaps[2] > 0  # merging tokens can only hide divergence
    assert gaps[-1] == pytest.approx(0, abs=1e-10)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_autocast_stays_within_the_rounding_of_its_operands(term, dtype, bound):
    """Peers that round the softmax to bfloat16 too are off by 4 to 23 % here."""
    hidden, weight, labels, teacher = example(torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wide = TeacherStates((teacher.hidden[0].double(),), (teacher.weights[0].double(),))
    wanted = torch.autograd.grad(textbook(term, *exact, labels, wide), exact)
    with torch.autocast("cpu", dtype):
        loss = loss_of([(term, 1.0)], hidden, weight, labels, teacher)
    for found, right in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - right).norm() <= bound * right.norm()


def test_the_error_does_not_grow_with_the_number_of_chunks(monkeypatch):
    hidden, weight, labels, teacher = example(torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wide = TeacherStates((teacher.hidden[0].double(),), (teacher.weights[0].double(),))
    wanted = torch.autograd.grad(textbook(Distillation(), *exact, labels, wide), exact[1])[0]
    errors = []
    for rows in (1, POSITIONS):
        monkeypatch.setattr(products, "CHUNK_BYTES", 4 * VOCAB * rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of([(Distillation(), 1.0)], hidden, weight, labels, teacher)
        errors.append((torch.autograd.grad(loss, weight)[0] - wanted).norm())
    assert errors[0] <= 1.5 * errors[1]


def test_a_sure_student_and_a_sure_teacher_stay_finite():
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    teacher = TeacherStates((torch.tensor([[-150.0], [150.0]]),), (weight,))
    labels = torch.tensor([[0, 2]])
    for term in (Distillation(1.0), Distillation(1.0, "reverse"), Distillation(1.0, "jsd")):
        loss = loss_of([(term, 1.0)], hidden, weight, labels, teacher)
        assert loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all(), term
    top = top_tokens(TeacherStates((teacher.hidden[0].double(),), (weight.double(),)), 1, 1.0)
    loss = loss_of([(Distillation(1.0), 1.0)], hidden, weight, labels, top)
    assert loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all()
