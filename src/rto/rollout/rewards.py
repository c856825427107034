"""Sources of sentence scores: reward models and Python functions, on completions as text."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from rto.batches import collate, micro_batches
from rto.models.actor import hidden_states
from rto.models.loading import (
    freeze,
    load_scalar,
    load_tokenizer,
    scalar_head,
    source_name,
    tokenizer_kwargs,
    unwrap_peft,
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


def call(function: Callable[..., Any], batch: Completed) -> Any:
    """``f(prompts, completions, completion_ids, **columns)``, as in TRL's GRPO.

    Only what the function's signature asks for is handed over, everything if it takes ``**kwargs``.
    """
    offered = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
    }
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    takes = asked_for(function)
    return function(**{name: x for name, x in offered.items() if takes_all or name in takes})


def asked_for(function: Callable[..., Any]) -> set[str]:
    """Names in a function's signature."""
    return set(inspect.signature(function).parameters)


def function_name(function: Callable[..., Any]) -> str:
    """How logs and messages call a function."""
    return getattr(function, "__name__", type(function).__name__)


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
        device = next(unwrap_peft(self.model).parameters()).device
        sequences = collate([[]] * len(ids), ids, pad=self.tokenizer.pad_token_id, device=device)
        out = torch.zeros(len(ids))
        for rows in micro_batches(sequences.lengths.cpu(), self.max_tokens):
            part = sequences.rows(rows).trim()
            last = hidden_states(self.model, part)[torch.arange(len(rows)), part.lengths - 1]
            head = scalar_head(self.model)
            out[rows] = head(last.to(head.weight.dtype)).squeeze(-1).float().cpu()
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
    """A Python function ``f(prompts, completions, completion_ids, **columns) -> list[float]``; see `call`."""

    def __init__(self, function: Callable[..., Sequence[float | None]]) -> None:
        self.function = function
        self.name = function_name(function)

    def __call__(self, batch: Completed) -> list[float]:
        """One score a completion.

        Raises:
            ValueError: the function returns another number of scores, or one that is not finite.
        """
        scores = list(call(self.function, batch))
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
        return [float(score) for score in scores]


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
        tokenizer = load_tokenizer(name, **tokenizer_kwargs(init_kwargs))
    return RewardModel(load_scalar(source, new_head=False, **init_kwargs), tokenizer, max_tokens=max_tokens)
