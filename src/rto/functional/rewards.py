"""The reward of Reinforced Token Optimization, Eq. 4.7, and what its variants change in it.

Notation: B rollouts, T response tokens; a mask is True on the tokens the policy sampled, EOS included.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rto.functional.masked import AllReduce, last_kept, local, masked_sum
from rto.ranges import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, check_ranges


@dataclass(frozen=True, kw_only=True)
class RewardTerms:
    """The three sources of reward, kept apart so that each can be logged."""

    token: Float[Tensor, "B T"]
    """β₁ · clip(log π_dpo/π_ref), after placement and shaping."""
    kl: Float[Tensor, "B T"]
    """−β₂ · log π/π_ref."""
    score: Float[Tensor, "B T"]
    """β₃ · r_MLE on the last kept token."""

    @property
    def total(self) -> Float[Tensor, "B T"]:
        """r_t of Eq. 4.7."""
        return self.token + self.kl + self.score


@dataclass(frozen=True, kw_only=True)
class RTOReward:
    r"""Eq. 4.7 of Zhong et al. (2025); the object is its own config.

    r_t = β₁ log π_dpo(y_t|x,y_<t)/π_ref(y_t|x,y_<t) − β₂ log π(y_t|x,y_<t)/π_ref(y_t|x,y_<t)
          + 1[t = T] β₃ r_MLE(x, y)

    Attributes:
        dpo_coef: β₁. 0 switches the token reward off; the DPO log-ratio is then not needed.
        kl_coef: β₂, the weight of the k1 estimate of the KL divergence from the reference.
        score_coef: β₃. 0 switches the sentence score off.
        token_reward_clip: bound c on the *raw* log-ratio, before β₁: clip(ρ_t, −c, c). None: no clip.
        shaping: subtract the sum of the placed token rewards at the last token, so that they add up to zero
            (potential shaping, RS-PPO): credit is assigned by the DPO model, the total is the score's alone.
        missing_eos_penalty: subtracted at the last token of a completion that was cut off at the length limit;
            no EOS is put there in its stead, since the policy did not choose one.
    """

    dpo_coef: float = 0.05
    kl_coef: float = 0.01
    score_coef: float = 1.0
    token_reward_clip: float | None = 1.0
    shaping: bool = False
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            dpo_coef=NOT_NEGATIVE,
            kl_coef=NOT_NEGATIVE,
            score_coef=FINITE,
            token_reward_clip=POSITIVE,
            missing_eos_penalty=NOT_NEGATIVE,
        )

    def __call__(
        self,
        *,
        policy_logp: Float[Tensor, "B T"],
        ref_logp: Float[Tensor, "B T"],
        token_logratio: Float[Tensor, "B T"] | None,
        scores: Float[Tensor, " B"],
        mask: Bool[Tensor, "B T"],
        anchors: Bool[Tensor, "B T"],
        ended: Bool[Tensor, " B"] | None = None,
    ) -> RewardTerms:
        """The terms of r_t for each token, 0 outside the mask.

        Args:
            policy_logp: log π(y_t|x,y_<t), nats, at the sampling temperature.
            ref_logp: log π_ref(y_t|x,y_<t), same temperature.
            token_logratio: log π_dpo/π_ref per token; None is allowed only when ``dpo_coef`` is 0.
            scores: r_MLE(x, y), one a rollout.
            mask: True on the sampled tokens, EOS included.
            anchors: where token rewards are paid out; see `place`.
            ended: EOS was sampled before the length limit; read when there is a penalty for its absence.

        Raises:
            ValueError: β₁ ≠ 0 and no log-ratio is given, or there is a penalty and ``ended`` is not given.
        """
        zeros = torch.zeros_like(policy_logp)
        token = zeros
        if self.dpo_coef != 0:
            if token_logratio is None:
                raise ValueError(f"dpo_coef is {self.dpo_coef}, so the log-ratio of a DPO model is needed")
            token = place(self.dpo_coef * self.clip(token_logratio), mask, anchors)
        if self.shaping:
            token = token + place(-token, mask, torch.zeros_like(mask))
        kl = torch.where(mask, -self.kl_coef * (policy_logp - ref_logp), 0.0)
        final = self.score_coef * scores if self.score_coef != 0 else torch.zeros_like(scores)
        if self.missing_eos_penalty != 0:
            if ended is None:
                raise ValueError("missing_eos_penalty needs to know which completions ended")
            final = final - self.missing_eos_penalty * (~ended).to(scores.dtype)
        score = torch.where(last_kept(mask), final[:, None], 0.0)
        return RewardTerms(token=token, kl=kl, score=score)

    def clip(self, logratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The raw log-ratio ρ bounded to [−c, c]."""
        c = self.token_reward_clip
        return logratio if c is None else logratio.clamp(-c, c)


