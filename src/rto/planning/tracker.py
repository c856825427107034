"""How much memory live tensors hold: what a plan is checked against.

PyTorch counts allocations on accelerators only. Here every tensor that an operation returns is looked at, on any
device: its storage counts from then until nothing refers to it.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


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
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._see(x)
        return out
