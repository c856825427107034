"""How models lie over processes: the one place that knows DDP, FSDP2 and DeepSpeed.

    one process    everything is here
    DDP            every process holds the model; gradients are exchanged
    FSDP2          weights, gradients and optimizer are cut over processes, layer by layer; a unit (a layer, or what
                   is no layer) is gathered for its part of a pass, or all of them at once by `Engine.whole`
    ZeRO-2         DeepSpeed cuts gradients and optimizer; weights are whole everywhere

Wrappers average gradients over processes. A loss here is a share of a sum under one global denominator, so
`Engine.backward` multiplies by the number of processes what they will divide by.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_auto_wrap_policy
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rto.batches import micro_batches
from rto.models.loading import unwrap_peft
from rto.models.precision import noted, settle
from rto.models.roles import Role
from rto.values import read_yaml

logger = logging.getLogger(__name__)
_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class EngineError(ValueError):
    """A way of laying models over processes that is not supported; the message names what is."""


def check_layout(args: Any) -> None:
    """Refuse a layout that would train something else, or not at all, before any library or model is loaded for it.

    Args:
        args: a configuration with ``deepspeed`` and ``fsdp_config`` of `transformers.TrainingArguments` as they were
            given; what `accelerate launch` was told is in the environment.

    Raises:
        EngineError: it is DeepSpeed's ZeRO-3, or the first FSDP.
    """
    warn_of_one_process()
    deepspeed, fsdp = _settings(args.deepspeed), _settings(args.fsdp_config)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if _launched("DEEPSPEED"):
        told = _settings(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")).get("zero_optimization", {}).get("stage")
        stage = told or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    if str(stage) == "3":
        raise EngineError(f"DeepSpeed ZeRO-3 is not supported, since processes decode unevenly: {REMEDY}")
    version = fsdp.get("version", fsdp.get("fsdp_version", 2)) if args.fsdp else 2
    if not args.fsdp and _launched("FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
    if str(version) == "1":
        raise EngineError(f"FSDP of version 1 is not supported: {REMEDY}")


REMEDY = "use FSDP2 (recipes/accelerate/fsdp2.yaml, or --fsdp), which cuts weights, gradients and optimizer alike"


def will_cut(args: Any) -> bool:
    """Whether models will be cut over processes by FSDP2, told before there is an `Engine`.

    Args:
        args: a configuration with ``fsdp`` of `transformers.TrainingArguments`.
    """
    return (bool(getattr(args, "fsdp", None)) or _launched("FSDP")) and "LOCAL_RANK" in os.environ


def _launched(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _settings(given: Any) -> dict[str, Any]:
    """A configuration given as such, as a file, or not at all; what cannot be read is the library's to tell."""
    if isinstance(given, dict):
        return given
    if isinstance(given, str) and Path(given).is_file():
        found = read_yaml(Path(given).read_text(encoding="utf-8"))  # JSON is YAML
        return found if isinstance(found, dict) else {}
    return {}


# --- processes of one launch


def processes() -> PartialState:
    """This process among those of its launch; on processors, too, where each would take itself for the only one."""
    warn_of_one_process()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


TIMEOUT = timedelta(minutes=30)
"""After which an exchange of tensors has failed; the default of `transformers`' ``ddp_timeout``."""
PATIENCE = timedelta(days=365)
"""After which waiting for a process that works alone has failed: whoever dies before is told of by the launcher."""


