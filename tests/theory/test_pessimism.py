"""Algorithm 1: the bounds follow from the confidence set; each learner has its own oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rto.theory.instances import LinearMDP, linear_mdp, random_mdp, random_policy
from rto.theory.mdp import expectation, mean_value, soft_optimal, suboptimality
from rto.theory.pessimism import (
    bandit,
    bound_4_2,
    bound_b_1,
    no_pessimism,
    pessimistic_reward,
    response_features,
    sentence_pessimism,
    solve_value_pessimism,
    token_pessimism,
    value_pessimism,
    weigh,
)
from rto.theory.preferences import draw_preferences, inverse_norm
from rto.theory.studies.pessimism import slope, starved


def evidence_of(seed=0, size=300, beta=0.3, eos=False):
    problem = linear_mdp(random_mdp(3, 2, prompts=2, beta=beta, spread=0.5, eos=eos, seed=seed), 4, seed=seed)
    data = draw_preferences(problem.mdp, problem.mdp.ref_logp, size, np.random.default_rng(seed))
    return weigh(problem, data)


def anywhere_in_the_set(evidence, seed, how_far=1.0):
    """θ_MLE put on the boundary of the confidence set around θ*: the worst the guarantee allows."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(4, generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(evidence.sigma)
    step = torch.linalg.solve_triangular(root.T, (direction / direction.norm())[:, None], upper=True)[:, 0]
    return replace(evidence, theta=evidence.problem.theta + how_far * evidence.rho * step)


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("eos", [False, True])
def test_both_bounds_hold_for_every_estimate_in_the_confidence_set(seed, eos):
    evidence = anywhere_in_the_set(replace(evidence_of(seed % 5, eos=eos), rho=2.0), seed)
    assert evidence.error == pytest.approx(evidence.rho, rel=1e-9)
    learned = token_pessimism(evidence)
    assert (pessimistic_reward(evidence) <= evidence.problem.mdp.reward + 1e-9).all()
    assert suboptimality(evidence.problem.mdp, learned) <= bound_4_2(evidence, learned) + 1e-9
    assert suboptimality(evidence.problem.mdp, value_pessimism(evidence)) <= bound_b_1(evidence) + 1e-6


def test_the_bound_breaks_outside_the_confidence_set():
    """Far enough outside, some estimate breaks it: the check above can fail."""
    broken = 0
    for seed in range(30):
        evidence = anywhere_in_the_set(replace(evidence_of(0, beta=0.05), rho=0.3), seed, how_far=30.0)
        learned = token_pessimism(evidence)
        broken += suboptimality(evidence.problem.mdp, learned) > bound_4_2(evidence, learned)
    assert broken > 0


