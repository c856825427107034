"""What each role holds on a device, and what each phase adds to it at its worst moment."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from rto.planning.activations import (
    FP32,
    Forward,
    Pass,
    Trained,
    head_bytes,
    layer_backward,
    layer_forward,
    layer_kept,
    layers_kept,
)
from rto.planning.arithmetic import cache_per_token
from rto.planning.shapes import PRODUCT, Lora, Shape
from rto.rollout.samplers.packed import SMALL

MOMENTS = 2 * FP32
"""Adam's, a weight."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by what they are."""

    weights: float = 0
    """Trained ones in fp32, frozen ones in the precision of the computation, or their shards."""
    gradients: float = 0
    """In fp32, or their shards."""
    moments: float = 0
    """Of the optimizer."""
    buckets: float = 0
    """Of DDP: it copies gradients to exchange them."""
    copies: float = 0
    """Low-precision copies that autocast makes of fp32 weights, or weights that are gathered from their shards."""
    activations: float = 0
    """Between forward and backward pass."""
    cache: float = 0
    """Keys and values of the decoder."""
    transient: float = 0
    """Logits, gradients of activations and whatever else lives for a moment."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a run.

    Attributes:
        name: policy, reference, dpo, reward or critic.
        shape: its sizes.
        trained: it learns.
        speaks: it has an output layer over the vocabulary; a scalar head otherwise.
        on_base: it is an adapter (none for the reference) on the policy's base, which counts with the policy.
    """

    name: str
    shape: Shape
    trained: bool
    speaks: bool = True
    on_base: bool = False

    @property
    def parameters(self) -> int:
        """Of the model as it stands by itself."""
        return self.shape.language_model if self.speaks else self.shape.scalar_model


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the numbers of a run lie.

    Attributes:
        devices: processes, one a device.
        sharded: FSDP2, frozen models too; otherwise every process has all of every model (DDP where there are more).
        offload: frozen models are in host memory except while they score.
        lora: adapters of the roles on one base; None trains whole models.
        compute: bytes of a number in a matrix product.
        moments: bytes of the optimizer's state, a trained weight.
        packed: decoding is on processors, from packed copies of linear maps (`rto.rollout.samplers.packed`).
    """

    devices: int = 1
    sharded: bool = False
    offload: bool = False
    lora: Lora | None = None
    compute: int = FP32
    moments: int = MOMENTS
    packed: bool = False

    @property
    def shards(self) -> int:
        """Parts that weights are cut into."""
        return self.devices if self.sharded else 1

    def forward(self, role: Role, *, checkpointing: bool = False, training: bool = False) -> Forward:
        """How a role's model is run."""
        whole = role.trained and self.lora_of(role) is None
        trained = Trained.NOTHING if not training else Trained.ALL if whole else Trained.ADAPTER
        return Forward(
            shape=role.shape,
            weights=FP32 if whole and not self.sharded else self.compute,
            compute=self.compute,
            trained=trained,
            lora=None if role.name == "reference" else self.lora_of(role),
            speaks=role.speaks,
            checkpointing=checkpointing and training,
        )

    def lora_of(self, role: Role) -> Lora | None:
        """The adapter that a role is, or that is trained on it; None where its model stands by itself."""
        return self.lora if role.on_base else None

    def learns(self, role: Role) -> int:
        """Weights of a role that have gradients."""
        if not role.trained:
            return 0
        lora = self.lora_of(role)
        if lora is None:
            return role.parameters
        return lora.parameters(role.shape) + (0 if role.speaks else role.shape.hidden)

    def base_parameters(self, role: Role) -> int:
        """Weights that a forward pass of a role reads, adapters aside."""
        return role.shape.language_model if self.lora_of(role) is not None else role.parameters

    def resting(self, roles: Sequence[Role]) -> Memory:
        """What lies on a device all the time, without gradients: weights, moments, DDP's buckets."""
        return sum((self._of(role) for role in roles), Memory())

    def _of(self, role: Role) -> Memory:
        learns, lora = self.learns(role), self.lora_of(role)
        if lora is None:
            weights = FP32 * learns if role.trained else 0 if self.leaves(role) else self.compute * role.parameters
        else:
            size = role.shape.language_model if role.speaks else role.shape.backbone
            base = self.compute * size if role.name == "policy" else 0
            weights = base + FP32 * self._own(role, lora)
        exchanged = self.devices > 1 and not self.sharded
        return Memory(
            weights=weights / self.shards,
            moments=self.moments * learns / self.shards,
            buckets=FP32 * learns if exchanged else 0,
        )

    @staticmethod
    def _own(role: Role, lora: Lora) -> int:
        """Weights that a role has for itself beside the base: its adapter and its scalar head."""
        adapter = 0 if role.name == "reference" else lora.parameters(role.shape)
        return adapter + (0 if role.speaks else role.shape.hidden)

    def gathered(self, roles: Iterable[Role]) -> float:
        """Bytes of some models, gathered from their shards at one time; a base that roles share counts once."""
        base, all_else = 0, 0
        for role in roles:
            lora = self.lora_of(role)
            if lora is None:
                all_else += role.parameters
            else:
                base, all_else = role.shape.language_model, all_else + self._own(role, lora)
        return float(self.compute * (base + all_else)) if self.sharded else 0.0

    def gathers_once(self, asked: bool | None) -> bool:
        """Whether an update gathers what it trains once for all its passes: ``gather_once``, or where it is None."""
        return self.sharded and (self.lora is not None if asked is None else asked)

    # --- phases

    def read(self, roles: Sequence[Role], at: Pass, *, entropy: bool = False, beside: Sequence[Role] = ()) -> Memory:
        """The worst moment of one forward pass without gradients over some roles, one after the other.

        Args:
            roles: whose; shards are gathered for all passes of a phase.
            at: the largest pass.
            entropy: that of the policy is taken, too.
            beside: roles that are gathered as well, though nobody reads them.
        """
        runs = [self.forward(role) for role in roles]
        there = [*roles, *(role for role in beside if role not in roles)]
        copies = self.gathered(there) if self.sharded else sum(map(self._copies, runs))
        moments: list[float] = []
        for f in runs:
            states = at.responses * f.shape.hidden * f.weights
            moments += [layer_forward(f, at), states + head_bytes(f, at, entropy=entropy).forward]
        brought = sum(self.compute * role.parameters / self.shards for role in roles if self.leaves(role))
        return Memory(weights=brought, copies=copies, transient=max(moments))

    def leaves(self, role: Role) -> bool:
        """It is in host memory except while it scores."""
        return self.offload and not role.trained and self.lora_of(role) is None

    def sample(self, policy: Role, at: Pass) -> Memory:
        """The worst moment of decoding: the prompts' pass, or the last step, when the cache is full."""
        f = self.forward(policy)
        s = f.shape
        copies = self.gathered([policy])  # once for all steps
        if self.packed:  # autocast then has nothing to copy
            sizes = [x.size for x in s.linears] * s.layers + [s.table]
            copies += f.compute * sum(size for size in sizes if size > SMALL)
        elif not self.sharded:
            copies += self._copies(f) + (f.compute * s.table if f.casts else 0)
        prompts = replace(at, response=0)
        mask = 3 * at.rows * at.prompt**2
        repeated = 2 * f.compute * (s.queries - s.keys)  # bytes a token: attention with a mask repeats keys, values
        drawn = 4 * FP32 * at.rows * s.vocab
        transient = max(layer_forward(f, replace(prompts, masked=True)) + mask, repeated * at.tokens + drawn)
        cache = s.keys * s.layers * (FP32 + f.compute) if self.packed else cache_per_token(f)  # keys are fp32 there
        return Memory(copies=copies, cache=at.tokens * cache, transient=transient)

    def train(
        self,
        role: Role,
        at: Pass,
        passes: int,
        *,
        checkpointing: bool,
        once: bool | None = False,
        others: Sequence[Role] = (),
    ) -> Memory:
        """The worst moment of an update of one model, its optimizer step included.

        Args:
            role: whose.
            at: the largest of its passes.
            passes: how many; from the second on all gradients exist during a pass.
            checkpointing: layers are computed again in the backward pass.
            once: ``gather_once``.
            others: other models of this update, in passes of their own.
        """
        f = self.forward(role, checkpointing=checkpointing, training=True)
        here = self.gathered([role]) if self.gathers_once(once) else self._units(f) + self._root([f])
        # What is in no layer is one unit of all models that are trained, and is gathered for each of them.
        here += self._root([self.forward(x) for x in others if self.lora_of(x) is None])
        moments = self._moments(f, at, self.learns(role), passes, here if self.sharded else 0.0)
        return max(moments, key=lambda m: m.total)

    def gradients(self, role: Role) -> float:
        """Bytes of all gradients of a role."""
        return FP32 * self.learns(role) / self.shards

    def _moments(self, f: Forward, at: Pass, learns: int, passes: int, gathered: float) -> list[Memory]:
        """End of the forward pass; head, last layer, first layer, embedding in the backward pass; the update."""
        s, head = f.shape, head_bytes(f, at)
        whole = f.trained is Trained.ALL
        every = FP32 * learns / self.shards
        there = every if passes > 1 else 0.0
        kept, copies, one = layers_kept(f, at), self._copies(f), f.compute * s.layer if f.casts else 0.0
        if self.sharded:
            copies = one = gathered
        again = at.tokens * layer_kept(f, masked=at.masked)
        table = FP32 * s.table if f.speaks or not whole else 0
        top = (table + FP32 * max(x.size for x in s.reading(PRODUCT))) / self.shards if whole else 0.0
        late = FP32 * (s.layer + s.table) / self.shards if whole else 0.0
        down = layer_backward(f, at) + ((f.compute + FP32) * s.layer if self.sharded and whole else 0)
        first = max(there, min(every, top))
        mine = one if f.checkpointing else copies
        return [
            Memory(gradients=there, copies=copies, activations=kept + head.kept, transient=head.forward),
            Memory(
                gradients=first,
                copies=0 if f.checkpointing and not self.sharded else copies,
                activations=kept + head.kept,
                transient=head.backward,
            ),
            Memory(
                gradients=first,
                copies=mine,
                activations=kept + (again if f.checkpointing else 0),
                transient=down,
            ),
            Memory(
                gradients=max(there, every - late),
                copies=one,
                activations=again + at.tokens * f.weights * s.hidden,
                transient=down,
            ),
            Memory(gradients=every, activations=at.tokens * f.weights * s.hidden, transient=self._tables(f, passes)),
            Memory(gradients=every),
        ]

    def _tables(self, f: Forward, passes: int) -> float:
        """The embedding's gradient, last of all: where it is the output layer, too, both parts and their sum exist."""
        if f.trained is not Trained.ALL:
            return 0.0
        if self.sharded:
            return float((f.compute + FP32) * f.shape.table)
        more = (2 if f.speaks and f.shape.tied else 0) + (1 if passes > 1 else 0)
        return float(FP32 * f.shape.table * more)

    def _copies(self, f: Forward) -> float:
        """Copies that autocast makes of the layers' weights; the head reads its weights as they are."""
        return f.compute * f.shape.layers * f.shape.layer if f.casts else 0.0

    def _units(self, f: Forward) -> float:
        """Two layers gathered from their shards: the one that runs and the next."""
        return 2.0 * f.compute * f.shape.layer

    def _root(self, runs: Sequence[Forward]) -> float:
        """What belongs to no layer is gathered for the whole pass: embedding, output layer, last norm."""
        shapes = [(f.shape, 2 if f.speaks and not f.shape.tied else 1) for f in runs]
        return float(self.compute * sum(s.vectors + tables * s.table + s.hidden for s, tables in shapes))
