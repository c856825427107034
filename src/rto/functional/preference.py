"""Losses that learn a policy from preferences; each is a frozen dataclass that is also its own config.

Two kinds by the data they read: a `PreferenceLoss` reads pairs, an `UnpairedLoss` reads completions with a label each.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rto.functional.masked import masked_sum
from rto.ranges import NOT_NEGATIVE, POSITIVE, Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class Completions:
    """One side of a batch, token by token: B completions of up to T tokens."""

    logp: Float[Tensor, "B T"]
    """log π(y_t|x,y_<t), with gradient; where `needs_scalar_head` what that head says of each token."""
    ref_logp: Float[Tensor, "B T"] | None
    """log π_ref(y_t|x,y_<t); None for losses that need no reference."""
    mask: Bool[Tensor, "B T"]
    """True on completion tokens, EOS included."""
    ref_kl: Float[Tensor, "B T"] | None = None
    """KL(π_ref(·|x,y_<t) ‖ π(·|x,y_<t)) over the whole vocabulary, with gradient; for losses that need it."""

    @property
    def length(self) -> Float[Tensor, " B"]:
        """|y|, tokens."""
        return self.mask.sum(-1).to(self.logp.dtype)

    @property
    def logprob(self) -> Float[Tensor, " B"]:
        """Σ_t log π(y_t|x,y_<t)."""
        return masked_sum(self.logp, self.mask, dim=-1)

    @property
    def logratio(self) -> Float[Tensor, " B"]:
        """Σ_t log π/π_ref, the implicit reward divided by β (Rafailov et al., 2023, Eq. 5).

        Raises:
            ValueError: the reference's log-probabilities are missing.
        """
        if self.ref_logp is None:
            raise ValueError("this loss needs the reference model's log-probabilities")
        return masked_sum(self.logp - self.ref_logp, self.mask, dim=-1)

    @property
    def drift(self) -> Float[Tensor, " B"]:
        """(1/|y|) Σ_t log π/π_ref, nats a token, without gradient; NaN where there is no reference."""
        if self.ref_logp is None:
            return self.logp.new_full(self.logp.shape[:1], torch.nan)
        return (self.logratio / self.length).detach()

    @property
    def sequential_kl(self) -> Float[Tensor, " B"]:
        """D_SeqKL(x, y; π_ref‖π) = Σ_t KL(π_ref(·|x,y_<t) ‖ π(·|x,y_<t)) (Zeng et al., 2024).

        Raises:
            ValueError: the divergences are missing.
        """
        if self.ref_kl is None:
            raise ValueError("this loss needs the divergence from the reference model's whole distribution")
        return masked_sum(self.ref_kl, self.mask, dim=-1)


class PairLoss(NamedTuple):
    """One number a pair: the loss, and the implicit rewards of both sides (detached)."""

    loss: Float[Tensor, " B"]
    chosen_reward: Float[Tensor, " B"]
    rejected_reward: Float[Tensor, " B"]


class CompletionLoss(NamedTuple):
    """One number a completion: the loss, and the implicit reward, desirable above the baseline (both detached)."""

    loss: Float[Tensor, " B"]
    reward: Float[Tensor, " B"]
    baseline: Float[Tensor, ""]


@runtime_checkable
class PreferenceLoss(Protocol):
    """A loss over pairs."""

    needs_reference: ClassVar[bool]
    needs_ref_kl: ClassVar[bool]

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair."""


class UnpairedLoss(ABC):
    """A loss over completions, each labelled desirable or not."""

    needs_reference: ClassVar[bool]
    needs_ref_kl: ClassVar[bool]

    @abstractmethod
    def __call__(
        self, completions: Completions, desirable: Bool[Tensor, " B"], kl: Float[Tensor, ""]
    ) -> CompletionLoss:
        """Loss for each completion; ``kl`` is the batch's estimate of KL(π ‖ π_ref), nats, without gradient."""


