import math

import pytest
import torch

from rto.functional.preference import DPO, IPO, KTO, QRM, RDPO, TDPO, TDPO1, Completions, SimPO


def side(*per_token: float, padding: float = math.nan) -> Completions:
    """A completion whose log-ratios are ``per_token``, on a reference of −1, with one padding column."""
    ratios = torch.tensor([[*per_token, padding]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(per_token) + [False]])
    ref = torch.full_like(ratios, -1.0)
    return Completions(logp=(ref + ratios).requires_grad_(), ref_logp=ref, mask=mask)


@pytest.mark.parametrize(
    ("beta", "smoothing", "expected"),
    [
        # Log-ratios 2 and −1, so the margin is 3β and the loss ln(1 + e^−3β), plus 3βε for a flipped share ε.
        (0.1, 0.0, 0.554355244468527),
        (0.1, 0.1, 0.584355244468527),
        (1.0, 0.0, 0.048587351573742),
        (2.0, 0.25, 1.502475685137730),
    ],
)
def test_dpo_by_hand(beta, smoothing, expected):
    chosen, rejected = side(1.5, 1.0, -0.5), side(-2.0, 1.0)
    loss = DPO(beta=beta, label_smoothing=smoothing)(chosen, rejected)
    assert loss.loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.chosen_reward.item() == pytest.approx(2 * beta)
    assert loss.rejected_reward.item() == pytest.approx(-beta)
    assert not loss.chosen_reward.requires_grad
    assert not loss.rejected_reward.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_equation_4_of_the_dpo_paper(smoothing):
    """∇ = −β σ(−h) [∇ log π(y_w) − ∇ log π(y_l)], the same on each token, none on padding."""
    beta, chosen, rejected = 0.5, side(0.3, 0.4), side(0.9, -0.5, 0.1)
    DPO(beta=beta, label_smoothing=smoothing)(chosen, rejected).loss.sum().backward()
    h = beta * (0.7 - 0.5)
    wrong = 1 / (1 + math.exp(h))  # σ(−h)
    slope = beta * ((1 - smoothing) * wrong - smoothing * (1 - wrong))
    assert chosen.logp.grad.flatten().tolist() == pytest.approx([-slope] * 2 + [0.0], abs=1e-12)
    assert rejected.logp.grad.flatten().tolist() == pytest.approx([slope] * 3 + [0.0], abs=1e-12)


def test_a_step_along_the_gradient_widens_the_margin():
    chosen, rejected = side(0.0, 0.0), side(0.0)
    loss = DPO()(chosen, rejected).loss.sum()
    assert loss.item() == pytest.approx(math.log(2))
    up, down = torch.autograd.grad(loss, [chosen.logp, rejected.logp])
    assert (up[chosen.mask] < 0).all()
    assert (down[rejected.mask] > 0).all()


@pytest.mark.parametrize(("ratio", "expected"), [(4000.0, 0.0), (-4000.0, 400.0)])
def test_extreme_margins_neither_overflow_nor_vanish(ratio, expected):
    chosen, rejected = side(ratio), side(0.0)
    loss = DPO(beta=0.1)(chosen, rejected).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert chosen.logp.grad[0, 0].item() == pytest.approx(-0.1 if ratio < 0 else 0.0)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": -0.1}])
def test_beta_must_be_positive(settings):
    with pytest.raises(ValueError, match="beta must be positive, got"):
        DPO(**settings)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_is_a_minority_of_flipped_labels(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got"):
        DPO(label_smoothing=smoothing)


def test_a_missing_reference_is_an_error():
    x = side(1.0)
    alone = Completions(logp=x.logp, ref_logp=None, mask=x.mask)
    with pytest.raises(ValueError, match="needs the reference model's log-probabilities"):
        DPO()(alone, x)


# --- the other losses on pairs


def test_ipo_by_hand():
    """Log-ratios a token 2/3 and −1/2, so h = 7/6; the target is 1/(2·0.5) = 1."""
    chosen, rejected = side(1.5, 1.0, -0.5), side(-2.0, 1.0)
    out = IPO(beta=0.5)(chosen, rejected)
    assert out.loss.item() == pytest.approx((7 / 6 - 1) ** 2, abs=1e-12)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((1 / 3, -1 / 4))
    out.loss.sum().backward()
    slope = 2 * (7 / 6 - 1)
    assert chosen.logp.grad.flatten().tolist() == pytest.approx([slope / 3] * 3 + [0.0], abs=1e-12)
    assert rejected.logp.grad.flatten().tolist() == pytest.approx([-slope / 2] * 2 + [0.0], abs=1e-12)


def test_simpo_by_hand_and_without_a_reference():
    """Mean log-probabilities −1/3 and −3/2: β times their gap less γ is 2·(7/6) − 0.5 = 11/6."""
    sides = [side(1.5, 1.0, -0.5), side(-2.0, 1.0)]
    alone = [Completions(logp=x.logp, ref_logp=None, mask=x.mask) for x in sides]
    out = SimPO(beta=2.0, gamma=0.5)(*alone)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-11 / 6)), abs=1e-12)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((-2 / 3, -3.0))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_simpo_without_a_margin_ranks_by_mean_log_probability(beta):
    g = torch.Generator().manual_seed(0)
    for lengths in [(1, 4), (4, 1), (3, 3)]:
        for _ in range(20):
            sides = [side(*torch.randn(n, generator=g, dtype=torch.float64).tolist()) for n in lengths]
            means = [x.logp[x.mask].mean().item() for x in sides]
            loss = SimPO(beta=beta, gamma=0.0)(*sides).loss.item()
            assert (loss < math.log(2)) == (means[0] > means[1])


