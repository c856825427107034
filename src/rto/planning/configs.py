"""From model configurations to shapes: folders, hub ids whose configuration is in the cache, and a few by name."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rto.models.loading import find_config
from rto.planning.shapes import ATTENTION, MIXED, MLP, PRODUCT, Linear, Shape

READS = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"),
    MIXED: ("o_proj", "attention.dense"),
    MLP: ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h"),
    PRODUCT: ("down_proj", "dense_4h_to_h"),
}
"""What the linear maps of a layer read, by the end of their names."""

_LLAMA_3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
_NEOX: dict[str, Any] = {"model_type": "gpt_neox"}
NAMED: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": _LLAMA_3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "pythia-1b": _NEOX
    | {
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
    },
    "pythia-2.8b": _NEOX
    | {
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""Shapes that need no file."""

ALIASES = {
    "openrlhf/llama-3-8b-sft-mixture": "llama-3-8b",
    "meta-llama/meta-llama-3-8b": "llama-3-8b",
    "meta-llama/meta-llama-3-8b-instruct": "llama-3-8b",
    "meta-llama/llama-3.2-1b": "llama-3.2-1b",
    "meta-llama/llama-3.2-3b": "llama-3.2-3b",
    "cleanrl/eleutherai_pythia-1b-deduped__reward__tldr": "pythia-1b",
    "cleanrl/eleutherai_pythia-2.8b-deduped__sft__tldr": "pythia-2.8b",
}
"""Hub ids of the paper's recipes, so that these plan without a network; the shapes are public."""


def find_shape(role: str, source: str) -> Shape:
    """The shape of a named shape, a folder, a ``config.json``, or a hub id.

    Raises:
        ValueError: there is none, or the architecture is one that the plan does not know; one line, with the remedy.
    """
    name = ALIASES.get(source.lower(), source)
    if name in NAMED and not Path(source).exists():
        return named_shape(name)
    try:
        config = find_config(role, source)
    except ValueError as error:
        raise ValueError(
            f"{error}: give its configuration with --config {role}=FILE_OR_SHAPE (a folder, a config.json, or one of "
            f"{', '.join(NAMED)})"
        ) from error
    path = Path(source)
    return shape_of(config, path.parent.name if path.name == "config.json" else path.stem)


@cache
def named_shape(name: str) -> Shape:
    """One of `NAMED`."""
    from transformers import AutoConfig

    settings = dict(NAMED[name])
    return shape_of(AutoConfig.for_model(settings.pop("model_type"), **settings), name)


def shape_of(config: Any, name: str) -> Shape:
    """The shape that a configuration describes, read from the model itself on the meta device.

    Raises:
        ValueError: it is no decoder of equal, dense layers with full attention.
    """
    from transformers import AutoModel

    config = config.get_text_config()
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    stacks = [x for x in model.children() if isinstance(x, nn.ModuleList)]
    if len(stacks) != 1 or not hasattr(config, "num_attention_heads"):
        raise _unknown(name, config, "its layers are not one stack")
    per_layer = [_linears(layer, name, config) for layer in stacks[0]]
    if len(set(per_layer)) != 1:
        raise _unknown(name, config, "its layers differ")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(
        name=name,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=len(per_layer),
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        linears=per_layer[0],
        vectors=sum(x.numel() for x in model.parameters() if x.dim() == 1),
        rms=any("RMSNorm" in type(x).__name__ for x in model.modules()),
        tied=bool(config.tie_word_embeddings),
        family=config.model_type,
    )
    made = sum(x.outputs for x in shape.reading(ATTENTION))
    counted = shape.backbone == sum(x.numel() for x in model.parameters())
    if made != shape.queries + 2 * shape.keys or not shape.reading(MIXED) or not counted:
        raise _unknown(name, config, "it has weights beside attention, MLP and norms")
    return shape


def _linears(layer: nn.Module, name: str, config: Any) -> tuple[Linear, ...]:
    found = []
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            reads = next((kind for kind, ends in READS.items() if path.endswith(ends)), None)
            if reads is None:
                raise _unknown(name, config, f"it has a linear map {path}")
            found.append(
                Linear(
                    name=path.rpartition(".")[2], reads=reads, inputs=module.in_features, outputs=module.out_features
                )
            )
    if not any(x.reads == PRODUCT for x in found):
        raise _unknown(name, config, "its MLP is not one of two linear maps")
    return tuple(found)


def _unknown(name: str, config: Any, why: str) -> ValueError:
    return ValueError(
        f"{name}: a plan for model type {config.model_type} is not known ({why}): only dense decoders with "
        "equal layers, such as Llama, Mistral, Qwen2, Phi-3 and GPT-NeoX; give the nearest of these with --config"
    )
