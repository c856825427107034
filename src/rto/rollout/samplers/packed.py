"""Linear maps with weights packed for as long as a batch is decoded: on processors that is most of the time there is.

A step of decoding multiplies a few rows with every matrix of the model. torch gives fp32 products to MKL, and hands
bf16 ones to oneDNN with weights that it reads in an order not its own. oneDNN with weights in its own order has up to
2.4 times the rate in fp32 (on processors that are not Intel's, where MKL leaves the wider half of the registers alone)
and 1.3 times in bf16, where layers that read one input (`TOGETHER`) are one product. The copies live within one draw,
so they cannot be stale.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**15
"""Weights of a matrix that is not worth it: a packed product starts some microseconds later."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that usually read the same input; whether they do is seen at every call."""
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
        for parent in model.modules():
            changed += (layer for names in TOGETHER for layer in _join(parent, names))
        for module in model.modules():
            dtype = _computes_in(module)
            if dtype is not None:
                layer: Any = module
                key = (id(layer.weight), dtype)
                if key not in copies:
                    copies[key] = _reordered(layer.weight, dtype)
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


def _reordered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)


def _multiply(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    b = None if bias is None else bias.detach().to(dtype)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, b, "none", [], "")


def _join(parent: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """Make the layers of these names one product; those that it was done to: all, or none.

    Only in bf16, where it gains 3 to 7 %; fp32 is bound by the rate of products.
    """
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    if any(not isinstance(x, nn.Module) or _computes_in(x) != torch.bfloat16 for x in layers):
        return []
    if len({(x.in_features, x.bias is None) for x in layers}) > 1 or len(set(map(id, layers))) < len(layers):
        return []
    joined = _Joined(layers)
    for i, layer in enumerate(layers):
        layer.forward = joined.reader(i)
    return layers


class _Joined:
    """Layers that read one input: the first that is called multiplies for all of them.

    An input is known by itself and its version. When another one comes before all have read the last, each layer
    multiplies on its own from then on.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.sizes = layers, [x.out_features for x in layers]
        bias = None if layers[0].bias is None else torch.cat([x.bias.detach() for x in layers])
        self.product = _product(torch.cat([x.weight.detach() for x in layers]), bias)
        self.input: tuple[Tensor, int] | None = None
        self.parts = dict[int, Tensor]()
        self.alone = list[Callable[[Tensor], Tensor]]()

    def reader(self, i: int) -> Callable[[Tensor], Tensor]:
        """The forward pass of a layer."""
        return lambda x: self._read(i, x)

    def _read(self, i: int, x: Tensor) -> Tensor:
        if not self.alone and (x.is_inference() or (self.parts and not self._has(i, x))):
            self._part()
        if self.alone:
            return self.alone[i](x)
        if not self.parts:
            self.input, self.parts = (x, x._version), dict(enumerate(self.product(x).split(self.sizes, -1)))
        part = self.parts.pop(i)
        if not self.parts:
            self.input = None
        return part

    def _has(self, i: int, x: Tensor) -> bool:
        return self.input is not None and x is self.input[0] and x._version == self.input[1] and i in self.parts

    def _part(self) -> None:
        self.alone = [_product(layer.weight, layer.bias) for layer in self.layers]
        self.input, self.parts = None, {}


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return _multiply(_reordered(weight, torch.bfloat16), bias, torch.bfloat16)
