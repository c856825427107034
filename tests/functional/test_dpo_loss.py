import math

import pytest
import torch

from rto.functional.preference import DPO, Completions


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
