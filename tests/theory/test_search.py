"""Proposition 3.2: counts, edge cases, and what its assumption leaves open."""

from dataclasses import replace
from itertools import product
from math import log
from random import Random

import pytest
import torch

from rto.theory.identities import response_reward
from rto.theory.instances import comb, random_mdp, random_policy, with_xi
from rto.theory.mdp import PrefixTree, soft_optimal
from rto.theory.search import (
    RowOracle,
    SentenceOracle,
    TokenOracle,
    bounded_search,
    nodes_to_visit,
    paper_bound,
    proven_bound,
    row_search,
    sentence_search,
    token_search,
)

SHAPES = [(2, 3, 1.0), (2, 5, 0.5), (3, 3, 1.0), (3, 4, 1.7), (4, 3, 2.5), (5, 2, 1.0)]


def instance(vocabulary, horizon, xi, seed):
    mdp = with_xi(random_mdp(vocabulary, horizon, spread=0.0, seed=seed), xi)
    return mdp.tree, soft_optimal(mdp).logp[0]


def best_responses(logp, tree):
    """argmax by enumeration, from the table through `Responses`."""
    total = tree.responses.read(logp[None]).sum(-1)[0]
    return {tuple(tree.responses.tokens[i].tolist()) for i in (total >= total.max() - 1e-9).nonzero()[:, 0]}


