"""From prompts to completions: what every sampler is asked, and what it answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rto.batches import Samples, collate
from rto.rollout.samplers.randomness import row_seeds


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
        max_completion_length: T, the length limit in tokens, EOS included.
        temperature: τ of softmax(logits / τ); 0 takes the most likely token.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(
                f"sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got {self.temperature}, "
                f"{self.top_p} and {self.top_k}"
            )


class SamplerError(ValueError):
    """A sampler cannot be reached, or does not do what it says; the message names it and a remedy."""


class Sampler(ABC):
    """Anything that completes prompts: transformers in this process, or an inference engine.

    `Samples.sampler_logp` are the log-probabilities of the distribution that was drawn from, temperature, top-k and
    top-p included; NaN where there is none to give, as of the most likely token (temperature 0). They are for the
    importance weights alone: what enters the PPO ratio is the trainer's own forward pass.
    """

    @abstractmethod
    def sync(self, policy: nn.Module, version: int) -> None:
        """Draw with ``policy``'s present weights from now on; ``version`` is written on what is drawn."""

    @abstractmethod
    def draw(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """Complete every prompt once; the same seeds, one a prompt, give the same samples.

        Token ids are those that were drawn, never those of a text read again.
        """

    def __call__(self, model: nn.Module, prompts: list[list[int]], seed: int) -> Samples:
        """`sync`, then `draw`."""
        self.sync(model, 0)
        return self.draw(prompts, row_seeds(seed, len(prompts)))


def samples_of(
    prompts: list[list[int]],
    responses: list[list[int]],
    logp: Float[Tensor, "B T"],
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    version: int,
    device: torch.device | str,
) -> Samples:
    """What was drawn as a batch; log-probabilities of columns without a token become NaN."""
    batch = collate(prompts, responses, pad=pad_id, device=device)
    width = batch.mask.shape[1]
    ended = torch.tensor([bool(y) and y[-1] in eos_ids for y in responses], device=device)
    return Samples(
        tokens=batch.tokens,
        prompt_mask=batch.prompt_mask,
        mask=batch.mask,
        ended=ended,
        sampler_logp=logp[:, :width].masked_fill(~batch.mask, torch.nan),
        stopped=ended.long(),
        version=version,
    )


SampleFunction = Callable[[nn.Module, list[list[int]], int], Samples]
"""Policy, prompts and a seed to samples: the simplest sampler of one's own."""


class FunctionSampler(Sampler):
    """A `SampleFunction` as a sampler: it is given the policy itself, and the first row's seed."""

    def __init__(self, function: SampleFunction) -> None:
        self.function = function

    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler`."""
        self.policy, self.version = policy, version

    def draw(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """See `Sampler`."""
        return self.function(self.policy, prompts, seeds[0])


def as_sampler(given: Any) -> Any:
    """What has `sync` and `draw` as it is, a function of (policy, prompts, seed) as a `FunctionSampler`.

    Raises:
        TypeError: it is neither.
    """
    if hasattr(given, "sync") and hasattr(given, "draw"):
        return given
    if callable(given):
        return FunctionSampler(given)
    raise TypeError(f"a sampler has sync(policy, version) and draw(prompts, seeds), or is a function; got {given!r}")
