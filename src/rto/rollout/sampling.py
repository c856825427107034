"""From prompts to completions. One interface; the sampler on transformers is here."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from rto.batches import Samples, collate
from rto.finite import NotFiniteError
from rto.models.loading import unwrap_peft


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


@runtime_checkable
class Sampler(Protocol):
    """Anything that completes prompts: transformers here, an inference engine elsewhere.

    A sampler returns token ids and no log-probabilities: the trainer computes those with its own forward pass,
    since an engine's numbers differ in precision, and top-p or top-k change the distribution they belong to.
    """

    def __call__(self, model: nn.Module, prompts: list[list[int]], seed: int) -> Samples:
        """Complete every prompt once with ``model``'s present weights; same seed, same samples."""


@dataclass(frozen=True, kw_only=True)
class TransformersSampler:
    """Decoding on a static key-value cache; a row that has ended soon leaves the batch.

    Attributes:
        config: how to draw.
        eos_ids: ids that end a completion; the first one sampled is kept, and nothing follows it.
        pad_id: id written where nothing was sampled.
        max_rows: prompts decoded side by side.
    """

    config: SamplingConfig
    eos_ids: tuple[int, ...]
    pad_id: int
    max_rows: int = 512

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: list[list[int]], seed: int) -> Samples:
        """See `Sampler`. Prompts of like length are decoded together.

        Raises:
            NotFiniteError: the model's logits are NaN or infinite; the message names prompt and token.
        """
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        was_training, _ = model.training, model.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: list[list[int]] = [[] for _ in prompts]
        try:
            for start in range(0, len(order), self.max_rows):
                rows = order[start : start + self.max_rows]
                try:
                    drawn = self._decode(model, [prompts[i] for i in rows], generator)
                except NotFiniteError as error:
                    raise NotFiniteError(error.what, rows[error.row or 0]) from error
                for i, response in zip(rows, drawn):
                    responses[i] = response
        finally:
            model.train(was_training)
        batch = collate(prompts, responses, pad=self.pad_id, device=device)
        ended = torch.tensor([y[-1] in self.eos_ids for y in responses], device=device)
        return Samples(tokens=batch.tokens, prompt_mask=batch.prompt_mask, mask=batch.mask, ended=ended)

    def _decode(self, model: nn.Module, prompts: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        device = generator.device
        limit = self.config.max_completion_length
        batch = collate(prompts, [[] for _ in prompts], pad=self.pad_id, device=device)
        width = batch.prompt_mask.shape[1]
        decoder = _Decoder(model, batch.prompt_mask, width + limit)
        eos = torch.tensor(self.eos_ids, device=device)
        out = torch.full((len(prompts), limit), self.pad_id, dtype=torch.long, device=device)
        lengths = torch.full((len(prompts),), limit, dtype=torch.long, device=device)
        live = torch.arange(len(prompts), device=device)  # rows still in the batch
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        tokens = batch.tokens[:, :width]
        for t in range(limit):
            logits = decoder.step(tokens)
            finite = logits.amax(-1).isfinite()
            tokens = draw(logits, self.config, generator)
            out[live[~done], t] = tokens[~done]
            ends = ~done & torch.isin(tokens, eos)
            lengths[live[ends]] = t + 1
            done = done | ends
            running, lost = torch.stack([(~done).sum(), (~finite).sum()]).tolist()
            if lost:
                raise NotFiniteError(f"the sampler's logits are not finite at token {t}", int(live[~finite][0]))
            if running == 0:
                break
            if running <= 0.75 * len(live):  # shrinking copies the cache, so not for every row
                keep = (~done).nonzero().squeeze(1)
                decoder.keep(keep)
                live, done, tokens = live[keep], done[keep], tokens[keep]
            tokens = tokens[:, None]
        return [row[:n] for row, n in zip(out.tolist(), lengths.tolist())]


class _Filled(StaticLayer):
    """A static cache layer of which attention reads the filled part only.

    Under autocast keys and values are kept in the lower precision, which attention would cast them to at every step.
    """

    keys: Tensor
    values: Tensor
    filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers in the precision that attention works in."""
        device = key_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else key_states.dtype
        super().lazy_initialization(key_states.to(dtype), value_states.to(dtype))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns, return all that are written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.filled


class _Decoder:
    """A model with its cache: tokens in, next-token logits out."""

    def __init__(self, model: nn.Module, prompt_mask: Bool[Tensor, "B P"], length: int) -> None:
        rows, width = prompt_mask.shape
        config = unwrap_peft(model).config.get_text_config()
        self.model = model
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.visible = torch.zeros(rows, length, dtype=torch.bool, device=prompt_mask.device)
        self.visible[:, :width] = prompt_mask
        self.filled = 0
        self.positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        # Full attention takes our mask as it is, which spares building one a step, and needs no more of the cache than
        # is filled; other kinds build their own masks, for all of it.
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        self.full = kinds == {"full_attention"} and config._attn_implementation in ("sdpa", "eager")
        if self.full:
            self.cache.layers = [_Filled(max_cache_len=length) for _ in self.cache.layers]

    def step(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """Feed S tokens a row, return the logits that follow the last one."""
        start, stop = self.filled, self.filled + tokens.shape[1]
        if start:
            self.visible[:, start:stop] = True
            self.positions = self.positions[:, -1:] + 1
        # The library's cache layers take keys and values of one precision, which autocast does not give.
        with nullcontext() if self.full else torch.autocast(tokens.device.type, enabled=False):
            outputs = self.model(
                input_ids=tokens,
                attention_mask=self._mask(start, stop),
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.filled = stop
        return outputs.logits[:, -1].float()

    def _mask(self, start: int, stop: int) -> Tensor:
        if not self.full:
            return self.visible[:, :stop].long()
        # A single new token sees itself and whatever was visible before it.
        keep = self.visible[:, None, None, :stop] if stop - start == 1 else self._causal(start, stop)
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
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.batch_size = len(rows)


def draw(logits: Float[Tensor, "B V"], config: SamplingConfig, generator: torch.Generator) -> Int[Tensor, " B"]:
    """One token a row from softmax(logits / τ), within top-k and top-p."""
    if config.temperature == 0:
        return logits.argmax(-1)
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
    return invert(probs, torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator))


BLOCK = 256


def invert(weights: Float[Tensor, "B V"], uniform: Float[Tensor, "B 1"]) -> Int[Tensor, " B"]:
    """The first token whose cumulative weight exceeds ``uniform`` · total: sampling by inversion, sums in float64.

    It takes one random number a row, where `torch.multinomial` draws one for every entry. Sums go by blocks of the
    vocabulary, then within one block, so no B × V tensor of float64 is made. A weight of 0 is never drawn.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
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
