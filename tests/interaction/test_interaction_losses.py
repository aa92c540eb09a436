"""Losses and advantages of a judged student: by hand, against TRL and slow loops, gradcheck, masks, memory."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from torch.autograd import grad, gradcheck

from nbutils.benchmarks.measuring import extra_memory
from nbutils.data.batches import IGNORE_INDEX, UNLABELLED
from nbutils.foundation.errors import ParameterError
from nbutils.interaction.losses import (
    kl_estimate,
    mean_log_probs,
    ppo_loss,
    rloo_loss,
    simpo_loss,
    token_log_probs,
    value_loss,
)
from nbutils.interaction.rewards import AdaptiveKL, generalised_advantages, leave_one_out, shaped_rewards, whiten

BATCH, TIME = 4, 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def draw(generator):
    """Random float64 tensors; `draw(4, 6)` has gradients."""
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def mask():
    """Responses of 6, 3, 1 and 4 tokens, the last of which begins after two of a prompt."""
    rows = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]
    return tensor(rows)


def with_rubbish(values, mask, rubbish=math.nan):
    """`values` with `rubbish` outside the mask, and gradients of its own."""
    return values.detach().where(mask.bool(), rubbish).requires_grad_()


# SimPO


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.1, 0.5), (10.0, 3.0)])
def test_simpo_is_trl_s_loss(draw, beta, gamma):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "label_smoothing": 0.0}
    stand_in = SimpleNamespace(**settings, accelerator=SimpleNamespace(device=torch.device("cpu")))
    chosen, rejected = draw(64), draw(64)
    theirs, _, _ = CPOTrainer.cpo_loss(stand_in, chosen, rejected)
    ours = simpo_loss(chosen, rejected, beta, gamma)
    torch.testing.assert_close(ours, theirs)
    both = [grad(loss.sum(), (chosen, rejected)) for loss in (ours, theirs)]
    torch.testing.assert_close(*both)


def test_simpo_by_hand(draw):
    chosen, rejected = draw(16), draw(16)
    losses = simpo_loss(chosen, rejected, 2.0, 1.0)
    by_hand = [
        math.log1p(math.exp(-(2 * (a - b) - 1))) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert simpo_loss(tensor(0.5), tensor(0.0), 2.0, 1.0).item() == pytest.approx(math.log(2))  # the margin is met
    assert simpo_loss(tensor(-900.0), tensor(0.0), 2.0, 1.0).item() == pytest.approx(1801)  # and no overflow


def test_a_mean_is_over_each_response_s_own_tokens(mask):
    log_probs = -torch.arange(24.0).view(BATCH, TIME)
    assert mean_log_probs(log_probs, mask).tolist() == [-2.5, -7.0, -12.0, -21.5]
    mask[2] = 0
    with pytest.raises(ValueError, match="without tokens"):
        mean_log_probs(log_probs, mask)


# gradients and masks of every loss


def losses_of(mask, draw):
    """{name: (function of the log-probabilities or values, their tensor)}; the rest is constant."""
    old, other = draw(BATCH, TIME).detach(), draw(BATCH, TIME).detach()
    one = draw(BATCH).detach()
    return {
        "mean": lambda x: mean_log_probs(x, mask),
        "simpo": lambda x: simpo_loss(mean_log_probs(x, mask), one, 2.0, 1.0),
        "ppo": lambda x: ppo_loss(x, old, other, mask, 0.2).loss,
        "value": lambda x: value_loss(x, old, other, mask, 0.2),
        "rloo": lambda x: rloo_loss(x, mask, one),
    }


@pytest.mark.parametrize("name", ["mean", "simpo", "ppo", "value", "rloo"])
def test_gradients_and_masks(name, mask, draw):
    loss, x = losses_of(mask, draw)[name], draw(BATCH, TIME)
    assert gradcheck(loss, (x,))
    rubbish = with_rubbish(x, mask)
    assert torch.equal(loss(rubbish), loss(x))
    got = grad(loss(rubbish).sum(), rubbish)[0]
    assert torch.equal(got, grad(loss(x).sum(), x)[0])
    assert (got[mask == 0] == 0).all() and (got[mask == 1] != 0).any()


def test_the_estimate_of_a_kl_is_unbiased(draw):
    log_probs, reference = draw(3, 5), draw(3, 5)
    p, q = (x.detach().softmax(-1) for x in (log_probs, reference))
    expected = (p * kl_estimate(p.log(), q.log())).sum(-1)  # over every token that could be drawn
    torch.testing.assert_close(expected, (p * (p / q).log()).sum(-1))


def test_constants_of_a_loss_stay_constant(mask, draw):
    """What sampled, judged or was estimated before an update is no way to make the loss smaller."""
    x, old, advantages, one = draw(BATCH, TIME), draw(BATCH, TIME), draw(BATCH, TIME), draw(BATCH)
    for loss in (
        ppo_loss(x, old, advantages, mask, 0.2).loss,
        value_loss(x, old, advantages, mask, 0.2),
        rloo_loss(x, mask, one),
    ):
        assert grad(loss, (old, advantages, one), allow_unused=True) == (None, None, None)


# PPO


def test_the_first_pass_is_the_policy_gradient(mask, draw):
    x, advantages = draw(BATCH, TIME), draw(BATCH, TIME).detach()
    found = ppo_loss(x, x.detach().clone(), advantages, mask, 0.2)
    real = mask.bool()
    assert found.loss.item() == pytest.approx(-advantages[real].sum().item())
    assert (found.clip_fraction.item(), found.approximate_kl.item()) == (0, 0)
    plain = -(advantages * x).where(real, 0).sum()
    torch.testing.assert_close(grad(found.loss, x)[0], grad(plain, x)[0])


def test_ppo_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5, 1.1: what would go on in the direction it was pushed to is clipped, and that alone."""
    log_probs = tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 9.0]]).log().requires_grad_()
    advantages, mask = tensor([[1.0, 1.0, -1.0, -1.0, 1.0, 5.0]]), tensor([[1, 1, 1, 1, 1, 0]])
    found = ppo_loss(log_probs, torch.zeros(1, 6), advantages, mask, 0.2)
    assert found.loss.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8 - 1.1)
    assert found.clip_fraction.item() == pytest.approx(2 / 5)
    assert grad(found.loss, log_probs)[0].tolist() == [pytest.approx([0, -0.5, 1.5, 0, -1.1, 0])]
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (1.5, 0.5, 1.5, 0.5, 1.1)) / 5
    assert found.approximate_kl.item() == pytest.approx(kl, rel=1e-5)


