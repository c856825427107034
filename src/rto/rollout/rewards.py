"""Sources of sentence scores: reward models and Python functions, on completions as text."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto.batches import collate, micro_batches
from rto.data.chat import template_options, whole_ids
from rto.data.formats import Prompt
from rto.errors import users_code
from rto.files import shown
from rto.models.loading import (
    freeze,
    load_scalar,
    load_tokenizer,
    max_positions,
    source_name,
    tokenizer_kwargs,
    unwrap_peft,
)
from rto.models.roles import Role
from rto.models.scalars import scoring_wide
from rto.ranges import is_finite

RewardFunc = str | Path | nn.Module | Callable[..., Any]
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

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], texts: Sequence[Any], ended: list[bool], ids: list[list[int]] | None = None
    ) -> "Completed":
        """The completions of prompts as a data set has them, each in the format of its prompt: text, or a message.

        The one place where reward functions' batches are made. Columns are those that every prompt has.

        Args:
            prompts: one for each completion.
            texts: the completions: text, or messages already.
            ended: whether each ended by itself.
            ids: their token ids, for functions that ask for them; None where there are none.
        """
        names = [name for name in prompts[0].columns if all(name in p.columns for p in prompts)] if prompts else []
        return cls(
            prompts=[p.raw for p in prompts],
            completions=[said(p.raw, text) for p, text in zip(prompts, texts, strict=True)],
            completion_ids=[[] for _ in texts] if ids is None else ids,
            ended=ended,
            columns={name: [p.columns[name] for p in prompts] for name in names},
        )

    def at(self, rows: Sequence[int]) -> "Completed":
        """Some of the completions."""
        return Completed(
            prompts=[self.prompts[i] for i in rows],
            completions=[self.completions[i] for i in rows],
            completion_ids=[self.completion_ids[i] for i in rows],
            ended=[self.ended[i] for i in rows],
            columns={name: [column[i] for i in rows] for name, column in self.columns.items()},
        )

    def row(self, i: int) -> dict[str, Any]:
        """The data set's other columns of one completion."""
        return {name: column[i] for name, column in self.columns.items()}


def said(prompt: Any, text: Any) -> Any:
    """A completion in the format of its prompt: text, or a message; messages stay as they are."""
    return text if isinstance(prompt, str) or not isinstance(text, str) else [{"role": "assistant", "content": text}]


def call(function: Callable[..., Any], batch: Completed, state: Any = None) -> Any:
    """``f(prompts, completions, completion_ids, trainer_state, **columns)``, as in TRL's GRPO; it may be ``async``.

    Only what the function's signature asks for is handed over, everything if it takes ``**kwargs``. What the function
    raises is its own and keeps its traceback.
    """
    offered: dict[str, Any] = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
    }
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    takes = asked_for(function)
    if state is not None or "trainer_state" in takes:  # None outside of training
        offered["trainer_state"] = state
    with users_code(function_name(function)):
        found = function(**{name: x for name, x in offered.items() if takes_all or name in takes})
        return _awaited(found) if inspect.isawaitable(found) else found


def _awaited(found: Awaitable[Any]) -> Any:
    """What comes of it, in an event loop of its own: in a thread, since a notebook has one running."""

    async def wait() -> Any:
        return await found

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


_LOGGED = "a number is logged by a reward function of its own with weight 0 in reward_weights"
ONLY_IN_GRPO = {
    "log_metric": _LOGGED,
    "log_extra": f"{_LOGGED}; completions.jsonl has the scores beside the text",
    "environments": "tools and environments in a rollout are not here",
}
"""What TRL's GRPO offers a reward function beyond `call`, and what to do instead."""


def asked_for(function: Callable[..., Any]) -> set[str]:
    """Names in a function's signature."""
    return set(inspect.signature(function).parameters)


def function_name(function: Callable[..., Any]) -> str:
    """How logs and messages call a function."""
    return getattr(function, "__name__", type(function).__name__)


