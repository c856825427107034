import pytest
import torch

from rto.theory import stochastic
from rto.theory.instances import random_mdp
from rto.theory.mdp import soft_optimal


@pytest.mark.parametrize("vocabulary", [2, 3, 5])
def test_counter_example_loses_one_less_one_over_a(vocabulary):
    mdp = stochastic.counter_example(vocabulary)
    seen = float(stochastic.soft_optimal(mdp)[0][0, 0])
    assert seen == pytest.approx(1.0, abs=1e-12)
    assert stochastic.value_fixed_in_advance(mdp) == pytest.approx(1 / vocabulary, abs=1e-12)
    assert seen - stochastic.value_fixed_in_advance(mdp) >= 0.5 - 1e-12


def test_counter_example_by_simulation():
    """Dice, not algebra: draw the state, then follow the seeing and the fixed policy."""
    mdp = stochastic.counter_example(2)
    generator = torch.Generator().manual_seed(0)
    state = torch.multinomial(mdp.transition[0, 0, 0], 40_000, replacement=True, generator=generator)
    best_token = stochastic.soft_optimal(mdp)[1][1].argmax(-1)
    seeing = mdp.reward[1, state, best_token[state]].mean()
    fixed = max(float(mdp.reward[1, state, torch.full_like(state, a)].mean()) for a in range(2))
    assert float(seeing) == 1.0
    assert fixed == pytest.approx(0.5, abs=0.01)


def test_writing_in_advance_loses_nothing_when_transitions_append():
    """The hard optimum of a deterministic MDP is one response, and enumeration finds it."""
    tokens = random_mdp(3, 3, seed=2)
    drawn = stochastic.from_tokens(tokens)
    hard = stochastic.StochasticMDP(
        reward=drawn.reward, transition=drawn.transition, ref_logp=drawn.ref_logp, beta=0.0
    )
    best = float(tokens.tree.responses.read(tokens.reward).sum(-1).max())
    assert stochastic.value_fixed_in_advance(hard) == pytest.approx(best, abs=1e-12)
    assert float(stochastic.soft_optimal(hard)[0][0, 0]) == pytest.approx(best, abs=1e-12)


def test_both_solvers_agree_on_a_token_mdp():
    tokens = random_mdp(3, 3, beta=0.7, seed=4)
    values, _ = stochastic.soft_optimal(stochastic.from_tokens(tokens))
    tree = tokens.tree
    for depth in range(tree.horizon):
        at = tree.level(depth)
        torch.testing.assert_close(values[depth, at], soft_optimal(tokens).value[0, at], rtol=0, atol=1e-12)


def test_telescoping_fails_by_the_surprise_of_the_transitions():
    mdp = stochastic.random_stochastic(4, 3, 2, beta=0.5, seed=0)
    gap, surprise = stochastic.telescoping_gap(mdp, [0, 2, 1, 1], [1, 0, 1, 0])
    assert gap == pytest.approx(surprise, abs=1e-12)
    assert abs(gap) > 0.01
    certain = stochastic.from_tokens(random_mdp(2, 3, seed=1))
    gap, surprise = stochastic.telescoping_gap(certain, [0, 2, 5], [1, 0, 1])
    assert gap == pytest.approx(0.0, abs=1e-12)
    assert surprise == pytest.approx(0.0, abs=1e-12)


def test_transitions_must_be_distributions():
    mdp = stochastic.counter_example(2)
    with pytest.raises(ValueError, match="sum to one"):
        stochastic.StochasticMDP(reward=mdp.reward, transition=2 * mdp.transition, ref_logp=mdp.ref_logp, beta=0.0)
