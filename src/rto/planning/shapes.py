"""The sizes of a decoder that memory and arithmetic follow from; plain numbers, no model and no library."""

from collections.abc import Iterable
from dataclasses import dataclass

ATTENTION, MIXED, MLP, PRODUCT = "attention", "mixed", "mlp", "product"
"""What a linear map of a layer reads: normed states, what attention made, normed states again, the gated product."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map of a layer: y = W x, W of ``outputs`` × ``inputs``."""

    name: str
    reads: str
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Entries of W."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of equal layers with full attention.

    Attributes:
        name: how tables call it.
        vocab: V.
        hidden: D.
        layers: how many.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        linears: the linear maps of one layer.
        vectors: weights that are no matrices, in the whole backbone: norms and biases.
        rms: norms are root mean squares (a LayerNorm otherwise).
        tied: the output layer is the embedding.
        family: the model type; `MEASURED` lists those that predictions were measured on.
    """

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    vectors: int
    rms: bool
    tied: bool
    family: str

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def intermediate(self) -> int:
        """Width of what the second half of the MLP reads."""
        return self.reading(PRODUCT)[0].inputs

    @property
    def gated(self) -> bool:
        """The MLP multiplies a gate with a second map."""
        return sum(x.outputs for x in self.reading(MLP)) == 2 * self.intermediate

    @property
    def fused(self) -> bool:
        """Queries, keys and values come out of one map."""
        return len(self.reading(ATTENTION)) == 1

    def reading(self, what: str) -> tuple[Linear, ...]:
        """The linear maps that read one kind of input."""
        return tuple(x for x in self.linears if x.reads == what)

    @property
    def layer(self) -> int:
        """Entries of a layer's matrices."""
        return sum(x.size for x in self.linears)

    @property
    def table(self) -> int:
        """Entries of the embedding, and of an output layer."""
        return self.vocab * self.hidden

    @property
    def backbone(self) -> int:
        """Parameters up to the last hidden state."""
        return self.table + self.layers * self.layer + self.vectors

    @property
    def language_model(self) -> int:
        """Parameters with the output layer."""
        return self.backbone + (0 if self.tied else self.table)

    @property
    def scalar_model(self) -> int:
        """Parameters with a scalar head."""
        return self.backbone + self.hidden


MEASURED = ("llama", "gpt_neox")
"""Model types whose predicted memory and arithmetic were compared with measured ones."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters W + B A of rank r on some of a layer's linear maps."""

    rank: int
    targets: frozenset[str]

    def on(self, linears: Iterable[Linear]) -> tuple[Linear, ...]:
        """Those of the linear maps that carry an adapter."""
        return tuple(x for x in linears if x.name in self.targets)

    def layer(self, shape: Shape) -> int:
        """Entries of A and B in one layer."""
        return sum(self.rank * (x.inputs + x.outputs) for x in self.on(shape.linears))

    def parameters(self, shape: Shape) -> int:
        """Entries of A and B in the whole model."""
        return shape.layers * self.layer(shape)
