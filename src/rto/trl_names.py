"""Arguments by the names they have in TRL's DPO, KTO, GRPO, RLOO and PPO: ours under another name, or refused by name.

A configuration takes each of them, in Python, as a flag and in a file: `As` puts the value where it belongs here,
`Not` refuses it with what to set instead, unless the value asks for nothing. A test walks over every field of TRL's.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class As:
    """Ours under another name.

    Attributes:
        name: of our field.
        key: of the mapping that our field is; empty where it is no mapping.
        values: theirs to ours, where those differ, too.
    """

    name: str
    key: str = ""
    values: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {{{self.key}: …}}" if self.key else self.name


@dataclass(frozen=True)
class Not:
    """Not here.

    Attributes:
        instead: what to set, or why there is nothing to set.
        nothing: values that ask for nothing, TRL's defaults among them.
    """

    instead: str
    nothing: tuple[Any, ...] = (None, False)

    def __str__(self) -> str:
        return self.instead


Names = Mapping[str, As | Not]


def each(names: str, theirs: Not) -> dict[str, As | Not]:
    """One answer to several names."""
    return dict.fromkeys(names.split(), theirs)


ROWS: Names = {
    "dataset_streaming": Not("a stream is read to its end before training: give files, or a hub name"),
    "ignore_bias_buffers": Not("it worked around a fault of older transformers"),
}
"""Of ``ScriptArguments``."""

_EVERYWHERE: Names = {
    **each("pad_to_multiple_of pad_token", Not("padding is told by position and has no influence", (None, "auto"))),
    "dataset_num_proc": Not("rows are read once, by one process"),
    "router_aux_loss_coef": Not("the loss of a router is not added here", (None, 0, 0.0, 0.001)),
    "sync_ref_model": Not("π_ref stays what it was: give another ref_model in a further run"),
    "ref_model_mixup_alpha": Not("π_ref stays what it was", (None, 0.6)),
    "ref_model_sync_steps": Not("π_ref stays what it was", (None, 512)),
    "ds3_gather_for_generation": Not("weights are gathered for sampling whenever a model is sharded", (None, True)),
}
PREFERENCE: Names = {
    **_EVERYWHERE,
    "beta": As("loss_kwargs", "beta"),
    "label_smoothing": As("loss_kwargs", "label_smoothing"),
    "desirable_weight": As("loss_kwargs", "desirable_weight"),
    "undesirable_weight": As("loss_kwargs", "undesirable_weight"),
    "loss_type": As("loss", values={"sigmoid": "dpo"}),
    "loss_weights": Not("one loss at a time: loss"),
    "precompute_ref_batch_size": Not("max_tokens_per_micro_batch bounds every pass"),
    "truncation_mode": Not("rows over max_length are left out with a count, never cut", (None,)),
    "padding_free": Not("rows of like length share a pass: max_tokens_per_micro_batch"),
    "activation_offloading": Not("gradient_checkpointing, or a smaller max_tokens_per_micro_batch"),
    "use_weighting": Not("WPO's weights are not among the losses"),
    "ld_alpha": Not("loss: rdpo takes length out of DPO's reward"),
    "f_divergence_type": Not("the losses here are of the reverse KL divergence", (None, "reverse_kl")),
    "f_alpha_divergence_coef": Not("the losses here are of the reverse KL divergence", (None, 0.5, 1.0)),
    "discopop_tau": Not("DiscoPOP is not among the losses", (None, 0.05)),
}
"""Of ``DPOConfig`` and ``KTOConfig``."""

_MASKS = "token rewards and scores are of whole completions: missing_eos_penalty prices those that were cut off"
_ROLLOUTS = (
    "per_device_train_batch_size is the rollouts of an iteration, num_mini_batches and num_ppo_epochs its updates"
)
_PPO = "the loss is PPO's clipped surrogate, a mean over all tokens of a minibatch"
_DRAW = "completions are drawn by temperature, top_p and top_k alone, so that their log-probabilities are known"
ONLINE: Names = {
    **_EVERYWHERE,
    "beta": As("kl_coef"),
    "epsilon": As("cliprange"),
    "num_iterations": As("num_ppo_epochs"),
    "response_length": As("max_completion_length"),
    "normalize_advantages": As("whiten_advantages"),
    "epsilon_high": Not("the clip is the same on both sides: cliprange"),
    "delta": Not(f"{_PPO}, with one bound: cliprange"),
    "loss_type": Not(_PPO, (None, "dapo")),
    "importance_sampling_level": Not(_PPO, (None, "token")),
    **each(
        "sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos "
        "top_entropy_quantile off_policy_mask_threshold use_bias_correction_kl cast_lm_head_to_fp32",
        Not(_PPO, (None, False, True, 1.0, 1.05, 2.0, 3.0)),
    ),
    **each(
        "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        Not(
            "there is no bonus for entropy: kl_coef or kl_target keeps the policy from collapsing",
            (None, False, 0.0, 0.005, 0.2, 1.0),
        ),
    ),
    "scale_rewards": Not(
        "normalize_scores standardizes scores, whiten_advantages the advantages", (None, False, "none")
    ),
    "reward_clip_range": Not("token_reward_clip bounds token rewards, normalize_scores tames scores"),
    "multi_objective_aggregation": Not("scores are summed by reward_weights", (None, "sum_then_normalize")),
    "num_generations_eval": Not("one completion a held-out prompt", (None, 1)),
    **each(
        "generation_batch_size steps_per_generation batch_size local_batch_size mini_batch_size local_mini_batch_size "
        "micro_batch_size num_total_batches world_size",
        Not(_ROLLOUTS),
    ),
    "local_rollout_forward_batch_size": Not("max_tokens_per_micro_batch bounds every pass", (None, 64)),
    "shuffle_dataset": Not("prompts are shuffled by seed", (None, True)),
    "mask_truncated_completions": Not(_MASKS),
    **each("min_p repetition_penalty generation_kwargs cache_implementation", Not(_DRAW, (None, False, 1.0))),
    **each(
        "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
        Not("max_cache_tokens says how many rows are decoded side by side"),
    ),
    "chat_template_kwargs": Not("a column of the data set: each row has its own"),
    "max_tool_calling_iterations": Not("a completion is one answer: tools are shown to the model, not called"),
    **each("stop_token stop_token_id", Not("an answer ends at EOS and at the end of turn of the chat template")),
    "num_completions_to_print": Not("log_completions is their number"),
    **each(
        "log_unique_prompts log_multimodal log_completions_hub_repo",
        Not("log_completions keeps text in a file", (None, False, True)),
    ),
    "num_sample_generations": Not("log_completions keeps completions of every rollout batch", (None, 0, 10)),
    "kl_estimator": Not("the KL penalty is k1, whose mean is the KL divergence", (None, "k1")),
    "exp_name": Not("run_name"),
    "sft_model_path": Not("the policy: model (--model_name_or_path)"),
    "reward_model_path": Not("reward_funcs of the trainer (--reward_funcs)"),
    "reward_model_name_or_path": Not("reward_funcs of the trainer (--reward_funcs)"),
    **each(
        "model_adapter_name ref_adapter_name",
        Not("the policy is the adapter that model names, π_ref its base or the adapter that ref_model names"),
    ),
    "vllm_importance_sampling_cap": As("vllm_importance_sampling_clip_max"),
    "vllm_model_impl": Not("vLLM takes its own implementation of a model", (None, False, "vllm")),
    "vllm_structured_outputs_regex": Not(_DRAW),
    "vllm_group_port": Not("weights go to a server as files: vllm_sync_folder", (None, False, 51216)),
    "vllm_tensor_parallel_size": Not(
        "an engine on several devices is a server, started with --tensor-parallel-size: vllm_mode", (None, False, 1)
    ),
}
"""Of ``GRPOConfig``, ``RLOOConfig`` and, until TRL 1.12, ``PPOConfig``."""

TRAINERS: Mapping[str, str] = {
    "reward_model": "reward_funcs",
    "tokenizer": "processing_class",
    "rollout_func": "sampler",
    "tools": "the column tools of the data set: they are shown to the model, not called",
    "environment_factory": "sampler",
    "beta": "the configuration: dpo_coef, kl_coef, or loss_kwargs",
    "max_length": "the configuration",
    "formatting_func": "the data set: prompt, chosen and rejected, as text or messages",
}
"""Arguments of TRL's trainers: what they are here."""


