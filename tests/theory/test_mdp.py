"""The exact solver against brute force over all responses, which knows nothing of heaps or levels."""

from math import exp, log, prod

import pytest
import torch

from rto.theory.instances import random_mdp, random_policy, sentence_rewards, token_rewards
from rto.theory.mdp import (
    PrefixTree,
    TokenMDP,
    evaluate,
    expectation,
    mean_value,
    occupancy,
    sample,
    soft_optimal,
    suboptimality,
)

KINDS = [(token_rewards, False), (token_rewards, True), (sentence_rewards, False), (sentence_rewards, True)]


def make(kind, seed=0, **kwargs):
    rewards, eos = kind
    return random_mdp(3, 3, prompts=2, beta=0.6, eos=eos, rewards=rewards, seed=seed, **kwargs)


def walk(tree, prefix=()):
    """All responses by recursion, as tuples: the oracle's own enumeration."""
    if len(prefix) == tree.horizon or (prefix and prefix[-1] == tree.eos):
        yield prefix
    else:
        for token in range(tree.vocabulary):
            yield from walk(tree, (*prefix, token))


def along(table, prompt, response):
    """The table's entries on a path, with the states numbered in the order of a breadth-first walk."""
    vocabulary, values = table.shape[2], []
    for h, token in enumerate(response):
        first = sum(vocabulary**d for d in range(h))
        index = sum(t * vocabulary ** (h - 1 - i) for i, t in enumerate(response[:h]))
        values.append(float(table[prompt, first + index, token]))
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_soft_values_and_policy_by_brute_force(kind):
    mdp = make(kind)
    best = soft_optimal(mdp)
    for x in range(2):
        weight = {
            y: exp(sum(along(mdp.ref_logp, x, y)) + sum(along(mdp.reward, x, y)) / mdp.beta) for y in walk(mdp.tree)
        }
        total = sum(weight.values())
        assert float(best.value[x, 0]) == pytest.approx(mdp.beta * log(total), abs=1e-12)
        for y, w in weight.items():
            assert exp(sum(along(best.logp, x, y))) == pytest.approx(w / total, rel=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_value_of_a_policy_by_brute_force(kind):
    mdp = make(kind)
    policy = random_policy(mdp.tree, 2, torch.Generator().manual_seed(5))
    value = evaluate(mdp, policy)
    for x in range(2):
        expected = 0.0
        for y in walk(mdp.tree):
            logp, ref = sum(along(policy, x, y)), sum(along(mdp.ref_logp, x, y))
            expected += exp(logp) * (sum(along(mdp.reward, x, y)) - mdp.beta * (logp - ref))
        assert float(value[x, 0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_occupancy_by_brute_force(kind):
    mdp = make(kind)
    policy = random_policy(mdp.tree, 2, torch.Generator().manual_seed(5))
    table = torch.randn(mdp.reward.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = sum(
        0.5 * exp(sum(along(policy, x, y))) * sum(along(table, x, y)) for x in range(2) for y in walk(mdp.tree)
    )
    assert float(expectation(mdp, policy, table)) == pytest.approx(expected, abs=1e-12)
    reach = occupancy(mdp, policy)
    assert torch.all(reach[:, 0] == 1)
    assert not reach[:, mdp.tree.ended].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_beats_the_optimum(kind):
    mdp = make(kind)
    assert suboptimality(mdp, soft_optimal(mdp).logp) == pytest.approx(0.0, abs=1e-12)
    for seed in range(20):
        assert suboptimality(mdp, random_policy(mdp.tree, 2, torch.Generator().manual_seed(seed))) > 0


def test_a_policy_that_never_takes_a_token_has_a_value():
    mdp = make(KINDS[0])
    logp = torch.full_like(mdp.ref_logp, -torch.inf)
    logp[..., 1] = 0.0
    reward, ref = (sum(along(t, 0, (1, 1, 1))) for t in (mdp.reward, mdp.ref_logp))
    assert float(evaluate(mdp, logp)[0, 0]) == pytest.approx(reward + mdp.beta * ref, abs=1e-12)


@pytest.mark.parametrize("eos", [None, 0, 2])
def test_enumeration_is_the_recursion(eos):
    tree = PrefixTree(vocabulary=3, horizon=4, eos=eos)
    mine = {tuple(y[m].tolist()) for y, m in zip(tree.responses.tokens, tree.responses.mask)}
    assert mine == set(walk(tree))
    assert len(tree.responses.tokens) == len(mine)


def test_write_inverts_read_and_refuses_what_is_no_function_of_the_state():
    mdp = make(KINDS[1])
    responses = mdp.tree.responses
    rows = responses.read(mdp.reward)
    assert torch.equal(responses.write(rows), mdp.reward)
    rows[0, 0, 0] += 1.0
    with pytest.raises(ValueError, match="share a prefix"):
        responses.write(rows)


def test_samples_have_the_policys_frequencies():
    mdp = make(KINDS[1])
    policy = random_policy(mdp.tree, 2, torch.Generator().manual_seed(5))
    count = 200_000
    prompts, y = sample(mdp, policy, count, torch.Generator().manual_seed(0))
    chance = 0.5 * mdp.tree.responses.read(policy).sum(-1).exp()
    seen = torch.zeros_like(chance).index_put_((prompts, y), torch.ones(count).double(), accumulate=True)
    deviation = (seen - count * chance) / (count * chance * (1 - chance)).sqrt()
    assert deviation.abs().max() < 4.5


def test_mean_value_weighs_the_prompts():
    mdp = make(KINDS[0])
    assert mean_value(mdp, torch.arange(26.0).double().view(2, 13)) == 0.5 * 0 + 0.5 * 13


def test_tree_sizes():
    for vocabulary, horizon in ((2, 1), (2, 5), (4, 3)):
        tree = PrefixTree(vocabulary=vocabulary, horizon=horizon)
        assert tree.size == sum(vocabulary**d for d in range(horizon))
        assert len(tree.responses.tokens) == prod([vocabulary] * horizon)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta", 0.0, "beta"),
        ("reward", torch.ones(1, 13, 3), "float64"),
        ("ref_logp", torch.zeros(1, 13, 3).double(), "sum to one"),
        ("reward", torch.ones(1, 13, 3).double(), "ended"),
        ("ref_logp", torch.full((1, 13, 3), -log(3.0)).double(), "legal"),
    ],
)
def test_what_is_no_token_mdp_is_refused(field, value, message):
    eos = message in ("ended", "legal")
    good = random_mdp(3, 3, eos=eos)
    fields = {k: getattr(good, k) for k in ("tree", "reward", "ref_logp", "prompts", "beta")}
    with pytest.raises(ValueError, match=message):
        TokenMDP(**{**fields, field: value})


def test_bad_trees_are_refused():
    with pytest.raises(ValueError, match="A ≥ 2"):
        PrefixTree(vocabulary=1, horizon=3)
    with pytest.raises(ValueError, match="eos"):
        PrefixTree(vocabulary=2, horizon=3, eos=2)
