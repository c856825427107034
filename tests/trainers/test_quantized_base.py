"""QLoRA: roles on a base of four bits, where bitsandbytes is installed."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from rto import RTOConfig, RTOTrainer
from rto.models.roles import Role

bitsandbytes = pytest.importorskip("bitsandbytes")


def test_five_roles_on_four_bits(tiny_model, tokenizer, prompts, tmp_path):
    """The base is loaded once and stays as it is; adapters on it learn in fp32."""
    base = tmp_path / "base"
    tiny_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(base)
    tokenizer.save_pretrained(base)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = RTOConfig(
        output_dir=str(tmp_path / "run"),
        model_init_kwargs={"quantization_config": bits},
        per_device_train_batch_size=8,
        num_mini_batches=2,
        max_completion_length=6,
        learning_rate=1e-2,
        dpo_coef=0.0,
        activation_checkpointing=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    run = RTOTrainer(
        str(base),
        args,
        reward_funcs=lambda completions: [float(len(c)) for c in completions],
        train_dataset=prompts,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    layer = run.model.policy.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
    assert isinstance(run.model.value_model, Role)
    before = layer.base_layer.weight.detach().clone()
    adapter = layer.lora_B["default"].weight.detach().clone()
    critic = layer.lora_B["value_model"].weight.detach().clone()
    run.train()
    assert torch.equal(layer.base_layer.weight, before)
    assert not torch.equal(layer.lora_B["default"].weight, adapter)
    assert not torch.equal(layer.lora_B["value_model"].weight, critic)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    assert run.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-4)
