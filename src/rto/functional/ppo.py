"""The clipped losses of proximal policy optimization; one number a token, reduced by the caller."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.functional.masked import AllReduce, local, masked_var


class Clipped(NamedTuple):
    """A loss for each token, and where the clip decided it."""

    loss: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]


def policy_loss(
    logp: Float[Tensor, "B T"],
    old_logp: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    cliprange: float,
) -> Clipped:
    """−min(ρ A, clip(ρ, 1−ε, 1+ε) A) with ρ = exp(logp − old_logp) (Schulman et al., 2017, Eq. 7)."""
    ratio = (logp - old_logp).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return Clipped(torch.maximum(plain, bounded), bounded > plain)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    cliprange: float | None,
) -> Clipped:
    """½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²); without a clip, ½ (V − R)²."""
    plain = (values - returns).square()
    if cliprange is None:
        return Clipped(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    bounded = (old_values + (values - old_values).clamp(-cliprange, cliprange) - returns).square()
    return Clipped(0.5 * torch.maximum(plain, bounded), bounded > plain)


def approx_kl(logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k3 estimate of KL(π_old ‖ π), ρ − 1 − log ρ ≥ 0 (Schulman, 2020, "Approximating KL divergence")."""
    delta = logp - old_logp
    return delta.exp() - 1 - delta


def explained_variance(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    all_reduce: AllReduce = local,
) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R) over the kept tokens: 1 for a perfect critic, 0 for a constant one."""
    residual = masked_var(returns - values, mask, all_reduce=all_reduce)
    return 1 - residual / masked_var(returns, mask, all_reduce=all_reduce).clamp(min=1e-12)