def by_trl_names(names: Names) -> Callable[[_Kind], _Kind]:
    """A configuration that takes its arguments by TRL's names, too: a decorator above ``dataclass``."""

    def decorate(kind: Any) -> Any:
        made_by = kind.__init__

        @wraps(made_by)
        def by_either(self: Any, *args: Any, **kwargs: Any) -> None:
            made_by(self, *args, **translated(names, kwargs))

        kind.__init__, kind.trl_names = by_either, names
        return kind

    return decorate


def translated(names: Names, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with TRL's names in the place of which ours stand.

    Raises:
        ValueError: one is refused, or is given by both names.
    """
    found = {name: value for name, value in given.items() if name not in names}
    for name in given:
        theirs, value = names.get(name), given[name]
        if isinstance(theirs, Not) and not _among(value, theirs.nothing):
            raise ValueError(f"{name}={value!r} is TRL's; here: {theirs}")
        if isinstance(theirs, As):
            _put(found, name, theirs, value)
    return found


def _put(found: dict[str, Any], name: str, theirs: As, value: Any) -> None:
    if theirs.values:
        value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        value = theirs.values.get(value, value) if isinstance(value, str) else value
    if not theirs.key:
        if theirs.name in found:
            raise ValueError(f"{name} is {theirs.name} here, and both are given: leave one out")
        found[theirs.name] = value
        return
    held = found.get(theirs.name) or {}
    held = json.loads(held) if isinstance(held, str) else dict(held)
    if theirs.key in held:
        raise ValueError(f"{name} is {theirs} here, and both are given: leave one out")
    found[theirs.name] = {**held, theirs.key: value}


def _among(value: Any, values: Iterable[Any]) -> bool:
    return any(value is x or (type(value) is type(x) and value == x) for x in values)
