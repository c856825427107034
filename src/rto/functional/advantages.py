"""Credit assignment: from rewards a token to advantages and returns. One object an estimator."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.ranges import SHARE, check_ranges


class Assigned(NamedTuple):
    """What an estimator hands to the update: both 0 outside the mask, the advantages not yet whitened."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


@runtime_checkable
class Estimator(Protocol):
    """Rewards (and values, for those that need a critic) to `Assigned`."""

    needs_values: ClassVar[bool]

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
    ) -> Assigned:
        """Assign credit; masks are True on a prefix of each row."""


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Generalized advantage estimation (Schulman et al., 2016, Eq. 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t),  A_t = Σ_k (γλ)^k δ_{t+k},  R_t = A_t + V(s_t),  V after the end is 0.
    """

    gamma: float = 1.0
    lam: float = 0.95
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, gamma=SHARE, lam=SHARE)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
    ) -> Assigned:
        """Advantages and the returns that the critic regresses on.

        Raises:
            ValueError: no values are given.
        """
        if values is None:
            raise ValueError("GAE needs the critic's values")
        values = torch.where(mask, values, 0.0)
        rewards = torch.where(mask, rewards, 0.0)
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        deltas = rewards + self.gamma * following - values
        advantages = torch.where(mask, discounted_sum(deltas, self.gamma * self.lam), 0.0)
        return Assigned(advantages, advantages + values)


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """REINFORCE++ (Hu, 2025): A_t = R_t = Σ_k γ^k r_{t+k}; no critic, the whitening is the baseline."""

    gamma: float = 1.0
    needs_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, gamma=SHARE)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
    ) -> Assigned:
        """Reward-to-go for each token; ``values`` are not read."""
        to_go = torch.where(mask, discounted_sum(torch.where(mask, rewards, 0.0), self.gamma), 0.0)
        return Assigned(to_go, to_go)


@dataclass(frozen=True, kw_only=True)
class QAdvantage:
    """Rewards that are Q-values: A_t = r_t − c V(s_t), R_t = r_t (Chen et al., 2025, arXiv:2505.23363).

    Where r_t = Q*(s_t, y_t) − β₂ log π/π_ref, nothing is summed over time: Q* has the future in it already, and
    Σ_a π(a|s) A(s, a) ∇log π(a|s) = 0 at π ∝ π_ref exp(Q*/β₂), whatever V is. V is a baseline, learned by regression
    on r_t. The authors' code divides z and V by their deviations over the batch before it subtracts, and takes
    c = 0.01 to begin softly; here β₁ sets the scale of z, and advantages are whitened like all others.

    Attributes:
        value_coef: c in [0, 1], how much of the baseline is subtracted.
    """

    value_coef: float = 1.0
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, value_coef=SHARE)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
    ) -> Assigned:
        """Each token's own reward less the baseline; a score at the last token reaches that token alone.

        Raises:
            ValueError: no values are given.
        """
        if values is None:
            raise ValueError("advantages of Q-values need the critic's values")
        returns = torch.where(mask, rewards, 0.0)
        return Assigned(returns - self.value_coef * torch.where(mask, values, 0.0), returns)


def discounted_sum(x: Float[Tensor, "B T"], discount: float) -> Float[Tensor, "B T"]:
    """y_t = Σ_k discount^k x_{t+k}, along the last axis."""
    if discount == 1.0:
        return x.flip(-1).cumsum(-1).flip(-1)
    out = torch.empty_like(x)
    carry = torch.zeros_like(x[:, 0])
    for t in reversed(range(x.shape[1])):
        carry = x[:, t] + discount * carry
        out[:, t] = carry
    return out