def place(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], anchors: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Pay each token's reward at the next anchor (its own position if it is one); sums are unchanged.

    The last kept token is always an anchor. With every token an anchor this is RTO; with sentence delimiters,
    Semi-RTO; with none, everything lands on the last token: DDPO.
    """
    rewards = torch.where(mask, rewards, 0.0)
    anchors = (anchors & mask) | last_kept(mask)
    segment = anchors.long().cumsum(-1) - anchors.long()  # tokens up to and including an anchor share a number
    sums = torch.zeros_like(rewards).scatter_add(-1, segment.clamp(max=rewards.shape[-1] - 1), rewards)
    paid = sums.gather(-1, segment.clamp(max=rewards.shape[-1] - 1))
    return torch.where(anchors, paid, 0.0)


Placement = Callable[[Int[Tensor, "B T"], Bool[Tensor, "B T"], Callable[[int], str]], Bool[Tensor, "B T"]]
"""(tokens, mask, id → text) to anchors."""


def on_tokens(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], text: Callable[[int], str]
) -> Bool[Tensor, "B T"]:
    """Every token is paid where it stands (RTO)."""
    return mask


def on_final(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], text: Callable[[int], str]) -> Bool[Tensor, "B T"]:
    """Everything is paid at the last token (DDPO)."""
    return torch.zeros_like(mask)


_DELIMITER = re.compile(r"[.!?;。！？；\n]")


def on_sentences(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], text: Callable[[int], str]
) -> Bool[Tensor, "B T"]:
    """Sums are paid at tokens whose text holds a sentence delimiter: . ! ? ; a line break (Semi-RTO)."""
    ids, inverse = tokens.unique(return_inverse=True)
    ends = torch.tensor([bool(_DELIMITER.search(text(int(i)))) for i in ids], dtype=torch.bool)
    return ends.to(mask.device)[inverse] & mask


PLACEMENTS: dict[str, Placement] = {"token": on_tokens, "sentence": on_sentences, "final": on_final}


@dataclass
class AdaptiveKL:
    """Proportional control of β₂ towards a target KL (Ziegler et al., 2019, §2.2).

    β₂ ← β₂ (1 + K_p · clip(KL/target − 1, −0.2, 0.2)), with K_p = n / horizon for n rollouts.
    """

    coef: float
    target: float
    horizon: int = 10_000

    def __post_init__(self) -> None:
        check_ranges(self, coef=NOT_NEGATIVE, target=POSITIVE, horizon=COUNT)

    def update(self, kl: float, rollouts: int) -> None:
        """Move β₂ after ``rollouts`` completions whose mean KL was ``kl`` nats a completion."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * rollouts / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.coef = float(state["coef"])


@dataclass
class RunningMoments:
    """Mean and variance of all scores seen so far, on all processes (Chan et al., 1979, parallel update)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Float[Tensor, " B"], *, all_reduce: AllReduce = local) -> None:
        """Add one batch of scores."""
        x = x.double()
        n, total = all_reduce(torch.stack([torch.tensor(float(len(x)), dtype=x.dtype, device=x.device), x.sum()]))
        mean = total / n
        m2 = all_reduce((x - mean).square().sum())
        delta, seen = mean.item() - self.mean, self.count + n.item()
        self.m2 += m2.item() + delta**2 * self.count * n.item() / seen
        self.mean += delta * n.item() / seen
        self.count = seen

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before anything varied."""
        return (self.m2 / self.count) ** 0.5 if self.count > 1 and self.m2 > 0 else 1.0

    def normalize(self, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """(x − mean) / std with the statistics so far."""
        return (x - self.mean) / self.std

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.count, self.mean, self.m2 = (float(state[key]) for key in ("count", "mean", "m2"))


def shares(terms: RewardTerms, mask: Bool[Tensor, "B T"]) -> dict[str, Float[Tensor, ""]]:
    """Σ|term| of each source over the kept tokens: their ratio tells which source drives the return."""
    named: Sequence[tuple[str, Tensor]] = (("token", terms.token), ("kl", terms.kl), ("score", terms.score))
    return {name: masked_sum(x.abs(), mask) for name, x in named}