def test_the_bounds_terms_by_enumeration():
    """E_{d*} over responses instead of states: Σ_y π*(y) Σ_h ‖φ_h‖, and KL(π*‖π̂) of whole responses."""
    evidence = evidence_of(eos=True)
    mdp, responses = evidence.problem.mdp, evidence.problem.mdp.tree.responses
    best, learned = soft_optimal(mdp).logp, token_pessimism(evidence)
    whole = mdp.prompts[:, None] * responses.read(best).sum(-1).exp()
    width = (whole * responses.read(inverse_norm(evidence.problem.features, evidence.sigma)).sum(-1)).sum()
    away = (whole * (responses.read(best) - responses.read(learned)).sum(-1)).sum()
    expected = float(2 * evidence.rho * width - mdp.beta * away)
    assert bound_4_2(evidence, learned) == pytest.approx(expected, abs=1e-9)
    mean = (whole[..., None] * response_features(evidence.problem)).sum((0, 1))
    direct = 2 * evidence.rho * float(mean @ torch.linalg.inv(evidence.sigma) @ mean) ** 0.5
    assert bound_b_1(evidence) == pytest.approx(direct, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rho", [0.05, 0.5, 5.0])
def test_value_pessimism_is_certified_and_beats_every_other_policy(seed, rho):
    evidence = replace(evidence_of(seed), rho=rho)
    problem = evidence.problem

    def objective(logp):
        mean = expectation(problem.mdp, logp, problem.features)
        kl = expectation(problem.mdp, logp, problem.mdp.beta * problem.mdp.logratio(logp))
        return float(mean @ evidence.theta - kl - rho * inverse_norm(mean, evidence.sigma))

    solved = solve_value_pessimism(evidence)
    assert -1e-10 <= solved.gap < 1e-5
    rivals = [random_policy(problem.mdp.tree, 2, torch.Generator().manual_seed(s)) for s in range(30)]
    rivals += [no_pessimism(evidence), token_pessimism(evidence), problem.mdp.ref_logp]
    assert objective(solved.logp) >= max(objective(r) for r in rivals) - 1e-9


def test_without_pessimism_tokens_sentences_and_values_are_one_learner():
    evidence = replace(evidence_of(eos=True), rho=0.0)
    expected = no_pessimism(evidence).exp()
    for learner in (token_pessimism, sentence_pessimism, value_pessimism):
        torch.testing.assert_close(learner(evidence).exp(), expected, rtol=0, atol=1e-9)


def test_sentences_take_off_less_than_their_tokens_together():
    evidence = evidence_of(eos=True)
    whole = inverse_norm(response_features(evidence.problem), evidence.sigma)
    tokens = evidence.problem.mdp.tree.responses.read(inverse_norm(evidence.problem.features, evidence.sigma))
    assert (whole <= tokens.sum(-1) + 1e-12).all()


def test_with_enough_data_every_learner_is_nearly_optimal():
    evidence = evidence_of(size=10_000_000)
    scale = suboptimality(evidence.problem.mdp, evidence.problem.mdp.ref_logp)
    for learner in (token_pessimism, sentence_pessimism, value_pessimism, no_pessimism, bandit):
        assert suboptimality(evidence.problem.mdp, learner(evidence)) < 0.01 * scale


def test_indicator_features_leave_one_direction_unlearned():
    """Σ_h φ always sums to H, so Σ_𝒟 never sees the all-ones direction: ‖φ‖²_{Σ⁻¹} ≥ 1/(dλ) for ever."""
    mdp = random_mdp(2, 2, beta=0.3, spread=0.0)
    cells = mdp.reward.numel()
    features = torch.eye(cells, dtype=torch.float64).view(*mdp.reward.shape, cells)
    theta = mdp.reward.flatten() / mdp.reward.norm()
    problem = LinearMDP(mdp=replace(mdp, reward=features @ theta), features=features, theta=theta, radius=1.0)
    data = draw_preferences(problem.mdp, mdp.ref_logp, 10_000_000, np.random.default_rng(0))
    evidence = weigh(problem, data, regulariser=1.0)
    assert (inverse_norm(features, evidence.sigma) >= cells**-0.5 - 1e-9).all()
    assert suboptimality(problem.mdp, no_pessimism(evidence)) < 1e-4


def test_one_lonely_comparison_fools_maximum_likelihood_but_not_pessimism():
    losses = {"plain": [], "pessimist": []}
    for seed in range(20):
        problem, data = starved(1_000_000, np.random.default_rng(seed))
        evidence = weigh(problem, data)
        for name, learner in (("plain", no_pessimism), ("pessimist", token_pessimism)):
            losses[name].append(suboptimality(problem.mdp, learner(evidence)))
    assert max(losses["pessimist"]) < 0.05
    assert np.mean(losses["plain"]) > 0.2


def test_pessimism_lowers_the_value_by_what_it_takes_off():
    """Pessimism lowers V* by what it takes off along its own policy, at least."""
    evidence = evidence_of()
    mdp = evidence.problem.mdp
    lower = mean_value(mdp, soft_optimal(evidence.problem.with_reward(pessimistic_reward(evidence))).value)
    plain = mean_value(mdp, soft_optimal(evidence.problem.with_theta(evidence.theta)).value)
    width = evidence.rho * inverse_norm(evidence.problem.features, evidence.sigma)
    first_order = float(expectation(mdp, token_pessimism(evidence), width))
    assert plain - lower >= first_order - 1e-9


def test_slope_of_a_power_law_and_its_error():
    """Values c·n^−p have slope −p whatever the seeds' constants; noise in one seed shows in the error."""
    sizes, constants = (10, 100, 1_000, 10_000), np.array([1.0, 2.0, 5.0])
    values = np.array(sizes, float)[:, None] ** -0.5 * constants
    assert slope(sizes, values) == pytest.approx((-0.5, 0.0), abs=1e-12)
    values[-1, 0] *= 3
    assert slope(sizes, values)[1] > 0.01
