"""Credit assignment: a rollout in, what the update is to learn from out. One object holds all of it, with its state.

    scores standardized? → r_t of Eq. 4.7, placed and shaped → whitened? → advantages, returns → whitened? → `Targets`

The methods of the paper are values of it (`METHODS`), and nothing but values: no branch knows their names. Pure torch:
sums over processes and the text of a token are arguments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batches import Rollout, Targets
from rto.functional.advantages import GAE, Estimator, ReinforcePlusPlus
from rto.functional.masked import AllReduce, local, masked_mean, masked_sum, whiten
from rto.functional.ppo import explained_variance
from rto.functional.rewards import PLACEMENTS, AdaptiveKL, RewardTerms, RTOReward, RunningMoments, shares

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "rto": {},
        "ppo": {"dpo_coef": 0.0},
        "semi-rto": {"placement": "sentence"},
        "ddpo": {"placement": "final"},
        "rs-ppo": {"shaping": True},
        "reinforce++": {"dpo_coef": 0.0, "estimator": ReinforcePlusPlus()},
        "rto-reinforce++": {"estimator": ReinforcePlusPlus()},
    }
)
"""What each method of the paper changes in `Credit()`, which is RTO; see `Credit.of`."""


@dataclass(frozen=True, kw_only=True)
class Credited:
    """What comes of a rollout."""

    targets: Targets
    metrics: dict[str, Float[Tensor, ""] | float]
    """What a log should say of it, over the rollouts of all processes."""


@dataclass(kw_only=True)
class Credit:
    """Rollout → Targets, and what has to be remembered from one rollout to the next.

    Attributes:
        reward: Eq. 4.7 with its coefficients, clip, shaping and penalty.
        placement: where token rewards are paid, a key of `PLACEMENTS`.
        estimator: rewards (and values) to advantages and returns.
        whiten_rewards: scale rewards to unit variance; their mean stays.
        whiten_advantages: standardize advantages over the rollouts of all processes.
        normalize_scores: standardize scores by ``score_moments``, which have then seen them.
        kl_control: steers β₂ and holds it; None: β₂ is the reward's, for good.
        score_moments: of all scores so far.

    Raises:
        ValueError: there is no such placement.
    """

    reward: RTOReward = field(default_factory=RTOReward)
    placement: str = "token"
    estimator: Estimator = field(default_factory=GAE)
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    normalize_scores: bool = False
    kl_control: AdaptiveKL | None = None
    score_moments: RunningMoments = field(default_factory=RunningMoments)

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")

    @classmethod
    def of(cls, method: str, **changes: Any) -> "Credit":
        """A method by its name in `METHODS`.

        Args:
            method: the name.
            changes: attributes of `Credit` or of its `RTOReward` that are to be others.

        Raises:
            ValueError: there is no such method.
            TypeError: there is no such attribute.
        """
        if method not in METHODS:
            raise ValueError(f"no method {method!r}: choose from {', '.join(METHODS)}")
        given = {**METHODS[method], **changes}
        terms = {f.name: given.pop(f.name) for f in fields(RTOReward) if f.name in given}
        return cls(reward=replace(given.pop("reward", RTOReward()), **terms), **given)

    @property
    def needs_values(self) -> bool:
        """A critic's values are read."""
        return self.estimator.needs_values

    @property
    def kl_coef(self) -> float:
        """β₂ as it is now."""
        return self.reward.kl_coef if self.kl_control is None else self.kl_control.coef

    def __call__(self, rollout: Rollout, *, text: Callable[[int], str], all_reduce: AllReduce = local) -> Credited:
        """Targets of one rollout. The score moments move before they are used, the controller after β₂ was.

        Args:
            rollout: samples with everything the reward needs.
            text: a token's text, which tells where sentences end.
            all_reduce: sums a tensor over processes: every statistic is over the rollouts of all of them.
        """
        mask = rollout.mask
        scores = rollout.scores
        if self.normalize_scores:
            self.score_moments.update(scores, all_reduce=all_reduce)
            scores = self.score_moments.normalize(scores)
        reward = replace(self.reward, kl_coef=self.kl_coef)
        terms = reward(
            policy_logp=rollout.policy_logp,
            ref_logp=rollout.ref_logp,
            token_logratio=rollout.token_logratio,
            scores=scores,
            ended=rollout.ended,
            mask=mask,
            anchors=PLACEMENTS[self.placement](rollout.responses, mask, text),
        )
        rewards = terms.total
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, center=False, all_reduce=all_reduce)
        advantages, returns = self.estimator(rewards, rollout.values, mask)
        metrics = _metrics(rollout, reward, terms, returns, all_reduce)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce=all_reduce)
        if self.kl_control is not None:
            everywhere = all_reduce(torch.tensor(float(len(rollout)), device=mask.device))
            self.kl_control.update(float(metrics["kl"]), int(everywhere))
        targets = Targets(
            tokens=rollout.tokens,
            prompt_mask=rollout.prompt_mask,
            mask=mask,
            old_logp=rollout.policy_logp,
            advantages=advantages,
            old_values=rollout.values,
            returns=None if rollout.values is None else returns,
            sampler_logp=rollout.sampler_logp,
            version=rollout.version,
        )
        return Credited(targets=targets, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "kl_control": None if self.kl_control is None else self.kl_control.state_dict(),
            "score_moments": self.score_moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.score_moments.load_state_dict(state["score_moments"])
        if self.kl_control is not None and state["kl_control"] is not None:
            self.kl_control.load_state_dict(state["kl_control"])


def _metrics(
    rollout: Rollout, reward: RTOReward, terms: RewardTerms, returns: Float[Tensor, "B T"], all_reduce: AllReduce
) -> dict[str, Float[Tensor, ""] | float]:
    """Per source and per completion, over all processes."""
    mask = rollout.mask

    def a_completion(x: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        sums = masked_sum(x, mask, dim=-1)
        return masked_mean(sums, torch.ones_like(sums, dtype=torch.bool), all_reduce=all_reduce)

    def a_token(x: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        return masked_mean(x, mask, all_reduce=all_reduce)

    weights = {name: all_reduce(x) for name, x in shares(terms, mask).items()}
    everything = sum(weights.values(), torch.tensor(1e-12, device=mask.device))
    found: dict[str, Float[Tensor, ""] | float] = {
        "kl": a_completion(rollout.policy_logp - rollout.ref_logp),
        "kl_coef": reward.kl_coef,
        "return": a_completion(terms.total),
        **{f"reward/{name}": a_completion(getattr(terms, name)) for name in weights},
        **{f"share/{name}": x / everything for name, x in weights.items()},
    }
    if (ratio := rollout.token_logratio) is not None:
        found["logratio/dpo"] = a_completion(ratio)
        found["clip/token_reward"] = a_token((reward.clip(ratio) != ratio).float())
    if rollout.values is not None:
        found["explained_variance"] = explained_variance(rollout.values, returns, mask, all_reduce=all_reduce)
        found["value"] = a_token(rollout.values)
    return found