@pytest.mark.parametrize(("vocabulary", "horizon", "xi"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_searchers_find_the_best_response_within_their_bounds(vocabulary, horizon, xi, seed):
    tree, logp = instance(vocabulary, horizon, xi, seed)
    best, rng = best_responses(logp, tree), Random(seed)
    sentence = sentence_search(SentenceOracle(logp), tree, rng)
    assert sentence.best == best
    assert sentence.samples == vocabulary**horizon
    proof = token_search(TokenOracle(logp), tree, xi, rng)
    assert proof.best == best
    assert proof.samples == nodes_to_visit(logp, tree, xi) <= proven_bound(vocabulary, horizon, xi)
    bounded = bounded_search(TokenOracle(logp), tree, rng)
    assert bounded.best <= best
    assert bounded.samples <= proof.samples
    rows = row_search(RowOracle(logp), tree)
    assert rows.best <= best
    assert rows.samples <= vocabulary**xi + 1e-9
    assert rows.samples <= paper_bound(vocabulary, horizon, xi)


@pytest.mark.parametrize("xi", [0.3, 1.0, 2.2])
def test_controlled_xi_is_the_xi_asked_for(xi):
    tree, logp = instance(3, 4, xi, 0)
    assert float(tree.responses.read(logp[None]).sum(-1).max()) == pytest.approx(-xi * log(3), abs=1e-9)


def test_figure_2_needs_at_most_4():
    """A = 2, H = 3, ξ = 1 and one optimum: over instances and all orders, 4 and not fewer."""
    counts, kept = set(), 0
    for seed in range(30):
        tree, logp = instance(2, 3, 1.0, seed)
        if tree.responses.read(logp[None]).sum(-1)[0].topk(2).values[1] > log(0.49):
            continue  # two optima of ½ each: the next test
        kept += 1
        counts |= {token_search(TokenOracle(logp), tree, 1.0, Random(o)).samples for o in range(5)}
        assert bounded_search(TokenOracle(logp), tree, Random(seed)).samples <= 4
        assert sentence_search(SentenceOracle(logp), tree, Random(0)).samples == 8
    assert max(counts) == 4
    assert kept >= 25


def test_figure_2_with_two_optima_takes_the_proofs_search_6():
    """Two responses of exactly ½: the count exceeds A^{ξ+1} = 4; the best-first search stays within."""
    tree, logp = PrefixTree(vocabulary=2, horizon=3), comb(2, 3, 1)[0]
    found = token_search(TokenOracle(logp), tree, 1.0, Random(0))
    assert found.samples == 6 > paper_bound(2, 3, 1.0)
    assert found.best == {(0, 0, 0), (1, 0, 0)}
    assert all(bounded_search(TokenOracle(logp), tree, Random(s)).samples <= 4 for s in range(50))


@pytest.mark.parametrize(("vocabulary", "horizon", "xi"), [(2, 4, 0), (3, 3, 0), (3, 4, 1), (3, 4, 2), (2, 4, 4)])
def test_the_comb_attains_the_proven_bound(vocabulary, horizon, xi):
    tree, logp = PrefixTree(vocabulary=vocabulary, horizon=horizon), comb(vocabulary, horizon, xi)[0]
    closed_form = vocabulary**xi * (1 + (horizon - xi) * (vocabulary - 1))
    found = token_search(TokenOracle(logp), tree, float(xi), Random(0))
    assert found.samples == proven_bound(vocabulary, horizon, float(xi)) == closed_form
    assert len(found.best) == vocabulary**xi


def test_proven_bound_over_every_short_deterministic_tree():
    """Brute force for ξ = 0: every deterministic π* of A = 2, H = 3 has 1 + H(A − 1) nodes."""
    tree = PrefixTree(vocabulary=2, horizon=3)
    for choice in product(range(2), repeat=tree.size):
        logp = torch.full((tree.size, 2), -torch.inf, dtype=torch.float64)
        logp[torch.arange(tree.size), list(choice)] = 0.0
        assert nodes_to_visit(logp, tree, 0.0) == 4 == proven_bound(2, 3, 0.0)


class Adversary(TokenOracle):
    """A deterministic π* that is made up on the way: the right token is the last one tried."""

    def __init__(self, vocabulary):
        super().__init__(torch.zeros(1, vocabulary).double())
        self.vocabulary, self.tried = vocabulary, {}

    def right(self, prefix):
        tried = self.tried.setdefault(prefix, set())
        return (set(range(self.vocabulary)) - tried).pop() if len(tried) == self.vocabulary - 1 else None

    def ask(self, response):
        self.samples += 1
        out = []
        for h, token in enumerate(response):
            prefix, alive = response[:h], all(v == 0.0 for v in out)
            if not alive:
                out.append(0.0 if token == 0 else -torch.inf)  # off the path: token 0, whatever happens
            elif self.right(prefix) == token:
                out.append(0.0)
            else:
                self.tried[prefix].add(token)
                out.append(-torch.inf)
        return out


@pytest.mark.parametrize(("vocabulary", "horizon"), [(2, 3), (3, 3), (4, 4), (5, 3)])
@pytest.mark.parametrize("how", ["proof", "bounded"])
def test_no_searcher_escapes_the_factor_h_at_xi_zero(vocabulary, horizon, how):
    """H(A − 1) samples are forced; the A of A^{ξ+1} is not enough when H > 1 and A > 2."""
    tree, oracle = PrefixTree(vocabulary=vocabulary, horizon=horizon), Adversary(vocabulary)
    if how == "proof":
        used = token_search(oracle, tree, 0.0, Random(0)).samples
    else:
        used = bounded_search(oracle, tree, Random(0)).samples
    assert horizon * (vocabulary - 1) <= used <= 1 + horizon * (vocabulary - 1)
    if vocabulary > 2:
        assert used > paper_bound(vocabulary, horizon, 0.0)


def test_xi_equal_to_h_always_holds_and_gains_nothing():
    mdp = random_mdp(3, 3, spread=0.0, beta=1e9)
    logp = soft_optimal(mdp).logp[0]
    assert token_search(TokenOracle(logp), mdp.tree, 3.0 + 1e-6, Random(0)).samples == 27
    assert paper_bound(3, 3, 3.0) == 27


def test_too_small_a_xi_finds_nothing():
    """If no response reaches A^{−ξ}, 𝒩* is empty: the assumption cannot be dropped."""
    tree, logp = instance(3, 3, 2.0, 0)
    with pytest.raises(ValueError, match="empty"):
        token_search(TokenOracle(logp), tree, 0.5, Random(0))


def test_the_likeliest_response_need_not_pay_most_under_another_reference():
    """π_ref can hide the best-paid response below A^{−ξ}: “best” then means likeliest under π*."""
    mdp = random_mdp(2, 2, spread=0.0, beta=1.0)
    reward = torch.zeros_like(mdp.reward)
    reward[0, 0, 1] = 1.0
    logits = torch.zeros_like(mdp.ref_logp)
    logits[0, 0, 0] = 5.0
    hidden = replace(mdp, reward=reward, ref_logp=logits.log_softmax(-1))
    logp, tree = soft_optimal(hidden).logp[0], hidden.tree
    found = token_search(TokenOracle(logp), tree, 1.1, Random(0)).best
    paid = response_reward(hidden)[0]
    top = {tuple(tree.responses.tokens[i].tolist()) for i in (paid == paid.max()).nonzero()[:, 0]}
    assert not found & top
    uniform = replace(hidden, ref_logp=torch.full_like(logits, -log(2.0)))
    likely = best_responses(soft_optimal(uniform).logp[0], tree)
    assert likely == top


def test_the_same_total_paid_at_the_end_tells_nothing_on_the_way():
    """A token-wise reward need not be β log π*/π_ref: paid at the end, it guides no search."""
    tree, logp = instance(3, 3, 1.0, 0)
    total = tree.responses.read(logp[None]).sum(-1)
    rows = torch.zeros(1, *tree.responses.tokens.shape, dtype=torch.float64)
    rows[..., -1] = total
    late = tree.responses.write(rows)[0]
    assert token_search(TokenOracle(late), tree, 1.0, Random(0)).samples > 2 * nodes_to_visit(logp, tree, 1.0)


def test_bounds_do_not_depend_on_which_random_policy():
    """Any π* at all: counts of the proof's search within the proven bound at its own ξ."""
    for seed in range(20):
        tree = PrefixTree(vocabulary=3, horizon=3)
        logp = random_policy(tree, 1, torch.Generator().manual_seed(seed), spread=3.0)
        xi = -float(tree.responses.read(logp).sum(-1).max()) / log(3)
        assert nodes_to_visit(logp[0], tree, xi) <= proven_bound(3, 3, xi)


def test_best_first_search_does_not_stop_while_the_rest_may_be_better():
    """π* = (0.45, 0.55), one token: the likelier one is found whichever is sampled first."""
    tree = PrefixTree(vocabulary=2, horizon=1)
    logp = torch.tensor([[0.45, 0.55]], dtype=torch.float64).log()
    used = set()
    for seed in range(20):
        found = bounded_search(TokenOracle(logp), tree, Random(seed))
        assert found.best == {(1,)}
        used.add(found.samples)
    assert used == {1, 2}  # after the likelier one, what is left cannot be better
