"""Run functions of this folder's programs on several CPU processes whose models are cut by FSDP2.

accelerate cuts models over accelerators only: on CPU processes ``--fsdp`` would silently train something else (DDP).
Here it is told that a CPU is one, so its own code, and torch's, cut over gloo.

usage: torchrun --nproc_per_node 2 sharded.py CASES.json    [{"run": "MODULE:FUNCTION", ...keyword arguments}, ...]
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from rto.trainers import base


def call_it_an_accelerator() -> None:
    """Let accelerate treat CPU processes as it treats GPUs."""

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: Any = False, backend: str | None = None) -> Any:
        if "LOCAL_RANK" not in os.environ:
            return None, DistributedType.NO
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare
    wraps = torch.nn.parallel.DistributedDataParallel.__init__

    def wrap(self: Any, *args: Any, **kwargs: Any) -> None:
        wraps(self, *args, **{name: x for name, x in kwargs.items() if name not in ("device_ids", "output_device")})

    torch.nn.parallel.DistributedDataParallel.__init__ = wrap  # a CPU has no number
    base.on_this_machine = lambda args: None  # would set use_cpu, under which there is no DeepSpeed


WRITTEN: list[str] = []
"""Files that this process has written, renamed or removed, in the present case."""


def watch_writes() -> None:
    """Take down every file that this process touches: what Python opens, and what libraries write past it."""

    def see(event: str, args: Any) -> None:
        if event == "open" and isinstance(args[0], str | os.PathLike):
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                WRITTEN.append(os.path.abspath(os.fspath(args[0])))
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.truncate"):
            WRITTEN.extend(os.path.abspath(os.fspath(x)) for x in args if isinstance(x, str | os.PathLike))

    sys.addaudithook(see)
    for owner, name, at in ((torch, "save", 1), (safetensors.torch, "serialize_file", 1)):
        setattr(owner, name, _seen(getattr(owner, name), at))


def _seen(work: Any, at: int) -> Any:
    def seen(*args: Any, **kwargs: Any) -> Any:
        if len(args) > at and isinstance(args[at], str | os.PathLike):
            WRITTEN.append(os.path.abspath(os.fspath(args[at])))
        return work(*args, **kwargs)

    return seen


def main(cases: list[dict[str, Any]]) -> None:
    """One case after the other, in this process group."""
    from accelerate.state import AcceleratorState

    for case in cases:
        module, _, function = case.pop("run").partition(":")
        WRITTEN.clear()
        os.environ |= case.pop("launched", {})  # what `accelerate launch` sets
        getattr(importlib.import_module(module), function)(**case)
        AcceleratorState._reset_state()  # a process group is kept; what was asked of it is not
        for name in [n for n in os.environ if n.startswith(("FSDP_", "DS_", "ACCELERATE_USE_"))]:
            del os.environ[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    call_it_an_accelerator()
    watch_writes()
    sys.modules["sharded"] = sys.modules["__main__"]
    main(json.loads(Path(sys.argv[1]).read_text()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0)
