"""Sources of token rewards: log-ratios of any two models, log-probabilities of one, ensembles, Python functions.

All of them answer ``source(sequences, ref_logp=…, completed=…)`` with one number for each response token: what
β₁ multiplies in Eq. 4.7, before the clip.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rto.batches import Sequences
from rto.models.actor import read_in_parts, score_logprobs, token_scores
from rto.models.loading import Source, freeze, load_policy, load_scalar
from rto.ranges import is_finite
from rto.rollout.rewards import Completed, call, function_name


@runtime_checkable
class TokenSource(Protocol):
    """Anything that rewards tokens."""

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """One number a response token, 0 outside the mask.

        Args:
            sequences: prompts with their completions.
            ref_logp: log-probabilities of the trainer's reference, where it has one.
            completed: the same completions as text.
        """

    def to(self, device: torch.device | str) -> "TokenSource":
        """Move the models."""


class TokenReward:
    """The implicit reward of a policy, token by token: log π_dpo(y_t|x,y_<t) − log π_ref(y_t|x,y_<t), nats.

    Any two models with one vocabulary will do, whoever trained them (Rafailov et al., 2024, "From r to Q*"). Both
    read at the policy's sampling temperature, so that the reference's numbers serve the KL term too.

    Args:
        dpo_model: π_dpo: a folder, a hub id, an adapter or a model.
        ref_model: its own reference; None means the trainer's reference, whose log-probabilities are then known.
        temperature: τ of both.
        max_tokens: padded tokens in one forward pass.
        init_kwargs: passed to ``from_pretrained``.
    """

    compares: ClassVar[bool] = True
    scalar: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dpo_model: Source,
        ref_model: Source | None = None,
        *,
        temperature: float = 1.0,
        max_tokens: int = 2**14,
        **init_kwargs: Any,
    ) -> None:
        self.dpo_model = freeze(load_policy(dpo_model, **init_kwargs))
        self.ref_model = None if ref_model is None else freeze(load_policy(ref_model, **init_kwargs))
        self._logprobs = partial(score_logprobs, temperature=temperature, max_tokens=max_tokens)

    def to(self, device: torch.device | str) -> "TokenReward":
        """Move the models."""
        for model in (self.dpo_model, self.ref_model):
            if model is not None:
                model.to(device)
        return self

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """The raw log-ratio for each response token, 0 outside the mask.

        Raises:
            ValueError: there is neither a ``ref_model`` nor the reference's log-probabilities.
        """
        if self.ref_model is not None:
            ref_logp = self._logprobs(self.ref_model, sequences)
        if ref_logp is None:
            raise ValueError("a token reward needs the reference's log-probabilities or a reference model")
        return self._compared(self._logprobs(self.dpo_model, sequences), ref_logp)

    def _compared(self, dpo_logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return dpo_logp - ref_logp


class PowerDifference(TokenReward):
    """A log-ratio bounded by a power transform: (π_dpo(y_t|x,y_<t)^α − π_ref(y_t|x,y_<t)^α) / α.

    In [−1/α, 1/α] by construction, of the log-ratio's sign, and the log-ratio itself as α → 0 (Box–Cox). A ratio of
    tokens that both models find unlikely counts for little, where a clip counts it in full. The transform is that of
    PowerOPD (Zhao et al., 2026, arXiv:2606.17199), by its authors' code, which leaves out 1/α and takes α = 5.
    PowerOPD compares a teacher with the *present* policy in place of a KL term; here π_dpo is compared with its
    reference, and β₂ stays what it is.

    Args:
        dpo_model: π_dpo.
        ref_model: its own reference; None means the trainer's.
        power: α > 0.
        kwargs: of `TokenReward`.

    Raises:
        ValueError: α is not positive.
    """

    settings: ClassVar[tuple[str, ...]] = ("power",)

    def __init__(
        self, dpo_model: Source, ref_model: Source | None = None, *, power: float = 1.0, **kwargs: Any
    ) -> None:
        if not 0 < power < math.inf:
            raise ValueError(f"power must be a positive number, got {power}")
        super().__init__(dpo_model, ref_model, **kwargs)
        self.power = power

    def _compared(self, dpo_logp: Float[Tensor, "B T"], ref_logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return ((self.power * dpo_logp).exp() - (self.power * ref_logp).exp()) / self.power


class QValue:
    """z(s_t, y_t) of a model that was trained with the loss ``qrm``: a Q-function up to scale and offset.

    Args:
        model: its folder, hub id, adapter or the model.
        ref_model: not used.
        temperature: not used.
        max_tokens: padded tokens in one forward pass.
        init_kwargs: passed to ``from_pretrained``.
    """

    compares: ClassVar[bool] = False
    scalar: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Source,
        ref_model: Source | None = None,
        *,
        temperature: float = 1.0,
        max_tokens: int = 2**14,
        **init_kwargs: Any,
    ) -> None:
        self.model = freeze(load_scalar(model, new_head=False, **init_kwargs))
        self._max_tokens = max_tokens

    def to(self, device: torch.device | str) -> "QValue":
        """Move the model."""
        self.model.to(device)
        return self

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """What the head says after each response token."""
        return read_in_parts(partial(token_scores, self.model), sequences, max_tokens=self._max_tokens)


class MeanLogProb:
    """SimPO's implicit reward, token by token and without a reference: log π(y_t|x,y_<t) / |y|, nats a token.

    Summed over a completion it is the mean log-probability that SimPO ranks by (Meng et al., 2024).

    Args:
        model: a policy trained with SimPO: a folder, a hub id, an adapter or a model.
        ref_model: not used.
        temperature: τ of its log-probabilities.
        max_tokens: padded tokens in one forward pass.
        init_kwargs: passed to ``from_pretrained``.
    """

    compares: ClassVar[bool] = False
    scalar: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Source,
        ref_model: Source | None = None,
        *,
        temperature: float = 1.0,
        max_tokens: int = 2**14,
        **init_kwargs: Any,
    ) -> None:
        self.model = freeze(load_policy(model, **init_kwargs))
        self._logprobs = partial(score_logprobs, temperature=temperature, max_tokens=max_tokens)

    def to(self, device: torch.device | str) -> "MeanLogProb":
        """Move the model."""
        self.model.to(device)
        return self

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """The mean log-probability's share of each response token."""
        return self._logprobs(self.model, sequences) / sequences.mask.sum(1, keepdim=True).clamp(min=1)


