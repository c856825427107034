"""RTO on a table, where the answer of every stage is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rto.theory.identities import response_reward
from rto.theory.instances import random_mdp
from rto.theory.mdp import evaluate, mean_value, soft_optimal, suboptimality
from rto.theory.miniature import ESTIMATORS, Recipe, Run, anchors, dense, fit_dpo, score_only, train
from rto.theory.preferences import draw_preferences, population_preferences
from rto.theory.studies.dense import value_at
from rto.theory.studies.fitting import planning


def test_dpo_fit_on_infinite_data_is_the_soft_optimum():
    mdp = random_mdp(3, 3, prompts=2, beta=0.5, eos=True, seed=1)
    data = population_preferences(mdp, mdp.ref_logp)
    fitted = fit_dpo(mdp, data, ridge=1e-9)
    best = soft_optimal(mdp).logp
    gap = (mdp.beta * mdp.logratio(fitted) - mdp.beta * mdp.logratio(best)).abs().max()
    assert gap < 2e-3


def test_dpo_fit_gets_better_with_data_and_stays_finite_without():
    mdp = random_mdp(3, 2, beta=0.5, seed=1)
    losses = []
    for size in (10, 1_000, 100_000):
        data = draw_preferences(mdp, mdp.ref_logp, size, np.random.default_rng(0))
        fitted = fit_dpo(mdp, data)
        assert torch.isfinite(fitted).all()
        losses.append(suboptimality(mdp, fitted))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("place", ["token", "sentence", "final"])
def test_training_comes_most_of_the_way_with_every_placement(place, estimator):
    mdp = random_mdp(3, 2, prompts=2, beta=0.5, spread=0.5, eos=True, seed=3)
    recipe = Recipe(
        reward=dense(mdp), placement=place, estimator=ESTIMATORS[estimator], learning_rate=0.1, batch_size=64
    )
    zeros = torch.zeros_like(response_reward(mdp))
    run = train(mdp, recipe, dpo=soft_optimal(mdp).logp, scores=zeros, iterations=60, seed=0)
    assert float(run.value[0]) == pytest.approx(mean_value(mdp, evaluate(mdp, mdp.ref_logp)), abs=1e-12)
    assert float(run.value[-1]) > value_at(mdp, 0.9)
    assert run.value.max() <= mean_value(mdp, soft_optimal(mdp).value) + 1e-9


def test_the_score_paid_at_the_end_is_the_summed_token_reward_up_to_a_constant():
    """Whitened, PPO on r(y) and DDPO on π* make the same updates: they differ by V*(s₁) of the one prompt."""
    mdp = random_mdp(3, 2, beta=0.5, seed=3)
    best, totals = soft_optimal(mdp).logp, response_reward(mdp)
    common = {"iterations": 10, "seed": 0}
    final = Recipe(reward=dense(mdp), placement="final")
    a = train(mdp, final, dpo=best, scores=torch.zeros_like(totals), **common)
    b = train(mdp, replace(final, reward=score_only(mdp)), dpo=None, scores=totals, **common)
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=1e-6)


def test_a_run_stops_where_it_was_told_to():
    mdp = random_mdp(3, 2, beta=0.5, spread=0.5, seed=3)
    goal = value_at(mdp, 0.5)
    zeros = torch.zeros_like(response_reward(mdp))
    recipe = Recipe(reward=dense(mdp), learning_rate=0.1)
    run = train(mdp, recipe, dpo=soft_optimal(mdp).logp, scores=zeros, iterations=200, seed=0, until=goal)
    assert (run.value[:-1] < goal).all()
    assert run.value[-1] >= goal
    assert run.rollouts_to(goal) == float(run.rollouts[-1])


def test_rollouts_to_a_value():
    run = Run(rollouts=torch.tensor([0.0, 8, 16]).double(), value=torch.tensor([0.0, 2, 1]).double())
    assert run.rollouts_to(1.5) == 8
    assert run.rollouts_to(3.0) == float("inf")


def test_sentence_anchors_are_full_stops():
    mdp = random_mdp(4, 3, eos=True)
    stop = mdp.tree.vocabulary - 2
    expected = (mdp.tree.responses.tokens == stop) & mdp.tree.responses.mask
    assert torch.equal(anchors(mdp, "sentence"), expected)


def test_rto_without_a_score_returns_the_dpo_policy():
    plans = planning((200,), range(2))
    np.testing.assert_allclose(plans["RTO β₁=β, β₃=0"], plans["DPO"], atol=1e-10)
