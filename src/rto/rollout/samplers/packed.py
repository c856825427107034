"""Linear maps with weights packed for as long as a batch is decoded: on processors that is most of the time there is.

A step of decoding multiplies a few rows with every matrix of the model. torch gives fp32 products to MKL, and hands
bf16 ones to oneDNN with weights that it reads in an order not its own. oneDNN with weights in its own order has up to
2.4 times the rate in fp32 (on processors that are not Intel's, where MKL leaves the wider half of the registers alone)
and 1.3 times in bf16. The copies live within one draw, so they cannot be stale.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**15
"""Weights of a matrix that is not worth it: a packed product starts some microseconds later."""
ROWS = 32
"""What weights are packed for; other numbers of rows read them as fast."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within it, linear layers of a model on processors multiply with packed copies of their present weights.

    The copies take as much memory as the weights, or half where autocast computes fp32 weights in bf16. Layers of a
    class of their own, with weights elsewhere or in another precision stay as they are.
    """
    changed: list[nn.Module] = []
    copies: dict[tuple[int, torch.dtype], Tensor] = {}  # tied weights are packed once
    try:
        for module in model.modules():
            dtype = _computes_in(module)
            if dtype is not None:
                layer: Any = module
                key = (id(layer.weight), dtype)
                if key not in copies:
                    copies[key] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), ROWS)
                layer.forward = _multiply(copies[key], layer.bias, dtype)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _computes_in(module: nn.Module) -> torch.dtype | None:
    """The precision a layer's product is in; None where the layer is left alone."""
    if type(module) is not nn.Linear or "forward" in vars(module) or not torch.backends.mkldnn.is_available():
        return None
    weight: Any = module.weight
    if weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter) or weight.numel() <= SMALL:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return dtype if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else None


def _multiply(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    b = None if bias is None else bias.detach().to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, b, "none", [], "")
