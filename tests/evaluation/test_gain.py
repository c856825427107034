"""What a payment buys at a KL, against normal rewards, sets small enough to solve, and a linear program."""

import math

import numpy as np
import pytest
from scipy import optimize

from rto.evaluation.statistics.gain import best_mixture, foretell, tilted_gain


def normal_rewards(n: int, k: int, rho: float, seed: int, *, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Payment and gold of n · K completions: jointly normal within a prompt, on offsets of the prompt's own."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(n, k))
    g = spread * (rho * p + math.sqrt(1 - rho**2) * rng.normal(size=(n, k)))
    return 0.3 * p + 10 * rng.normal(size=(n, 1)), g + 10 * rng.normal(size=(n, 1))


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("k", [2, 8])
def test_intervals_cover_what_normal_rewards_were_drawn_with(rho: float, k: int) -> None:
    covered = []
    for seed in range(30):
        found = foretell(*normal_rewards(300, k, rho, seed), rounds=200)
        truth = ((found.correlation, rho), (found.slope, 2 * rho), (found.gain(2.0), 2 * rho * math.sqrt(2 * 2.0)))
        covered += [x.low <= true <= x.high for x, true in truth]
    assert np.mean(covered) >= 0.85  # of 30 data sets


def test_the_prompts_mean_costs_a_degree_of_freedom() -> None:
    """With K = 2 a division by K would halve the variance."""
    spreads = [foretell(*normal_rewards(200, 2, 0.5, seed), rounds=2).spread ** 2 for seed in range(200)]
    assert np.mean(spreads) == pytest.approx(4.0, abs=4 * np.std(spreads) / math.sqrt(200))


def test_the_gain_of_normal_rewards_is_that_of_their_tilted_density() -> None:
    """By quadrature of π ∝ N(0, 1) exp(λp): its KL and its mean, without the formula."""
    p = np.linspace(-12, 12, 20001)
    base = np.exp(-(p**2) / 2)
    base /= base.sum()
    found = foretell(*normal_rewards(20_000, 4, 0.6, seed=0), rounds=2)
    for strength in (0.2, 1.0, 2.0):
        w = base * np.exp(strength * p)
        w /= w.sum()
        kl = (w * np.log(w / base)).sum()
        gain = 2.0 * 0.6 * (w * p).sum()  # E[gold | p] = spread · ρ · p
        assert found.gain(float(kl)).value == pytest.approx(gain, rel=0.02)


def test_tilting_approaches_the_formula_on_normal_rewards() -> None:
    paid, gold = normal_rewards(300, 256, 0.6, seed=1)
    levels = [0.05, 0.5, 1.5]
    expected = [2.0 * 0.6 * math.sqrt(2 * level) for level in levels]
    assert tilted_gain(paid, gold, levels) == pytest.approx(expected, rel=0.05)


def test_tilting_a_finite_set_is_the_best_that_its_kl_can_buy() -> None:
    """Against a solver that knows nothing of exponents: max Σ w·paid with KL(w ‖ uniform) = level."""
    rng = np.random.default_rng(3)
    paid, gold, level = rng.normal(size=(1, 5)), rng.normal(size=(1, 5)), 0.4

    def kl(w: np.ndarray) -> float:
        return float((w * np.log(w * 5)).sum())

    solved = optimize.minimize(
        lambda w: -(w @ paid[0]),
        np.full(5, 0.2),
        bounds=[(1e-9, 1)] * 5,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}, {"type": "ineq", "fun": lambda w: level - kl(w)}],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    by_hand = solved.x @ gold[0] - gold.mean()
    assert tilted_gain(paid, gold, [level])[0] == pytest.approx(by_hand, abs=1e-4)
    assert tilted_gain(paid, paid, [level])[0] == pytest.approx(solved.x @ paid[0] - paid.mean(), abs=1e-4)


def test_a_small_tilt_of_a_finite_set_has_the_slope_of_its_moments() -> None:
    rng = np.random.default_rng(4)
    paid, gold = rng.normal(size=(7, 6)) ** 3, rng.normal(size=(7, 6))
    p, g = paid - paid.mean(1, keepdims=True), gold - gold.mean(1, keepdims=True)
    slope = (p * g).mean() / math.sqrt((p * p).mean())  # the K completions are all there are: no degree is lost
    assert tilted_gain(paid, gold, [1e-7])[0] == pytest.approx(slope * math.sqrt(2e-7), rel=1e-3)


def test_scales_and_offsets_of_the_payment_do_not_matter() -> None:
    paid, gold = normal_rewards(50, 4, 0.5, seed=5)
    other = 1000 * paid + np.arange(50)[:, None]
    ours, theirs = foretell(other, gold), foretell(paid, gold)
    for name in ("correlation", "slope"):
        assert getattr(ours, name).value == pytest.approx(getattr(theirs, name).value)
        assert getattr(ours, name).low == pytest.approx(getattr(theirs, name).low)
    np.testing.assert_allclose(tilted_gain(other, gold, [0.3]), tilted_gain(paid, gold, [0.3]), rtol=1e-6)


def test_what_never_varies_foretells_nothing() -> None:
    gold = np.random.default_rng(0).normal(size=(5, 3))
    assert math.isnan(foretell(np.ones((5, 3)), gold).slope.value)
    assert np.isnan(tilted_gain(np.ones((5, 3)), gold, [0.1])).all()
    assert np.isnan(tilted_gain(gold, gold, [math.log(3) + 0.1])).all()  # more than K completions can part with
    for shapes in (((5, 1), (5, 1)), ((0, 2), (0, 2))):
        with pytest.raises(ValueError, match="at least two completions a prompt"):
            foretell(*map(np.ones, shapes))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_mixture_is_the_linear_programs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, kl = np.r_[0.0, rng.normal(size=5)], np.r_[0.0, rng.exponential(3, size=5)]
    for level in (0.5, 2.0, 8.0):
        shares = best_mixture(gold, kl, level)
        solved = optimize.linprog(-gold, A_ub=kl[None], b_ub=[level], A_eq=np.ones((1, 6)), b_eq=[1.0])
        assert shares @ gold == pytest.approx(-solved.fun, abs=1e-9)
        assert shares @ kl <= level + 1e-9
        assert shares.min() >= 0
        assert shares.sum() == pytest.approx(1)


def test_a_mixture_costs_no_more_than_its_parts() -> None:
    """KL(Σ w π ‖ π_ref) ≤ Σ w KL(π ‖ π_ref), on drawn distributions: what makes a hull a thing that can be had."""
    rng = np.random.default_rng(0)
    ref, a, b = rng.dirichlet(np.ones(6), size=3)
    kl = [float((x * np.log(x / ref)).sum()) for x in (a, b, 0.3 * a + 0.7 * b)]
    assert kl[2] <= 0.3 * kl[0] + 0.7 * kl[1]


def test_a_mixture_needs_somewhere_to_begin() -> None:
    with pytest.raises(ValueError, match="no policy is within KL 1"):
        best_mixture(np.ones(2), np.array([2.0, 3.0]), 1.0)
