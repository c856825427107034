"""Tiny random models of every causal type of the installed transformers, and what the library makes of each.

`docs/architectures.md` is written by ``python tests/contracts/architectures.py``; `test_architectures.py` holds it to
what the code decides.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rto.models.actor import check_output_layer
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
VOCAB, WINDOW, LAYERS = 97, 8, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    # names of the width, the layers and the heads
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("n_positions", "n_ctx"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    # experts
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    # recurrent and linear layers
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    # images
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "temporal_patch_size": 1,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
}
"""What a small configuration sets, wherever its type knows the name."""

HYBRID = ["linear_attention", "full_attention"]
LATENT = {"num_key_value_heads": 4}
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT
    ),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu", "dots3_note_text"), LATENT),
    "bailing_hybrid": LATENT | {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "kimi_linear": LATENT | {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [*["linear_attention"] * 2, *["hybrid"] * 2]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"]},
    "nemotron_h": {"n_groups": 1, "moe_shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"head_dim": None},
    "xlstm": {"num_heads": 4, "head_dim": None, "v_head_dim": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4},
    },
    "dots1": {"n_shared_experts": 1, "norm_topk_prob": True},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
    "roc_bert": {"shape_vocab_size": 8, "pronunciation_vocab_size": 8, "is_decoder": True},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "num_hidden_layers": None,
    },
    "xlnet": {"max_position_embeddings": None},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "doge": {"keep_window_size": 64},
}
"""What a type needs beside `SIZES`; None takes a name out of them."""

BERTS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, ALiBi, new decoder": ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_h1, scaled head": ("falcon_h1", {"lm_head_multiplier": 0.25}),
    "granite, scaled head": ("granite", {"logits_scaling": 5.0}),
    "gemma2, capped at 2": ("gemma2", {"final_logit_softcapping": 2.0}),
    "gpt2, tied": ("gpt2", {"tie_word_embeddings": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama4_text, chunks": ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, long window": ("mistral", {"sliding_window": 64}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16}),
    "phi3, no window": ("phi3", {"sliding_window": None}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    **{f"{name}, decoder": (name, {"is_decoder": True}) for name in BERTS},
}
"""Further rows of the table: a type with settings that change how it attends or what follows its head."""

SKIPPED: dict[str, str] = {
    **dict.fromkeys(
        [
            "blt",
            "dots3_note",
            "gemma3n",
            "got_ocr2",
            "moss_transcribe_diarize",
            "phi4_multimodal",
            "qwen4_exp",
            "git",
        ],
        "join a text model with one for images, sound or bytes, in sizes that are not all named alike",
    ),
    **dict.fromkeys(["musicgen", "musicgen_melody"], "write codes of sound from text, one row for each codebook"),
    **dict.fromkeys(
        ["gemma4_assistant", "gemma4_unified_assistant"], "draft for another model, from that model's hidden states"
    ),
    "qwen4_exp_text": "its configuration leaves the sizes of its indexer open",
}
"""Types of which no tiny model is built, and why."""

NAMES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - SKIPPED.keys())


def build(name: str) -> Any:
    """A tiny random model, the same one each time, with weights so large that its tokens are decided.

    Embeddings stay small beside the layers: where they are the output layer, too, a model would repeat its last token.
    """
    kind, settings = VARIANTS.get(name, (name, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**_small(CONFIG_MAPPING[kind], settings))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.0 if parameter is embeddings else 8.0)
    return model


def _small(factory: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small configuration; where it joins several, of each of them."""
    usual = factory()
    parts = {name: getattr(usual, name, None) for name in factory.sub_configs}
    joined = {
        name: _small(type(part), {"model_type": part.model_type}) for name, part in parts.items() if part is not None
    }
    sizes = {name: x for name, x in SIZES.items() if _has(usual, name)}
    wanted = sizes | joined | SETTINGS.get(factory.model_type, {}) | settings
    return {name: x for name, x in wanted.items() if x is not None}


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # it differs by layer
        return True


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the type, or of a variant.
        decoded: the way that completions are drawn, or "refused".
        line: what a refusal says.
    """

    name: str
    decoded: str
    line: str = ""

    def __str__(self) -> str:
        return f"| {self.name} | {self.decoded} | {self.line.replace('|', '/')} |"


def decide(name: str, model: Any) -> Row:
    """What the library makes of a model before it does anything else with it."""
    sampler = TransformersSampler(config=SamplingConfig(), eos_ids=(), pad_id=0)
    try:
        check_output_layer(model)
        return Row(name, sampler.check(model))
    except ValueError as error:
        return Row(name, "refused", str(error))


def committed() -> dict[str, str]:
    """Of each row of the committed table, the name and how it is decoded."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and line.count("|") == 4]
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    return dict(cells[1:])


def main() -> None:
    """Write the table."""
    transformers.logging.set_verbosity_error()
    rows = [decide(name, build(name)) for name in NAMES]
    right, skipped = sum(row.decoded != "refused" for row in rows), len(SKIPPED)
    reasons = [
        f"- {reason}: {', '.join(name for name in SKIPPED if SKIPPED[name] == reason)}"
        for reason in dict.fromkeys(SKIPPED.values())
    ]
    head = HEAD.format(
        version=transformers.__version__, right=right, refused=len(rows) - right, skipped=skipped, window=WINDOW
    )
    TABLE.write_text("\n".join([head, *map(str, rows), "", "## Not tried", "", *reasons, ""]))


HEAD = """# Which causal models it works on

`python tests/contracts/architectures.py` writes this page; `tests/contracts/test_architectures.py` holds it to what
the code does. Every causal type of transformers {version} whose configuration takes small sizes is built with random
weights (windows and chunks of {window} tokens) and then sampled, greedily, from prompts of several lengths, past the
window, with rows that end at different steps. Each token must be the argmax of one forward pass of the model itself
over prompt and completion, each log-probability that training reads the model's own to 1e-4, and the output layer in
fp32 under autocast. {right} rows are right, {refused} are refused by one line before anything else is loaded,
{skipped} types are not tried.

How completions are drawn:

- *own cache*: a filled static cache and masks of ours, where every layer looks at all tokens before it. A window as
  long as prompt and completion together is none, so a model with long windows is decoded so, too.
- *generate*: by `transformers`' own `generate`, prompts of several lengths padded on the left.
- *generate, equal lengths*: the same, for groups of prompts of one length, where padding would reach the numbers; *row
  by row* where even equal rows disturb each other.

The same decision is made for every model when it is loaded: a few tokens are decoded and compared with a forward pass.

| type | decoded by | refused because |
|---|---|---|"""

if __name__ == "__main__":
    main()
