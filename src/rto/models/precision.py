"""In which precision weights are held: wide where they are trained, as the compute precision where they are only read.

AdamW moves a weight by about the learning rate. bf16 keeps 8 bits of a weight, so that near 0.01 its neighbours are
3·10⁻⁵ apart: at a learning rate of 5·10⁻⁷ almost every update is rounded away. Trained weights are fp32 for that
reason, whatever a model was loaded in; what they are multiplied in is autocast's to say.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NARROW = (torch.float16, torch.bfloat16)
"""Precisions in which a weight does not move at the learning rates of reinforcement learning."""


def as_dtype(name: str | torch.dtype) -> Any:
    """A precision by its name; ``auto``, the one that a checkpoint was written in, stays a word.

    Raises:
        ValueError: there is no such precision.
    """
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {name!r} is not known; choose from auto, float32, bfloat16, float16")
    return found


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of parameter names that an architecture keeps in fp32 when it is loaded in ``dtype``."""
    lists = {torch.float16: ("", "_strict"), torch.bfloat16: ("_strict",)}.get(dtype, ())
    return tuple(part for kind in lists for part in getattr(model, f"_keep_in_fp32_modules{kind}", None) or ())


def leave(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Leave weights as their files have them, and note in which precision they are to be held: see `settle`.

    Weights in their file's own precision are mapped, not copied: they take no memory of a process, and copies of them
    share it.
    """
    kept = kept_in_fp32(model, dtype)
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            note(weight, torch.float32 if any(part in name for part in kept) else dtype)
    return model


def note(weight: nn.Parameter, dtype: torch.dtype) -> None:
    """Say in which precision a weight is to be held that is as its file has it."""
    vars(weight)["held_in"] = dtype


def noted(weight: Tensor) -> torch.dtype | None:
    """In which precision a weight is to be held; None where it is in it."""
    return vars(weight).get("held_in")


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Give the weights of a module that were left as their files have them memory of their own, as it was noted."""
    for weight in module.parameters():
        dtype = vars(weight).pop("held_in", None)
        if dtype is not None:
            weight.data = weight.data.to(dtype, copy=True)


@contextmanager
def taking_adapter(model: nn.Module, config: Any) -> Iterator[None]:
    """Within this context PEFT puts an adapter on a model as if its weights were held as it was noted.

    An adapter is made in the precision of its layer's weights, or of what a layer says that it computes in; modules
    that are trained beside it are copies, for which they are given memory of their own.

    Args:
        model: what the adapter is put on; weights may be as their files have them.
        config: the adapter's.
    """
    copies = (*(getattr(config, "modules_to_save", None) or ()), *HEAD_NAMES)
    for name, module in model.named_modules():
        if name.endswith(copies):
            settle(module)
    layers = {module: weight for module in model.modules() for weight in module.parameters(recurse=False)}
    left = {module: dtype for module, weight in layers.items() if (dtype := noted(weight)) is not None}
    for module, dtype in left.items():
        vars(module)["compute_dtype"] = dtype
    try:
        yield
    finally:
        for module in left:
            del vars(module)["compute_dtype"]


HEAD_NAMES = ("classifier", "score")
"""What PEFT calls the heads of its sequence classification models, which it trains beside their adapters."""


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of a whole model that is only read, in place and one by one; buffers stay as they are."""
    kept = kept_in_fp32(model, dtype)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or any(part in name for part in kept):
            continue
        if noted(weight) is not None:
            note(weight, dtype)
        else:
            weight.data = weight.data.to(dtype)
    return model


@torch.no_grad()
def widen(model: nn.Module) -> int:
    """Cast the trained weights of a model to fp32, in place, where they are narrower; the number of those that were.

    A model that is trained whole becomes fp32 altogether. Of a PEFT model only what is trained does: adapters, and
    modules that are trained beside them (``modules_to_save``), which still take and give what the layers around do.
    """
    adapters = hasattr(model, "peft_config")
    weights = [w for w in model.parameters() if w.dtype in NARROW and (w.requires_grad or not adapters)]
    weights = [w for w in weights if noted(w) is None]
    if adapters:
        _join_saved_modules(model)
    for weight in weights:
        weight.data = weight.data.float()
    for buffer in () if adapters else model.buffers():
        if buffer.dtype in NARROW:
            buffer.data = buffer.data.float()
    return sum(weight.numel() for weight in weights)


def _join_saved_modules(model: Any) -> None:
    """Let modules that are about to be wider than the layers around them cast what they take and what they give.

    What the output layer or the scalar head gives goes to no layer, and stays in fp32.
    """
    from peft.utils.other import ModulesToSaveWrapper

    heads = [getattr(model, name, None) for name in ("score", "classifier")]
    heads.append(model.get_base_model().get_output_embeddings())
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            around = {w.dtype for w in module.parameters() if w.requires_grad and w.dtype in NARROW}
            if around:
                module.register_forward_pre_hook(_take(torch.float32), with_kwargs=True)
            if around and not any(wrapper is head for head in heads):
                module.register_forward_hook(_give(around.pop()))


def _take(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, args, kwargs: (_cast(args, dtype), _cast(kwargs, dtype))


def _give(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, args, output: _cast(output, dtype)


def _cast(data: Any, dtype: torch.dtype) -> Any:
    """The same data with its floating-point tensors in another precision."""
    return recursively_apply(lambda x: x.to(dtype), data, test_type=_is_floating)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# --- heads


class _WideLinear(TorchFunctionMode):
    """Every linear map is computed in fp32 at least, whatever the precision of its weights and inputs.

    The weights are read where the layer itself reads them, so adapters on it and hooks that gather them (sharding)
    stay in place; a gradient comes back in the weight's own precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            args, kwargs = [_at_least_fp32(x) for x in args], {n: _at_least_fp32(x) for n, x in kwargs.items()}
        return func(*args, **kwargs)


def _at_least_fp32(x: Any) -> Any:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if _is_floating(x) else x


@contextmanager
def wide_linear(device: torch.device) -> Iterator[None]:
    """Within this context linear maps are computed in fp32, autocast or not.

    Heads are: bf16 numbers around 3 are 1/64 apart, and a token reward is at most 0.05.
    """
    with torch.autocast(device.type, enabled=False), _WideLinear():
        yield


@contextmanager
def wide_head(head: nn.Module | None) -> Iterator[None]:
    """Within this context a module of a larger model, its head, computes in fp32; None changes nothing."""
    if head is None:
        yield
        return
    own, narrow = vars(head).get("forward"), head.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with wide_linear(next(head.parameters()).device):
            return narrow(*args, **kwargs)

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


# --- bases of four bits

REARRANGES = "support_avx512bf16_for_cpu"
"""By this attribute a layer of bitsandbytes says that it may rearrange its weights for inference."""


def keep_derivative(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes' layers of four bits in the layout whose product has a derivative.

    On processors with avx512_bf16 a pass without gradients in eval mode rearranges their weights for a kernel that
    has none, and every later backward pass goes through it: gradients are wrong, and nothing fails.
    """
    for module in model.modules():
        if REARRANGES in vars(module):
            vars(module)[REARRANGES] = False
    return model


def check_derivative(name: str, model: nn.Module) -> None:
    """Refuse to train on layers that were rearranged before they came here; that loses bits and is not undone.

    Raises:
        ValueError: a layer of four bits has no derivative any more.
    """
    for where, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: {where} was rearranged by bitsandbytes for a kernel that has no derivative, as the first "
                "pass without gradients does on this processor: load the model anew and hand it over before it is run"
            )