def test_rdpo_by_hand():
    """Log-ratios 2 and −1 over 3 and 2 tokens: the margin is 3β + α."""
    chosen, rejected = side(1.5, 1.0, -0.5), side(-2.0, 1.0)
    out = RDPO(beta=0.5, alpha=0.25)(chosen, rejected)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.75)), abs=1e-12)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == pytest.approx((1.0, -0.5))


def with_kl(completions: Completions, *kl: float) -> Completions:
    ref_kl = torch.tensor([[*kl, math.nan]], dtype=torch.float64).requires_grad_()
    return Completions(logp=completions.logp, ref_logp=completions.ref_logp, mask=completions.mask, ref_kl=ref_kl)


def test_tdpo_by_hand():
    """Log-ratios 2 and −1, divergences 0.6 and 0.5: δ = 0.5 − 0.6; only TDPO1 sends a gradient to the chosen one."""
    chosen, rejected = with_kl(side(1.5, 1.0, -0.5), 0.1, 0.2, 0.3), with_kl(side(-2.0, 1.0), 0.5, 0.0)
    margin = 0.5 * (3 + 0.1)
    first = TDPO1(beta=0.5)(chosen, rejected).loss
    assert first.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-12)
    grads = torch.autograd.grad(first.sum(), [chosen.ref_kl, rejected.ref_kl])
    slope = 0.5 / (1 + math.exp(margin))
    assert grads[0].flatten().tolist() == pytest.approx([-slope] * 3 + [0.0], abs=1e-12)
    assert grads[1].flatten().tolist() == pytest.approx([slope] * 2 + [0.0], abs=1e-12)

    second = TDPO(beta=0.5, alpha=0.2)(chosen, rejected).loss
    margin = 0.5 * (3 + 0.2 * 0.1)
    assert second.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-12)
    grads = torch.autograd.grad(second.sum(), [chosen.ref_kl, rejected.ref_kl], allow_unused=True)
    assert grads[0] is None
    slope = 0.2 * 0.5 / (1 + math.exp(margin))
    assert grads[1].flatten().tolist() == pytest.approx([slope] * 2 + [0.0], abs=1e-12)


@pytest.mark.parametrize("loss", [RDPO(beta=0.3, alpha=0.0), TDPO(beta=0.3, alpha=0.0)])
def test_without_their_alpha_they_are_dpo(loss):
    chosen, rejected = with_kl(side(0.3, -1.4), 0.3, 0.1), with_kl(side(0.9, -0.5, 0.1), 0.2, 0.4, 0.5)
    ours, dpo = loss(chosen, rejected), DPO(beta=0.3)(chosen, rejected)
    torch.testing.assert_close(ours.loss, dpo.loss, rtol=0, atol=0)
    wrt = [chosen.logp, rejected.logp]
    for a, b in zip(torch.autograd.grad(ours.loss.sum(), wrt), torch.autograd.grad(dpo.loss.sum(), wrt)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [TDPO(), TDPO1()])
def test_a_missing_divergence_is_an_error(loss):
    with pytest.raises(ValueError, match="divergence from the reference model's whole distribution"):
        loss(side(1.0), side(2.0))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (IPO, {"beta": 0.0}, "beta must be positive, got 0.0"),
        (SimPO, {"gamma": -0.1}, "gamma must not be negative, got -0.1"),
        (RDPO, {"alpha": -1.0}, "alpha must not be negative"),
        (TDPO, {"alpha": -1.0}, "alpha must not be negative"),
        (TDPO1, {"beta": -1.0}, "beta must be positive"),
        (KTO, {"desirable_weight": 0.0}, "desirable_weight must be positive"),
    ],
)
def test_settings_are_checked(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


# --- losses on labelled completions


@pytest.mark.parametrize(("kl", "z"), [(0.5, 0.5), (-3.0, 0.0)])
def test_kto_by_hand(kl, z):
    """Log-ratios 2 and −1, β = 0.5, weights 1.5 and 2: the reference point z₀ is never negative."""
    good, bad = side(1.5, 1.0, -0.5), side(-2.0, 1.0)
    kl = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    loss = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=2.0)
    won, lost = (loss(x, torch.tensor([label]), kl) for x, label in ((good, True), (bad, False)))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert won.loss.item() == pytest.approx(1.5 * (1 - sigmoid(0.5 * (2 - z))), abs=1e-12)
    assert lost.loss.item() == pytest.approx(2.0 * (1 - sigmoid(0.5 * (z + 1))), abs=1e-12)
    assert (won.reward.item(), lost.reward.item(), won.baseline.item()) == pytest.approx((1.0, -0.5, 0.5 * z))
    (won.loss.sum() + lost.loss.sum()).backward()
    assert kl.grad is None
    assert good.logp.grad[0, 0] < 0 < bad.logp.grad[0, 0]


