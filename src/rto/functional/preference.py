"""Losses that learn a policy from preferences; each is a frozen dataclass that is also its own config."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rto.functional.masked import masked_sum


@dataclass(frozen=True, kw_only=True)
class Completions:
    """One side of a batch of pairs, token by token: B completions of up to T tokens."""

    logp: Float[Tensor, "B T"]
    """log π(y_t|x,y_<t), with gradient."""
    ref_logp: Float[Tensor, "B T"] | None
    """log π_ref(y_t|x,y_<t); None for losses that need no reference."""
    mask: Bool[Tensor, "B T"]
    """True on completion tokens, EOS included."""

    @property
    def logratio(self) -> Float[Tensor, " B"]:
        """Σ_t log π/π_ref, the implicit reward divided by β (Rafailov et al., 2023, Eq. 5).

        Raises:
            ValueError: the reference's log-probabilities are missing.
        """
        if self.ref_logp is None:
            raise ValueError("this loss needs the reference model's log-probabilities")
        return masked_sum(self.logp - self.ref_logp, self.mask, dim=-1)


class PairLoss(NamedTuple):
    """One number a pair: the loss, and the implicit rewards of both sides (detached)."""

    loss: Float[Tensor, " B"]
    chosen_reward: Float[Tensor, " B"]
    rejected_reward: Float[Tensor, " B"]


@runtime_checkable
class PreferenceLoss(Protocol):
    """A loss over pairs."""

    needs_reference: ClassVar[bool]

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair."""


@dataclass(frozen=True, kw_only=True)
class DPO:
    r"""Direct preference optimization (Rafailov et al., 2023, Eq. 7), with label smoothing (Mitchell, 2023).

    h = β [Σ_t log π/π_ref(y_w) − Σ_t log π/π_ref(y_l)];  loss = −(1−ε) log σ(h) − ε log σ(−h).

    Attributes:
        beta: β > 0, the strength of the pull towards the reference.
        label_smoothing: ε in [0, ½), the share of labels believed flipped.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats."""
        won, lost = self.beta * chosen.logratio, self.beta * rejected.logratio
        margin = won - lost
        eps = self.label_smoothing
        loss = -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
        return PairLoss(loss, won.detach(), lost.detach())


LOSSES: dict[str, type[DPO]] = {"dpo": DPO}