def test_value_loss_by_hand():
    """The larger of both: a value within the clip counts plainly, one beyond is measured where it was clipped to."""
    values, old = tensor([[1.1, 2.0, 0.0, 7.0]]), torch.ones(1, 4)
    returns = tensor([[2.0, 3.0, 0.0, 7.0]])
    loss = value_loss(values, old, returns, tensor([[1, 1, 1, 0]]), 0.2)
    assert loss.item() == pytest.approx((0.9**2 + 1.8**2 + 0.8**2) / 2)


def test_rloo_by_hand(mask):
    log_probs = -torch.ones(BATCH, TIME)
    assert rloo_loss(log_probs, mask, tensor([1.0, -2.0, 0.5, 0.0])).item() == pytest.approx(6 - 6 + 0.5)


# rewards and advantages


def test_three_tokens_of_advantages_by_hand():
    rewards, values = tensor([[0.1, 0.2, 1.0]]), tensor([[0.5, 0.4, 0.3]])
    advantages, returns = generalised_advantages(rewards, values, torch.ones(1, 3), 0.9, 0.8)
    third = 1.0 - 0.3
    second = (0.2 + 0.9 * 0.3 - 0.4) + 0.72 * third
    first = (0.1 + 0.9 * 0.4 - 0.5) + 0.72 * second
    assert advantages.tolist() == [pytest.approx([first, second, third])]
    assert returns.tolist() == [pytest.approx([first + 0.5, second + 0.4, third + 0.3])]


