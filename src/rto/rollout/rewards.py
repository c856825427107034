"""Sources of reward: sentence scores from models and functions, token log-ratios from a DPO model."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from rto.batches import Sequences, collate, micro_batches
from rto.models.actor import hidden_states, score_logprobs
from rto.models.loading import (
    Source,
    freeze,
    load_policy,
    load_scalar,
    load_tokenizer,
    scalar_head,
    source_name,
    trusts,
)

RewardFunc = str | Path | nn.Module | Callable[..., list[float]]
"""As in TRL's GRPO: a folder or hub id of a reward model, such a model, or a Python function."""


@dataclass(frozen=True, kw_only=True)
class Completed:
    """Completions as text, the way reward functions see them: one entry a completion in every list."""

    prompts: list[Any]
    """Text, or a list of messages for conversational data."""
    completions: list[Any]
    """Text, or ``[{"role": "assistant", "content": text}]``."""
    completion_ids: list[list[int]]
    ended: list[bool]
    """EOS was sampled before the length limit."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The data set's other columns."""

    @property
    def conversational(self) -> bool:
        """Prompts are lists of messages."""
        return not isinstance(self.prompts[0], str)


class RewardModel:
    """r_MLE(x, y): the scalar head of a sequence classification model at the last token of prompt + completion.

    The model is given text through its own tokenizer, so it may be of another family and size than the policy.
    EOS is appended only to completions that sampled one, as in its training data.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 2**14) -> None:
        self.model, self.tokenizer, self.max_tokens = freeze(model), tokenizer, max_tokens
        self.name = Path(source_name(model)).name

    @torch.no_grad()
    def __call__(self, batch: Completed) -> list[float]:
        """One score a completion."""
        ids = self._encode(batch)
        device = next(self.model.parameters()).device
        sequences = collate([[]] * len(ids), ids, pad=self.tokenizer.pad_token_id, device=device)
        out = torch.zeros(len(ids))
        for rows in micro_batches(sequences.lengths.cpu(), self.max_tokens):
            part = sequences.rows(rows).trim()
            last = hidden_states(self.model, part)[torch.arange(len(rows)), part.lengths - 1]
            out[rows] = scalar_head(self.model)(last).squeeze(-1).float().cpu()
        return out.tolist()

    def _encode(self, batch: Completed) -> list[list[int]]:
        if batch.conversational:
            texts = [self._spoken(*row) for row in zip(batch.prompts, batch.completions, batch.ended)]
            return self.tokenizer(text=texts, add_special_tokens=False).input_ids
        eos = self.tokenizer.eos_token
        ends = [eos if ended else "" for ended in batch.ended]
        texts = [x + y + end for x, y, end in zip(batch.prompts, batch.completions, ends)]
        return self.tokenizer(text=texts).input_ids

    def _spoken(self, prompt: list[Any], completion: list[Any], ended: bool) -> str:
        """A conversation as text; an answer that was cut off gets no end of turn."""
        if ended:
            return apply_chat_template({"messages": prompt + completion}, self.tokenizer)["text"]
        return apply_chat_template({"prompt": prompt}, self.tokenizer)["prompt"] + completion[0]["content"]


class FunctionReward:
    """A Python function ``f(prompts, completions, completion_ids, **columns) -> list[float]``, as in TRL's GRPO.

    Only what the function's signature asks for is handed over, everything if it takes ``**kwargs``.
    """

    def __init__(self, function: Callable[..., Sequence[float | None]]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    def __call__(self, batch: Completed) -> list[float]:
        """One score a completion.

        Raises:
            ValueError: the function returns another number of scores, or one that is not finite.
        """
        offered = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
        }
        kwargs = {name: x for name, x in offered.items() if self.takes_all or name in self.takes}
        scores = list(self.function(**kwargs))
        if len(scores) != len(batch.completions):
            raise ValueError(
                f"reward function {self.name} returned {len(scores)} scores for {len(batch.completions)} completions: "
                "it must return one for each"
            )
        for i, score in enumerate(scores):
            if score is None or not math.isfinite(score):
                raise ValueError(
                    f"reward function {self.name} returned {score} for completion {i} "
                    f"({batch.completions[i]!r:.200}): scores must be finite numbers"
                )
        return [float(score) for score in scores]  # type: ignore[arg-type]


def reward_source(
    source: RewardFunc, tokenizer: PreTrainedTokenizerBase | None = None, *, max_tokens: int, **init_kwargs: Any
) -> RewardModel | FunctionReward:
    """Make any kind of `RewardFunc` callable on `Completed`.

    Raises:
        ValueError: a live model comes without a tokenizer and names no folder to load one from.
    """
    if callable(source) and not isinstance(source, nn.Module):
        return FunctionReward(source)
    if tokenizer is None:
        name = source_name(source)
        if isinstance(source, nn.Module) and not getattr(source.config, "_name_or_path", ""):
            raise ValueError("a reward model object needs its tokenizer: pass reward_processing_classes")
        tokenizer = load_tokenizer(name, trust_remote_code=trusts(init_kwargs))
    return RewardModel(load_scalar(source, new_head=False, **init_kwargs), tokenizer, max_tokens=max_tokens)


class TokenReward:
    """The implicit reward of a DPO model, token by token: log π_dpo(y_t|x,y_<t) − log π_ref(y_t|x,y_<t), nats.

    Both models read at the policy's sampling temperature, so that the reference's numbers serve the KL term too.

    Args:
        dpo_model: π_dpo.
        ref_model: its own reference; None means the trainer's reference, whose log-probabilities are then known.
        temperature: τ of both.
        max_tokens: padded tokens in one forward pass.
    """

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
        self.temperature, self.max_tokens = temperature, max_tokens

    def to(self, device: torch.device | str) -> "TokenReward":
        """Move the models."""
        for model in (self.dpo_model, self.ref_model):
            if model is not None:
                model.to(device)
        return self

    def __call__(self, sequences: Sequences, ref_logp: Float[Tensor, "B T"] | None = None) -> Float[Tensor, "B T"]:
        """The raw log-ratio for each response token, 0 outside the mask.

        Args:
            sequences: prompts with their completions.
            ref_logp: the reference's log-probabilities, read when there is no ``ref_model`` of its own.

        Raises:
            ValueError: neither is there.
        """
        score = partial(score_logprobs, temperature=self.temperature, max_tokens=self.max_tokens)
        if self.ref_model is not None:
            ref_logp = score(self.ref_model, sequences)
        if ref_logp is None:
            raise ValueError("a token reward needs the reference's log-probabilities or a reference model")
        return score(self.dpo_model, sequences) - ref_logp
