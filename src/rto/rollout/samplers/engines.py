"""Samplers on inference engines: weights go over, token ids and log-probabilities come back, and both are checked.

An engine that takes weights and goes on with those it had says nothing of it, and its samples look like any others. So
the first time that weights go over in a run, they are first moved far away (`rto.rollout.samplers.weights.moved`): an
engine whose log-probabilities do not follow is stale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rto.batches import Samples
from rto.models.actor import policy_logprobs, vocab_size
from rto.models.loading import max_positions
from rto.rollout.samplers.base import Sampler, SamplerError, SamplingConfig, samples_of
from rto.rollout.samplers.randomness import row_seeds
from rto.rollout.samplers.weights import moved


@dataclass(frozen=True)
class Drawn:
    """One completion of an engine.

    Attributes:
        tokens: what it sampled, the stop token included.
        logp: of the distribution each token was drawn from.
        stopped: 0 the length limit, 1 one of the stop ids, 2 anything else.
    """

    tokens: list[int]
    logp: list[float]
    stopped: int


@runtime_checkable
class Engine(Protocol):
    """What completes prompts elsewhere."""

    name: str

    def load(self, policy: nn.Module) -> None:
        """Take the policy's present weights."""

    def complete(
        self, prompts: list[list[int]], seeds: Sequence[int], config: SamplingConfig, stop_ids: tuple[int, ...]
    ) -> list[Drawn]:
        """Complete every prompt once, up to the first of the stop ids."""

    def rest(self) -> None:
        """Free what can be freed until weights are loaded again."""


PROBES, PROBE_TOKENS = 4, 8
"""Prompts and tokens that an engine's log-probabilities are checked on."""
ROUNDING = 0.25
"""Nats a token, on average, that another precision may be off by; bfloat16 is off by 0.04 or so."""
FOLLOWS = 0.25
"""How far an engine's log-probabilities may be from those of moved weights, by the distance of the weights it had."""


class EngineSampler(Sampler):
    """See `Sampler`; what it asks of an engine is the same for all of them.

    Args:
        engine: what draws.
        config: how to draw.
        eos_ids: ids that end a completion; the first one sampled is kept.
        pad_id: id written where nothing was sampled.
    """

    def __init__(self, engine: Engine, config: SamplingConfig, eos_ids: tuple[int, ...], pad_id: int) -> None:
        self.engine, self.config, self.eos_ids, self.pad_id = engine, config, eos_ids, pad_id
        self._checked = False
        self._device: torch.device | str = "cpu"
        self._version = 0

    @torch.no_grad()
    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler`.

        Raises:
            SamplerError: the engine cannot be reached, or does not draw from the weights that it was given.
        """
        self._device, self._version = next(policy.parameters()).device, version
        if not self._checked:
            self._check_that_it_follows(policy)
        self.engine.load(policy)
        if not self._checked:
            self._check_log_probabilities(policy)
            self._checked = True

    def draw(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """See `Sampler`.

        Raises:
            SamplerError: the engine cannot be reached, or answers something else than tokens.
        """
        samples = self._samples(prompts, seeds, self.config)
        self.engine.rest()
        return samples

    def _samples(self, prompts: list[list[int]], seeds: Sequence[int], config: SamplingConfig) -> Samples:
        drawn = self.engine.complete(prompts, seeds, config, self.eos_ids)
        logp = torch.full((len(prompts), config.max_completion_length), torch.nan)
        for row, one in zip(logp, drawn, strict=True):
            if not 0 < len(one.tokens) <= config.max_completion_length or len(one.logp) != len(one.tokens):
                raise SamplerError(
                    f"{self.engine.name} answered {len(one.tokens)} tokens with {len(one.logp)} log-probabilities "
                    f"where 1 to {config.max_completion_length} were asked for"
                )
            if config.temperature > 0:  # the most likely token is taken, not drawn
                row[: len(one.logp)] = torch.tensor(one.logp)
        samples = samples_of(
            prompts,
            [one.tokens for one in drawn],
            logp.to(self._device),
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            version=self._version,
            device=self._device,
        )
        return replace(samples, stopped=torch.tensor([one.stopped for one in drawn], device=self._device))

    def _check_that_it_follows(self, policy: nn.Module) -> None:
        """Moved weights go over, and the engine's log-probabilities must be theirs."""
        with moved(policy):
            self.engine.load(policy)
            samples = self._probe(policy)
            near = _mean_gap(samples, self._own(policy, samples))
        far = _mean_gap(samples, self._own(policy, samples))
        if not near <= FOLLOWS * far:
            raise SamplerError(
                f"{self.engine.name} is stale: it was given other weights, and its log-probabilities are {near:.3g} "
                f"nats from theirs, {far:.3g} from those before. {REMEDY}"
            )

    def _check_log_probabilities(self, policy: nn.Module) -> None:
        samples = self._probe(policy)
        gap = _mean_gap(samples, self._own(policy, samples))
        if not gap <= ROUNDING:
            raise SamplerError(
                f"{self.engine.name} gives log-probabilities {gap:.3g} nats from the policy's own on average, where "
                f"another precision explains {ROUNDING}: it computes another model, or does not give those of the "
                "distribution it draws from (start it with --logprobs-mode processed_logprobs)"
            )

    def _probe(self, policy: nn.Module) -> Samples:
        room = min(max_positions(policy) or 2**31, 4 * PROBE_TOKENS)
        g = torch.Generator().manual_seed(0)
        lengths = [1 + i * (room - PROBE_TOKENS - 1) // PROBES for i in range(1, PROBES + 1)]
        prompts = [torch.randint(vocab_size(policy), (n,), generator=g).tolist() for n in lengths]
        config = SamplingConfig(max_completion_length=PROBE_TOKENS, temperature=self.config.temperature or 1.0)
        return self._samples(prompts, row_seeds(0, PROBES), config)

    def _own(self, policy: nn.Module, samples: Samples) -> Float[Tensor, "B T"]:
        """The trainer's numbers for the same tokens."""
        training, _ = policy.training, policy.eval()
        try:
            return policy_logprobs(policy, samples, self.config.temperature or 1.0).float()
        finally:
            policy.train(training)


REMEDY = (
    "On processors vLLM packs weights once and for all: start it with `python -m rto.rollout.samplers.vllm_server`, "
    "which keeps them plain and takes the base of an adapter"
)


def _mean_gap(samples: Samples, logp: Float[Tensor, "B T"]) -> float:
    assert samples.sampler_logp is not None
    return float((samples.sampler_logp - logp)[samples.mask].abs().mean())
