"""A run as work for devices: stages and iterations under a placement, whether they fit, what would make them fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, groupby

from rto.planning import arithmetic
from rto.planning.activations import Pass
from rto.planning.arithmetic import Work
from rto.planning.memory import Memory, Placement, Role
from rto.planning.shapes import Lora


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second, at best, and which share of it a training run reaches. Assumptions, all of them.

    Attributes:
        operations: of dense matrix products.
        utilisation: share of them.
        bandwidth: bytes of the device's own memory, read or written.
        reached: share of that.
        link: bytes to other devices of a host.
        network: bytes of a device to devices of other hosts.
        host: bytes between a device and its host's memory.
        per_host: devices of a host.
    """

    operations: float
    utilisation: float = 0.4
    bandwidth: float = 3.35e12
    reached: float = 0.7
    link: float = 450e9
    network: float = 50e9
    host: float = 55e9
    per_host: int = 8


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase on one device.

    Attributes:
        name: SFT, DPO, reward, sample, score, update of the policy, update of the critic.
        per: what arithmetic and bytes are for: an update, or an iteration with all of its updates.
        memory: at the worst moment.
        work: operations, and bytes of the device's memory.
        traffic: bytes received from other devices.
        loaded: bytes from the host's memory.
    """

    name: str
    per: str
    memory: Memory
    work: Work
    traffic: float = 0.0
    loaded: float = 0.0

    def seconds(self, rates: Rates, devices: int) -> float:
        """Arithmetic or memory, whichever takes longer, and traffic that hides behind neither."""
        busy = max(
            self.work.operations / (rates.operations * rates.utilisation),
            self.work.bytes / (rates.bandwidth * rates.reached),
        )
        link = rates.link if devices <= rates.per_host else rates.network
        return busy + self.traffic / link + self.loaded / rates.host


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model trained on rows of data.

    Attributes:
        name: SFT, DPO or reward.
        role: the model.
        at: one pass.
        unit: rows that cannot be cut apart: the two sides of a pair.
        passes: of an update.
        checkpointing: layers are computed again in the backward pass.
        reference: π_ref of a preference loss.
        reads_first: it reads the data before training and is let go, which only whole models can.
        once: ``gather_once``; False for the stages whose trainers are the library's.
    """

    name: str
    role: Role
    at: Pass
    passes: int
    checkpointing: bool
    unit: int = 1
    reference: Role | None = None
    reads_first: bool = True
    once: bool | None = False

    def phases(self, place: Placement) -> Iterator[Phase]:
        """The stage's one phase."""
        stays = self.reference is not None and (place.sharded or not self.reads_first)
        beside = [self.reference] if stays and self.reference is not None else []
        place = replace(place, offload=False)  # what stays is read at every update
        memory = place.resting([self.role, *beside])
        memory += place.train(self.role, self.at, self.passes, checkpointing=self.checkpointing, once=self.once)
        memory += Memory(copies=place.gathered(x for x in beside if place.lora_of(x) is None))  # for the whole update
        f = place.forward(self.role, checkpointing=self.checkpointing, training=True)
        learns = place.learns(self.role)
        work = arithmetic.train(f, self.at) * self.passes + arithmetic.optimizer(learns / place.shards)
        for role in beside:
            work += arithmetic.forward(place.forward(role), self.at) * self.passes
        traffic = _received(place, place.gathered([self.role])) * _gathers(place, self.once, self.passes)
        traffic += _reduced(place, self.role, self.passes)
        for role in beside:  # a model of its own is gathered once, the base under an adapter with every pass
            again = 1 if place.lora_of(role) is None else 0 if place.gathers_once(self.once) else self.passes
            traffic += _received(place, place.gathered([role])) * again
        yield Phase(name=self.name, per="update", memory=memory, work=work, traffic=traffic)

    def smaller(self, times: int) -> "Stage":
        """The same update in passes of fewer tokens."""
        rows = max(self.unit, self.at.rows // times // self.unit * self.unit)
        passes = math.ceil(self.passes * self.at.rows / rows)
        return replace(self, at=replace(self.at, rows=rows), passes=passes)


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Sample, score, update: one iteration of RTO or PPO on one device.

    Attributes:
        policy: π_θ.
        critic: V; None for critic-free estimators.
        frozen: reference, DPO models, reward models.
        rollouts: of one device.
        prompt: P, the longest.
        response: T.
        tokens: of a pass.
        decoded: bytes that the decoder's cache may take.
        epochs: passes over the rollouts.
        mini_batches: updates in each.
        checkpointing: layers are computed again in the backward pass.
        once: ``gather_once``.
    """

    policy: Role
    critic: Role | None
    frozen: tuple[Role, ...]
    rollouts: int
    prompt: int
    response: int
    tokens: int
    decoded: float
    epochs: int
    mini_batches: int
    checkpointing: bool
    once: bool | None = None

    @property
    def trained(self) -> tuple[Role, ...]:
        """Policy and critic."""
        return (self.policy,) if self.critic is None else (self.policy, self.critic)

    @property
    def roles(self) -> tuple[Role, ...]:
        """All models of the iteration."""
        return (*self.trained, *self.frozen)

    def at(self, rows: int) -> Pass:
        """The largest pass over so many rollouts."""
        fits = max(1, self.tokens // (self.prompt + self.response))
        return Pass(rows=min(rows, fits), prompt=self.prompt, response=self.response)

    def decoding(self, place: Placement) -> Pass:
        """Rows decoded side by side, by the bytes a number that the sampler finds in the weights."""
        f = place.forward(self.policy)
        token = 2 * f.shape.keys * f.shape.layers * f.weights
        rows = max(1, int(self.decoded // token) // (self.prompt + self.response))
        return Pass(rows=min(self.rollouts, rows), prompt=self.prompt, response=self.response)

    def phases(self, place: Placement) -> Iterator[Phase]:
        """Sample, score, update."""
        resting = place.resting(self.roles)
        yield self._sample(place, resting)
        yield self._score(place, resting)
        yield from self._update(place, resting)

    def _sample(self, place: Placement, resting: Memory) -> Phase:
        at, f = self.decoding(place), place.forward(self.policy)
        work = arithmetic.decode(f, at) * (self.rollouts / at.rows)
        memory = resting + place.sample(self.policy, at)
        traffic = _received(place, self._units(place, self.policy))
        return Phase(name="sample", per="iteration", memory=memory, work=work, traffic=traffic)

    def _score(self, place: Placement, resting: Memory) -> Phase:
        at, worst, work, loaded = self.at(self.rollouts), Memory(), Work(), 0.0
        passes = self.rollouts / at.rows
        for roles in (self.trained, *(tuple(alike) for _, alike in groupby(self.frozen, lambda role: role.name))):
            memory = place.read(roles, at, entropy=roles == self.trained, beside=[self.policy])
            worst = max(worst, memory, key=lambda m: m.total)
            loaded += memory.weights
            for role in roles:
                work += arithmetic.forward(place.forward(role), at) * passes
        others = [role for role in self.roles if role is not self.policy and place.lora_of(role) is None]
        traffic = _received(place, place.gathered(others))  # policy and base still lie there as they were decoded with
        return Phase(name="score", per="iteration", memory=resting + worst, work=work, traffic=traffic, loaded=loaded)

    def _update(self, place: Placement, resting: Memory) -> Iterator[Phase]:
        """One model after the other: in every micro-batch, or (``gather_once``) in all of them."""
        rows, updates = self.rollouts // self.mini_batches, self.epochs * self.mini_batches
        at, once = self.at(rows), place.gathers_once(self.once)
        passes = math.ceil(rows / at.rows)
        for role in self.trained:
            others = [x for x in self.trained if x is not role]
            memory = resting + place.train(
                role, at, passes, checkpointing=self.checkpointing, once=self.once, others=others
            )
            if role is not self.policy or (passes > 1 and not once):  # the others have gradients by now
                memory += Memory(gradients=sum(map(place.gradients, others)))
            f = place.forward(role, checkpointing=self.checkpointing, training=True)
            work = arithmetic.train(f, at) * (updates * rows / at.rows)
            work += arithmetic.optimizer(place.learns(role) / place.shards) * updates
            again = once and role is not self.policy and place.lora_of(role) is not None  # the base is there
            gathers = 0 if again else _gathers(place, self.once, passes)
            traffic = _received(place, self._units(place, role)) * gathers + _reduced(place, role, passes)
            yield Phase(
                name=f"update of {role.name}", per="iteration", memory=memory, work=work, traffic=traffic * updates
            )

    def _units(self, place: Placement, role: Role) -> float:
        """Bytes that are gathered with a model: on one base the adapters of all roles lie in the same units."""
        on_base = [x for x in self.roles if place.lora_of(x) is not None]
        return place.gathered(on_base if role in on_base else [role])

    def smaller(self, times: int) -> "Iteration":
        """The same iteration in passes of fewer tokens, fewer rows decoded side by side."""
        return replace(self, tokens=self.tokens // times, decoded=self.decoded / times)


def _received(place: Placement, gathered: float) -> float:
    """Bytes that a device receives of what is gathered once."""
    return (place.devices - 1) / place.devices * gathered


def _gathers(place: Placement, once: bool | None, passes: int) -> int:
    """How often an update gathers what it trains: forward and backward in every pass, or once."""
    return 1 if place.gathers_once(once) else 2 * passes


def _reduced(place: Placement, role: Role, passes: int) -> float:
    """Bytes of fp32 gradients that a device receives in an update: once a pass, or twice an update (DDP)."""
    return _received(place, 4 * place.learns(role)) * (passes if place.sharded else 2)


Part = Stage | Iteration


@dataclass(frozen=True, kw_only=True)
class Job:
    """All parts of a run; they follow each other, so memory is that of the largest."""

    parts: tuple[Part, ...]

    def phases(self, place: Placement) -> list[Phase]:
        """Every phase under a placement."""
        return [phase for part in self.parts for phase in part.phases(place)]

    def peak(self, place: Placement) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases(place), key=lambda phase: phase.memory.total)

    def smaller(self, times: int) -> "Job":
        """The same run in passes of so many times fewer tokens."""
        return replace(self, parts=tuple(part.smaller(times) for part in self.parts))

    def fewer_tokens(self, place: Placement, memory: float) -> int | None:
        """The first of 1, 2, 4, … by which tokens a pass are divided so that the run fits; None where none does."""
        if self.smaller(MOST_CUTS).peak(place).memory.total > memory:
            return None
        times = 1
        while self.smaller(times).peak(place).memory.total > memory:
            times *= 2
        return times


MOST_CUTS = 2**12
"""By then a pass is one row."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A placement by name, with whether a run fits."""

    name: str
    place: Placement
    peak: Phase
    fits: bool
    fewer: int | None
    """Tokens a pass divided by this fit; None: one row is too much."""


def variants(job: Job, plain: Placement, lora: Lora, memory: float, *, offloads: bool = False) -> list[Variant]:
    """Full fine-tuning and LoRA on one base, whole and sharded models, frozen ones at hand and off-loaded.

    Args:
        job: the run.
        plain: where its numbers lie when they are whole and at hand.
        lora: adapters.
        memory: bytes of a device.
        offloads: the run off-loads; on one base only what stands beside it can go, so this is no variant unasked.
    """
    found = []
    for training, adapters in (("full", None), ("LoRA on one base", lora)):
        for sharded in (False, True) if plain.devices > 1 else (False,):
            for offload in (False, True) if adapters is None or offloads else (False,):
                engine = "FSDP2" if sharded else "DDP" if plain.devices > 1 else "one device"
                place = replace(plain, lora=adapters, sharded=sharded, offload=offload)
                name = f"{training}, {engine}" + (", off-loading" if offload else "")
                found.append(variant(job, name, place, memory))
    return found


def variant(job: Job, name: str, place: Placement, memory: float) -> Variant:
    """A placement with what it needs."""
    peak = job.peak(place)
    fewer = job.fewer_tokens(place, memory)
    return Variant(name=name, place=place, peak=peak, fits=peak.memory.total <= memory, fewer=fewer)


LORA, SHARD, OFFLOAD, TOKENS = (
    "LoRA on one base",
    "sharding (FSDP2)",
    "off-loading of frozen models",
    "fewer tokens a pass",
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What could be done to a run that does not fit."""

    names: tuple[str, ...]
    peak: Phase
    fits: bool
    times: int = 1
    """Tokens a pass are divided by this."""


def changes(job: Job, place: Placement, lora: Lora, memory: float) -> list[Change]:
    """Every single change in the order of preference, then, where none is enough, the first of several that is."""
    possible = [LORA] if place.lora is None else []
    possible += [SHARD] if place.devices > 1 and not place.sharded else []
    possible += [OFFLOAD] if not place.offload else []
    possible += [TOKENS]
    single = [_changed(job, place, (name,), lora, memory) for name in possible]
    if any(change.fits for change in single):
        return single
    for size in range(2, len(possible) + 1):
        for names in combinations(possible, size):
            change = _changed(job, place, names, lora, memory)
            if change.fits:
                return [*single, change]
    return single


def _changed(job: Job, place: Placement, names: tuple[str, ...], lora: Lora, memory: float) -> Change:
    place = replace(
        place,
        lora=lora if LORA in names else place.lora,
        sharded=place.sharded or SHARD in names,
        offload=place.offload or OFFLOAD in names,
    )
    times = (job.fewer_tokens(place, memory) or MOST_CUTS) if TOKENS in names else 1
    peak = job.smaller(times).peak(place)
    return Change(names=names, peak=peak, fits=peak.memory.total <= memory, times=times)
