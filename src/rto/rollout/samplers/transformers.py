"""The sampler on transformers: the policy itself decodes, in this process."""

import inspect
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StaticCache,
)
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from rto.batches import Samples, Sequences, collate
from rto.finite import NotFiniteError
from rto.models.actor import vocab_size
from rto.models.loading import check_special_tokens, eos_ids, max_positions, pad_id, source_name, unwrap_peft
from rto.models.roles import acting
from rto.rollout.samplers.attention import COLUMNS, by_products, one_token
from rto.rollout.samplers.base import Sampler, SamplingConfig, samples_of
from rto.rollout.samplers.packed import packed
from rto.rollout.samplers.randomness import uniforms

CACHE_BYTES = 2**33
"""What the cache of the rows decoded side by side may take where nothing else is said: 8 GiB.

A Llama of 8B in bfloat16 gets 32 rows of 2048 tokens; models of some million parameters never reach it.
"""

Choose = Callable[[Float[Tensor, "B V"], Int[Tensor, " B"], int], Int[Tensor, " B"]]
"""Next-token logits, which rows of the batch they are of, and the step, to the tokens taken: drawn, or given."""


@dataclass(kw_only=True)
class TransformersSampler(Sampler):
    """Decoding with transformers: on a cache of our own, or by the library's `generate` (`WAYS`).

    Attributes:
        config: how to draw.
        eos_ids: ids that end a completion; the first one sampled is kept, and nothing follows it.
        pad_id: id written where nothing was sampled.
        max_cache_tokens: how many tokens the rows decoded side by side may have together, prompts and length limits;
            None takes what fits into `CACHE_BYTES`. A single row is always decoded.
        max_rows: how many prompts are decoded side by side at most; None leaves that to the cache.
    """

    config: SamplingConfig
    eos_ids: tuple[int, ...]
    pad_id: int
    max_cache_tokens: int | None = None
    max_rows: int | None = None
    _faults: MutableMapping[nn.Module, dict[str, str]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    """For each model seen, the ways that were checked and what is wrong with them ("" for nothing)."""
    _policy: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _version: int = field(default=0, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, **limits: int | None
    ) -> "TransformersSampler":
        """The sampler of a model with its tokenizer, `check`-ed.

        Raises:
            ValueError: models of this type cannot be sampled right.
        """
        check_special_tokens(model, tokenizer)
        sampler = cls(config=config, eos_ids=eos_ids(model, tokenizer), pad_id=pad_id(tokenizer), **limits)
        sampler.check(model)
        return sampler

    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler`. Nothing is copied: what is drawn is drawn with the weights of that moment."""
        self._policy, self._version = policy, version

    @torch.no_grad()
    def draw(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        """See `Sampler`. Prompts of like length are decoded together.

        Raises:
            NotFiniteError: the model's logits are NaN or infinite; the message names the prompt.
            ValueError: models of this type cannot be sampled right.
        """
        assert self._policy is not None, "sync comes first"
        model = self._policy
        device = next(model.parameters()).device
        limit, lengths = self.config.max_completion_length, list(map(len, prompts))
        settings = Settings(limit=limit, eos_ids=self.eos_ids, pad_id=self.pad_id)
        responses: list[list[int]] = [[] for _ in prompts]
        logp = torch.full((len(prompts), limit), torch.nan, device=device)
        was_training, _ = model.training, model.eval()
        try:
            way = self._way(model, max(lengths) + limit)
            held, dtype = cache_bytes(model), next(model.parameters()).dtype
            if dtype == torch.bfloat16 and by_products(unwrap_peft(model), device, dtype):
                held = 3 * held // 2  # keys are held in fp32
            budget = self.max_cache_tokens or CACHE_BYTES // held
            most = min((n for n in (self.max_rows, way.max_rows) if n), default=None)
            cuts = side_by_side(lengths, room=limit, padded=way.padded, max_tokens=budget, max_rows=most)
            with packed(model):
                for rows in cuts:
                    batch = collate([prompts[i] for i in rows], [[] for _ in rows], pad=self.pad_id, device=device)
                    choose = _Drawing(self.config, uniforms([seeds[i] for i in rows], limit, device))
                    for i, response in zip(rows, way.complete(model, batch, choose, settings)):
                        responses[i] = response
                    logp[rows] = choose.logp
                    if choose.lost:
                        raise _not_finite(model, prompts, responses, rows)
        finally:
            model.train(was_training)
        return samples_of(
            prompts, responses, logp, eos_ids=self.eos_ids, pad_id=self.pad_id, version=self._version, device=device
        )

    def check(self, model: nn.Module) -> str:
        """Decode a few tokens and compare with one forward pass; returns the name of the first way that is right.

        Raises:
            ValueError: none is right for models of this type.
        """
        return self._way(model, max_positions(model) or LONG).name

    def _way(self, model: nn.Module, length: int) -> "Way":
        """The first way that serves sequences of this length and passes its check; a model is checked once."""
        faults = self._faults.setdefault(unwrap_peft(model), {})
        for way in WAYS:
            if way.serves(model, length):
                if way.name not in faults:
                    faults[way.name] = fault(way, model, self.pad_id)
                if not faults[way.name]:
                    return way
        raise ValueError(
            f"a model of type {unwrap_peft(model).config.model_type} cannot be sampled right by transformers "
            f"({'; '.join(f'{name}: {what}' for name, what in faults.items())}): take a model of another type "
            "(docs/architectures.md), or a sampler of your own"
        )


class _Drawing:
    """`draw` for a batch; keeps the log-probabilities, and whether some logits were not finite, on the device."""

    def __init__(self, config: SamplingConfig, uniform: Float[Tensor, "B T"]) -> None:
        self.config, self.uniform = config, uniform
        self.logp = torch.full(uniform.shape, torch.nan, device=uniform.device)
        self._lost = torch.zeros((), dtype=torch.bool, device=uniform.device)

    def __call__(self, logits: Float[Tensor, "B V"], rows: Int[Tensor, " B"], step: int) -> Int[Tensor, " B"]:
        self._lost |= ~logits.amax(-1).isfinite().all()  # a single -inf is a token that cannot be drawn
        tokens, logp = draw(logits, self.config, self.uniform[rows, step, None])
        self.logp[rows, step] = logp
        return tokens

    @property
    def lost(self) -> bool:
        """Some were not; waits for the device."""
        return bool(self._lost)


def _not_finite(
    model: nn.Module, prompts: list[list[int]], responses: list[list[int]], rows: list[int]
) -> NotFiniteError:
    """The error, with the first row whose own forward pass shows it."""
    device = next(model.parameters()).device
    for i in rows:
        logits = model(input_ids=torch.tensor([prompts[i] + responses[i]], device=device), use_cache=False).logits
        if not logits.amax(-1).isfinite().all():
            return NotFiniteError("the logits of the sampled model are not finite", i)
    return NotFiniteError(f"the logits of the sampled model are not finite within rows {min(rows)} to {max(rows)}")


def side_by_side(
    lengths: list[int], *, room: int, padded: bool, max_tokens: float = math.inf, max_rows: int | None = None
) -> Iterator[list[int]]:
    """Rows to decode in one batch, shortest prompts first.

    Args:
        lengths: of the prompts.
        room: tokens that each row may get beside its prompt.
        padded: whether prompts of several lengths may share a batch.
        max_tokens: tokens that a batch may have, padding and room included; a single row always may.
        max_rows: rows that a batch may have.
    """
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        unlike = bool(rows) and not padded and lengths[i] != lengths[rows[-1]]
        if rows and ((len(rows) + 1) * (lengths[i] + room) > max_tokens or len(rows) == max_rows or unlike):
            yield rows
            rows = []
        rows.append(i)
    yield rows


ALIKE, ENOUGH = 0.8, 256
"""Prompts of this share of the longest's length are read with it; others, too, until there are so many tokens."""


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in parts of like length, the shortest first, each part's longest last."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        part = parts[-1] if parts else []
        if part and (lengths[part[0]] >= ALIKE * lengths[i] or len(part) * lengths[part[-1]] < ENOUGH):
            part.append(i)
        else:
            parts.append([i])
    return parts


def cache_bytes(model: nn.Module) -> int:
    """Bytes of cache a token: 2 · layers · key-value heads · head size · bytes a number.

    It is what full attention needs, more than windows and recurrent layers do.
    """
    config = unwrap_peft(model).config.get_text_config()

    def known(*names: str) -> int | None:
        return next((x for x in (_setting(config, name) for name in names) if isinstance(x, int) and x), None)

    dtype, hidden = next(model.parameters()).dtype, known("hidden_size", "d_model") or 1
    heads, all_heads = known("num_key_value_heads", "num_attention_heads"), known("num_attention_heads")
    latent = (known("qk_nope_head_dim") or 0) + (known("qk_rope_head_dim") or 0)  # what latent attention unfolds to
    size = latent or known("head_dim") or (hidden // all_heads if all_heads else 0)
    width = heads * size if heads and size else hidden
    return 2 * (known("num_hidden_layers") or 1) * width * (dtype.itemsize if dtype.is_floating_point else 2)


def _setting(config: Any, name: str) -> Any:
    """A setting of a configuration; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # the library's answer for a setting that differs by layer
        return None


# --- ways to decode


@dataclass(frozen=True)
class Settings:
    """Where a completion ends.

    Attributes:
        limit: its length limit.
        eos_ids: tokens that end it.
        pad_id: what a row's empty places hold.
    """

    limit: int
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Way:
    """How a batch of prompts is completed.

    Attributes:
        name: what the table of architectures calls it.
        complete: the batch's completions, each up to its first EOS.
        serves: whether it is meant for a model and sequences of so many tokens.
        padded: whether prompts of several lengths may share a batch.
        max_rows: prompts that may share one; None means any number.
    """

    name: str
    complete: Callable[[nn.Module, Sequences, Choose, Settings], list[list[int]]]
    serves: Callable[[nn.Module, int], bool]
    padded: bool = True
    max_rows: int | None = None


def is_plain(model: nn.Module, length: int) -> bool:
    """Whether every layer looks at all tokens before it, so that a filled cache and a causal mask are the whole truth.

    It must follow from what the model declares: a forward pass that takes positions and a cache, an attention function
    that takes a mask, no ALiBi, no state, and a cache in which each layer holds the whole sequence (a window or chunk
    of ``length`` tokens or more is none).
    """
    inner = unwrap_peft(model)
    config = inner.config.get_text_config()
    takes = inspect.signature(inner.forward).parameters
    if not {"position_ids", "past_key_values"} <= set(takes) or getattr(inner, "_is_stateful", False):
        return False
    if getattr(config, "alibi", False) or config._attn_implementation not in ("sdpa", "eager"):
        return False
    try:
        layers: list[Any] = StaticCache(config=config, max_cache_len=length).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a kind of layer without a static cache
        return False
    whole = (StaticLayer, StaticSlidingWindowLayer)
    return all(type(layer) in whole and layer.max_cache_len >= length for layer in layers)


def _on_own_cache(model: nn.Module, batch: Sequences, choose: Choose, settings: Settings) -> list[list[int]]:
    """Decoding on `_Decoder`; a row that has ended soon leaves the batch."""
    rows, width = batch.prompt_mask.shape
    limit, device = settings.limit, batch.tokens.device
    decoder = _Decoder(model, batch.prompt_mask, width + limit)
    eos = torch.tensor(settings.eos_ids, device=device)
    out = torch.full((rows, limit), settings.pad_id, dtype=torch.long, device=device)
    lengths = torch.full((rows,), limit, dtype=torch.long, device=device)
    live = torch.arange(rows, device=device)  # rows still in the batch
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    logits = decoder.read(batch.tokens[:, :width])
    for t in range(limit):
        tokens = choose(logits, live, t)
        out[live, t] = tokens  # of rows that are done, too: they are cut at their length
        ends = ~done & torch.isin(tokens, eos)
        lengths[live] = torch.where(ends, t + 1, lengths[live])
        done = done | ends
        running = int((~done).sum())  # the one wait for the device in a step
        if running == 0:
            break
        if running <= 0.9 * len(live):  # rows that stay take the places of those that leave
            keep = (~done).nonzero().squeeze(1)
            order = torch.arange(running, device=device)
            order[done[:running]] = keep[keep >= running]
            decoder.keep(order)
            live, done, tokens = live[order], done[order], tokens[order]
        if t + 1 < limit:
            logits = decoder.step(tokens[:, None])
    return [row[:n] for row, n in zip(out.tolist(), lengths.tolist())]


def _by_generate(model: nn.Module, batch: Sequences, choose: Choose, settings: Settings) -> list[list[int]]:
    """Decoding by the library's `generate`, with the tokens that ``choose`` takes.

    Nothing of the model's own generation configuration is used: penalties or suppressed tokens would draw from another
    distribution than the policy's.
    """
    inner, width = unwrap_peft(model), batch.prompt_mask.shape[1]
    eos = [i for i in settings.eos_ids if i >= 0]
    config = GenerationConfig(
        max_new_tokens=settings.limit, do_sample=False, eos_token_id=eos or None, pad_token_id=settings.pad_id
    )
    # The library's cache layers take keys and values of one precision, which autocast does not give.
    with acting(model), _generating_by(inner, config), torch.autocast(batch.tokens.device.type, enabled=False):
        out = inner.generate(
            input_ids=batch.tokens[:, :width],
            attention_mask=batch.prompt_mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Chosen(choose)]),
        )
    return [_up_to_eos(row, settings.eos_ids) for row in out[:, width:].tolist()]


@contextmanager
def _generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a configuration leaves open from the model's own; here that is the same one."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


class _Chosen(LogitsProcessor):
    """Leaves one token possible: the chosen one."""

    def __init__(self, choose: Choose) -> None:
        self.choose, self.step = choose, 0

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        tokens = self.choose(scores, torch.arange(len(scores), device=scores.device), self.step)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _up_to_eos(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    end = next((t for t, y in enumerate(tokens) if y in eos), len(tokens))
    return tokens[: end + 1]


def _generates(model: nn.Module, length: int) -> bool:
    return hasattr(unwrap_peft(model), "generate")


def _is_told_of_padding(model: nn.Module, length: int) -> bool:
    """Whether a model takes positions or masks its state; else only a check in full precision can say."""
    inner = unwrap_peft(model)
    told = "position_ids" in inspect.signature(inner.forward).parameters or getattr(inner, "_is_stateful", False)
    return _generates(model, length) and (told or _is_exact(model))


WAYS = (
    Way("own cache", _on_own_cache, is_plain),
    Way("generate", _by_generate, _is_told_of_padding),
    Way("generate, equal lengths", _by_generate, _generates, padded=False),
    Way("generate, row by row", _by_generate, _generates, padded=False, max_rows=1),
)
"""In the order in which they are tried."""

# --- the check

LONG = 2**31
"""Tokens: longer than any window."""
CHECK_LENGTH, CHECK_STEPS = 20, 6
"""Tokens of a check's longest rows, and how many of them are decoded."""
CHEAP_WINDOW = 128
"""A check's rows are longer than a window of so many tokens or less."""


@torch.no_grad()
def fault(way: Way, model: nn.Module, pad_id: int) -> str:
    """What is wrong with a way for a model, "" where nothing is.

    A few tokens are decoded for prompts of several lengths, and their log-probabilities compared with those of one
    forward pass over each row alone: mean |Δ log p| over the vocabulary and the steps, by the spread of log p. Both
    in the precision of the weights, also within autocast, whose rounding would pass for a fault.
    """
    training, _ = model.training, model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            gap = _gap(way, model, pad_id)
    except NotFiniteError:
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return f"{type(error).__name__}, {' '.join(str(error).split())[:100]}"
    finally:
        model.train(training)
    return "" if gap < _tolerance(model) else f"log-probabilities off by {gap:.2g} of their spread"


def _gap(way: Way, model: nn.Module, pad_id: int) -> float:
    prompts, completions = _check_rows(model, pad_id)
    steps = completions.shape[1]
    settings, device = Settings(limit=steps, eos_ids=(), pad_id=pad_id), completions.device
    gaps = []
    for rows in side_by_side(list(map(len, prompts)), room=steps, padded=way.padded, max_rows=way.max_rows):
        given = _Given(completions[rows])
        batch = collate([prompts[i] for i in rows], [[] for _ in rows], pad=pad_id, device=device)
        with packed(model):
            way.complete(model, batch, given, settings)
        ours = torch.stack(given.seen[:steps], dim=1).log_softmax(-1)
        for i, decoded in zip(rows, ours):
            whole = torch.tensor([prompts[i] + completions[i].tolist()], device=device)
            expected = model(input_ids=whole, use_cache=False).logits[0, -steps - 1 : -1].float().log_softmax(-1)
            if expected.isnan().any():
                raise NotFiniteError(
                    f"the logits of the sampled model {source_name(model)} are not finite: look at its weights, and "
                    "at rope_parameters in its config.json"
                )
            spread = expected.std(-1).clamp(min=1e-3)
            gaps.append(((decoded - expected).abs().mean(-1) / spread).mean())
    return torch.stack(gaps).max().item()


def _check_rows(model: nn.Module, pad_id: int) -> tuple[list[list[int]], Int[Tensor, "B T"]]:
    """Prompts of one token, of some, and twice of as many as there is room for, with their completions."""
    config = unwrap_peft(model).config.get_text_config()
    windows = [_setting(config, name) for name in ("sliding_window", "attention_chunk_size")]
    past = [2 + CHECK_STEPS + w for w in windows if isinstance(w, int) and w <= CHEAP_WINDOW]
    room = min(max([CHECK_LENGTH, *past]), max_positions(model) or LONG)
    steps = min(CHECK_STEPS, room // 2)
    lengths = [1, max(1, (room - steps) // 4), room - steps, room - steps]
    g = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        drawn = torch.randint(vocab_size(model), shape, generator=g)
        return torch.where(drawn == pad_id, (drawn + 1) % vocab_size(model), drawn)

    device = next(model.parameters()).device
    return [tokens(n).tolist() for n in lengths], tokens(len(lengths), steps).to(device)


class _Given:
    """Takes the tokens that are given, and remembers the logits."""

    def __init__(self, tokens: Int[Tensor, "B T"]) -> None:
        self.tokens, self.seen = tokens, list[Tensor]()

    def __call__(self, logits: Float[Tensor, "B V"], rows: Int[Tensor, " B"], step: int) -> Int[Tensor, " B"]:
        self.seen.append(logits.float())
        return self.tokens[rows, min(step, self.tokens.shape[1] - 1)]


def _is_exact(model: nn.Module) -> bool:
    dtype = next(model.parameters()).dtype
    return dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"


def _tolerance(model: nn.Module) -> float:
    """What rounding explains, also where it sends a token to another expert; a wrong mask is off by about 1."""
    return 0.01 if _is_exact(model) else 0.25


# --- the cache


class _Filled(StaticLayer):
    """A static cache layer of which attention reads the filled part only, or whole blocks of columns.

    Under autocast keys and values are kept in the lower precision, which attention would cast them to at every step.

    Attributes:
        filled: columns written.
        block: columns that it grows by, all of which a single new token reads under a mask, keys in fp32; 0 holds all
            columns from the start and gives out those that are written.
    """

    keys: Tensor
    values: Tensor
    filled = 0

    def __init__(self, max_cache_len: int, block: int = 0) -> None:
        super().__init__(max_cache_len)
        self.block = block

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers in the precision that attention works in."""
        dtype, columns = cache_dtype(value_states), 0 if self.block else self.max_cache_len
        self.keys = key_states.new_zeros(*key_states.shape[:2], columns, key_states.shape[-1], dtype=dtype)
        self.values = value_states.new_zeros(*value_states.shape[:2], columns, value_states.shape[-1], dtype=dtype)
        if self.block:
            self.keys = self.keys.float()
        self.dtype, self.device, self.is_initialized = dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns, return those that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self._fill(self.filled + new)
        self.keys[:, :, self.filled - new : self.filled] = key_states
        self.values[:, :, self.filled - new : self.filled] = value_states
        if self.block and new == 1:
            return self.keys, self.values
        return self.keys[:, :, : self.filled].to(self.dtype), self.values[:, :, : self.filled]

    def _fill(self, columns: int) -> None:
        """There is room for so many columns; what they hold is written next."""
        self.filled = columns
        more = columns_of(columns, self.block, self.max_cache_len) - self.keys.shape[2]
        if more > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def take(self, other: "_Filled", rows: Int[Tensor, " K"], of: int, stop: int) -> None:
        """Another layer's columns as those of some rows of a batch of so many, up to column ``stop``."""
        if not self.is_initialized:
            self.lazy_initialization(*(x[:1].expand(of, -1, -1, -1) for x in (other.keys, other.values)))
        self._fill(stop)
        self.keys[rows, :, stop - other.filled : stop] = other.keys[:, :, : other.filled]
        self.values[rows, :, stop - other.filled : stop] = other.values[:, :, : other.filled]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.filled

    def batch_select_indices(self, indices: Int[Tensor, " K"]) -> None:
        """Keep these rows, in this order; nothing is copied of those that stay in their places."""
        places = torch.arange(len(indices), device=indices.device)
        moves = indices != places
        to, source = places[moves], indices[moves]
        for x in (self.keys, self.values):
            x[to, :, : self.filled] = x[source, :, : self.filled]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def cache_dtype(states: Tensor) -> torch.dtype:
    """The precision that attention over such keys and values works in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def columns_of(filled: int, block: int, most: int) -> int:
    """How many columns a cache has whose columns are filled so far; whole blocks, and never more than the most."""
    return min(-(-filled // block) * block, most) if block else most


class _Decoder:
    """A model with its cache: tokens in, next-token logits out.

    A plain model (`is_plain`) reads a cache of ours under masks of ours. Any other gets the library's own cache for it
    and builds its masks itself, from which tokens exist.

    Raises:
        ValueError: the model takes no such cache, or no positions for a batch that has padding.
    """

    def __init__(self, model: nn.Module, prompt_mask: Bool[Tensor, "B P"], length: int) -> None:
        rows, width = prompt_mask.shape
        inner = unwrap_peft(model)
        config = inner.config.get_text_config()
        self.model = model
        self.takes = set(inspect.signature(inner.forward).parameters)
        if "past_key_values" not in self.takes or not ("position_ids" in self.takes or bool(prompt_mask.all())):
            raise ValueError(f"a model of type {inner.config.model_type} is decoded by `generate`: use its sampler")
        self.visible = torch.zeros(rows, length, dtype=torch.bool, device=prompt_mask.device)
        self.visible[:, :width] = prompt_mask
        self.filled = 0
        self.positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        self.full, self.block = is_plain(model, length), 0
        self.cache: Cache = DynamicCache(config=config)
        if self.full:
            dtype = cache_dtype(next(model.parameters()))
            self.block = COLUMNS if by_products(inner, prompt_mask.device, dtype) else 0
            self.cache = StaticCache(config=config, max_cache_len=length)
            self.cache.layers = [_Filled(length, self.block) for _ in self.cache.layers]

    def read(self, prompts: Int[Tensor, "B P"]) -> Float[Tensor, "B V"]:
        """Feed the prompts, return the logits that follow them; long ones and short ones apart (`alike`)."""
        width = prompts.shape[1]
        lengths = self.visible.sum(1).tolist()
        parts = alike(lengths) if self.full else []
        if len(parts) < 2:
            return self.step(prompts)
        logits: list[Tensor] = []
        for part in parts:
            rows = torch.tensor(part, device=prompts.device)
            start = width - lengths[part[-1]]
            short = _Decoder(self.model, self.visible[rows, start:width], width - start)
            logits.append(short.step(prompts[rows, start:]))
            for mine, theirs in zip(self.cache.layers, short.cache.layers):
                assert isinstance(mine, _Filled)
                assert isinstance(theirs, _Filled)
                mine.take(theirs, rows, len(prompts), width)
        self.filled = width
        return torch.cat(logits)[torch.tensor([i for part in parts for i in part]).argsort().to(prompts.device)]

    def step(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """Feed S tokens a row, return the logits that follow the last one."""
        start, stop = self.filled, self.filled + tokens.shape[1]
        if start:
            self.visible[:, start:stop] = True
            self.positions = self.positions[:, -1:] + 1
        settings = {"position_ids": self.positions, "logits_to_keep": 1}
        mask = self._mask(start, stop)
        # The library's cache layers take keys and values of one precision, which autocast does not give.
        context: Any = nullcontext() if self.full else torch.autocast(tokens.device.type, enabled=False)
        if self.block and stop - start == 1:
            context = one_token(mask)
        with context:
            outputs = self.model(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                **{name: x for name, x in settings.items() if name in self.takes},
            )
        self.filled = stop
        return outputs.logits[:, -1].float()

    def _mask(self, start: int, stop: int) -> Tensor:
        if not self.full:
            return self.visible[:, :stop].long()
        columns = columns_of(stop, self.block, self.visible.shape[1]) if self.block else stop
        # A single new token sees itself and whatever was visible before it.
        keep = self.visible[:, None, None, :columns] if stop - start == 1 else self._causal(start, stop)
        if unwrap_peft(self.model).config._attn_implementation == "sdpa":
            return keep
        dtype = next(self.model.parameters()).dtype
        return torch.zeros_like(keep, dtype=dtype).masked_fill_(~keep, torch.finfo(dtype).min)

    def _causal(self, start: int, stop: int) -> Bool[Tensor, "B 1 S K"]:
        causal = torch.ones(stop - start, stop, dtype=torch.bool, device=self.visible.device)
        allowed = self.visible[:, None, :stop] & causal.tril(start)
        # A padding position sees itself: attention over nothing is NaN, and NaN times zero is NaN.
        itself = torch.zeros_like(causal)
        itself.diagonal(start).fill_(True)
        return (allowed | itself)[:, None]

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Forget all other rows."""
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)


def draw(
    logits: Float[Tensor, "B V"], config: SamplingConfig, uniform: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token a row from softmax(logits / τ), within top-k and top-p, and its log-probability there.

    At temperature 0 it is the most likely token, of which no log-probability is given: NaN.
    """
    if config.temperature == 0:
        return logits.argmax(-1), torch.full_like(logits[:, 0], torch.nan)
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k:
        smallest = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probs = logits.softmax(-1)
    if config.top_p < 1:
        ranked, index = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked
        probs = probs.masked_fill((before >= config.top_p).gather(-1, index.argsort(-1)), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    tokens = invert(probs, uniform)
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


BLOCK = 256


def invert(weights: Float[Tensor, "B V"], uniform: Float[Tensor, "B 1"]) -> Int[Tensor, " B"]:
    """The first token whose cumulative weight exceeds ``uniform`` · total: inversion, with sums in float64.

    It takes one random number a row, where `torch.multinomial` draws one for every entry. Sums go by blocks of the
    vocabulary, then within one block, so no B × V tensor of float64 is made; a block's own sum is in the weights'
    precision. A weight of 0 is never drawn.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()  # a sum of float32 in float64 is made from a copy in float64
    point = uniform * sums.sum(-1, keepdim=True)
    block, rest = _first_above(sums, point)
    row = torch.arange(len(weights), device=weights.device)
    token, _ = _first_above(blocks[row, block].double(), rest)
    return (block * BLOCK + token).clamp(max=weights.shape[-1] - 1)  # where weights are NaN


def _first_above(
    weights: Float[Tensor, "B K"], point: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, "B 1"]]:
    """Index of the first cumulative weight above ``point``, and what ``point`` exceeds the one before by."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not pass the end
    index = torch.searchsorted(cumulative, point, right=True)
    index = index.clamp(max=weights.shape[-1] - 1)  # where weights are NaN
    return index.squeeze(-1), point - (cumulative - weights).gather(-1, index)
