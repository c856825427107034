"""Importance weights against sums written out, and against the expectation they are for."""

import itertools
import math

import pytest
import torch

from rto.functional.importance import MODES, Correction, log_ratio, mismatch
from rto.functional.ppo import policy_loss

CAP, FLOOR = 1.5, 0.5


@pytest.fixture
def rows():
    """Two log-probabilities of every token, NaN where the sampler gives none and on all padding."""
    g = torch.Generator().manual_seed(0)
    logp, sampler = (-3 * torch.rand(6, 5, generator=g) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5, 2])[:, None]
    sampler[0, 2] = sampler[3, 0] = torch.nan
    return logp.masked_fill(~mask, torch.nan), sampler.masked_fill(~mask, torch.nan), mask


def oracle(logp, sampler, mask):
    """ρ of every token that exists, by Python's own numbers."""
    return [
        [1.0 if math.isnan(m) else math.exp(p - m) for p, m, keep in zip(*row) if keep]
        for row in zip(logp.tolist(), sampler.tolist(), mask.tolist())
    ]


@pytest.mark.parametrize(("floor", "cap"), [(0.0, CAP), (FLOOR, CAP), (FLOOR, math.inf), (0.0, math.inf)])
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_written_out(rows, mode, floor, cap):
    logp, sampler, mask = rows
    found = Correction(mode, cap, floor)(log_ratio(logp, sampler, mask))
    bounded, seen = [], set()
    for rhos in oracle(logp, sampler, mask):
        for rho in rhos:
            whole = math.prod(rhos) if mode.startswith("sequence") else rho
            within = floor <= whole <= cap
            kept = max(min(whole, cap), floor) if mode.endswith("truncate") else whole * within
            bounded.append((kept, not within))
            seen.add("below" if whole < floor else "above" if whole > cap else "within")
    assert seen == {"within"} | ({"below"} if floor else set()) | ({"above"} if cap < math.inf else set())
    assert found.weights[mask].tolist() == pytest.approx([w for w, _ in bounded], rel=1e-5)
    assert found.clipped[mask].tolist() == [clipped for _, clipped in bounded]
    assert found.weights.isfinite().all()


def test_mismatch_is_that_written_out_and_padding_is_inert(rows):
    logp, sampler, mask = rows
    found = mismatch(log_ratio(logp, sampler, mask), mask)
    flat = list(itertools.chain(*oracle(logp, sampler, mask)))
    logs = [math.log(rho) for rho in flat]
    assert found.mean.item() == pytest.approx(sum(map(abs, logs)) / len(flat), rel=1e-5)
    assert found.largest.item() == pytest.approx(max(map(abs, logs)), rel=1e-5)
    assert found.kl.item() == pytest.approx(sum(r - 1 - x for r, x in zip(flat, logs)) / len(flat), rel=1e-5)
    assert found.effective.item() == pytest.approx(sum(flat) ** 2 / (len(flat) * sum(r * r for r in flat)), rel=1e-5)


def test_two_processes_count_as_one(rows):
    """Each half brings the other's sums along; what is told is of all tokens, the largest apart."""
    logp, sampler, mask = rows
    whole = mismatch(log_ratio(logp, sampler, mask), mask)
    halves = [(logp[:3], sampler[:3], mask[:3]), (logp[3:], sampler[3:], mask[3:])]
    sent: list[list[torch.Tensor]] = [[], []]
    for half, own in zip(halves, sent):
        mismatch(log_ratio(*half), half[2], all_reduce=lambda x, own=own: own.append(x) or x)
    for half, other in zip(halves, reversed(sent)):
        theirs = iter(other)
        found = mismatch(log_ratio(*half), half[2], all_reduce=lambda x, theirs=theirs: x + next(theirs))
        for name in ("mean", "kl", "effective"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize(("mode", "length"), [(mode, 2 if mode.startswith("sequence") else 1) for mode in MODES])
def test_the_gradient_is_the_policys_in_expectation(mode, length):
    """E_μ[w ∇loss] over all completions is E_π[∇loss] where no bound holds; without weights it is another.

    A token's weight leaves the distribution of what comes before it alone, so it is exact for one token.
    """
    g = torch.Generator().manual_seed(1)
    pi, mu = (torch.randn(3, 3, generator=g) for _ in range(2))  # next-token logits after the token before
    every = torch.tensor(list(itertools.product(range(3), repeat=length)))
    before = torch.cat([torch.zeros(len(every), 1, dtype=torch.long), every[:, :-1]], dim=1)
    advantages = torch.randn(len(every), 1, generator=g).expand(-1, length)

    def logp(logits):
        return logits.log_softmax(-1)[before, every]

    def gradient(drawn, weights):
        theta = pi.clone().requires_grad_()
        loss = policy_loss(logp(theta), logp(pi), advantages, cliprange=0.2).loss
        (drawn.sum(1).exp()[:, None] * weights * loss).sum().backward()
        return theta.grad

    mask = torch.ones(len(every), length, dtype=torch.bool)
    weights = Correction(mode, 1e6)(log_ratio(logp(pi), logp(mu), mask)).weights
    exact, corrected, plain = gradient(logp(pi), mask), gradient(logp(mu), weights), gradient(logp(mu), mask)
    assert (plain - exact).abs().max() > 0.05
    torch.testing.assert_close(corrected, exact)


def test_bounds_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"clip_min=3\.0 must not exceed clip_max=2\.0"):
        Correction(floor=3.0)


def test_no_gradient_goes_through_a_weight():
    logp = torch.zeros(1, 2, requires_grad=True)
    assert not Correction()(
        log_ratio(logp, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    ).weights.requires_grad