class Ensemble:
    """Mean over several sources less κ standard deviations, token by token: a lower confidence bound for κ > 0.

    Algorithm 1 of the paper is pessimistic, by the bound of a linear reward; its practical version is not. Where
    rewards come from networks, the spread of an ensemble takes the bound's place. The deviation is over the N
    members, √(Σ (r_i − r̄)² / N).

    Args:
        members: the sources.
        pessimism: κ ≥ 0; 0 is the mean.

    Raises:
        ValueError: κ is negative, or positive with a single member.
    """

    def __init__(self, members: Sequence[TokenSource], *, pessimism: float = 0.0) -> None:
        if not members:
            raise ValueError("an ensemble of token rewards needs members")
        if pessimism < 0:
            raise ValueError(f"pessimism must not be negative, got {pessimism}")
        if pessimism > 0 and len(members) == 1:
            raise ValueError("pessimism is measured by how members differ: give more than one token reward, or 0")
        self.members, self.pessimism = list(members), pessimism

    def to(self, device: torch.device | str) -> "Ensemble":
        """Move every member."""
        self.members = [member.to(device) for member in self.members]
        return self

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """Mean − κ · standard deviation over the members."""
        rewards = torch.stack([m(sequences, ref_logp=ref_logp, completed=completed) for m in self.members])
        return rewards.mean(0) - self.pessimism * rewards.std(0, correction=0)


class TokenFunction:
    """A Python function ``f(prompts, completions, completion_ids, **columns) -> list[list[float]]``.

    One list a completion, one float a token of its ``completion_ids``. What the function's signature does not ask
    for is not handed over. Its numbers are clipped like a log-ratio: mind ``token_reward_clip``.
    """

    def __init__(self, function: Callable[..., Sequence[Sequence[float]]]) -> None:
        self.function = function

    def to(self, device: torch.device | str) -> "TokenFunction":
        """Nothing to move."""
        return self

    def __call__(
        self, sequences: Sequences, *, ref_logp: Float[Tensor, "B T"] | None = None, completed: Completed | None = None
    ) -> Float[Tensor, "B T"]:
        """The function's rewards in their places.

        Raises:
            ValueError: a completion gets another number of rewards than it has tokens, or one that is not finite.
        """
        if completed is None:
            raise ValueError("a token reward function needs the completions as text")
        rewards, name = list(call(self.function, completed)), function_name(self.function)
        if len(rewards) != len(completed.completions):
            raise ValueError(
                f"token reward function {name} returned {len(rewards)} lists for {len(completed.completions)} "
                "completions: it must return one for each"
            )
        out = torch.zeros(sequences.mask.shape)
        for i, (row, ids) in enumerate(zip(rewards, completed.completion_ids)):
            if len(row) != len(ids) or not all(map(is_finite, row)):
                raise ValueError(
                    f"token reward function {name} must return one finite number for each of the {len(ids)} tokens "
                    f"of completion {i} ({completed.completions[i]!r:.200}), got {row!r:.200}"
                )
            out[i, : len(ids)] = torch.tensor(row)
        return out.to(sequences.tokens.device)


TokenRewardSpec = Source | TokenSource | Callable[..., Sequence[Sequence[float]]]
"""A model's folder, hub id, adapter or object; a source; or a Python function."""

TOKEN_REWARDS: dict[str, type[TokenReward] | type[MeanLogProb] | type[QValue]] = {
    "logratio": TokenReward,
    "mean_logprob": MeanLogProb,
    "power": PowerDifference,
    "q": QValue,
}
"""What can be read from a model. A kind says whether it ``compares`` with a reference, whether its model has a
``scalar`` head, and which ``settings`` of its own it has."""


def token_source(
    specs: Sequence[TokenRewardSpec],
    ref_model: Source | None = None,
    *,
    kind: str = "logratio",
    pessimism: float = 0.0,
    **kwargs: Any,
) -> TokenSource:
    """One source for what the user named: several make an ensemble.

    Args:
        specs: models, sources or functions.
        ref_model: the reference that models are compared with; None means the trainer's.
        kind: what is read from a model, a key of `TOKEN_REWARDS`.
        pessimism: κ of `Ensemble`.
        kwargs: passed to the source of a model: its ``settings``, ``temperature``, ``max_tokens`` and those of
            ``from_pretrained``.
    """
    sources: list[TokenSource] = []
    for spec in specs:
        if isinstance(spec, str) or not callable(spec) or isinstance(spec, nn.Module):
            sources.append(TOKEN_REWARDS[kind](spec, ref_model, **kwargs))
        else:
            sources.append(spec if isinstance(spec, TokenSource) else TokenFunction(spec))
    return sources[0] if len(sources) == 1 and pessimism == 0 else Ensemble(sources, pessimism=pessimism)