def needs_scalar_head(loss: object) -> bool:
    """Whether a loss trains a head of one number a token and no policy, which an attribute of this name says."""
    return bool(getattr(loss, "needs_scalar_head", False))


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
    needs_ref_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, label_smoothing=Range(low=0, high=0.5, open_high=True))

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats."""
        won, lost = self.beta * chosen.logratio, self.beta * rejected.logratio
        margin = won - lost
        eps = self.label_smoothing
        loss = -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
        return PairLoss(loss, won.detach(), lost.detach())


@dataclass(frozen=True, kw_only=True)
class IPO:
    r"""Identity preference optimization (Azar et al., 2024, Eq. 17), per token.

    h = Σ_t log π/π_ref(y_w) / |y_w| − Σ_t log π/π_ref(y_l) / |y_l|;  loss = (h − 1/(2β))².

    The paper's h is a difference of sums. As in TRL, where its authors confirmed that this is what they ran, each sum
    is divided by its length, so that the target means the same for long and short completions.

    Attributes:
        beta: β > 0 (τ in the paper): margins are pulled to 1/(2β), nats a token.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    needs_ref_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, squared nats."""
        won, lost = chosen.logratio / chosen.length, rejected.logratio / rejected.length
        loss = (won - lost - 1 / (2 * self.beta)).square()
        return PairLoss(loss, self.beta * won.detach(), self.beta * lost.detach())


@dataclass(frozen=True, kw_only=True)
class SimPO:
    r"""Simple preference optimization, without a reference (Meng et al., 2024).

    loss = −log σ(β Σ_t log π(y_w) / |y_w| − β Σ_t log π(y_l) / |y_l| − γ).

    Attributes:
        beta: β > 0, the scale of the mean log-probability.
        gamma: γ ≥ 0, the margin by which the chosen side is to win (its published runs name the ratio γ/β).
    """

    beta: float = 2.5
    gamma: float = 0.5
    needs_reference: ClassVar[bool] = False
    needs_ref_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, gamma=NOT_NEGATIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats."""
        won = self.beta * chosen.logprob / chosen.length
        lost = self.beta * rejected.logprob / rejected.length
        return PairLoss(-F.logsigmoid(won - lost - self.gamma), won.detach(), lost.detach())


@dataclass(frozen=True, kw_only=True)
class RDPO:
    r"""Length-regularized DPO (Park et al., 2024, "Disentangling length from quality in DPO").

    r(y) = β Σ_t log π/π_ref(y) + α|y|;  loss = −log σ(r(y_w) − r(y_l)).

    The policy that is optimal under a reward less α a token has this reward; where length alone explains a preference,
    α|y| does, and the log-ratio need not.

    Attributes:
        beta: β > 0, the strength of the pull towards the reference.
        alpha: α ≥ 0, nats a token; 0 is DPO.
    """

    beta: float = 0.1
    alpha: float = 0.001
    needs_reference: ClassVar[bool] = True
    needs_ref_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, alpha=NOT_NEGATIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats; the implicit rewards are without the length term."""
        won, lost = self.beta * chosen.logratio, self.beta * rejected.logratio
        margin = won - lost + self.alpha * (chosen.length - rejected.length)
        return PairLoss(-F.logsigmoid(margin), won.detach(), lost.detach())


@dataclass(frozen=True, kw_only=True)
class TDPO1:
    r"""Token-level DPO, first form (Zeng et al., 2024).

    δ = β D_SeqKL(x, y_l; π_ref‖π) − β D_SeqKL(x, y_w; π_ref‖π);
    loss = −log σ(β Σ_t log π/π_ref(y_w) − β Σ_t log π/π_ref(y_l) − δ).

    Attributes:
        beta: β > 0, the strength of the pull towards the reference.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    needs_ref_kl: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats; the implicit rewards are without the divergence."""
        return _tdpo(self.beta, chosen, rejected, rejected.sequential_kl - chosen.sequential_kl)


@dataclass(frozen=True, kw_only=True)
class TDPO:
    r"""Token-level DPO, second form (TDPO2; Zeng et al., 2024).

    δ₂ = β D_SeqKL(x, y_l; π_ref‖π) − β sg(D_SeqKL(x, y_w; π_ref‖π)), sg without gradient;
    loss = −log σ(β Σ_t log π/π_ref(y_w) − β Σ_t log π/π_ref(y_l) − α δ₂).

    Attributes:
        beta: β > 0, the strength of the pull towards the reference.
        alpha: α ≥ 0, the weight of the divergence; 0 is DPO.
    """

    beta: float = 0.1
    alpha: float = 0.5
    needs_reference: ClassVar[bool] = True
    needs_ref_kl: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, alpha=NOT_NEGATIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats; the implicit rewards are without the divergence."""
        gap = rejected.sequential_kl - chosen.sequential_kl.detach()
        return _tdpo(self.beta, chosen, rejected, self.alpha * gap)


