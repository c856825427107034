"""Attention of one new token a row, on processors, as two products over the heads of keys and values.

The library's fused kernel starts two small products for every row and head, which take longer to start than to run.
All of them as one product each, over keys and values that lie together, take 0.6 of its time in bfloat16, 0.6 to 0.9
in fp32. For that the cache hands out whole blocks of columns (`COLUMNS`), so that nothing is copied together; columns
that are not written yet are masked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

COLUMNS = 32
"""Columns that a cache grows by."""
NOT_OURS = ("softcap", "position_bias", "output_attentions", "cache")
"""What the library's function reads, or refuses, beside what `attended` does."""


def by_products(model: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's attention can be replaced, and products of small matrices are fast there."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not getattr(model, "_supports_attention_backend", False) or model.config._attn_implementation != "sdpa":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attended(
    query: Float[Tensor, "B H 1 D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K E"],
    bias: Float[Tensor, "BG 1 K"],
    scale: float,
) -> Float[Tensor, "B 1 H E"]:
    """softmax(scale · q kᵀ + bias) v; the heads that share keys lie beside each other.

    Scores are products of fp32, because a bfloat16 one near 8 is 1/32 apart; weights are rounded as values are.
    """
    (rows, heads, _, size), groups = query.shape, key.shape[1]
    q = query.to(key.dtype).reshape(rows * groups, heads // groups, size)
    weights = torch.baddbmm(bias, q, key.flatten(0, 1).transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(weights.to(value.dtype), value.flatten(0, 1)).view(rows, 1, heads, -1)


@contextmanager
def one_token(mask: Bool[Tensor, "B 1 1 K"]) -> Iterator[None]:
    """Within it the library's attention goes by `attended` where a layer reads one token a row under this very mask.

    Keys are held in fp32 then, whatever values are in.
    """
    theirs, biases = ALL_ATTENTION_FUNCTIONS["sdpa"], dict[int, Tensor]()

    def bias(groups: int) -> Tensor:
        if groups not in biases:
            hidden = ~mask[:, 0].repeat_interleave(groups, 0)
            biases[groups] = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        return biases[groups]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, Any]:
        other = any(settings.get(name) is not None and settings[name] is not False for name in NOT_OURS)
        ours = attention_mask is mask and not settings.get("dropout") and not other
        if not ours or query.shape[2] != 1 or query.shape[1] % key.shape[1] or key.dtype != torch.float32:
            return theirs(module, query, key.to(value.dtype), value, attention_mask, **settings)
        scale = settings.get("scaling")
        with torch.autocast("cpu", enabled=False):
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return attended(query, key, value, bias(key.shape[1]), scale), None

    overridden = _forget()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if overridden:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs


def _forget() -> bool:
    """Whether somebody had put a function in the place of the library's; it is taken out."""
    try:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    except KeyError:
        return False
    return True
