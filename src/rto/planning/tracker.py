"""What a plan is checked against: live tensors and operations of real passes, counted on any device.

PyTorch counts allocations on accelerators only. Here every tensor that goes into an operation or comes out of one is
looked at: its storage counts from then until nothing refers to it.
"""

import math
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rto.batches import Sequences, collate
from rto.models.actor import policy_logprobs, vocab_size
from rto.planning.activations import Pass


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that exist within a ``with`` block, each counted once however many tensors share it.

    Attributes:
        now: bytes at this moment.
        peak: the most since the block began or since the last `reset`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()
        for tensor in known:
            self._see(tensor)

    def reset(self) -> None:
        """Forget how high it was."""
        self.peak = self.now

    def _see(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
            storage: Any = tensor  # weights packed for a processor have no storage that could be asked
            key, size = id(tensor), tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter((args, kwargs, out)):
            if isinstance(x, Tensor):
                self._see(x)
        return out


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _packed_product(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


def counter() -> FlopCounterMode:
    """`FlopCounterMode` that knows the attention of CPUs, too."""
    ops = torch.ops.aten
    known = {
        ops._scaled_dot_product_flash_attention_for_cpu: _attention,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        torch.ops.mkldnn._linear_pointwise: _packed_product,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


class Measured(NamedTuple):
    """What a phase took."""

    peak: int
    """Bytes of live tensors at the worst moment."""
    operations: int


def measure_update(model: nn.Module, at: Pass, passes: int = 1, *, bf16: bool = False) -> Measured:
    """The second of two updates of a language model on random rows: forward and backward passes, clipping, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batches = [_random(model, at) for _ in range(passes)]
    live = LiveTensors([*model.parameters(), *model.buffers()])

    def learn() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = -policy_logprobs(model, batch).sum() / batch.mask.sum()
            loss.backward()
            del loss

    with counter() as count:  # apart from the other: it holds on to what a checkpointed layer computes again
        learn()
    with live:
        for _ in range(2):
            live.reset()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            learn()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return Measured(peak=live.peak, operations=count.get_total_flops())


def measure_reading(model: nn.Module, at: Pass, *, bf16: bool = False) -> Measured:
    """A pass of a language model without gradients on random rows."""
    live, batch = LiveTensors([*model.parameters(), *model.buffers()]), _random(model, at)
    with live, counter() as count, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        policy_logprobs(model, batch)
    return Measured(peak=live.peak, operations=count.get_total_flops())


def _random(model: nn.Module, at: Pass) -> Sequences:
    rows = torch.randint(3, vocab_size(model), (at.rows, at.length)).tolist()
    return collate([row[: at.prompt] for row in rows], [row[at.prompt :] for row in rows], pad=0)