# --- optima: where the population loss is flat


COMPLETIONS = [(0,), (1, 0), (1, 1, 0), (1, 1, 1, 1), (2, 0), (2, 1, 2)]
REWARDS = torch.tensor([0.3, -0.8, 1.2, 0.1, 0.6, -0.4], dtype=torch.float64)


def token_logp(theta: torch.Tensor) -> Completions:
    """A policy over six completions, softmax(θ), as log-probabilities of their tokens: log P(y_≤t) − log P(y_<t)."""
    logp = theta.log_softmax(0)

    def prefix(tokens: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([logp[i] for i, y in enumerate(COMPLETIONS) if y[: len(tokens)] == tokens]).logsumexp(0)

    rows = [[prefix(y[: t + 1]) - prefix(y[:t]) for t in range(len(y))] for y in COMPLETIONS]
    pad = torch.zeros((), dtype=torch.float64)
    table = torch.stack([torch.stack(row + [pad] * (4 - len(row))) for row in rows])
    mask = torch.tensor([[t < len(y) for t in range(4)] for y in COMPLETIONS])
    return Completions(logp=table, ref_logp=None, mask=mask)


def population_gradient(loss, theta: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """∇ of the loss over all ordered pairs, labelled by Bradley–Terry on the rewards."""
    theta = theta.clone().requires_grad_()
    ours, theirs = token_logp(theta), token_logp(ref)
    won, lost = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    sides = [
        Completions(logp=ours.logp[i], ref_logp=theirs.logp[i], mask=ours.mask[i])
        for i in (won.flatten(), lost.flatten())
    ]
    weight = torch.sigmoid(REWARDS[won.flatten()] - REWARDS[lost.flatten()])
    return torch.autograd.grad((weight * loss(*sides).loss).sum(), theta)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_population_optimum_is_the_soft_optimal_policy(alpha, beta):
    """With labels from r, (R-)DPO is flat at π* ∝ π_ref exp((r − α|y|)/β), not at π_ref or with −α."""
    ref = torch.linspace(-0.5, 0.7, 6, dtype=torch.float64)
    lengths = torch.tensor([len(y) for y in COMPLETIONS], dtype=torch.float64)
    loss = RDPO(beta=beta, alpha=alpha) if alpha else DPO(beta=beta)
    optimum = ref.log_softmax(0) + (REWARDS - alpha * lengths) / beta
    assert population_gradient(loss, optimum, ref).abs().max() < 1e-12
    for other in (ref, ref + (REWARDS + (alpha + 0.1) * lengths) / beta):
        assert population_gradient(loss, other, ref).abs().max() > 0.01


def test_qrm_by_hand():
    """Scores 1, 3 against −1: means 2 and −1, β · 3 = 0.6, less the margin γ."""
    z = [
        Completions(logp=torch.tensor([x]), ref_logp=None, mask=torch.tensor([m]))
        for x, m in (
            ([1.0, 3.0, math.nan], [True, True, False]),
            ([-1.0, math.nan, math.nan], [True, False, False]),
        )
    ]
    found = QRM(beta=0.2, gamma=2.0)(*z)
    assert found.loss.item() == pytest.approx(math.log(1 + math.exp(2.0 - 0.6)), rel=1e-6)
    assert found.chosen_reward.item() == pytest.approx(0.4)
    assert found.rejected_reward.item() == pytest.approx(-0.2)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_qrm_without_a_margin_learns_the_log_odds_of_mean_scores(p):
    """The minimiser of p · loss(a ≻ b) + (1 − p) · loss(b ≻ a) has β (z̄_a − z̄_b) = ln p/(1 − p), for any lengths."""
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.tensor([[True, True, True], [True, False, False]])
    step = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss():
        step.zero_grad()
        a, b = (Completions(logp=z[i : i + 1], ref_logp=None, mask=masks[i : i + 1]) for i in (0, 1))
        both = p * QRM(beta=0.2, gamma=0.0)(a, b).loss + (1 - p) * QRM(beta=0.2, gamma=0.0)(b, a).loss
        both.sum().backward()
        return both.sum()

    step.step(loss)
    means = [z[i][masks[i]].mean().item() for i in (0, 1)]
    assert 0.2 * (means[0] - means[1]) == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