@cache
def _patient_group() -> Any:
    """All processes, connected for waiting: on processors, whatever tensors are exchanged over."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def wait_for_all() -> None:
    """Wait until every process has come here, however long one of them works alone.

    The barrier of a process group of tensors fails after its time-out, and on accelerators keeps them busy.
    """
    if processes().num_processes > 1:
        torch.distributed.barrier(_patient_group())


def leave() -> None:
    """Go apart together at the end of a launch: who closes its connections early can end who still uses them."""
    if torch.distributed.is_initialized():
        wait_for_all()
        torch.distributed.destroy_process_group()
        _patient_group.cache_clear()


def shared_out(items: Sequence[_Part], work: Callable[[_Part], _Result]) -> list[_Result]:
    """``work(item)`` of every item, in their order, each done by one process and known to all.

    Args:
        items: the same on every process.
        work: what does not need the other processes; its results are pickled, so they hold no device's tensors.
    """
    state = processes()
    mine = [work(item) for item in items[state.process_index :: state.num_processes]]
    if state.num_processes == 1:
        return mine
    found: list[Any] = [None] * state.num_processes
    torch.distributed.all_gather_object(found, mine, group=_patient_group())
    return [found[i % len(found)][i // len(found)] for i in range(len(items))]


@cache
def warn_of_one_process() -> None:
    """Say so where `accelerate launch` was asked for several processes and has started one.

    With ``--cpu`` it starts one, whatever ``--num_processes`` says, unless an MPI is named.
    """
    if "LOCAL_RANK" in os.environ or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return
    asked = _asked_for(_command_of_parent())
    if asked > 1:
        logger.warning(
            "accelerate launch --cpu --num_processes %d has started one process: this run is of one. Several on "
            "processors: torchrun --nproc_per_node %d, or accelerate launch --multi_gpu --num_processes %d",
            *(asked, asked, asked),
        )


def _command_of_parent() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _asked_for(command: Sequence[str]) -> int:
    """``--num_processes`` of a launcher's command line, or of the configuration that it names; 0: not asked."""
    given: dict[str, str] = {}
    for flag, following in zip(command, [*command[1:], ""]):
        name, separator, value = flag.partition("=")
        given.setdefault(name.lstrip("-").replace("-", "_"), value if separator else following)
    if "num_processes" not in given and Path(given.get("config_file", "")).is_file():
        given["num_processes"] = str((read_yaml(Path(given["config_file"]).read_text()) or {}).get("num_processes", 0))
    number = given.get("num_processes", "0")
    return int(number) if number.isdigit() else 0


