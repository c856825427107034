"""A policy's weights as an inference engine takes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rto.models.loading import unwrap_peft
from rto.models.roles import acting, save_adapter


def named_weights(policy: Any, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that the base's checkpoint has for it.

    The adapter that is active is merged into them, or (``merged=False``) left out. A weight that is cut over processes
    is gathered, so all of them iterate.

    Raises:
        ValueError: the base is quantized; there is nothing an adapter could be merged into.
    """
    inner = unwrap_peft(policy)
    with acting(policy):
        layers = _adapter_layers(inner)
        for name, parameter in inner.named_parameters():
            owner, is_base, leaf = name.rpartition(".base_layer.")
            if not parameter.is_floating_point():
                raise ValueError(f"weights of type {parameter.dtype} (model.{name}) cannot be handed to an engine")
            if is_base and owner in layers:
                weight = _whole(parameter.detach())
                yield f"{owner}.{leaf}", _merged(layers[owner], leaf, weight) if merged else weight
            elif not any(name.startswith(f"{layer}.") for layer in layers):
                yield name, _whole(parameter.detach())


def _adapter_layers(inner: nn.Module) -> dict[str, Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return {}
    return {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


def _merged(layer: Any, leaf: str, weight: Tensor) -> Tensor:
    if leaf != "weight":
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A or adapter in getattr(layer, "lora_embedding_A", {}):
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _whole(weight: Any) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def is_adapted(policy: Any) -> bool:
    """Whether an adapter is what is trained."""
    return hasattr(policy, "peft_config")


def write_adapter(policy: Any, folder: Path) -> None:
    """The policy's own adapter as a folder that PEFT and vLLM read."""
    with acting(policy):
        save_adapter(policy, policy.active_adapters[0], folder)


@contextmanager
def moved(policy: Any) -> Iterator[None]:
    """Within it what is trained is far from where it was; then it is back, bit for bit.

    Every second matrix is negated and negated again, which is exact, takes no memory and keeps activations as large as
    they were; all of them negated would cancel out. An adapter may start at zero, so it is filled with noise, and
    then with what it was. Autocast keeps narrow copies of weights as long as its context is open: they are forgotten.
    """
    trained = [p for p in policy.parameters() if p.requires_grad and p.dim() > 1]
    kept = [p.detach().clone() for p in trained] if is_adapted(policy) else []
    with torch.no_grad():
        if kept:
            for i, p in enumerate(trained):
                noise = torch.Generator(p.device).manual_seed(i)
                p.normal_(0.0, 0.1, generator=noise)
        else:
            for p in trained[::2]:
                p.neg_()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(trained, kept):
                p.copy_(was)
            for p in [] if kept else trained[::2]:
                p.neg_()
        torch.clear_autocast_cache()
