"""Frozen carriers: what flows from sampling to the update.

Shape legend for the whole project: B rollouts (or pairs), P prompt, T response, L = P + T, V vocabulary,
D hidden size, N tokens that exist. Prompts are padded on the left, responses on the right, so column P − 1
always holds the last prompt token. A mask is True = keep.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_Carrier = TypeVar("_Carrier", bound="Carrier")
_Rows = TypeVar("_Rows", bound="Sequences")


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """Tensors that share their first axis; moves, rows and persistence for all of them at once."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def given(self) -> dict[str, Any]:
        """The fields that are not None: what another carrier is built of."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold a tensor."""
        return {name: x for name, x in self.given().items() if isinstance(x, Tensor)}

    def rows(self: _Carrier, index: Tensor) -> _Carrier:
        """The chosen rows of every field."""
        return replace(self, **{name: x[index.to(x.device)] for name, x in self.tensors().items()})

    def to(self: _Carrier, device: torch.device | str) -> _Carrier:
        """Every field on ``device``."""
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in self.tensors().items()})


@dataclass(frozen=True, kw_only=True)
class Sequences(Carrier):
    """Prompts with their responses: what a model needs to score them."""

    tokens: Int[Tensor, "B L"]
    prompt_mask: Bool[Tensor, "B P"]
    """True on prompt tokens; pad may be a real token's id, so padding is told by position, never by id."""
    mask: Bool[Tensor, "B T"]
    """True on response tokens, EOS included."""

    @property
    def attention_mask(self) -> Bool[Tensor, "B L"]:
        """True on every token that exists."""
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    @property
    def responses(self) -> Int[Tensor, "B T"]:
        """The last T columns."""
        return self.tokens[:, self.prompt_mask.shape[1] :]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens that exist in each row, prompt and response."""
        return self.prompt_mask.sum(1) + self.mask.sum(1)

    def trim(self: _Rows) -> _Rows:
        """Drop columns that are padding in every row; padding is inert, so no number changes."""
        prompt = self.prompt_mask.shape[1]
        left = int(prompt - self.prompt_mask.sum(1).max())
        right = max(int(self.mask.sum(1).max()), 1)
        cut = {name: x[:, :right] for name, x in self.tensors().items() if x.dim() == 2}  # [B, T]
        cut |= {"tokens": self.tokens[:, left : prompt + right], "prompt_mask": self.prompt_mask[:, left:]}
        return replace(self, **cut)

    def widen(self: "Sequences", response: int) -> "Sequences":
        """Pad responses to ``response`` columns."""
        extra = response - self.mask.shape[1]
        return Sequences(
            tokens=F.pad(self.tokens, (0, extra)),
            prompt_mask=self.prompt_mask,
            mask=F.pad(self.mask, (0, extra), value=False),
        )


@dataclass(frozen=True, kw_only=True)
class Samples(Sequences):
    """What a sampler returns."""

    ended: Bool[Tensor, " B"]
    """EOS was sampled before the length limit."""
    sampler_logp: Float[Tensor, "B T"] | None = None
    """Of the distribution that was drawn from, temperature included; NaN where the sampler gives none."""
    stopped: Int[Tensor, " B"] | None = None
    """Why a completion stops: 0 the length limit, 1 EOS, 2 another stop."""
    version: int = 0
    """Of the policy's weights: how many batches had been learned from when they were handed to the sampler."""


@dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """Samples with everything the reward needs, all at the sampling temperature, nats."""

    policy_logp: Float[Tensor, "B T"]
    """By the trainer's own forward pass, not the sampler's."""
    ref_logp: Float[Tensor, "B T"]
    token_logratio: Float[Tensor, "B T"] | None
    """log π_dpo/π_ref; None when β₁ = 0: no model is run for it."""
    values: Float[Tensor, "B T"] | None
    """V(s_t); None for critic-free estimators."""
    scores: Float[Tensor, " B"]
    """r_MLE, one a rollout."""


@dataclass(frozen=True, kw_only=True)
class Targets(Sequences):
    """What the update needs, and nothing else."""

    old_logp: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    old_values: Float[Tensor, "B T"] | None
    returns: Float[Tensor, "B T"] | None
    sampler_logp: Float[Tensor, "B T"] | None = None
    """As `Samples` has it: what the tokens were really drawn from."""
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Preference pairs; each side is a full sequence with its own mask."""

    chosen: Sequences
    rejected: Sequences

    def __len__(self) -> int:
        return len(self.chosen)

    def stacked(self) -> Sequences:
        """Both sides as one batch for one forward pass: the chosen rows, then the rejected."""
        width = max(self.chosen.mask.shape[1], self.rejected.mask.shape[1])
        sides = [s.widen(width) for s in (self.chosen, self.rejected)]
        return Sequences(
            tokens=torch.cat([s.tokens for s in sides]),
            prompt_mask=torch.cat([s.prompt_mask for s in sides]),
            mask=torch.cat([s.mask for s in sides]),
        )


def collate(
    prompts: list[list[int]], responses: list[list[int]], *, pad: int, device: torch.device | str = "cpu"
) -> Sequences:
    """Token lists to one padded batch: prompts on the left, responses on the right."""
    width_p, width_t = max(map(len, prompts)), max(1, *map(len, responses))
    tokens = torch.full((len(prompts), width_p + width_t), pad, dtype=torch.long)
    prompt_mask = torch.zeros(len(prompts), width_p, dtype=torch.bool)
    mask = torch.zeros(len(prompts), width_t, dtype=torch.bool)
    for i, (x, y) in enumerate(zip(prompts, responses)):
        tokens[i, width_p - len(x) : width_p] = torch.tensor(x, dtype=torch.long)
        tokens[i, width_p : width_p + len(y)] = torch.tensor(y, dtype=torch.long)
        prompt_mask[i, width_p - len(x) :] = True
        mask[i, : len(y)] = True
    return Sequences(tokens=tokens, prompt_mask=prompt_mask, mask=mask).to(device)


MOST_PADDING = 0.1
WORTH_A_PASS = 512
"""Tokens: below it a forward pass of its own costs more than padding."""


def micro_batches(lengths: Int[Tensor, " B"], max_tokens: int, at_least: int = 1) -> list[Int[Tensor, " b"]]:
    """Cut rows into micro-batches of at most ``max_tokens`` padded tokens, longest rows first.

    Rows of like length go together, and a cut of some size ends before a tenth of it is padding, so that cost follows
    the tokens that exist. ``at_least`` asks for more cuts than that, so that all processes make the same number (a
    sharded model's forward passes are collective); it must not exceed the number of rows.
    """
    order = lengths.argsort(descending=True, stable=True)
    cuts: list[Tensor] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        rows = lengths[order[start : start + max(1, max_tokens // longest)]]
        padded = longest * torch.arange(1, len(rows) + 1, device=lengths.device)
        wasteful = (padded > WORTH_A_PASS) & (padded - rows.cumsum(0) > MOST_PADDING * padded)
        size = max(1, int((~wasteful).long().cumprod(0).sum()))
        cuts.append(order[start : start + size])
        start += size
    while len(cuts) < at_least:
        widest = max(range(len(cuts)), key=lambda i: len(cuts[i]))
        half = (len(cuts[widest]) + 1) // 2
        if half == len(cuts[widest]):
            raise ValueError(f"{len(order)} rows cannot be cut into {at_least} micro-batches")
        cuts[widest : widest + 1] = [cuts[widest][:half], cuts[widest][half:]]
    return cuts
