"""Operations and bytes of a forward pass, a training step and decoding, as a profiler counts them.

A multiplication and an addition are two operations; attention is counted over all L × L pairs, as
`torch.utils.flop_counter` does, though causal kernels skip half of them. Whatever is no matrix product is not counted.
"""

from dataclasses import dataclass

from rto.planning.activations import Forward, Pass, Trained, cuts, layer_kept
from rto.planning.shapes import ATTENTION, PRODUCT

ADAM_BYTES = 28
"""A weight's update in fp32: read weight, gradient and both moments, write weight and both moments."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a device does: operations, and bytes between its memory and its arithmetic units."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(operations=self.operations + other.operations, bytes=self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(operations=self.operations * times, bytes=self.bytes * times)


def layers_forward(f: Forward, rows: int, new: int, seen: int) -> float:
    """Operations of all layers on ``new`` tokens a row that look at ``seen`` tokens: 2·|W| a token, 4·D_q a pair."""
    weights = f.shape.layer + (0 if f.lora is None else f.lora.layer(f.shape))
    return f.shape.layers * (2 * rows * new * weights + 4 * rows * f.shape.queries * new * seen)


def head_forward(f: Forward, positions: int) -> float:
    """Operations of the output layer, or of the scalar head."""
    return 2 * positions * (f.shape.table if f.speaks else f.shape.hidden)


def forward(f: Forward, at: Pass) -> Work:
    """A pass without gradients."""
    operations = layers_forward(f, at.rows, at.length, at.length) + head_forward(f, at.responses)
    return Work(operations=operations, bytes=_weights_read(f) + _activations_moved(f, at))


def train(f: Forward, at: Pass) -> Work:
    """A forward and a backward pass; with checkpointing, layers forward twice."""
    s, tokens = f.shape, at.tokens
    attention = 4 * at.rows * s.queries * at.length**2 * s.layers
    maps = 2 * tokens * s.layer * s.layers
    adapters = 0 if f.lora is None else 2 * tokens * f.lora.layer(s) * s.layers
    operations = 3.5 * attention + 3 * adapters + (3 if f.trained is Trained.ALL else 2) * maps
    if f.trained is Trained.ADAPTER and not f.checkpointing:
        operations -= _first_inputs(f, tokens)
    head = head_forward(f, at.responses)
    passes = 3 if f.trained is Trained.ALL or not f.speaks else 2
    operations += head * (passes + (1 if f.speaks and cuts(s, at) > 1 else 0))
    if f.checkpointing:
        operations += attention + maps + adapters - _not_again(f, tokens)
    times = 4 if f.checkpointing else 3
    return Work(operations=operations, bytes=times * (_weights_read(f) + _activations_moved(f, at)))


def _first_inputs(f: Forward, tokens: int) -> float:
    """Nothing before the first layer learns, so its first maps hand no gradient back."""
    maps = f.shape.reading(ATTENTION)
    assert f.lora is not None
    return 2 * tokens * (sum(x.size for x in maps) + sum(f.lora.rank * x.inputs for x in f.lora.on(maps)))


def _not_again(f: Forward, tokens: int) -> float:
    """A layer is recomputed up to the last input that is kept: the product behind it is left out."""
    s = f.shape
    (last,) = s.reading(PRODUCT)
    adapted = f.lora is not None and f.lora.on((last,))
    per_token = f.lora.rank * last.outputs if adapted and f.lora is not None else last.size
    return 2 * tokens * s.layers * per_token


def decode(f: Forward, at: Pass) -> Work:
    """Prompts in one pass, then a token a row and step, each step reading all weights and the cache so far."""
    s = f.shape
    operations = layers_forward(f, at.rows, at.prompt, at.prompt) + head_forward(f, at.rows)
    moved = _weights_read(f) + at.rows * at.prompt * 2 * s.layers * layer_kept(f)
    steps = at.response - 1
    seen = steps * at.prompt + steps * (steps + 1) // 2  # the token itself included
    operations += layers_forward(f, at.rows, steps, 0) + 4 * at.rows * s.queries * seen * s.layers
    operations += steps * head_forward(f, at.rows)
    moved += steps * _weights_read(f) + at.rows * seen * cache_per_token(f)
    return Work(operations=operations, bytes=moved)


def cache_per_token(f: Forward) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * f.shape.keys * f.shape.layers * f.compute


def optimizer(trained: float) -> Work:
    """An update of so many weights."""
    return Work(bytes=ADAM_BYTES * trained)


def _weights_read(f: Forward) -> int:
    head = f.shape.table if f.speaks else f.shape.hidden
    return f.compute * (f.shape.layers * f.shape.layer + head)


def _activations_moved(f: Forward, at: Pass) -> int:
    """What a layer makes is written once and read once."""
    return 2 * at.tokens * f.shape.layers * layer_kept(f)