class Engine:
    """What trainers ask of whatever lays their models over processes.

    Args:
        accelerator: an `accelerate.Accelerator`.

    Raises:
        EngineError: it lays models over processes in a way that is not supported.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise EngineError(f"DeepSpeed ZeRO-3 is not supported, since processes decode unevenly: {REMEDY}")
        if self.sharded:
            # Every process reads the files itself: they are mapped, so the processes of a host share one copy.
            accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self._root: nn.Module | None = None
        self._held: Counter[int] = Counter()
        self._weights: list[list[nn.Parameter]] = []

    @property
    def joint(self) -> bool:
        """Every pass is to reach all that is trained, policy and critic: DeepSpeed's step is with the last one."""
        return self.deepspeed

    @property
    def world(self) -> int:
        """Processes."""
        return int(self.accelerator.num_processes)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return self.accelerator.reduce(x, reduction="sum")

    def filled_up(self, batch: int, rows: int) -> int:
        """How many rows at the end of this process's present batch are there for a second time.

        accelerate fills up the last batches of an epoch with its first rows, so that every process has a batch, and
        as many rows in it (``even_batches``).

        Args:
            batch: rows of the present batch.
            rows: of the data set.
        """
        state = self.accelerator.gradient_state
        left = rows % (batch * self.world)
        if self.world == 1 or left == 0 or not (self.accelerator.even_batches and state.end_of_dataloader):
            return 0
        return batch - min(max(left - self.accelerator.process_index * batch, 0), batch)

    # --- passes

    def in_step(self, lengths: Int[Tensor, " B"], max_tokens: int) -> list[Int[Tensor, " b"]]:
        """Cuts by a token budget, as many on every process: passes through a cut model are collective."""
        cuts = micro_batches(lengths, max_tokens)
        if self.world == 1:
            return cuts
        most = self.accelerator.gather(torch.tensor([len(cuts)], device=self.accelerator.device)).max()
        return micro_batches(lengths, max_tokens, at_least=int(most))

    def backward(
        self,
        model: nn.Module,
        parts: Sequence[_Part],
        loss: Callable[[_Part], Tensor],
        *,
        whole: bool = True,
        before_step: Callable[[], None] | None = None,
        reads: Callable[[_Part], Any] | None = None,
    ) -> Tensor:
        """Add up the gradients of Σ loss(part); the sum, over all processes.

        Under DDP and FSDP2 an optimizer's step comes after this; DeepSpeed takes it here, once, with the last part.

        Args:
            model: the model as it is wrapped.
            parts: what the loss is called on, one after the other; as many on every process.
            loss: a part's share of the loss, which divides by a global denominator.
            whole: every part reaches every trained parameter, which DDP's own exchange of gradients needs. Where
                it is not so, gradients are exchanged here.
            before_step: called before a step is taken here.
            reads: the model that a part reads: gather it once for all its parts, which follow each other, instead of
                layer by layer twice a part. None: layer by layer.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        exchanged = whole or self.sharded or self.deepspeed
        steps = accelerator.sync_gradients
        kept = self._kept() if self.sharded and reads is not None else nullcontext()
        with kept:
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                total += self._backward(model, loss, part, last, exchanged, last and steps, before_step)
                if self.sharded and reads is not None and not last:
                    self._let_go(reads(part), reads(parts[i + 1]))
        if not exchanged and self.world > 1:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            for exchange in [torch.distributed.all_reduce(grad, async_op=True) for grad in grads]:
                exchange.wait()
        return self.all_reduce(total)

    def _backward(
        self,
        model: nn.Module,
        loss: Callable[[_Part], Tensor],
        part: _Part,
        last: bool,
        exchanged: bool,
        steps: bool,
        before_step: Callable[[], None] | None,
    ) -> Tensor:
        """One part's share of the loss, its gradients added up."""
        with self._part(model, last=last, exchanged=exchanged, steps=steps):
            with self.accelerator.autocast():
                value = loss(part)
            if last and self.deepspeed and before_step is not None:
                before_step()
            # Denominators are global already: DeepSpeed would divide by gradient_accumulation_steps again.
            kwargs = {"scale_wrt_gas": False} if self.deepspeed else {}
            self.accelerator.backward(value * (self.world if exchanged else 1), **kwargs)
        return value.detach()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Units of the trained model stay as they are gathered, through forward and backward passes, until the end."""
        units = _units(cast(nn.Module, self._root))
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)
            self._held[id(unit)] += 1  # a reference on the same base is read in between
        try:
            yield
        finally:
            for unit in units:
                self._held[id(unit)] -= 1
                unit.reshard()
                unit.set_reshard_after_forward(self._lets_go(unit), recurse=False)
                unit.set_reshard_after_backward(True, recurse=False)

    def _let_go(self, model: Any, following: Any) -> None:
        """Let go of a model that the following part does not read."""
        there = set(map(id, self._units_of(following)))
        for unit in self._units_of(model):
            if id(unit) not in there:
                unit.reshard()

    def _lets_go(self, unit: Any) -> bool:
        """A unit is let go after its forward pass, as accelerate was told."""
        return unit is not self._root and bool(self.accelerator.state.fsdp_plugin.reshard_after_forward)

    @contextmanager
    def _part(self, model: nn.Module, *, last: bool, exchanged: bool, steps: bool) -> Iterator[None]:
        """The context of one part: whether its gradients are exchanged.

        A cut model adds up its own piece of the gradients, part by part: without an exchange it would hold them
        whole. DeepSpeed's engine takes a step with every part that "syncs", so only the last one of an update may.
        """
        if self.deepspeed:
            state = self.accelerator.gradient_state
            before = state.sync_gradients
            state._set_sync_gradients(steps)
            yield
            state._set_sync_gradients(before)
        else:
            at_once = self.sharded or (last and exchanged)
            with nullcontext() if at_once else self.accelerator.no_sync(model):
                yield

    def clip(self, groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
        """Clip each group of parameters by its own norm; the norms before that.

        DeepSpeed has clipped and stepped by now: by one norm over all groups, which comes back as ``joint``.
        """
        if self.deepspeed:
            norm = self.accelerator.clip_grad_norm_([], max_norm)
            return {"joint": torch.as_tensor(0.0 if norm is None else norm)}
        self.accelerator.unscale_gradients()
        norms: dict[str, Tensor] = {}
        for name, parameters in groups.items():
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            norms[name] = self.gather(norm)
        return norms

    def tell_of_layout(self, args: Any) -> None:
        """Say so where models were to be cut over processes and are not: accelerate cuts over accelerators only."""
        if will_cut(args) and not self.sharded:
            logger.warning(
                "FSDP was asked for, and accelerate cuts models over accelerators only: on processors every process "
                "holds all of every model, as without it (DDP)"
            )

    def tell_of_clipping(self, groups: int, max_norm: float) -> None:
        """Say so where a limit that is meant for each group of parameters would be on all of them together."""
        if self.deepspeed and groups > 1 and max_norm > 0:
            logger.warning(
                "DeepSpeed clips policy and critic by one norm, so max_grad_norm=%g is on both together here: a young "
                "critic's gradient shortens the policy's step. FSDP2 and DDP clip each by its own; "
                "max_grad_norm=0 clips nothing",
                max_norm,
            )

    # --- models that are cut over processes

    def ready(self, model: nn.Module) -> None:
        """Put the trained model where it is to be: cut over processes, or nothing but its weights in their precision.

        Log-probabilities and values leave it in fp32, and gradients are added up in fp32, whatever layers compute in:
        accelerate would round both to that.
        """
        if self._root is not None:
            return
        self._root = model
        if not self.sharded:
            settle(model)
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            wide = {"output_dtype": None, "reduce_dtype": torch.float32}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **wide)
        plugin.set_auto_wrap_policy(model)
        if plugin.activation_checkpointing:
            fsdp2_apply_ac(self.accelerator, model)
            plugin.activation_checkpointing = False
        chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
        policy, lets_go = plugin.mixed_precision_policy or MixedPrecisionPolicy(), plugin.reshard_after_forward
        self._cut(model, chosen or (lambda module: False), lets_go, mp_policy=policy)
        cut = len(_units(model))
        if cut < 2:
            logger.warning(
                "%s is cut into %d unit: every pass gathers the whole model at once; name its layers by "
                "transformer_layer_cls_to_wrap, or set auto_wrap_policy to TRANSFORMER_BASED_WRAP",
                type(model).__name__,
                cut,
            )

    def lay_out(self, model: Any) -> None:
        """Put a model that is only read where it is to be: on the device, or cut over processes by its layers.

        It is to be read within `whole`. A role shares a base, which is cut with the trained model; what is quantized
        stays whole.
        """
        if isinstance(model, Role) or not (self.sharded and all(p.is_floating_point() for p in model.parameters())):
            settle(model)
            model.to(self.accelerator.device)
        elif not isinstance(model, FSDPModule):
            names = getattr(unwrap_peft(model), "_no_split_modules", None) or ()
            self._cut(model, lambda module: type(module).__name__ in names, True)

    def _cut(
        self, model: nn.Module, chosen: Callable[[nn.Module], bool], lets_go: bool | None, **settings: Any
    ) -> None:
        """Cut a model, unit by unit, as its weights lie in their files; then give the pieces their precision.

        Args:
            model: what is cut; it is a unit itself, of what is in no other.
            chosen: which of its modules are units.
            lets_go: whether a unit is let go after its forward pass.
            settings: of `fully_shard`.
        """
        dtypes = {name: dtype for name, x in model.named_parameters() if (dtype := noted(x)) is not None}
        settings |= {"mesh": self._mesh(), "offload_policy": self.accelerator.state.fsdp_plugin.cpu_offload}
        for module in reversed(list(model.modules())):  # what is inside of a unit comes before it
            if module is not model and chosen(module):
                fully_shard(module, reshard_after_forward=lets_go, **settings)
        fully_shard(model, **settings)
        pieces = {id(x): dtypes[name] for name, x in model.named_parameters() if name in dtypes}
        model._apply(lambda x: x.to(pieces.get(id(x), x.dtype)))
        _make_root(model)

    def _mesh(self) -> Any:
        mesh = getattr(self.accelerator, "torch_device_mesh", None)
        return None if mesh is None else mesh[tuple(self.accelerator.parallelism_config.fsdp_dim_names)]

    def keep_weights_of(self, optimizer: Any) -> None:
        """Take down what an optimizer trains, before accelerate prepares it.

        accelerate looks for an optimizer's weights by their addresses. A piece without numbers, as a process has of
        an adapter of a lower rank than there are processes, has none: all such would become one weight.
        """
        self._weights = [list(group["params"]) for group in optimizer.param_groups]

    def restore_weights_of(self, optimizer: Any) -> None:
        """Give a prepared optimizer what was taken down, once; before its state is read."""
        kept, self._weights = self._weights, []
        if kept:
            for group, weights in zip(optimizer.param_groups, kept, strict=True):
                group["params"] = weights

    def take_up_settings(self, optimizer: Any, checkpoint: Path) -> bool:
        """Take up the settings of an optimizer that keeps no state; False where there is a state, or nothing is cut.

        torch cannot hand out a whole checkpoint's state (FULL_STATE_DICT) where it is empty, as that of plain SGD.
        """
        path = checkpoint / "optimizer.bin"
        if not self.sharded or not path.is_file():
            return False
        saved = torch.load(path, weights_only=True, mmap=True)
        if saved["state"]:
            return False
        for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in theirs.items() if name != "params"})
        return True

    @contextmanager
    def whole(self, *models: Any) -> Iterator[None]:
        """Within this context every process holds all weights of some models, which is collective to enter.

        Inside, passes exchange nothing, so that processes may make different numbers of them, and may read any part
        of a model: a decoder stops where its own rows have ended. After it, weights are cut as before. Contexts may
        lie within each other. For what is read, not for a pass whose gradient is asked for.
        """
        units = [unit for model in models for unit in self._units_of(model)] if self.sharded else []
        for unit in units:
            if self._held[id(unit)] == 0:
                unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()  # if it is not
            self._held[id(unit)] += 1
        try:
            yield
        finally:
            for unit in units:
                self._held[id(unit)] -= 1
                if self._held[id(unit)] == 0:
                    unit.reshard()
                    unit.set_reshard_after_forward(self._lets_go(unit), recurse=False)

    def _units_of(self, model: Any) -> list[Any]:
        """What has to be gathered for a model: its units, and the trained model's own where it is a part of that."""
        module = model.base.model if isinstance(model, Role) else model
        if module is None:
            return []
        inside = self._root is not None and any(m is module for m in self._root.modules())
        extra = [self._root] if inside and module is not self._root else []
        return [*extra, *_units(module)]

    @property
    def in_pieces(self) -> bool:
        """Checkpoints hold each process's own pieces (SHARDED_STATE_DICT)."""
        return self.sharded and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def gather(self, x: Tensor) -> Tensor:
        """The whole of a weight, on every process: collective where it is cut."""
        if not isinstance(x, DTensor):
            return x
        here: Any = x.to(self.accelerator.device)  # what is off-loaded is gathered where processes meet
        return here.full_tensor()


def unwrapped(accelerator: Any, model: Any) -> Any:
    """The model itself, without what lays it over processes."""
    return accelerator.unwrap_model(model)


def piece(weight: Tensor) -> tuple[Tensor, bool]:
    """What of a weight is here, and whether that is a piece of it."""
    return (weight.to_local(), True) if isinstance(weight, DTensor) else (weight, False)


def _units(model: nn.Module) -> list[Any]:
    """The modules whose parameters FSDP2 gathers and lets go together."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _make_root(model: Any) -> None:
    """Let FSDP2 know the model as the root of its units, also where only parts of it are called.

    FSDP2 takes the first unit that runs for the root. A method that counts as a forward pass, and does nothing, makes
    it this one.
    """
    model._begin = _begin.__get__(model)
    register_fsdp_forward_method(model, "_begin")
    model._begin()
    del model._begin
    model.reshard()


def _begin(self: nn.Module) -> None:
    """Nothing."""