def test_advantages_equal_the_double_sum(mask, draw):
    """A_t = sum_l (discount trace)^l delta_{t+l} over what is left of the response."""
    rewards, values = (draw(BATCH, TIME).detach() for _ in range(2))
    expected = torch.zeros(BATCH, TIME, dtype=torch.float64)
    for row in range(BATCH):
        real = mask[row].nonzero().squeeze(1).tolist()
        for start in real:
            for later in [time for time in real if time >= start]:
                following = values[row, later + 1] if later + 1 in real else 0
                delta = rewards[row, later] + 0.97 * following - values[row, later]
                expected[row, start] += (0.97 * 0.9) ** (later - start) * delta
    clean = generalised_advantages(rewards, values, mask, 0.97, 0.9)
    torch.testing.assert_close(clean[0], expected)
    torch.testing.assert_close(clean[1], (expected + values).where(mask.bool(), 0))
    dirty = generalised_advantages(with_rubbish(rewards, mask), with_rubbish(values, mask), mask, 0.97, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_score_comes_with_the_last_real_token(mask, draw):
    log_probs, reference = draw(BATCH, TIME), draw(BATCH, TIME)
    scores = tensor([0.25, 0.5, 0.75, 1.0])
    rewards = shaped_rewards(scores, with_rubbish(log_probs, mask), reference, mask, 0.3)
    expected = -0.3 * (log_probs - reference).detach() * mask
    expected[[0, 1, 2, 3], [5, 2, 0, 5]] += scores
    torch.testing.assert_close(rewards, expected)
    scores[1] = math.nan
    with pytest.raises(ValueError, match="ok False"):
        shaped_rewards(scores, log_probs, reference, mask, 0.3)


def test_whitening_is_over_real_tokens_alone(mask, draw):
    values = draw(BATCH, TIME).detach() * 3 + 5
    white, real = whiten(with_rubbish(values, mask), mask), mask.bool()
    assert white[real].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[real].std().item() == pytest.approx(1, abs=1e-6)
    assert (white[~real] == 0).all()
    assert torch.equal(white, whiten(with_rubbish(values, mask, 1e6), mask))
    assert whiten(tensor([[3.0, 9.0]]), tensor([[1, 0]])).tolist() == [[0, 0]]


def test_leave_one_out_by_hand():
    nan = math.nan
    scores = tensor([[1.0, 0.0, 0.5, 0.1], [0.2, nan, 0.8, 0.9], [0.7, nan, nan, 5.0], [nan, nan, nan, nan]])
    ok = tensor([[True] * 4, [True, False, True, True], [True, False, False, False], [False] * 4])
    assert leave_one_out(scores, ok).tolist() == [
        pytest.approx([1.0 - 0.2, 0.0 - 1.6 / 3, 0.5 - 1.1 / 3, 0.1 - 0.5]),
        pytest.approx([0.2 - 0.85, 0, 0.8 - 0.55, 0.9 - 0.5]),
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_the_kl_s_weight_follows_ziegler():
    """mult = 1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon, as TRL 0.9.4 has it."""
    adaptive = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    assert adaptive.update(6.6, 360) == pytest.approx(0.2 * (1 + 0.1 * 360 / 10_000))
    assert AdaptiveKL(0.2, 6.0, 10_000).update(60.0, 360) == pytest.approx(0.2 * (1 + 0.2 * 360 / 10_000))
    assert AdaptiveKL(0.2, 6.0, 10_000).update(-3.0, 360) == pytest.approx(0.2 * (1 - 0.2 * 360 / 10_000))
    adaptive.update(6.0, 360)
    assert adaptive.coefficient == pytest.approx(0.2 * 1.0036)
    with pytest.raises(ValueError, match="not finite"):
        adaptive.update(math.nan, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.2, 0.0, 10), "KL target is 0.0"),
        ((0.2, 6.0, 0), "KL horizon is 0"),
        ((-0.1, 6.0, 10), "KL coefficient is -0.1"),
        ((math.nan, 6.0, 10), "KL coefficient is nan"),
    ],
)
def test_kl_settings_that_cannot_be(settings, message):
    with pytest.raises(ParameterError, match=message):
        AdaptiveKL(*settings)


# log-probabilities of tokens


@pytest.mark.parametrize("chunk_tokens", [0, 1, 4, 7, 8, 100])
def test_token_log_probs_are_those_of_the_whole_softmax(draw, chunk_tokens):
    hidden, weight, upstream = draw(10, 5), draw(23, 5), draw(10).detach()
    labels = tensor([3, IGNORE_INDEX, 0, 22, 5, 5, UNLABELLED, 1, IGNORE_INDEX, 9])
    scored = labels >= 0
    ours = token_log_probs(hidden, weight, labels, chunk_tokens)
    whole = (hidden @ weight.T).log_softmax(-1)
    plain = whole.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).where(scored, 0)
    torch.testing.assert_close(ours, plain)
    got, expected = (grad((values * upstream).sum(), (hidden, weight)) for values in (ours, plain))
    torch.testing.assert_close(got, expected)
    assert (ours[~scored] == 0).all() and (got[0][~scored] == 0).all()


def test_token_log_probs_gradcheck(draw):
    labels = tensor([2, IGNORE_INDEX, 0, 3])
    assert gradcheck(lambda h, w: token_log_probs(h, w, labels, 2), (draw(4, 3), draw(5, 3)))


def test_token_log_probs_need_no_gradient_and_no_labels(draw):
    hidden, weight = draw(4, 3), draw(5, 3).detach()
    (d_hidden,) = grad(token_log_probs(hidden, weight, tensor([1, 2, 3, 4])).sum(), hidden)  # a frozen head
    assert d_hidden.abs().sum() > 0
    nothing = token_log_probs(hidden, weight, torch.full((4,), IGNORE_INDEX))
    assert nothing.tolist() == [0] * 4 and (grad(nothing.sum(), hidden)[0] == 0).all()


def test_token_log_probs_under_autocast(draw):
    """Products of bfloat16 factors summed in float32: the values are wide, the gradients those of the inputs."""
    hidden, weight = draw(8, 16).detach().float().requires_grad_(), draw(31, 16).detach().float().requires_grad_()
    labels = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        values = token_log_probs(hidden, weight, labels)
    rounded = hidden.bfloat16().float() @ weight.bfloat16().float().T
    torch.testing.assert_close(values, rounded.log_softmax(-1)[labels, labels])
    values.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_token_log_probs_memory_is_flat_in_the_number_of_tokens():
    weight = torch.randn(20_000, 8, requires_grad=True)

    def step(tokens):
        def run():
            hidden = torch.randn(tokens, 8, requires_grad=True)
            return grad(token_log_probs(hidden, weight, torch.arange(tokens), 64).sum(), (hidden, weight))

        return run

    step(64)()  # what only the first call takes
    few, many = (extra_memory(step(tokens)) for tokens in (512, 1024))
    logits = 1024 * 20_000 * 4 / 2**20
    assert many < few + 12 and many < logits / 2, (few, many)
