"""Precision by role: what is trained is fp32 and moves, what is only read takes the compute precision."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.models.loading import clone, load_policy, load_scalar
from rto.models.precision import as_dtype, hold, widen
from rto.models.roles import Role
from rto.trainers.examples import reference_key
from rto.trainers.supervised import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from tables import check_table

TRAINING = Path(__file__).resolve().parents[2] / "docs" / "training.md"
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
LITTLE = {"learning_rate": 5e-7, "lr_scheduler_type": "constant", "max_steps": 2, "per_device_train_batch_size": 8}
BF16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture
def make(tiny_folder: Path, pairs: Dataset, prompts: Dataset, reward_folder: Path, dpo_folder: Path, tmp_path: Path):
    """``make(stage, model=…, peft_config=…, **arguments)``: a trainer of that stage on tiny models."""

    def build(stage: str, model: Any = None, **kwargs: Any) -> Any:
        start = str(tiny_folder) if model is None else model
        own = {name: kwargs.pop(name) for name in ("peft_config", "ref_model", "dpo_model") if name in kwargs}
        args = {"output_dir": str(tmp_path / stage), **QUIET, **kwargs}
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        if stage == "sft":
            rows = pairs.map(lambda row: {"completion": row["chosen"]}).select_columns(["prompt", "completion"])
            return SFTTrainer(start, SFTConfig(**args), train_dataset=rows, processing_class=tokenizer, **own)
        if stage == "reward":
            return RewardTrainer(start, RewardConfig(**args), train_dataset=pairs, processing_class=tokenizer, **own)
        if stage == "prefer":
            config = PreferenceConfig(**args)
            return PreferenceTrainer(start, config, train_dataset=pairs, processing_class=tokenizer, **own)
        small = {"per_device_train_batch_size": 8, "num_mini_batches": 2, "max_completion_length": 6}
        own = {"dpo_model": str(dpo_folder), **own}
        rest = {"reward_funcs": str(reward_folder), "train_dataset": prompts, "processing_class": tokenizer}
        return RTOTrainer(start, RTOConfig(**small | args), **rest | own)

    return build


def dtypes(weights: Any) -> str:
    """The precisions of some weights, as the docs write them."""
    return ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights if w.is_floating_point()})) or "–"


# --- the table of the docs

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "`bf16`": {"bf16": True},
    "`fp16`": {"fp16": True},
    "`dtype=bfloat16`": BF16,
    "`bf16`, `frozen_dtype=float32`": {"bf16": True, "frozen_dtype": "float32"},
    "LoRA": {"peft_config": True},
    "LoRA, `bf16`": {"peft_config": True, "bf16": True},
    "LoRA, `dtype=bfloat16`": {"peft_config": True, **BF16},
}


def lora(settings: dict[str, Any], task: str = "CAUSAL_LM") -> dict[str, Any]:
    return settings | ({"peft_config": LoraConfig(**LORA, task_type=task)} if "peft_config" in settings else {})


def found_in(make: Callable[..., Any], settings: dict[str, Any]) -> dict[str, str]:
    run = make("rto", **lora(settings))
    actor = run.model
    base = getattr(actor.policy, "get_base_model", lambda: None)()
    heads = [model.score.weight for model in (actor.value_model, run.scoring.sources[0].model)]
    frozen = [run.reference, run.scoring.token_reward.dpo_model, run.scoring.sources[0].model]
    return {
        "autocast": run.args.mixed_precision,
        "policy, critic: what is trained": dtypes(p for p in actor.parameters() if p.requires_grad),
        "base under adapters": "–" if base is None else dtypes(p for p in base.parameters() if not p.requires_grad),
        "π_ref, DPO model, reward model": dtypes(
            p for m in frozen if not isinstance(m, Role) for n, p in m.named_parameters() if not n.startswith("score")
        ),
        "heads of critic, reward model": " / ".join(str(h.dtype).removeprefix("torch.") for h in heads),
        "SFT model, reward model in training": dtypes(
            p
            for stage, task in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS"))
            for p in make(stage, **lora(settings, task)).model.parameters()
            if p.requires_grad
        ),
    }


def test_the_table_in_the_docs(make: Callable[..., Any]) -> None:
    rows = [{"setting": name, **found_in(make, settings)} for name, settings in SETTINGS.items()]
    assert {row["policy, critic: what is trained"] for row in rows} == {"float32"}
    check_table(TRAINING, "precision by role", rows)


# --- what is trained moves


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> int:
    return sum(int((before[name] != x.float()).sum()) for name, x in model.state_dict().items() if name in before)


@pytest.mark.parametrize("stage", ["sft", "prefer", "reward", "rto"])
def test_a_model_handed_over_in_bf16_is_trained_as_in_fp32(
    make: Any, tiny_model: Any, stage: str, caplog: Any
) -> None:
    """The same weights, rounded once, move in the same places whichever precision the object had."""

    def start() -> Any:
        scorer = AutoModelForSequenceClassification.from_config(tiny_model(num_labels=1).config, dtype=torch.bfloat16)
        return copy.deepcopy(scorer) if stage == "reward" else tiny_model().to(torch.bfloat16)

    torch.manual_seed(0)
    narrow = start()
    wide = copy.deepcopy(narrow).float()
    trained = []
    for model in (wide, narrow):
        before = {name: x.clone().float() for name, x in model.state_dict().items()}
        run = make(stage, model=model, **LITTLE)
        run.train()
        trained.append((moved(before, model), model.state_dict()))
    assert trained[0][0] == trained[1][0] > 5000
    for name, x in trained[0][1].items():
        assert torch.equal(x, trained[1][1][name]), name
    assert sum("weights came in 16 bits" in r.message for r in caplog.records if r.levelno == logging.WARNING) == 1


@pytest.mark.parametrize("stage", ["sft", "prefer", "reward", "rto"])
def test_dtype_says_nothing_of_a_model_that_is_trained_whole(make: Any, stage: str, caplog: Any) -> None:
    start = torch.cat([p.detach().flatten() for p in make(stage).model.parameters()])
    caplog.clear()
    model = make(stage, **BF16).model
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), start)
    assert sum("dtype=torch.bfloat16 gives way to float32" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens", "norm"]], ids=str)
@pytest.mark.parametrize("stage", ["sft", "prefer", "reward", "rto"])
def test_an_adapter_on_a_base_in_bf16_is_trained(
    make: Any, tiny_model: Any, tmp_path: Path, stage: str, saved: Any
) -> None:
    if stage == "reward" and saved == ["lm_head"]:
        saved = None
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        task_type="SEQ_CLS" if stage == "reward" else "CAUSAL_LM",
        modules_to_save=saved,
    )
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=False).save_pretrained(base)
    run = make(stage, model=str(base), peft_config=config, **BF16, **LITTLE | {"learning_rate": 1e-3})
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in run.model.named_parameters() if p.requires_grad}
    assert dtypes(before.values()) == "float32"
    assert "bfloat16" in dtypes(frozen.values())
    run.train()
    now = dict(run.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    still = [n for n, p in before.items() if torch.equal(now[n], p) and "lora_A" not in n]
    assert not still


def test_a_saved_module_on_a_base_in_bf16_has_its_own_gradient(tiny_model: Any) -> None:
    """Against the same adapter on the same base in fp32, to the rounding of bf16."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        base = hold(tiny_model().to(torch.bfloat16).float(), dtype)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
        widen(model)
        logits = model(input_ids=torch.arange(3, 23)[None]).logits
        logits.float().log_softmax(-1)[..., 5].sum().backward()
        grads.append(next(p.grad for n, p in model.named_parameters() if "modules_to_save" in n))
    assert grads[1].dtype == torch.float32
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.995