def _tdpo(beta: float, chosen: Completions, rejected: Completions, gap: Float[Tensor, " B"]) -> PairLoss:
    won, lost = beta * chosen.logratio, beta * rejected.logratio
    return PairLoss(-F.logsigmoid(won - lost - beta * gap), won.detach(), lost.detach())


@dataclass(frozen=True, kw_only=True)
class KTO(UnpairedLoss):
    r"""Kahneman–Tversky optimization, for completions labelled one by one (Ethayarajh et al., 2024, Eq. 7).

    loss = λ_D [1 − σ(β (Σ_t log π/π_ref − z₀))] for a desirable completion,
           λ_U [1 − σ(β (z₀ − Σ_t log π/π_ref))] for an undesirable one.

    z₀ estimates KL(π ‖ π_ref): the mean log-ratio of completions put to other prompts than their own, at least 0.

    Attributes:
        beta: β > 0, the strength of the pull towards the reference.
        desirable_weight: λ_D > 0.
        undesirable_weight: λ_U > 0; λ_D n_D / (λ_U n_U) in [1, 4/3] is the paper's advice for unequal classes.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs_reference: ClassVar[bool] = True
    needs_ref_kl: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, desirable_weight=POSITIVE, undesirable_weight=POSITIVE)

    def __call__(
        self, completions: Completions, desirable: Bool[Tensor, " B"], kl: Float[Tensor, ""]
    ) -> CompletionLoss:
        """Loss for each completion, in [0, λ]."""
        reward = self.beta * completions.logratio
        baseline = self.beta * kl.clamp(min=0).detach()
        gain = reward - baseline
        won = self.desirable_weight * torch.sigmoid(-gain)
        lost = self.undesirable_weight * torch.sigmoid(gain)
        return CompletionLoss(torch.where(desirable, won, lost), reward.detach(), baseline)


@dataclass(frozen=True, kw_only=True)
class QRM:
    r"""Q-function reward model: a scalar z(s_t, y_t) of each token (Chen et al., 2025, arXiv:2505.23363).

    z̄(y) = Σ_t z(s_t, y_t) / |y|;  loss = −log σ(β (z̄(y_w) − z̄(y_l)) − γ).

    z comes from a linear head on the hidden state after y_t was read, not from a language model's head, so that what
    is likely and what is good are learned apart. By the authors' code (homzer/Q-RM, ``mean-score``), with its
    defaults; no reference is read. `QAdvantage` is the estimator that it is made for.

    Attributes:
        beta: β > 0, the scale of the mean score.
        gamma: γ ≥ 0, the margin by which the chosen side is to win.
    """

    beta: float = 0.2
    gamma: float = 2.0
    needs_reference: ClassVar[bool] = False
    needs_ref_kl: ClassVar[bool] = False
    needs_scalar_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, beta=POSITIVE, gamma=NOT_NEGATIVE)

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        """Loss for each pair, nats; ``logp`` of a side is z."""
        won, lost = (self.beta * side.logprob / side.length for side in (chosen, rejected))
        return PairLoss(-F.logsigmoid(won - lost - self.gamma), won.detach(), lost.detach())


LOSSES: dict[str, type[PreferenceLoss] | type[UnpairedLoss]] = {
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "simpo": SimPO,
    "rdpo": RDPO,
    "tdpo": TDPO,
    "tdpo1": TDPO1,
    "qrm": QRM,
}
