"""Samples of one distribution, learned from as those of another: how far apart the two are, and weights against it.

    ρ_t = π(y_t | x, y_<t) / μ(y_t | x, y_<t)

π is the policy before the update by the trainer's own forward pass, μ what the sampler drew from: other kernels,
another precision, the weights of a version before. The clipped surrogate keeps its ratio to π; ρ, bounded, multiplies
it as a constant: truncated importance sampling (Ionides, 2008, "Truncated importance sampling"; for engines of RLHF:
Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy RL training").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.functional.masked import AllReduce, local, masked_mean, masked_sum


class Weights(NamedTuple):
    """A weight for each token, and where the bound decided it."""

    weights: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]


class Mismatch(NamedTuple):
    """How far a sampler's distribution is from the policy, over the tokens of all processes; nats."""

    mean: Float[Tensor, ""]
    """|log ρ|, mean."""
    largest: Float[Tensor, ""]
    """|log ρ|, maximum over this process."""
    kl: Float[Tensor, ""]
    """k3 estimate of KL(μ ‖ π) a token: ρ − 1 − log ρ (Schulman, 2020, "Approximating KL divergence")."""
    effective: Float[Tensor, ""]
    """Effective sample size by the number of tokens, (Σ ρ)² / (n Σ ρ²): 1 where all weights are alike."""


def log_ratio(
    logp: Float[Tensor, "B T"], sampler_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The log of ρ; 0, a weight of 1, where the sampler gives no log-probability (NaN) and on padding."""
    return torch.where(mask & ~sampler_logp.isnan(), logp - sampler_logp, 0.0)


def mismatch(log_rho: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, all_reduce: AllReduce = local) -> Mismatch:
    """What `log_ratio` gives, in four numbers."""
    rho = log_rho.exp()
    total, squares, n = all_reduce(
        torch.stack([masked_sum(rho, mask), masked_sum(rho.square(), mask), mask.sum().to(rho.dtype)])
    )
    return Mismatch(
        mean=masked_mean(log_rho.abs(), mask, all_reduce=all_reduce),
        largest=torch.where(mask, log_rho.abs(), 0.0).amax(),
        kl=masked_mean(rho - 1 - log_rho, mask, all_reduce=all_reduce),
        effective=total.square() / (n * squares).clamp(min=1e-12),
    )


def of_token(log_rho: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """ρ_t: unbiased for one step, blind to how the prefix came about."""
    return log_rho.exp()


def of_sequence(log_rho: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Π_t ρ_t at every token: unbiased for the completion, of a variance that grows with its length."""
    return log_rho.sum(-1, keepdim=True).exp().expand_as(log_rho)


def truncate(rho: Float[Tensor, "B T"], floor: float, cap: float) -> Float[Tensor, "B T"]:
    """min(max(ρ, c), C)."""
    return rho.clamp(floor, cap)


def leave_out(rho: Float[Tensor, "B T"], floor: float, cap: float) -> Float[Tensor, "B T"]:
    """ρ where it is within [c, C], 0 elsewhere."""
    return torch.where(outside(rho, floor, cap), 0.0, rho)


def outside(rho: Float[Tensor, "B T"], floor: float, cap: float) -> Bool[Tensor, "B T"]:
    """Where ρ is below c or above C."""
    return (rho < floor) | (rho > cap)


Level = Callable[[Float[Tensor, "B T"]], Float[Tensor, "B T"]]
Bound = Callable[[Float[Tensor, "B T"], float, float], Float[Tensor, "B T"]]

MODES: dict[str, tuple[Level, Bound]] = {
    "token_truncate": (of_token, truncate),
    "token_mask": (of_token, leave_out),
    "sequence_truncate": (of_sequence, truncate),
    "sequence_mask": (of_sequence, leave_out),
}
"""As TRL names them; tokens left out on both sides are IcePop (Ling team, 2025, arXiv:2510.18855)."""


@dataclass(frozen=True)
class Correction:
    """log ρ to the weights of the policy's loss.

    Attributes:
        mode: one of `MODES`.
        cap: C, the largest weight; infinite where there is no bound.
        floor: c, the smallest; 0 where there is none.

    Raises:
        ValueError: no weight is within the bounds.
    """

    mode: str = "token_truncate"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.floor > self.cap:
            raise ValueError(f"importance weights: clip_min={self.floor} must not exceed clip_max={self.cap}")

    def __call__(self, log_rho: Float[Tensor, "B T"]) -> Weights:
        """Constants: no gradient goes through them."""
        level, bound = MODES[self.mode]
        rho = level(log_rho.detach())
        return Weights(bound(rho, self.floor, self.cap), outside(rho, self.floor, self.cap))
