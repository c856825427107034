"""Bytes that a forward and a backward pass hold beside weights and gradients, per token and in all.

They follow from what autograd keeps: a matrix product its input, a gate both of its factors, SiLU its input, attention
queries, keys, values and output (never tokens × tokens: fused kernels), a norm its input in fp32. Under autocast every
linear map that reads one input keeps a low-precision copy of its own, and each weight in fp32 has a low-precision copy
for as long as the pass needs it.
"""

import math
from dataclasses import dataclass
from enum import Enum

from rto.functional.logprobs import MAX_LOGITS
from rto.planning.shapes import ATTENTION, MIXED, MLP, PRODUCT, Lora, Shape

FP32 = 4
"""Bytes."""


class Trained(Enum):
    """What of a model has gradients."""

    NOTHING = "nothing"
    ADAPTER = "adapter"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows of prompt + response tokens that a model reads at once.

    Attributes:
        rows: B.
        prompt: P.
        response: T; at these positions a head is read.
        masked: rows have unlike lengths and attention is given a mask, which makes it repeat keys for each query head.
    """

    rows: int
    prompt: int
    response: int
    masked: bool = False

    @property
    def length(self) -> int:
        """L."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """B · L."""
        return self.rows * self.length

    @property
    def responses(self) -> int:
        """B · T."""
        return self.rows * self.response


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How one model is run.

    Attributes:
        shape: its sizes.
        weights: bytes of a weight as the forward pass finds it: 4 where it is trained, 2 where it is frozen in bf16 or
            gathered in bf16 from its shards.
        compute: bytes of a number in a matrix product; 2 under bf16.
        trained: what of it has gradients.
        lora: adapters on it, in fp32.
        speaks: it has an output layer over the vocabulary; a scalar head otherwise.
        checkpointing: layers keep their input only and are computed again in the backward pass.
    """

    shape: Shape
    weights: int
    compute: int
    trained: Trained
    lora: Lora | None = None
    speaks: bool = True
    checkpointing: bool = False

    @property
    def casts(self) -> bool:
        """Autocast makes low-precision copies of the weights."""
        return self.compute < self.weights

    def copies(self, linears: int, made_in: int) -> int:
        """Copies of one input that so many linear maps keep, when it was made with so many bytes a number."""
        if self.trained is Trained.ALL:
            return 1 if made_in == self.compute else linears
        return 0 if linears == 0 else 1 if self.compute == FP32 else linears  # each adapter casts for itself


def _adapted(f: Forward, reads: str) -> int:
    """Linear maps of a layer that keep their input."""
    maps = f.shape.reading(reads)
    if f.trained is Trained.ALL:
        return len(maps)
    return 0 if f.lora is None or f.trained is Trained.NOTHING else len(f.lora.on(maps))


def norm_kept(f: Forward, readers: int) -> int:
    """Bytes a token that one norm keeps, with the inputs of those who read it."""
    width = f.shape.hidden
    made_in = f.weights if f.shape.rms else max(f.weights, FP32)
    statistics = FP32 if f.shape.rms else 2 * FP32
    scaled = f.weights * width if f.shape.rms and f.trained is Trained.ALL else 0  # the factor of the norm's weight
    return FP32 * width + statistics + scaled + f.copies(readers, made_in) * f.compute * width


def layer_kept(f: Forward, *, masked: bool = False) -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    s, c = f.shape, f.compute
    attention = c * (2 * s.queries + 2 * s.keys) + FP32 * s.heads
    if s.fused:
        attention += c * (s.queries + s.keys)  # values are a view of what the one map made
    if masked:
        attention += 2 * c * (s.queries - s.keys)
    own = f.trained is Trained.ADAPTER and c < FP32  # an adapter reads a copy of its own
    if own and _adapted(f, MIXED):
        attention += c * s.queries
    mlp = (3 if s.gated else 1) * c * s.intermediate
    if _adapted(f, PRODUCT):
        mlp += c * s.intermediate
    between = 0 if f.lora is None or f.trained is not Trained.ADAPTER else c * f.lora.rank * len(f.lora.on(s.linears))
    return norm_kept(f, _adapted(f, ATTENTION)) + norm_kept(f, _adapted(f, MLP)) + attention + mlp + between


def layers_kept(f: Forward, at: Pass) -> int:
    """Bytes that all layers and the last norm keep between forward and backward pass."""
    each = f.weights * f.shape.hidden if f.checkpointing else layer_kept(f, masked=at.masked)
    last = norm_kept(f, 0)
    return at.tokens * (f.shape.layers * each + last) + at.responses * f.shape.hidden * f.weights


def layer_backward(f: Forward, at: Pass) -> int:
    """Bytes of gradients of activations at the worst moment of a layer's backward pass, the gate's product.

    The product's own gradient and those of both factors exist, when the product itself is gone.
    """
    c, width = f.compute, f.shape.intermediate
    most = (2 if f.shape.gated else 1) * c * width
    if f.trained is Trained.ADAPTER and c < FP32:
        most += (FP32 - c) * width  # through the adapter it comes in fp32
    return at.tokens * (most + f.weights * f.shape.hidden)


def layer_forward(f: Forward, at: Pass) -> int:
    """Bytes at the worst moment of a layer without gradients: gate, second map and product, or both norms' inputs."""
    s, c = f.shape, f.compute
    adapters = 2 * c * s.intermediate if f.lora is not None else 0
    mlp = (3 if s.gated else 2) * c * s.intermediate + adapters
    mixing = c * (s.queries + 2 * s.keys) + (2 * max(c, f.weights) + c) * s.queries
    if at.masked:
        mixing += 2 * c * (s.queries - s.keys)
    return at.tokens * (2 * f.weights * s.hidden + (c * s.hidden if f.casts else 0) + max(mlp, mixing))


@dataclass(frozen=True, kw_only=True)
class Head:
    """Bytes of an output layer at the tokens of one pass, of which only so many rows of logits exist at a time."""

    kept: int
    """Between forward and backward pass."""
    forward: int
    """More than that at the worst moment of the forward pass."""
    backward: int
    """More than that, beside the gradient of the weights, at the worst moment of the backward pass."""


def cuts(shape: Shape, at: Pass) -> int:
    """Parts that the rows of logits are computed in."""
    return math.ceil(at.responses / max(1, MAX_LOGITS // shape.vocab))


def head_bytes(f: Forward, at: Pass, *, entropy: bool = False) -> Head:
    """The output layer with the log-probabilities made of it, in fp32; entropy needs logarithm and products, too."""
    if not f.speaks:
        return Head(kept=0, forward=0, backward=0)
    rows = min(at.responses, max(1, MAX_LOGITS // f.shape.vocab))
    logits = FP32 * rows * f.shape.vocab
    copy = FP32 * f.shape.table if f.weights < FP32 else 0  # of weights in low precision
    if f.trained is Trained.NOTHING:
        return Head(kept=0, forward=max(copy + logits, (3 if entropy else 2) * logits), backward=0)
    gradient = (FP32 + (f.weights if copy else 0)) * f.shape.table if f.trained is Trained.ALL else 0
    if cuts(f.shape, at) == 1:
        return Head(kept=logits + copy, forward=logits, backward=max(0, gradient - logits))
    again = copy + max(2 * logits, logits + gradient)
    return Head(kept=0, forward=max(copy + logits, 2 * logits), backward=again)
