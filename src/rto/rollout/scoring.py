"""Samples → Rollout: the models that are only read, and what they say of completions.

Whoever draws completions goes through `draw`, whoever shows them to a reward through `Completed.of`, and whoever
trains on them through `Scoring`, which owns the reference and the sources of reward.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto.batches import Rollout, Samples, Sequences
from rto.data.chat import completion_texts
from rto.data.formats import Prompt
from rto.files import shown
from rto.models.actor import TokenOutputs, score_logprobs
from rto.models.roles import Role
from rto.rollout.rewards import Completed, FunctionReward, RewardModel, distinct
from rto.rollout.samplers.base import SampleFunction, Sampler, as_sampler
from rto.rollout.samplers.randomness import row_seeds
from rto.rollout.token_rewards import Ensemble, TokenSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Completions as a sampler returns them, and as the text they are; one entry a prompt in every list."""

    samples: Samples
    ids: list[list[int]]
    """Response tokens, EOS included."""
    texts: list[str]
    ended: list[bool]

    @classmethod
    def of(cls, samples: Samples, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> "Drawn":
        """Read samples with the tokenizer of the model that drew them."""
        ids = [row[keep].tolist() for row, keep in zip(samples.responses.cpu(), samples.mask.cpu())]
        return cls(
            samples=samples, ids=ids, texts=completion_texts(tokenizer, prompts, ids), ended=samples.ended.tolist()
        )

    def completed(self, prompts: Sequence[Prompt]) -> Completed:
        """What rewards are given."""
        return Completed.of(prompts, self.texts, self.ended, self.ids)


def complete(
    sampler: Sampler | SampleFunction, policy: nn.Module, prompts: list[list[int]], seed: int, *, version: int = 0
) -> Samples:
    """Complete every prompt once with ``policy``'s present weights: the one place that calls a sampler."""
    draws = as_sampler(sampler)
    draws.sync(policy, version)
    return draws.draw(prompts, row_seeds(seed, len(prompts)))


def draw(
    sampler: Sampler | SampleFunction,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seed: int,
) -> Drawn:
    """`complete`, and read what came of it with the policy's tokenizer."""
    return Drawn.of(complete(sampler, policy, prompts, seed), tokenizer, prompts)


def gather_nothing(*models: Any) -> AbstractContextManager[None]:
    """How models are read that are whole, in one process."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What frozen models say of samples."""

    rollout: Rollout
    completed: Completed
    by_source: dict[str, Float[Tensor, " B"]]
    """The scores of each source, before weights."""


@dataclass(kw_only=True)
class Scoring:
    """The reference and the sources of reward: everything that is read and never trained.

    Attributes:
        reference: π_ref.
        tokenizer: the policy's.
        token_reward: what β₁ multiplies; None: no model is run for it.
        sources: of sentence scores.
        weights: one a source; r_MLE is Σ weight · score. A weight of 0 only logs it.
        temperature: τ of the reference's log-probabilities.
        max_tokens: padded tokens in one forward pass.
        reading: the context in which models' weights are read: whatever gathers them from where they are cut.
        state: where training is, for reward functions that ask for ``trainer_state``.
        offload: keep each model in host memory until it is read. What cannot move alone (a role on a shared base, a
            quantized model) stays.
    """

    reference: nn.Module
    tokenizer: PreTrainedTokenizerBase
    token_reward: TokenSource | None = None
    sources: Sequence[RewardModel | FunctionReward] = ()
    weights: Sequence[float] | None = None
    temperature: float = 1.0
    max_tokens: int = 2**14
    reading: Callable[..., AbstractContextManager[None]] = gather_nothing
    offload: bool = False
    state: Callable[[], Any] | None = None
    _device: torch.device | None = field(default=None, init=False)

    @property
    def names(self) -> list[str]:
        """What logs call the sources of scores, each by another name."""
        return distinct([source.name for source in self.sources])

    @property
    def reward_models(self) -> list[RewardModel]:
        """The sources that are models."""
        return [s for s in self.sources if isinstance(s, RewardModel)]

    def models(self) -> dict[str, nn.Module]:
        """Every model that decides the results, by its part."""
        found = {"reference": self.reference}
        for i, source in enumerate(_members(self.token_reward)):
            of_source = {
                f"dpo_model {i}": getattr(source, "dpo_model", getattr(source, "model", None)),
                f"dpo_ref_model {i}": getattr(source, "ref_model", None),
            }
            found |= {part: model for part, model in of_source.items() if isinstance(model, nn.Module)}
        return found | {f"reward model {i}": s.model for i, s in enumerate(self.reward_models)}

    def frozen(self) -> list[nn.Module]:
        """Every model that is read, π_dpo's own reference among them."""
        return [self.reference, *(s.model for s in self.reward_models), *read_by(self.token_reward)]

    def lay_out(self, device: torch.device, put: Callable[[nn.Module], None]) -> None:
        """Bring every model to where it is read, by ``put``; those that wait elsewhere, when their turn has come."""
        self._device = device
        for model in self.frozen():
            if not self._waits(model):
                put(model)

    def __call__(self, samples: Samples, acting: TokenOutputs, prompts: Sequence[Prompt]) -> Scored:
        """Everything the reward needs, each number from one forward pass of the model it belongs to.

        Args:
            samples: what was drawn.
            acting: policy and critic on it, before any update: ``logp`` is not None.
            prompts: what for.
        """
        assert acting.logp is not None
        drawn = Drawn.of(samples, self.tokenizer, [p.ids for p in prompts])
        completed = drawn.completed(prompts)
        ref_logp = self.ref_logp(samples)
        logratio = None
        if self.token_reward is not None:
            with self._read(*read_by(self.token_reward)):
                logratio = self.token_reward(samples, ref_logp=ref_logp, completed=completed)
        by_source = self.scores(completed, samples.tokens.device)
        total = torch.zeros(len(samples), device=samples.tokens.device)
        for weight, scores in zip(self.weights or [1.0] * len(by_source), by_source.values()):
            total += weight * scores.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        rollout = Rollout(
            **samples.given(),
            policy_logp=acting.logp,
            ref_logp=ref_logp,
            token_logratio=logratio,
            values=acting.values,
            scores=total,
        )
        return Scored(rollout=rollout, completed=completed, by_source=by_source)

    @torch.no_grad()
    def ref_logp(self, samples: Sequences) -> Float[Tensor, "B T"]:
        """Log π_ref of each response token, nats."""
        with self._read(self.reference):
            return score_logprobs(self.reference, samples, temperature=self.temperature, max_tokens=self.max_tokens)

    def scores(self, completed: Completed, device: torch.device | str = "cpu") -> dict[str, Float[Tensor, " B"]]:
        """One score a completion from every source, by its name; NaN where a function has none to give."""
        found = {}
        for name, source in zip(self.names, self.sources):
            with self._read(getattr(source, "model", None)):
                if isinstance(source, FunctionReward):
                    scores = source.given(completed, None if self.state is None else self.state())
                else:
                    scores = list(source(completed))
                values = [math.nan if x is None else x for x in scores]
                found[name] = torch.tensor(values, dtype=torch.float32, device=device)
        if found and (silent := torch.stack(list(found.values())).isnan().all(0)).any():
            row = int(silent.nonzero()[0])
            logger.warning(
                "%d of %d completions have no score from any reward function, and count as 0: the first answers %s",
                int(silent.sum()),
                len(silent),
                shown(completed.prompts[row]),
            )
        return found

    @contextmanager
    def _read(self, *models: Any) -> Iterator[None]:
        """The weights of some models are on the device, and whole."""
        visiting = [m for m in models if isinstance(m, nn.Module) and self._waits(m)]
        for model in visiting:
            model.to(self._device)
        try:
            with self.reading(*models):
                yield
        finally:
            for model in visiting:
                model.to("cpu")

    def _waits(self, model: nn.Module) -> bool:
        movable = not isinstance(model, Role) and all(p.is_floating_point() for p in model.parameters())
        return self.offload and movable


def read_by(source: TokenSource | None) -> list[nn.Module]:
    """The models that a source of token rewards reads."""
    names = ("dpo_model", "ref_model", "model")
    found = [getattr(member, name, None) for member in _members(source) for name in names]
    return [m for m in found if isinstance(m, nn.Module)]


def _members(source: TokenSource | None) -> list[Any]:
    if source is None:
        return []
    return list(source.members) if isinstance(source, Ensemble) else [source]
