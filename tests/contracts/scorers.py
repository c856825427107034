"""Tiny random models of every type that scores a text, for tests that hold for all of them."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
    "rotary_dim": 4,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Set where a configuration has them."""

OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mistral4": {"head_dim": None},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "t5": {"decoder_start_token_id": 0},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"languages": ["en"], "default_language": "en"},
}
"""What a type needs besides; None leaves the library's default."""

SKIPPED = {
    **dict.fromkeys(
        ("gemma3", "modernvbert", "qwen3_5", "t5gemma", "t5gemma2", "ultravbert"), "sizes stand in nested parts"
    ),
    "cohere_compass_text": "rotary embeddings by kind of layer, which no small configuration has",
    "mra": "its attention is a CUDA kernel; without it every text is the same",
    **dict.fromkeys(("luke", "perceiver", "roc_bert"), "tables of a fixed size, over a million weights"),
    **dict.fromkeys(("lilt", "layoutlmv2", "layoutlmv3"), "reads pages: boxes and images besides text"),
    **dict.fromkeys(("reformer", "zamba", "zamba2"), "layers and axes of matching sizes, none of them small"),
}
"""Types of the installed library that are not built here, and why."""

TYPES = [name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name not in SKIPPED]


def scorer(kind: str, *, seed: int = 0, loud: float = 8.0, **config: Any) -> Any:
    """A random model with one output; weights are large, so that every token and position tells."""
    made = CONFIG_MAPPING[kind]
    defaults = made()
    sizes = {name: size for name, size in SIZES.items() if hasattr(defaults, name)} | OWN.get(kind, {})
    sizes = {name: size for name, size in sizes.items() if size is not None}
    settings = made(**{**sizes, "num_labels": 1, "pad_token_id": 0, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(settings)](settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(loud)
    return model
