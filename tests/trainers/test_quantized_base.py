"""QLoRA: roles on a base of four bits, where bitsandbytes is installed."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.models.loading import load_policy
from rto.models.roles import Role
from rto.trainers.supervised import SFTConfig, SFTTrainer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra qlora)")
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture
def base(tiny_model: Any, tokenizer: Any, tmp_path: Any) -> str:
    model = tiny_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False, initializer_range=0.1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def under_adapter(model: Any) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.train()


def gradient(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dequantized(model: Any) -> Any:
    """The same model with its layers of four bits as plain ones."""
    plain = AutoModelForCausalLM.from_config(model.config).to(torch.float32)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            state[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    rest = {name: x for name, x in model.state_dict().items() if x.is_floating_point() and ".weight." not in name}
    plain.load_state_dict({**rest, **state})
    return plain


def test_gradients_are_those_of_the_dequantized_base(base: str) -> None:
    """Also after a pass without gradients, which every rollout is."""
    model: Any = load_policy(base, quantization_config=BitsAndBytesConfig(**FOUR))
    oracle = gradient(under_adapter(dequantized(model)))
    model.config.quantization_config = None
    adapted = under_adapter(model)
    with torch.no_grad():
        adapted.eval()(input_ids=torch.arange(3, 40)[None])
    found = gradient(adapted.train())
    assert found.keys() == oracle.keys()
    for name, grad in oracle.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def quantized(base: str) -> nn.Module:
    """As transformers loads it, for a user to hand over."""
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**FOUR))


@pytest.mark.parametrize("stage", ["sft", "prefer"])
def test_every_adapter_learns_after_an_evaluation(
    base: str, pairs: Any, tokenizer: Any, tmp_path: Any, stage: str
) -> None:
    """Given as an object, which our loading has not seen."""
    model = get_peft_model(quantized(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "learning_rate": 1e-3, **QUIET}
    if stage == "sft":
        rows = pairs.map(lambda row: {"completion": row["chosen"]}).select_columns(["prompt", "completion"])
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "processing_class": tokenizer}
        run: Any = SFTTrainer(model, SFTConfig(**args), **data)
    else:
        data = {"train_dataset": pairs, "eval_dataset": pairs.select(range(4)), "processing_class": tokenizer}
        run = PreferenceTrainer(model, PreferenceConfig(**args), **data)
    run.evaluate()
    run.train()
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not [n for n, p in trained.items() if "lora_B" in n and not p.abs().sum() > 0]


def test_a_base_that_was_rearranged_before_is_refused(base: str, pairs: Any, tokenizer: Any, tmp_path: Any) -> None:
    """Before any pass; the mark is bitsandbytes' own, which it leaves on processors with avx512_bf16."""
    model: Any = quantized(base)
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    args = PreferenceConfig(output_dir=str(tmp_path / "run"), **QUIET)
    adapter = LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"0\.mlp\.up_proj was rearranged by bitsandbytes .* load the model anew"):
        PreferenceTrainer(model, args, train_dataset=pairs, processing_class=tokenizer, peft_config=adapter)


def test_five_roles_on_four_bits(base, prompts, tmp_path):
    """The base is loaded once and stays as it is; adapters on it learn in fp32."""
    bits = BitsAndBytesConfig(**FOUR)
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
        base,
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
