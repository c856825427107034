"""Estimators against their definitions, and against the exact policy gradient of a small token MDP."""

import itertools

import numpy as np
import pytest
import torch

from rto.functional.advantages import GAE, QAdvantage, ReinforcePlusPlus, discounted_sum
from rto.functional.ppo import policy_loss
from rto.functional.rewards import RTOReward
from rto.theory.instances import random_mdp
from rto.theory.mdp import soft_optimal


@pytest.fixture
def rollouts():
    """Ragged rewards and values with NaN on the padding."""
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 4, 6, 2])[:, None]
    rewards, values = torch.randn(2, 5, 7, dtype=torch.float64).masked_fill(~mask, torch.nan)
    return rewards, values, mask


def by_definition(rewards, values, mask, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, each sum written out."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        r, v = rewards[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]
        for t in range(n):
            for k in range(n - t):
                delta = r[t + k] + gamma * v[t + k + 1] - v[t + k]
                advantages[b, t] += (gamma * lam) ** k * delta
    return torch.from_numpy(advantages)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_is_its_definition(rollouts, gamma, lam):
    rewards, values, mask = rollouts
    credit = GAE(gamma=gamma, lam=lam)(rewards, values, mask)
    expected = by_definition(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(credit.advantages, expected, rtol=1e-12, atol=1e-12)
    assert (credit.advantages[~mask] == 0).all()
    assert (credit.returns[~mask] == 0).all()
    torch.testing.assert_close(credit.returns[mask], (expected + values)[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_the_return_less_the_value(rollouts, gamma):
    rewards, values, mask = rollouts
    credit = GAE(gamma=gamma, lam=1.0)(rewards, values, mask)
    for b, t in mask.nonzero().tolist():
        future = rewards[b, t:][mask[b, t:]].numpy()
        g = np.polynomial.polynomial.polyval(gamma, future)
        assert credit.returns[b, t].item() == pytest.approx(g, abs=1e-12)
        assert credit.advantages[b, t].item() == pytest.approx(g - values[b, t].item(), abs=1e-12)


def test_lambda_zero_is_the_temporal_difference():
    """By hand, γ = ½: δ = r + ½ V' − V, and no value after the last real token."""
    credit = GAE(gamma=0.5, lam=0.0)(
        torch.tensor([[1.0, 2.0, 3.0, 50.0]]),
        torch.tensor([[10.0, 20.0, 30.0, 60.0]]),
        torch.tensor([[True, True, True, False]]),
    )
    assert credit.advantages.tolist() == [[1.0, -3.0, -27.0, 0.0]]
    assert credit.returns.tolist() == [[11.0, 17.0, 3.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_is_gae_without_a_critic(rollouts, gamma):
    rewards, _, mask = rollouts
    ours = ReinforcePlusPlus(gamma=gamma)(rewards, None, mask)
    gae = GAE(gamma=gamma, lam=1.0)(rewards, torch.zeros_like(rewards), mask)
    for x in (*ours, gae.returns):
        torch.testing.assert_close(x, gae.advantages, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.3, 0.0])
def test_discounted_sum_is_a_triangular_matrix(discount):
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    power = torch.arange(6)[:, None] - torch.arange(6)
    matrix = torch.where(power >= 0, discount ** power.clamp(min=0).double(), 0.0)
    torch.testing.assert_close(discounted_sum(x, discount), x @ matrix, rtol=1e-12, atol=1e-12)


def test_gae_without_values_is_an_error(rollouts):
    rewards, _, mask = rollouts
    with pytest.raises(ValueError, match="GAE needs the critic's values"):
        GAE()(rewards, None, mask)


def test_estimators_say_whether_they_need_a_critic():
    assert GAE.needs_values
    assert not ReinforcePlusPlus.needs_values


# --- The exact policy gradient, by enumeration of every completion


class TokenMDP:
    """Three tokens, the last of which is EOS, and at most three steps; every completion is a row.

    All quantities are tables over prefixes. `objective` is J(θ) = E[β₃ r(y) + β₁ Σ clip(ρ) − β₂ Σ log π/π_ref −
    penalty · 1(no EOS)], a polynomial in probabilities that autograd differentiates without any estimator.
    """

    vocabulary, horizon, eos = 3, 3, 2

    def __init__(self, reward: RTOReward):
        g = torch.Generator().manual_seed(0)
        self.reward = reward
        ends = [
            y
            for n in range(1, self.horizon + 1)
            for y in itertools.product(range(self.vocabulary), repeat=n)
            if self.eos not in y[:-1] and (y[-1] == self.eos or n == self.horizon)
        ]
        prefixes = sorted({y[:t] for y in ends for t in range(len(y))})
        self.mask = torch.tensor([[t < len(y) for t in range(self.horizon)] for y in ends])
        self.state = torch.tensor([[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(3)] for y in ends])
        self.action = torch.tensor([[y[t] if t < len(y) else 0 for t in range(self.horizon)] for y in ends])
        self.ended = torch.tensor([y[-1] == self.eos for y in ends])
        self.theta, self.ref, dpo = torch.randn(3, len(prefixes), self.vocabulary, generator=g).double()
        self.theta.requires_grad_()
        self.logratio = self.gather(dpo) - self.gather(self.ref)
        self.scores = torch.randn(len(ends), generator=g).double()

    def gather(self, table):
        """log π(y_t|y_<t) of each token of each completion, NaN on the padding."""
        return table.log_softmax(-1)[self.state, self.action].masked_fill(~self.mask, torch.nan)

    def total(self, x):
        return torch.where(self.mask, x, 0.0).sum(1)

    def objective(self):
        r, logp = self.reward, self.gather(self.theta)
        gain = r.score_coef * self.scores - r.missing_eos_penalty * (~self.ended).double()
        if not r.shaping:
            gain = gain + r.dpo_coef * self.total(self.logratio.clamp(-r.token_reward_clip, r.token_reward_clip))
        gain = gain - r.kl_coef * self.total(logp - self.gather(self.ref))
        return (self.total(logp).exp() * gain).sum()

    def estimate(self, anchors, estimator, values):
        """Our rewards, credit and loss at ratio 1, in expectation over every completion."""
        logp = self.gather(self.theta)
        terms = self.reward(
            policy_logp=logp.detach(),
            ref_logp=self.gather(self.ref),
            token_logratio=self.logratio,
            scores=self.scores,
            ended=self.ended,
            mask=self.mask,
            anchors=anchors,
        )
        p = self.total(logp).exp().detach()
        if values == "exact":  # V(s) = E[placed reward to go | s]
            to_go = ReinforcePlusPlus()(terms.total, None, self.mask).returns
            mass = torch.where(self.mask, p[:, None], 0.0)
            n = len(self.theta)
            seen = torch.zeros(n).double().index_add(0, self.state.flatten(), mass.flatten())
            sums = torch.zeros(n).double().index_add(0, self.state.flatten(), (mass * to_go).flatten())
            values = (sums / seen)[self.state]
        elif values == "arbitrary":
            values = torch.linspace(-2, 3, len(self.theta)).double()[self.state]
        advantages = estimator(terms.total, values, self.mask).advantages
        logp = torch.where(self.mask, logp, 0.0)
        loss = policy_loss(logp, logp.detach(), advantages, cliprange=0.2).loss
        return (p[:, None] * torch.where(self.mask, loss, 0.0)).sum()


@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        (ReinforcePlusPlus(), None),
        (GAE(lam=1.0), "arbitrary"),
        (GAE(lam=0.5), "exact"),
        (GAE(lam=0.0), "exact"),
    ],
    ids=str,
)
@pytest.mark.parametrize("placement", ["token", "sentence", "final"])
@pytest.mark.parametrize("shaping", [False, True])
def test_the_expected_update_is_the_exact_policy_gradient(placement, estimator, values, shaping):
    """Sign, placement, KL, score, penalty and padding at once: E[∇ loss] = −∇J, wherever rewards are paid."""
    reward = RTOReward(
        dpo_coef=0.7, kl_coef=0.3, score_coef=1.3, shaping=shaping, missing_eos_penalty=0.4, token_reward_clip=0.8
    )
    mdp = TokenMDP(reward)
    assert (mdp.logratio.abs() > 0.8).any()
    anchors = {
        "token": mdp.mask,
        "sentence": mdp.mask & (mdp.action == 0),
        "final": torch.zeros_like(mdp.mask),
    }[placement]
    (exact,) = torch.autograd.grad(mdp.objective(), mdp.theta)
    (ours,) = torch.autograd.grad(mdp.estimate(anchors, estimator, values), mdp.theta)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(ours, -exact, rtol=1e-10, atol=1e-12)


def test_q_advantages_are_the_rewards_less_a_share_of_the_baseline(rollouts):
    rewards, values, mask = rollouts
    credit = QAdvantage(value_coef=0.3)(rewards, values, mask)
    for b, t in itertools.product(*map(range, mask.shape)):
        r, v = (x[b, t].item() if mask[b, t] else 0.0 for x in (rewards, values))
        assert credit.advantages[b, t].item() == pytest.approx(r - 0.3 * v)
        assert credit.returns[b, t].item() == pytest.approx(r)
    with pytest.raises(ValueError, match="need the critic's values"):
        QAdvantage()(rewards, None, mask)


@pytest.mark.parametrize("baseline", ["none", "value", "noise"])
def test_a_policy_paid_q_star_by_the_token_stands_still_at_the_soft_optimum(baseline):
    """On a solved token MDP, by every state's sum over actions: Σ_a π A ∇log π = 0 at π*, and nowhere near π_ref."""
    mdp = random_mdp(3, 3, beta=0.4, seed=0)
    best = soft_optimal(mdp)
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(best.value.shape, generator=g, dtype=torch.float64)
    values = {"none": torch.zeros_like(noise), "value": best.value, "noise": noise}[baseline]

    open_states = ~mdp.tree.ended

    def slope(logp):
        logits = logp[:, open_states].flatten(0, 1).clone().requires_grad_()
        q, ref = (x[:, open_states].flatten(0, 1) for x in (best.q, mdp.ref_logp))
        v = values[:, open_states].flatten()[:, None].expand_as(q)
        own = logits.log_softmax(-1)
        paid = q - mdp.beta * (own - ref).detach()
        advantages = QAdvantage(value_coef=1.0)(paid, v, torch.ones_like(paid, dtype=torch.bool)).advantages
        (own.exp().detach() * advantages * own).sum().backward()
        return logits.grad.abs().max().item()

    assert slope(best.logp) < 1e-12
    assert slope(mdp.ref_logp) > 1e-3