# --- what is only read


def test_a_copy_in_another_precision(tiny_model: Any) -> None:
    """Tied weights stay tied, buffers and what the architecture keeps in fp32 stay wide, the original stays."""
    model = tiny_model()
    model._keep_in_fp32_modules_strict = {"norm"}
    copied = clone(model, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert copied.model.norm.weight.dtype == torch.float32
    assert copied.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert dtypes(model.parameters()) == "float32"
    theirs = tiny_model().to(torch.bfloat16).state_dict()
    assert all(torch.equal(x.to(torch.bfloat16), theirs[name]) for name, x in copied.state_dict().items())
    same = clone(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_the_critic_starts_from_the_reward_model_as_it_was_saved(make: Any, reward_folder: Path) -> None:
    """Not from the copy that scores, which bf16 has rounded."""
    run = make("rto", bf16=True)
    assert dtypes(run.scoring.sources[0].model.parameters()) == "bfloat16"
    saved = AutoModelForSequenceClassification.from_pretrained(reward_folder).state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in run.model.value_model.state_dict().items())


def test_an_object_that_is_only_read_keeps_its_precision(make: Any, tiny_model: Any) -> None:
    reference = tiny_model(seed=3)
    run = make("rto", bf16=True, ref_model=reference, dpo_model=tiny_model(seed=1).to(torch.bfloat16))
    assert run.reference is reference
    assert dtypes(reference.parameters()) == "float32"
    assert dtypes(run.scoring.token_reward.dpo_model.parameters()) == "bfloat16"


def test_numbers_of_a_reference_belong_to_its_precision(make: Any, tiny_model: Any) -> None:
    examples = make("prefer").train_dataset
    keys = {reference_key(clone(tiny_model(), dtype), examples, "no") for dtype in (None, torch.bfloat16)}
    assert len(keys) == 2
    assert reference_key(tiny_model(), examples, "bf16") not in keys


def test_an_unknown_precision_is_refused(make: Any) -> None:
    for kwargs in ({"frozen_dtype": "bfloat"}, {"model_init_kwargs": {"dtype": "int8"}}):
        with pytest.raises(ValueError, match=r"dtype '(bfloat|int8)' is not known; choose from auto, float32"):
            make("prefer", **kwargs)
    assert as_dtype("torch.bfloat16") == as_dtype("bfloat16") == torch.bfloat16


# --- fp16


def test_fp16_unscales_once_clips_both_and_skips_what_overflows(make: Any) -> None:
    """accelerate makes no scaler on a processor; torch has one, and the trainer's own steps use it."""
    run = make("rto", max_grad_norm=0.5, max_steps=1, learning_rate=0.1)
    run.accelerator.native_amp, run.accelerator.state._mixed_precision = True, "fp16"
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.create_optimizer()
    run.optimizer = run.accelerator.prepare(run.optimizer)
    actor = run.model
    torch.manual_seed(0)
    true = {p: torch.randn_like(p) for p in actor.parameters()}
    for p, grad in true.items():
        p.grad = grad * run.accelerator.scaler.scale(torch.ones(()))
    norm = run._clip_grad_norm(actor)
    for weights in (actor.policy_parameters, actor.value_parameters):
        own = torch.cat([true[p].flatten() for p in weights])
        clipped = torch.cat([p.grad.flatten() for p in weights])
        torch.testing.assert_close(clipped, own * 0.5 / own.norm(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(norm, torch.cat([true[p].flatten() for p in actor.policy_parameters]).norm())
    before = [p.detach().clone() for p in actor.parameters()]
    run.optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, actor.parameters()))
    before = [p.detach().clone() for p in actor.parameters()]
    for p in actor.parameters():
        p.grad = torch.full_like(p, torch.inf)
    run._clip_grad_norm(actor)
    run.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, actor.parameters()))


