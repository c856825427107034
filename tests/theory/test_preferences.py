"""The Bradley–Terry estimator against another optimiser, and its confidence radius against chance."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rto.theory.instances import linear_mdp, random_mdp
from rto.theory.pessimism import response_features, weigh
from rto.theory.preferences import (
    confidence_radius,
    covariance,
    differences,
    draw_preferences,
    fit_bradley_terry,
    inverse_norm,
    population_preferences,
)


def lab(seed=0, dimension=4, **kwargs):
    mdp = random_mdp(3, 2, prompts=2, beta=0.3, spread=0.5, seed=seed)
    return linear_mdp(mdp, dimension, seed=seed + 50, **kwargs)


def by_another_optimiser(z, count, wins, radius):
    z, count, wins = z.numpy(), count.numpy(), wins.numpy()

    def loss(t):
        m = z @ t
        value = count @ np.logaddexp(0, m) - wins @ m
        return value / count.sum(), z.T @ (count / (1 + np.exp(-m)) - wins) / count.sum()

    ball = {"type": "ineq", "fun": lambda t: radius**2 - t @ t, "jac": lambda t: -2 * t}
    options = {"ftol": 1e-15, "maxiter": 1000}
    start = np.zeros(z.shape[1])
    return minimize(loss, start, jac=True, method="SLSQP", constraints=[ball], options=options).x


@pytest.mark.parametrize("radius", [0.2, 1.0, 50.0])
@pytest.mark.parametrize("size", [20, 2_000])
def test_maximum_likelihood_on_the_ball_by_another_optimiser(radius, size):
    problem = lab()
    data = draw_preferences(problem.mdp, problem.mdp.ref_logp, size, np.random.default_rng(0))
    z = differences(data, response_features(problem))
    mine = fit_bradley_terry(z, data.count, data.wins, radius)
    np.testing.assert_allclose(mine.theta.numpy(), by_another_optimiser(z, data.count, data.wins, radius), atol=2e-6)
    assert mine.residual < 1e-8
    assert mine.theta.norm() <= radius * (1 + 1e-9)


def test_separable_preferences_end_on_the_sphere():
    z = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    count = torch.tensor([5.0, 5.0]).double()
    found = fit_bradley_terry(z, count, count, 3.0)
    torch.testing.assert_close(found.theta, torch.full((2,), 3.0 / sqrt(2), dtype=torch.float64), rtol=0, atol=1e-9)
    assert found.multiplier > 0


def test_one_dimension_in_closed_form():
    """θ = logit(share of wins) when it fits in the ball."""
    one = torch.ones(1, 1).double()
    found = fit_bradley_terry(one, torch.tensor([10.0]).double(), torch.tensor([7.0]).double(), 5.0)
    assert float(found.theta[0]) == pytest.approx(log(0.7 / 0.3), abs=1e-8)


def test_infinite_data_give_back_theta():
    problem = lab()
    data = population_preferences(problem.mdp, problem.mdp.ref_logp)
    z = differences(data, response_features(problem))
    found = fit_bradley_terry(z, data.count, data.wins, 2.0)
    torch.testing.assert_close(found.theta, problem.theta, rtol=0, atol=1e-7)


def test_preferences_follow_bradley_and_terry():
    problem = lab()
    size = 400_000
    data = draw_preferences(problem.mdp, problem.mdp.ref_logp, size, np.random.default_rng(1))
    limit = population_preferences(problem.mdp, problem.mdp.ref_logp)
    assert data.size == size
    paid = problem.mdp.tree.responses.read(problem.mdp.reward).sum(-1)
    key = dict(zip(zip(limit.prompt.tolist(), limit.first.tolist(), limit.second.tolist()), limit.count))
    worst = 0.0
    for x, a, b, n, w in zip(data.prompt, data.first, data.second, data.count, data.wins):
        p, share = 1 / (1 + exp(float(paid[x, b] - paid[x, a]))), float(key[int(x), int(a), int(b)])
        worst = max(worst, abs(float(w) - float(n) * p) / sqrt(float(n) * p * (1 - p)))
        worst = max(worst, abs(float(n) - size * share) / sqrt(size * share))
    assert worst < 5


def test_covariance_and_norm_by_a_loop_over_comparisons():
    problem = lab()
    data = draw_preferences(problem.mdp, problem.mdp.ref_logp, 50, np.random.default_rng(2))
    phi = response_features(problem)
    sigma = 0.5 * np.eye(4)
    for x, a, b, n in zip(data.prompt, data.first, data.second, data.count):
        for _ in range(int(n)):
            sigma += np.outer(phi[x, a] - phi[x, b], phi[x, a] - phi[x, b])
    mine = covariance(differences(data, phi), data.count, 0.5)
    np.testing.assert_allclose(mine.numpy(), sigma, atol=1e-10)
    norms = inverse_norm(problem.features, mine)
    phi = problem.features.numpy()
    direct = np.sqrt(np.einsum("xnad,de,xnae->xna", phi, np.linalg.inv(sigma), phi))
    np.testing.assert_allclose(norms.numpy(), direct, atol=1e-12)


def test_confidence_radius_by_hand():
    """d = 1, ‖z‖B = 0, so Υ = ¼, and δ = 1/e: g = ½√(1 + 2 + 2)."""
    g = 0.5 * sqrt(5.0)
    expected = 2 * g + sqrt(4 * g**2 + 4 * 0.7 * 1.0)
    got = confidence_radius(1, 0.0, radius=1.0, regulariser=0.7, delta=exp(-1))
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_confidence_set_holds_theta_as_often_as_promised():
    """‖θ_MLE − θ*‖_Σ ≤ ϱ in at least 1 − δ of the runs; at a tenth of ϱ it does not."""
    ratios = []
    for seed in range(60):
        problem = lab(seed, bound=0.3)
        data = draw_preferences(problem.mdp, problem.mdp.ref_logp, 200, np.random.default_rng(seed))
        evidence = weigh(problem, data, delta=0.2)
        ratios.append(evidence.error / evidence.rho)
    assert np.mean(np.array(ratios) <= 1) >= 0.8
    assert np.mean(np.array(ratios) <= 0.1) < 0.8