class RewardModel:
    """r_MLE(x, y): what a sequence classification model's own ``model(...).logits`` gives for prompt + completion.

    The model is given text through its own tokenizer, so it may be of another family and size than the policy. EOS
    is appended only to completions that sampled one, as in its training data. It gets ``input_ids`` and
    ``attention_mask`` and nothing else, as in TRL's training: a text is one segment, which is also what
    ``token_type_ids`` says by default.

    Rows are padded on the right with the padding id of the *model's* configuration: the last token of another id,
    where decoders read their head, is then that of the row alone. Where padding changes a score all the same (Fourier
    layers, convolutions, landmarks), where there is no such id, and in encoder-decoders, rows go one by one.

    Attributes:
        identity: its folder (an adapter's own), hub id or class: what tells it from another model.
        name: what logs, files and messages call it: the last part of that.
        context: tokens it can read; None without a limit.

    Raises:
        ValueError: the model cannot score token ids alone.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 2**14) -> None:
        self.model, self.tokenizer, self.max_tokens = freeze(model), tokenizer, max_tokens
        folder = Path(source_name(model))
        self.identity = str(folder.resolve() if folder.is_dir() else folder)
        self.name = folder.name or folder.resolve().name
        self.context = max_positions(model)
        caches = not isinstance(model, Role) and "use_cache" in asked_for(unwrap_peft(model).forward)
        self._kwargs = {"use_cache": False} if caches else {}
        self.padding = self._inert_padding()

    @torch.no_grad()
    def __call__(self, batch: Completed) -> list[float]:
        """One score a completion.

        Raises:
            ValueError: a row is longer than the model's context or empty, or a score is not finite.
        """
        ids = self._encode(batch)
        self._check_lengths(ids, batch)
        scores = torch.zeros(len(ids))
        lengths = torch.tensor([len(row) for row in ids])
        cuts = torch.arange(len(ids)).split(1) if self.padding is None else micro_batches(lengths, self.max_tokens)
        for rows in cuts:
            scores[rows] = self._score([ids[i] for i in rows], pad=self.padding or 0)
        return finite(f"reward model {self.name}", scores.tolist(), batch.completions)

    def unread(self, batch: Completed) -> list[str | None]:
        """For each completion why the model cannot read it behind its prompt; None where it can."""
        return [self._why_unread(ids) for ids in self._encode(batch)]

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt as this model reads it."""
        empty = Completed.of(prompts, [""] * len(prompts), [False] * len(prompts))
        return [len(ids) for ids in self._encode(empty)]

    def _score(self, ids: list[list[int]], *, pad: int) -> Float[Tensor, " b"]:
        device = next(unwrap_peft(self.model).parameters()).device
        rows = collate([[]] * len(ids), ids, pad=pad, device=device)
        with scoring_wide(self.model):
            logits = self.model(input_ids=rows.tokens, attention_mask=rows.mask.long(), **self._kwargs).logits
        return logits.float().cpu().view(len(ids))

    def _check_lengths(self, ids: list[list[int]], batch: Completed) -> None:
        for i, row in enumerate(ids):
            where = f"prompt and completion {i} ({batch.completions[i]!r:.200})"
            if not row:
                raise ValueError(f"reward model {self.name}: its tokenizer reads no token in {where}")
            if self._why_unread(row) is not None:
                raise ValueError(
                    f"reward model {self.name} reads at most {self.context} tokens, and {where} have {len(row)}: "
                    "lower max_prompt_length or max_completion_length, or take a reward model of a longer context"
                )

    def _why_unread(self, ids: list[int]) -> str | None:
        if not ids:
            return f"without a token that {self.name} reads"
        if self.context is not None and len(ids) > self.context:
            return f"over the {self.context} tokens that {self.name} reads"
        return None

    @torch.no_grad()
    def _inert_padding(self) -> int | None:
        """The id that rows are padded with; None where they must go one by one.

        A few tokens are scored with and without padding: whatever an architecture does with padded rows shows here.
        """
        inner: Any = unwrap_peft(self.model)
        config = inner.config.get_text_config()
        pad = (self.model.pad_token_id or 0) if isinstance(self.model, Role) else getattr(config, "pad_token_id", None)
        eos = getattr(config, "eos_token_id", None)
        ends = [eos] if isinstance(eos, int) else []
        size = getattr(config, "vocab_size", 256)
        known = [i for i in range(min(size, 64)) if i not in (pad, *ends)]
        short, long = ([known[i % len(known)] for i in range(3, 3 + n)] + ends for n in (5, 14))
        try:
            alone = torch.cat([self._score([row], pad=0) for row in (short, long)])
        except Exception as error:  # whatever a model that needs more than text says of it
            raise ValueError(
                f"reward model {self.name}, a {type(inner).__name__}, cannot score token ids alone "
                f"({str(error).strip().splitlines()[0]}): take a model of text with one output"
            ) from error
        if inner.config.is_encoder_decoder or pad is None or not 0 <= pad < size:
            return None
        gap = (self._score([short, long], pad=pad) - alone).abs().max()
        rounding = 1e-5 if next(inner.parameters()).dtype == torch.float32 else 0.05
        return pad if gap <= rounding * alone.abs().max().clamp(min=1.0) else None

    def _encode(self, batch: Completed) -> list[list[int]]:
        """Prompt and completion as the reward stage reads a row of these columns."""
        rows = zip(batch.prompts, batch.completions, batch.ended, strict=True)
        return [
            whole_ids(x, y, self.tokenizer, ended=ended, **template_options(batch.row(i)))
            for i, (x, y, ended) in enumerate(rows)
        ]


