"""What decides the results of a run, as numbers and digests that two runs are compared by."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from rto.models.loading import is_adapter
from rto.stages import digest_of
from rto.trainers.engine import piece

FREE = {
    *("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "project", "local_rank"),
    *("max_tokens_per_micro_batch", "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "push_to_hub", "ref_cache_dir", "precompute_ref_log_probs", "model_init_kwargs", "debug"),
    *("use_cpu", "skip_memory_metrics", "prediction_loss_only", "batch_eval_metrics", "full_determinism", "use_cache"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "dataset_num_proc"),
    *("offload_frozen", "gather_once"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_sync_folder"),
    *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "stop_on_alarm"),
}
"""Settings that may change when a run is resumed, for they decide nothing."""
FREE_PREFIXES = (
    *("do_", "logging_", "log_", "save_", "eval_", "hub_", "dataloader_", "ddp_", "torch_compile", "include_", "jit_"),
    *("activation_", "trackio_", "push_to_", "restore_", "fsdp", "deepspeed", "parallelism_"),
)
DECIDES = {"dataloader_drop_last"}
"""What does decide, though it is called as what does not."""


def is_free(name: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    return name not in DECIDES and (name in FREE or name.startswith((*FREE_PREFIXES, "_")))


def identity(trainer: Any) -> dict[str, Any]:
    """Settings, data, models and processes of a trainer that has not begun."""
    args = trainer.args
    settings = {f.name: getattr(args, f.name) for f in fields(args) if not is_free(f.name)}
    settings = {name: x.value if isinstance(x, Enum) else x for name, x in settings.items()}
    rows = trainer.train_dataset
    return {
        **json.loads(json.dumps(settings, default=str)),
        "processes": trainer.accelerator.num_processes,
        "rows of train_dataset": len(rows) if hasattr(rows, "__len__") else None,
        "digest of train_dataset": rows_digest(rows),
        **{name: x for part, given in trainer.decide().items() for name, x in told(part, given).items()},
        **{f"weights of {part}": weights_digest(m, trainer.engine.all_reduce) for part, m in trainer.models().items()},
    }


def told(name: str, x: Any) -> dict[str, Any]:
    """An object that decides results, as values by dotted names: its kind, and what it is made of.

    Functions are their names; of an object that is no dataclass what is a number, a word or a function counts.
    """
    if isinstance(x, PLAIN):
        return {name: x}
    if isinstance(x, list | tuple):
        return {key: y for i, part in enumerate(x) for key, y in told(f"{name}[{i}]", part).items()}
    if hasattr(x, "__qualname__"):
        return {name: f"{x.__module__}.{x.__qualname__}"}
    kind = type(x)
    if is_dataclass(x):
        parts = {f.name: getattr(x, f.name) for f in fields(x) if f.name not in STATE}
    else:
        parts = {key: y for key, y in getattr(x, "__dict__", {}).items() if isinstance(y, PLAIN) or _is_function(y)}
    inside = {key: y for part, value in parts.items() for key, y in told(f"{name}.{part}", value).items()}
    return {name: f"{kind.__module__}.{kind.__qualname__}", **inside}


PLAIN = (bool, int, float, str, NoneType)
STATE = ("score_moments",)
"""What objects remember, which a checkpoint holds."""


def _is_function(x: Any) -> bool:
    return callable(x) and hasattr(x, "__qualname__")


def compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first thing that two runs differ in, in words; what only one of them knows is not compared."""
    for name, value in there.items():
        if name in here and here[name] != value:
            return f"{name} is {value!r} there and {here[name]!r} here"
    return None


def adapter_digest(source: Any) -> str | None:
    """A digest of the weights of an adapter's folder, which is trained from there on; None of anything else."""
    if not isinstance(source, str | Path) or not is_adapter(source):
        return None
    return digest_of(source, ("*.safetensors",))


def rows_digest(rows: Any) -> str | None:
    """A digest of token ids and labels; None of rows that come one by one."""
    if rows is None or not hasattr(rows, "__len__"):
        return None
    found = hashlib.blake2b(digest_size=16)
    for part in _parts(rows):
        found.update(part)
    return found.hexdigest()


def _parts(rows: Any) -> Iterable[bytes]:
    if isinstance(rows, Dataset):
        for batch in rows.with_format("numpy").iter(batch_size=1000):
            for name, column in sorted(batch.items()):
                yield name.encode()
                for value in column:
                    numeric = getattr(value, "dtype", None) is not None and value.dtype != object
                    yield value.tobytes() if numeric else repr(value).encode()
                    yield b"|"
        return
    for row in rows:
        held = [getattr(row, name, None) for name in ("ids", "raw", "prompt", "completions", "mismatched", "labels")]
        yield json.dumps(held, default=str).encode()


def weights_digest(model: nn.Module, add_up: Callable[[Tensor], Tensor]) -> str:
    """A digest of a model's weights: of each its name, type, shape and the sum of its bits, on its own device.

    Sums of integers are exact in any order, so every device and number of threads finds the same. Of a model with
    frozen weights these alone count: adapters may start at random. Of a model that is cut over processes each adds
    up its own pieces, and ``add_up`` those of all.
    """
    found = hashlib.blake2b(digest_size=16)
    weights = dict(model.named_parameters())
    weights = {name: w for name, w in weights.items() if not w.requires_grad} or weights
    sums: list[Tensor] = []
    cut = False
    for name, weight in weights.items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        local, in_pieces = piece(weight.detach())
        cut |= in_pieces
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        if not local.is_meta:
            sums.append(local.contiguous().view(-1).view(whole).sum(dtype=torch.int64))
    total = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)
    found.update(json.dumps((add_up(total) if cut else total).tolist()).encode())
    return found.hexdigest()
