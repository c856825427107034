import math

import numpy as np
import pytest
import torch

from rto.functional.ppo import approx_kl, explained_variance, policy_loss, value_loss


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_the_clip_stops_what_has_gone_far_enough_and_nothing_else(advantage, ratio):
    """d loss / d logp = −ρ A, except 0 where A pushes ρ further out of [1 − ε, 1 + ε]."""
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    loss, clipped = policy_loss(logp, old, torch.full_like(old, advantage), cliprange=0.2)
    loss.sum().backward()
    far_enough = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert clipped.item() == far_enough
    assert logp.grad.item() == pytest.approx(0.0 if far_enough else -ratio * advantage, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(2.0, 1.0, -1.2), (2.0, -1.0, 2.0), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.1, 3.0, -3.3), (2.0, 0.0, 0.0)],
)
def test_policy_loss_by_hand(ratio, advantage, expected):
    old = torch.zeros(1, 1, dtype=torch.float64)
    loss, _ = policy_loss(old + math.log(ratio), old, torch.full_like(old, advantage), cliprange=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_first_step_is_reinforce():
    """At ratio 1 the gradient is that of −A log π, for every token."""
    torch.manual_seed(0)
    logp, advantages = torch.randn(2, 3, 5, dtype=torch.float64)
    old = logp.clone()
    logp.requires_grad_()
    loss, clipped = policy_loss(logp, old, advantages, cliprange=0.2)
    (ppo,) = torch.autograd.grad(loss.sum(), logp)
    (reinforce,) = torch.autograd.grad(-(advantages * logp).sum(), logp)
    torch.testing.assert_close(ppo, reinforce)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "clipped"),
    [
        (1.0, 1.0, 3.0, 2.0, False),  # ½ (1 − 3)²
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, True),  # a step of +1 counts as +0.2: ½ (1.2 − 3)²
        (2.0, 1.0, 0.0, 2.0, False),  # away from the target: the larger, unclipped error
        (0.9, 1.0, 3.0, 0.5 * 2.1**2, False),  # within the range
        (0.0, 1.0, -1.0, 0.5 * 1.8**2, True),
    ],
)
def test_value_loss_by_hand(value, old, target, expected, clipped):
    v, o, r = (torch.tensor([[x]], dtype=torch.float64) for x in (value, old, target))
    v.requires_grad_()
    loss, by_clip = value_loss(v, o, r, cliprange=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert by_clip.item() == clipped
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert grad.item() == pytest.approx(0.0 if clipped else value - target, abs=1e-12)


def test_value_loss_without_a_clip_is_half_the_squared_error():
    v, o, r = torch.tensor([[5.0, -1.0]]), torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    loss, clipped = value_loss(v, o, r, cliprange=None)
    assert loss.tolist() == [[4.5, 0.5]]
    assert not clipped.any()


def test_approx_kl_is_unbiased_and_never_negative():
    """Its mean under the old policy is KL(π_old ‖ π) exactly, by enumeration of the vocabulary."""
    torch.manual_seed(0)
    old, new = (torch.randn(2, 40, dtype=torch.float64) * 2).log_softmax(-1)
    k3 = approx_kl(new[None], old[None])[0]
    assert (k3 >= 0).all()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=new)
    )
    assert (old.exp() * k3).sum().item() == pytest.approx(exact.item(), rel=1e-10)
    assert exact > 0.1
    assert (approx_kl(old[None], old[None]) == 0).all()


@pytest.fixture
def critic():
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    returns, noise = torch.randn(2, 3, 6, dtype=torch.float64).masked_fill(~mask, torch.nan)
    return returns + 0.3 * noise, returns, mask


def test_explained_variance(critic, on_ranks):
    values, returns, mask = critic
    r, v = returns[mask].numpy(), values[mask].numpy()
    expected = 1 - np.var(r - v) / np.var(r)
    assert 0.5 < expected < 1
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, rel=1e-12)
    shards = [(values[:1], returns[:1], mask[:1]), (values[1:], returns[1:], mask[1:])]
    for value in on_ranks(lambda s, reduce: explained_variance(*s, all_reduce=reduce), shards):
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic(critic):
    _, returns, mask = critic
    assert explained_variance(returns, returns, mask).item() == 1
    constant = torch.full_like(returns, 7.0)
    assert explained_variance(constant, returns, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, rel=1e-12)  # Var(2R)/Var(R) = 4
