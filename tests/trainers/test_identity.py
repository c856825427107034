"""What two runs are compared by, where a user has given an object instead of settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.credit import METHODS, Credit
from rto.functional.advantages import GAE, ReinforcePlusPlus
from rto.functional.preference import LOSSES
from rto.functional.rewards import AdaptiveKL
from rto.trainers.checkpoints import CheckpointError
from rto.trainers.identity import FREE, compare, identity, is_free, told, weights_digest
from rto.trainers.supervised import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Halved(GAE):
    """An estimator of a user's own."""

    by: float = 2.0

    def __call__(self, *args: Any) -> Any:
        advantages, returns = super().__call__(*args)
        return advantages / self.by, returns


class Plain:
    """One that is no dataclass."""

    needs_values = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, rewards: Float[Tensor, "B T"], values: Any, mask: Any) -> Any:
        return rewards * self.scale, rewards


CREDITS = {
    **{name: Credit.of(name) for name in METHODS},
    "own": Credit(estimator=Halved()),
    "own, other": Credit(estimator=Halved(by=3.0)),
    "plain": Credit(estimator=Plain(1.0)),
    "plain, other": Credit(estimator=Plain(2.0)),
    "lambda": Credit(estimator=GAE(lam=0.9)),
    "critic-free": Credit(estimator=ReinforcePlusPlus(gamma=0.9)),
    "steered": Credit(kl_control=AdaptiveKL(0.01, 1.0, 100)),
    "whitened": Credit(whiten_rewards=True),
}


def test_every_credit_is_told_from_every_other() -> None:
    """And written to a file and read back, none from itself; what it remembers does not count."""
    every = {name: told("credit", credit) for name, credit in CREDITS.items()}
    for name, theirs in every.items():
        for other, ours in every.items():
            found = compare(json.loads(json.dumps(theirs)), ours)
            assert (found is None) == (name == other), (name, other)
    credit = Credit(normalize_scores=True)
    before = told("credit", credit)
    credit.score_moments.update(torch.tensor([1.0, 3.0]))
    assert told("credit", credit) == before


def test_every_loss_is_told_from_every_other() -> None:
    every = [told("the loss", kind()) for kind in LOSSES.values()]
    assert len({json.dumps(x) for x in every}) == len(every)