def test_fp16_with_a_critic_runs(make: Any, caplog: Any) -> None:
    run = make("rto", fp16=True, total_episodes=8)
    run.train()
    assert run.state.global_step == 2
    assert any("fp16 needs an accelerator" in r.message for r in caplog.records)


# --- which revision and which arguments reach which model


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``from_pretrained`` was called with, by class and source; each is then loaded as it would be."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, AutoConfig):
        original = auto.from_pretrained

        def recorded(source: Any, *args: Any, auto: Any = auto, original: Any = original, **kwargs: Any) -> Any:
            first = seen.setdefault((auto.__name__, str(source)), kwargs)
            assert first.get("revision") == kwargs.get("revision"), f"{source}: two revisions"
            return original(source, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", recorded)
    return seen


INIT = {"revision": "v2", "attn_implementation": "eager", "dtype": "bfloat16"}


@pytest.mark.parametrize("stage", ["sft", "prefer", "reward", "rto"])
def test_a_revision_reaches_the_starting_model_alone(
    stage: str,
    read: Any,
    tiny_folder: Path,
    dpo_folder: Path,
    reward_folder: Path,
    pairs: Any,
    prompts: Any,
    tmp_path: Any,
) -> None:
    args = {"output_dir": str(tmp_path), **QUIET, "model_init_kwargs": INIT, "bf16": True}
    start, other, scorer = str(tiny_folder), str(dpo_folder), str(reward_folder)
    config = LoraConfig(**LORA, task_type="SEQ_CLS" if stage == "reward" else "CAUSAL_LM")
    if stage == "sft":
        rows = pairs.map(lambda row: {"completion": row["chosen"]}).select_columns(["prompt", "completion"])
        run: Any = SFTTrainer(start, SFTConfig(**args), train_dataset=rows, peft_config=config)
    elif stage == "reward":
        run = RewardTrainer(start, RewardConfig(**args), train_dataset=pairs, peft_config=config)
    elif stage == "prefer":
        run = PreferenceTrainer(
            start, PreferenceConfig(**args), ref_model=other, train_dataset=pairs, peft_config=config
        )
    else:
        run = RTOTrainer(
            start,
            RTOConfig(**args, per_device_train_batch_size=8, max_completion_length=6),
            dpo_model=other,
            dpo_ref_model=other,
            reward_funcs=scorer,
            train_dataset=prompts,
            peft_config=config,
        )
    kind = "AutoModelForSequenceClassification" if stage == "reward" else "AutoModelForCausalLM"
    found = read[kind, start]
    assert (found["revision"], found["attn_implementation"], found["dtype"]) == ("v2", "eager", torch.bfloat16)
    assert read["AutoTokenizer", start]["revision"] == read["AutoConfig", start]["revision"] == "v2"
    others = {source for _, source in read if source != start}
    assert others == {"sft": set(), "reward": set(), "prefer": {other}, "rto": {other, scorer}}[stage]
    assert not any(kwargs.get("revision") for (_, source), kwargs in read.items() if source != start)
    policy = getattr(run.model, "policy", run.model)
    assert policy.peft_config["default"].revision == ("v2" if stage in ("prefer", "rto") else None)


def test_the_base_of_an_adapter_is_read_at_the_adapters_own_revision(
    read: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(base, LoraConfig(**LORA), revision="v1").save_pretrained(tmp_path)
    read.clear()
    load_policy(str(tmp_path), revision="v2")
    assert read["AutoModelForCausalLM", str(tiny_folder)]["revision"] == "v1"


def test_the_configuration_is_of_the_revision_too(read: Any, tiny_folder: Path) -> None:
    for load in (load_policy, load_scalar):
        load(str(tiny_folder), revision="v2")
        assert read.pop(("AutoConfig", str(tiny_folder)))["revision"] == "v2"
