"""With ``disable_dropout`` a model in training says what it says otherwise, wherever it keeps the probability."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rto.models.actor import Actor
from rto.models.loading import load_policy
from rto.trainers.base import _disable_dropout

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "vocab_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt_neox", "olmo2", "stablelm"), SIZES
    ),
    "gpt2": GPT2,
    "opt": OPT | {"num_attention_heads": 2, "max_position_embeddings": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40},
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    named = [name for name, value in vars(config).items() if "dropout" in name and isinstance(value, (int, float))]
    assert named, f"{family} has no dropout"
    for name in named:
        setattr(config, name, 0.5)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_reads_what_evaluation_reads(family: str) -> None:
    model, ids = build(family), torch.randint(3, 40, (2, 12))
    with torch.no_grad():
        expected, noisy = model(ids).logits, model.train()(ids).logits
        assert (noisy - expected).abs().max() > 1e-3
        _disable_dropout(Actor(model))
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_probability_out_of_range_is_named(tmp_path: Path) -> None:
    model = build("llama")
    model.config.attention_dropout = 1.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention_dropout in config\.json is 1\.5, expected a probability"):
        load_policy(tmp_path)