class FunctionReward:
    """A Python function ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``; see `call`.

    Raises:
        ValueError: it asks for what TRL's GRPO hands over and nobody here does.
    """

    def __init__(self, function: Callable[..., Sequence[float | None]]) -> None:
        asked = inspect.signature(function).parameters
        for name, instead in ONLY_IN_GRPO.items():
            if name in asked and asked[name].default is inspect.Parameter.empty:
                raise ValueError(f"reward function {function_name(function)} asks for {name}: {instead}")
        self.function = function
        self.name = function_name(function)
        self.identity = f"{getattr(function, '__module__', type(function).__module__)}:{self.name}"

    def __call__(self, batch: Completed) -> list[float]:
        """One score a completion.

        Raises:
            ValueError: the function returns another number of scores, or one that is not finite, or none for a row.
        """
        return finite(f"reward function {self.name}", self.given(batch), batch.completions)

    def given(self, batch: Completed, state: Any = None) -> list[float | None]:
        """One score a completion, or None where the function does not apply.

        Args:
            batch: the completions.
            state: the `transformers.TrainerState` of the training that asks, if one does.

        Raises:
            ValueError: the function returns another number of scores, or one that is not finite.
        """
        scores = list(call(self.function, batch, state))
        if len(scores) != len(batch.completions):
            raise ValueError(
                f"reward function {self.name} returned {len(scores)} scores for {len(batch.completions)} completions: "
                "it must return one for each"
            )
        told = finite(
            f"reward function {self.name}", [0.0 if score is None else score for score in scores], batch.completions
        )
        return [None if score is None else x for score, x in zip(scores, told, strict=True)]


def finite(who: str, scores: Sequence[float | None], completions: Sequence[Any]) -> list[float]:
    """The scores, if all are numbers.

    Raises:
        ValueError: one is not; the message names the source and the completion.
    """
    for i, score in enumerate(scores):
        if score is None or not is_finite(score):
            raise ValueError(
                f"{who} returned {shown(score)} for completion {i} ({completions[i]!r:.200}): scores must be finite "
                "numbers"
            )
    return [float(score) for score in scores]  # type: ignore[arg-type]


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which no two are the same: one that is taken gets a number."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{i}" for i in count(1))
        found.append(name if name not in found else next(n for n in numbered if n not in found))
    return found


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
        tokenizer = load_tokenizer(name, **tokenizer_kwargs(init_kwargs), needs_eos=False)
    return RewardModel(load_scalar(source, new_head=False, **init_kwargs), tokenizer, max_tokens=max_tokens)
