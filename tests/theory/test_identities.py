"""The paper's identities, and `rto.functional` against exact values on enumerated responses."""

from dataclasses import replace

import pytest
import torch
from test_mdp import KINDS, make

from rto.functional.advantages import GAE, ReinforcePlusPlus
from rto.functional.logprobs import logprobs_and_entropies
from rto.functional.masked import masked_sum
from rto.functional.ppo import policy_loss
from rto.functional.rewards import RTOReward, place
from rto.theory.gradients import exact_gradient, gradient_moments
from rto.theory.identities import dense_reward, response_reward, shaped, trained_reward
from rto.theory.instances import normalise, random_policy
from rto.theory.mdp import advantage, evaluate, soft_optimal
from rto.theory.miniature import anchors, dense, dpo_loss, score_only
from rto.theory.preferences import population_preferences

PLACES = ("token", "sentence", "final")


def policy_of(mdp, seed=5):
    return random_policy(mdp.tree, len(mdp.prompts), torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratio_telescopes_to_reward_less_value(kind):
    mdp = make(kind)
    best = soft_optimal(mdp)
    total = mdp.tree.responses.read(dense_reward(mdp, best.logp)).sum(-1)
    close(total, response_reward(mdp) - best.value[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_dense_reward_has_the_same_optimum_and_no_value_left(kind):
    mdp = make(kind)
    best = soft_optimal(mdp)
    again = soft_optimal(replace(mdp, reward=dense_reward(mdp, best.logp)))
    close(again.logp.exp(), best.logp.exp())
    close(again.value, torch.zeros_like(again.value))


@pytest.mark.parametrize("kind", KINDS)
def test_shaping_moves_values_by_the_potential_and_policies_not_at_all(kind):
    mdp = make(kind)
    potential = torch.randn(2, mdp.tree.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, after = soft_optimal(mdp), soft_optimal(shaped(mdp, potential))
    close(after.logp.exp(), before.logp.exp())
    live = ~mdp.tree.ended
    close(after.value[:, live], (before.value - potential)[:, live])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place_", PLACES)
def test_rs_ppo_is_potential_shaping_of_the_score(kind, place_):
    mdp = make(kind)
    shaping = RTOReward(dpo_coef=0.7, kl_coef=0.0, score_coef=1.0, token_reward_clip=None, shaping=True)
    rows = trained_reward(
        mdp,
        shaping,
        policy=mdp.ref_logp,
        dpo=policy_of(mdp),
        scores=response_reward(mdp),
        anchors=anchors(mdp, place_),
    )
    close(rows.sum(-1), response_reward(mdp))
    credited = soft_optimal(replace(mdp, reward=mdp.tree.responses.write(rows)))
    close(credited.logp.exp(), soft_optimal(mdp).logp.exp())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place_", PLACES)
def test_every_placement_has_the_same_optimum(kind, place_):
    mdp = make(kind)
    best = soft_optimal(mdp)
    reward = replace(dense(mdp), kl_coef=0.0)
    zeros = torch.zeros_like(response_reward(mdp))
    rows = trained_reward(mdp, reward, policy=mdp.ref_logp, dpo=best.logp, scores=zeros, anchors=anchors(mdp, place_))
    placed = soft_optimal(replace(mdp, reward=mdp.tree.responses.write(rows)))
    close(placed.logp.exp(), best.logp.exp())


@pytest.mark.parametrize("kind", KINDS)
def test_expected_trained_reward_is_the_regularised_value(kind):
    mdp = make(kind)
    policy = policy_of(mdp)
    rows = trained_reward(mdp, score_only(mdp), policy=policy, dpo=None, scores=response_reward(mdp))
    whole = mdp.tree.responses.read(policy).sum(-1).exp()
    close((whole * rows.sum(-1)).sum(-1), evaluate(mdp, policy)[:, 0])


def test_place_pays_what_comes_up_to_the_next_anchor_and_nothing_twice():
    mdp = make(KINDS[1])
    responses = mdp.tree.responses
    rows = responses.read(mdp.reward)[0]
    at = anchors(mdp, "sentence")
    paid = place(rows, responses.mask, at)
    for row, got, mask, anchor in zip(rows, paid, responses.mask, at):
        held, last = 0.0, int(mask.sum()) - 1
        for h in range(last + 1):
            held += float(row[h])
            if anchor[h] or h == last:
                assert float(got[h]) == pytest.approx(held, abs=1e-12)
                held = 0.0
            else:
                assert float(got[h]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_exact_critic_is_the_advantage_on_average(kind, lam):
    """For λ = 0 it is the advantage itself; for any λ its mean given (s, a) is."""
    mdp = make(kind)
    policy, responses = policy_of(mdp), mdp.tree.responses
    pay = responses.read(mdp.reward - mdp.beta * mdp.logratio(policy))
    value = responses.read_states(evaluate(mdp, policy))
    mask = responses.mask.repeat(2, 1)
    got = GAE(gamma=1.0, lam=lam)(pay.flatten(0, 1), value.flatten(0, 1), mask).advantages.view(pay.shape)
    truth = advantage(mdp, policy)
    if lam == 0.0:
        close(got, responses.read(truth))
    whole = responses.read(policy).sum(-1).exp()[..., None]
    mean, reach = (torch.zeros_like(truth) for _ in range(2))
    for x in range(2):
        for into, what in ((mean, whole[x] * got[x]), (reach, whole[x] * responses.mask)):
            at = (torch.tensor(x), responses.nodes.flatten(), responses.tokens.flatten())
            into.index_put_(at, torch.where(responses.mask, what, 0.0).flatten(), accumulate=True)
    live = reach > 0
    close(mean[live] / reach[live], truth[live])


@pytest.mark.parametrize("place_", PLACES)
def test_with_its_exact_critic_a_placement_changes_no_delta(place_):
    """V of the placed reward takes the difference back: GAE is the same number for every λ."""
    mdp = make(KINDS[0])
    best, policy, responses = soft_optimal(mdp).logp, policy_of(mdp), mdp.tree.responses
    zeros = torch.zeros_like(response_reward(mdp))

    def credit(at):
        rows = trained_reward(mdp, dense(mdp), policy=policy, dpo=best, scores=zeros, anchors=at)
        plain = replace(mdp, reward=responses.write(rows + mdp.beta * responses.read(mdp.logratio(policy))))
        value = responses.read_states(evaluate(plain, policy)).flatten(0, 1)
        return GAE(lam=0.7)(rows.flatten(0, 1), value, responses.mask.repeat(2, 1)).advantages

    close(credit(anchors(mdp, place_)), credit(responses.mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place_", PLACES)
def test_every_placement_has_the_exact_gradient_as_its_mean(kind, place_):
    mdp = make(kind)
    policy, best = policy_of(mdp), soft_optimal(mdp).logp
    zeros = torch.zeros_like(response_reward(mdp))
    rows = trained_reward(mdp, dense(mdp), policy=policy, dpo=best, scores=zeros, anchors=anchors(mdp, place_))
    mask = mdp.tree.responses.mask.repeat(2, 1)
    credit = ReinforcePlusPlus()(rows.flatten(0, 1), None, mask).advantages.view(rows.shape)
    close(gradient_moments(mdp, policy, credit).mean, exact_gradient(mdp, policy))


def test_exact_gradient_by_finite_differences():
    mdp = make(KINDS[1])
    policy = policy_of(mdp)
    gradient = exact_gradient(mdp, policy)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(policy.shape, generator=generator, dtype=torch.float64)
    base, step = torch.where(mdp.tree.legal, policy, 0.0), 1e-5

    def value(t):
        return float(mdp.prompts @ evaluate(mdp, normalise(base + t * direction, mdp.tree))[:, 0])

    slope = (value(step) - value(-step)) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7)


def test_gradient_moments_by_autograd_on_each_response():
    mdp = make(KINDS[1])
    policy, responses = policy_of(mdp), mdp.tree.responses
    generator = torch.Generator().manual_seed(3)
    credit = torch.randn((2, *responses.mask.shape), generator=generator, dtype=torch.float64)
    logits = torch.where(mdp.tree.legal, policy, 0.0).requires_grad_()
    logp = normalise(logits, mdp.tree)
    mean, second = torch.zeros_like(policy), 0.0
    for x in range(2):
        for y in range(len(responses.tokens)):
            n, a, m = responses.nodes[y], responses.tokens[y], responses.mask[y]
            score = (credit[x, y][m] * logp[x, n[m], a[m]]).sum()
            (g,) = torch.autograd.grad(score, logits, retain_graph=True)
            weight = 0.5 * float(policy[x, n[m], a[m]].sum().exp())
            mean += weight * g
            second += weight * float(g.square().sum())
    moments = gradient_moments(mdp, policy, credit)
    close(moments.mean, mean)
    assert moments.variance == pytest.approx(second - float(mean.square().sum()), rel=1e-10)


def test_dense_reward_is_the_sentence_reward_with_the_soft_value_as_baseline():
    """Reward to go: Σ_{k≥h} dense = r(y) − V*(s_h) when r is paid at the end; at π* no noise is left."""
    mdp = make(KINDS[3])
    best, responses = soft_optimal(mdp), mdp.tree.responses
    rows = responses.read(dense_reward(mdp, best.logp))
    mask = responses.mask.repeat(2, 1)
    to_go = ReinforcePlusPlus()(rows.flatten(0, 1), None, mask).returns.view(rows.shape)
    baseline = response_reward(mdp)[..., None] - responses.read_states(best.value)
    close(to_go, torch.where(responses.mask, baseline, 0.0))
    zeros = torch.zeros_like(response_reward(mdp))
    cancelled = trained_reward(mdp, dense(mdp), policy=best.logp, dpo=best.logp, scores=zeros)
    close(cancelled, torch.zeros_like(cancelled))


def test_policy_loss_at_ratio_one_has_the_exact_gradient():
    mdp = make(KINDS[1])
    policy, responses = policy_of(mdp), mdp.tree.responses
    logits = torch.where(mdp.tree.legal, policy, 0.0).requires_grad_()
    logp = responses.read(torch.where(mdp.tree.legal, normalise(logits, mdp.tree), 0.0)).flatten(0, 1)
    old, mask = logp.detach(), responses.mask.repeat(2, 1)
    gain = responses.read(advantage(mdp, policy)).flatten(0, 1)
    loss = policy_loss(logp, old, gain, cliprange=0.2).loss
    weight = 0.5 * masked_sum(old, mask, dim=-1).exp()
    (gradient,) = torch.autograd.grad(weight @ masked_sum(loss, mask, dim=-1), logits)
    close(gradient, -exact_gradient(mdp, policy))


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_loss_is_stationary_at_the_soft_optimum(kind):
    """With infinitely many preferences, π* has gradient 0 and any other policy a larger loss."""
    mdp = make(kind)
    data = population_preferences(mdp, mdp.ref_logp)
    best = soft_optimal(mdp).logp
    logits = torch.where(mdp.tree.legal, best, 0.0).requires_grad_()
    loss = dpo_loss(mdp, data, normalise(logits, mdp.tree))
    (gradient,) = torch.autograd.grad(loss, logits)
    close(gradient, torch.zeros_like(gradient))
    assert dpo_loss(mdp, data, policy_of(mdp)) > loss + 1e-3


def test_logprobs_read_the_table():
    """In fp32, as for language models: identity head, the logits of each state as its hidden vector."""
    mdp = make(KINDS[0])
    responses = mdp.tree.responses
    hidden = mdp.ref_logp[0, responses.nodes.flatten()]
    logp, entropy = logprobs_and_entropies(hidden, lambda h: h, responses.tokens.flatten(), vocab_size=3)
    close(logp.double(), responses.read(mdp.ref_logp)[0].flatten(), atol=1e-6)
    row = mdp.ref_logp[0, responses.nodes.flatten()]
    close(entropy.double(), -(row.exp() * row).sum(-1), atol=1e-6)