def test_a_run_is_not_resumed_with_another_estimator(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Settings are the same; the message names what differs."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(credit=Credit(estimator=Halved()), **settings).train()
    with pytest.raises(CheckpointError, match=r"credit\.estimator\.by is 2\.0 there and 3\.0 here"):
        trainer(credit=Credit(estimator=Halved(by=3.0)), **settings).train(resume_from_checkpoint=True)


def test_a_digest_is_of_all_weights(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model(), tiny_model()
    assert weights_digest(model, torch.clone) == weights_digest(other, torch.clone)
    with torch.no_grad():
        other.model.norm.weight[-1] += 1
    assert weights_digest(model, torch.clone) != weights_digest(other, torch.clone)


# --- every setting, every model

MAY_CHANGE = """
    activation_checkpointing activation_checkpointing_kwargs activation_offloading batch_eval_metrics
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm
    do_eval do_predict do_train eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_packing eval_steps eval_strategy eval_use_gather_object fsdp fsdp_config full_determinism gather_once
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token include_for_metrics include_num_input_tokens_seen
    load_best_model_at_end local_rank log_completions log_level log_level_replica log_on_each_node
    logging_first_step logging_nan_inf_filter logging_steps logging_strategy max_tokens_per_micro_batch
    metric_for_best_model model_init_kwargs offload_frozen output_dir parallelism_config
    per_device_eval_batch_size precompute_ref_log_probs prediction_loss_only project push_to_hub ref_cache_dir
    report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit skip_memory_metrics stop_on_alarm torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id use_cache use_cpu vllm_enable_sleep_mode vllm_gpu_memory_utilization
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_sync_folder
"""
"""What is logged, saved and evaluated, where a run lives, and how it is laid out on its devices."""
DECIDE = """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon advantage_estimator assistant_only_loss async_rollouts
    auto_find_batch_size average_tokens_across_devices bf16 bf16_full_eval center_rewards_coefficient
    chat_template_path cliprange cliprange_value completion_only_loss critic_warmup_steps data_seed
    dataloader_drop_last dataset_kwargs dataset_text_field disable_dropout dpo_coef enable_jit_checkpoint
    eos_token fp16 fp16_full_eval frozen_dtype gamma gradient_accumulation_steps ignore_data_skip kl_coef
    kl_horizon kl_target label_names label_smoothing_factor lam learning_rate length_column_name
    liger_kernel_config loss loss_kwargs loss_type lr_scheduler_kwargs lr_scheduler_type max_cache_tokens
    max_completion_length max_grad_norm max_length max_prompt_length max_steps missing_eos_penalty
    neftune_noise_alpha normalize_scores num_generations num_mini_batches num_ppo_epochs num_train_epochs optim
    optim_args optim_target_modules packing packing_strategy pad_to_multiple_of pad_token padding_free
    per_device_train_batch_size remove_unused_columns reward_placement reward_shaping reward_weights
    router_aux_loss_coef score_coef seed shuffle_dataset split_special_tokens swap_pairs temperature tf32
    token_reward token_reward_clip token_reward_kwargs token_reward_pessimism top_k top_p total_episodes
    train_sampling_strategy truncation_mode trust_remote_code use_liger_kernel use_vllm value_coef
    value_learning_rate vf_coef vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode warmup_steps
    weight_decay whiten_advantages whiten_rewards
"""
CONFIGS = (RTOConfig, PreferenceConfig, SFTConfig, RewardConfig)


def test_every_setting_is_declared_free_to_change_or_to_decide() -> None:
    """A new one is in neither list: it belongs into this one or that, and what is free into the docs as well."""
    free, decide = set(MAY_CHANGE.split()), set(DECIDE.split())
    assert not free & decide
    known = {f.name for config in CONFIGS for f in fields(config) if not f.name.startswith("_")}
    assert known == free | decide
    assert {name for name in known if is_free(name)} == free
    assert known >= FREE, "no field has this name"


STAGES = {
    SFTConfig: (SFTTrainer, [{"prompt": "ab", "completion": "ba"}] * 8),
    RewardConfig: (RewardTrainer, [{"prompt": "ab", "chosen": "ba", "rejected": "zq"}] * 8),
    PreferenceConfig: (PreferenceTrainer, [{"prompt": "ab", "chosen": "ba", "rejected": "zq"}] * 8),
    RTOConfig: (RTOTrainer, [{"prompt": "ab"}] * 8),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_change_of_any_setting_that_decides_is_refused_by_its_name(
    config: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    kind, rows = STAGES[config]
    own = {"reward_funcs": lambda completions: [0.0] * len(completions)} if config is RTOConfig else {}
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4}
    settings |= {"dpo_coef": 0.0, "max_completion_length": 4} if config is RTOConfig else {}
    run = kind(str(tiny_folder), config(**settings), train_dataset=Dataset.from_list(rows), **own)
    here = identity(run)
    there = json.loads(json.dumps(here))
    assert compare(there, here) is None
    names = {f.name for f in fields(config)}
    for name in names & set(DECIDE.split()):
        said = compare({**there, name: "another"}, here)
        assert said is not None, name
        assert said.startswith(f"{name} is 'another' there and ")
    assert not names & set(MAY_CHANGE.split()) & here.keys()


ROLES = {
    "model": "weights of model",
    "ref_model": "weights of reference",
    "dpo_model": "weights of dpo_model 0",
    "dpo_ref_model": "weights of dpo_ref_model 0",
    "value_model": "weights of value_model",
    "reward_funcs": "weights of reward model 0",
}
"""Argument of `RTOTrainer` → how a refusal calls it."""


@pytest.mark.parametrize("role", ROLES)
def test_another_model_in_any_role_is_another_run(
    role: str,
    config: Callable[..., Any],
    tiny_folder: Path,
    dpo_folder: Path,
    reward_folder: Path,
    prompts: Dataset,
    tmp_path: Path,
) -> None:
    """Each is a model of its own here, and one weight of one of them is another."""
    roles = {"model": tiny_folder, "ref_model": tiny_folder, "dpo_model": dpo_folder, "dpo_ref_model": tiny_folder}
    roles |= {"value_model": reward_folder, "reward_funcs": reward_folder}
    there, here = (
        identity(RTOTrainer(**{name: str(path) for name, path in given.items()}, args=config(), train_dataset=prompts))
        for given in (
            roles,
            roles | {role: changed(roles[role], tmp_path / "other" / roles[role].name, "model.safetensors")},
        )
    )
    said = compare(there, here)
    assert said is not None
    assert said.startswith(f"{ROLES[role]} is '")


def changed(folder: Path, copy: Path, file: str) -> Path:
    """A copy of a model's folder with one weight of another value."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / file, {"format": "pt"})
    return copy


def test_another_reference_that_has_been_let_go_is_another_run(
    tiny_folder: Path, dpo_folder: Path, tmp_path: Path, pairs: Dataset
) -> None:
    """π_ref has read the data before training, and is gone when the run's identity is asked for."""
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4}
    there, here = (
        identity(
            PreferenceTrainer(str(tiny_folder), PreferenceConfig(**settings), ref_model=str(ref), train_dataset=pairs)
        )
        for ref in (tiny_folder, dpo_folder)
    )
    said = compare(there, here)
    assert said is not None
    assert said.startswith("weights of ref_model is '")


@pytest.mark.parametrize("role", ["model", "value_model"])
def test_an_adapter_that_training_starts_from_is_known(
    role: str, tiny_folder: Path, reward_folder: Path, config: Callable[..., Any], prompts: Dataset, tmp_path: Path
) -> None:
    """Its weights move, so that they are no part of the digest of what stays."""
    policy = LlamaForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "policy")
    scorer = LlamaForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    get_peft_model(scorer, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path / "critic")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(tmp_path / "policy")
    roles = {"model": tmp_path / "policy", "value_model": tmp_path / "critic", "reward_funcs": reward_folder}
    args = config(dpo_coef=0.0)
    there, here = (
        identity(RTOTrainer(**{name: str(path) for name, path in given.items()}, args=args, train_dataset=prompts))
        for given in (
            roles,
            roles | {role: changed(roles[role], tmp_path / "other" / roles[role].name, "adapter_model.safetensors")},
        )
    )
    said = compare(there, here)
    assert said is not None
    assert role in said
