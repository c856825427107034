"""From a recipe and the shapes of its models to a job."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rto.functional.preference import LOSSES
from rto.planning.activations import FP32, Pass
from rto.planning.configs import find_shape
from rto.planning.job import Iteration, Job, Part, Stage
from rto.planning.memory import MOMENTS, Role
from rto.planning.shapes import Lora, Shape
from rto.recipe import Recipe, is_function, stage_config

ROLES = ("policy", "reference", "dpo", "critic", "reward")
STATE = {"adamw": MOMENTS, "adam8": 2, "sgd": 0, "lion": FP32}
"""Bytes a trained weight of an optimizer's state, by how its name begins."""
UNKNOWN_LENGTH = 1024
"""Where a stage has no limit of its own."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A recipe's run for one device, before it is placed.

    Attributes:
        job: its stages, and the iterations of one method.
        method: which; None where the recipe has learners only.
        compute: bytes of a number in a matrix product.
        moments: bytes of the optimizer's state, a trained weight.
        offload: frozen models of the iterations wait in host memory (``offload_frozen``).
        lora: the recipe's own adapters; None where it trains whole models.
        tokens: of a pass, as the recipe has them.
        notes: what was assumed.
    """

    job: Job
    method: str | None
    compute: int
    moments: int
    offload: bool
    lora: Lora | None
    tokens: int
    notes: tuple[str, ...] = ()


def shapes_of(recipe: Recipe, given: Mapping[str, str]) -> dict[str, Shape]:
    """The shape of every role: what is given for it, or what the recipe names.

    Raises:
        ValueError: a role is not known, or has no configuration.
    """
    for role in given:
        if role not in ROLES:
            raise ValueError(f"--config {role}=…: no such role; a run has {', '.join(ROLES)}")
    if "policy" not in given and is_function(recipe.model):
        raise ValueError(
            f"model: {recipe.model} is a function, which has no configuration: give --config policy=FILE_OR_SHAPE"
        )
    named = {"policy": given.get("policy", recipe.model)}
    shapes = {"policy": find_shape("policy", named["policy"])}
    for role in ROLES[1:]:
        source = given.get(role) or (recipe.reward_model if role == "reward" else None)
        shapes[role] = shapes["policy"] if source in (None, named["policy"]) else find_shape(role, str(source))
    return shapes


def workload(recipe: Recipe, shapes: Mapping[str, Shape], *, method: str | None = None) -> Workload:
    """The work of a recipe: its stages, and the iterations of a method, the one with most models unless one is named.

    Raises:
        ValueError: there is no such method, or the optimizer's state is not known.
    """
    if method is not None and method not in recipe.methods:
        raise ValueError(f"--method {method}: the recipe has {', '.join(recipe.methods) or 'no method'}")
    if method is None and recipe.methods:
        method = max(recipe.methods, key=lambda name: len(_roles(recipe, name, shapes)))
    parts: list[Part] = []
    configs = []
    if recipe.sft is not None:
        config = stage_config(recipe, "sft", "plan")
        parts.append(_sft(config, shapes["policy"]))
        configs.append(config)
    learner = next(iter(recipe.learners))
    configs.append(stage_config(recipe, learner, "plan"))
    parts.append(_prefer(configs[-1], recipe, shapes))
    if recipe.reward is not None:
        configs.append(stage_config(recipe, "reward", "plan"))
        parts.append(_reward(configs[-1], recipe, shapes["reward"]))
    if method is not None:
        configs.append(stage_config(recipe, method, "plan"))
        parts.append(_iteration(configs[-1], recipe, method, shapes))
    compute = 2 if any(x.bf16 or x.fp16 for x in configs) else FP32
    return Workload(
        job=Job(parts=tuple(parts)),
        method=method,
        compute=compute,
        moments=max(map(_state, configs)),
        offload=method is not None and configs[-1].offload_frozen,
        lora=None if recipe.peft is None else lora_of(recipe.lora(), shapes["policy"]),
        tokens=configs[-1].max_tokens_per_micro_batch if method else configs[0].max_tokens_per_micro_batch,
        notes=tuple(_notes(recipe, shapes)),
    )


def lora_of(config: Any, shape: Shape) -> Lora:
    """The adapters that a ``LoraConfig`` puts on a shape.

    Raises:
        ValueError: its targets are not among the linear maps of a layer.
    """
    names = {x.name for x in shape.linears}
    targets = config.target_modules
    if targets is None:  # PEFT's own choice for these families
        targets = {"q_proj", "v_proj"} & names or {"query_key_value", "qkv_proj"} & names
    elif targets == "all-linear":
        targets = names
    targets = {targets} if isinstance(targets, str) else set(targets)
    if not targets or not targets <= names:
        raise ValueError(
            f"peft.target_modules: a plan knows names of linear maps ({', '.join(sorted(names))}) and all-linear, "
            f"not {config.target_modules!r}"
        )
    return Lora(rank=int(config.r), targets=frozenset(targets))


def _roles(recipe: Recipe, method: str, shapes: Mapping[str, Shape]) -> list[Role]:
    """The models of a method, the policy first."""
    settings = {**recipe.train, **recipe.methods[method]}
    found = [Role(name="policy", shape=shapes["policy"], trained=True, on_base=True)]
    if settings.get("advantage_estimator", "gae") != "reinforce++":
        found.append(Role(name="critic", shape=shapes["critic"], trained=True, speaks=False, on_base=True))
    found.append(Role(name="reference", shape=shapes["reference"], trained=False, on_base=True))
    dpo = Role(name="dpo", shape=shapes["dpo"], trained=False, on_base=True)
    found += [dpo] * len(recipe.learners_of(method))
    if recipe.reward is not None and recipe.methods[method].get("paid_by", "reward") == "reward":
        own = recipe.reward_model is None
        found.append(Role(name="reward", shape=shapes["reward"], trained=False, speaks=False, on_base=own))
    return found


def _sft(config: Any, shape: Shape) -> Stage:
    length = config.max_length or UNKNOWN_LENGTH
    role = Role(name="policy", shape=shape, trained=True, on_base=True)
    at = Pass(rows=config.per_device_train_batch_size, prompt=1, response=length - 1, masked=True)
    passes, again = config.gradient_accumulation_steps, _checkpointing(config)
    return Stage(name="SFT", role=role, at=at, passes=passes, checkpointing=again)


def _prefer(config: Any, recipe: Recipe, shapes: Mapping[str, Shape]) -> Stage:
    length = config.max_length
    response = max(1, min(recipe.completion_length, length - 1))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    pairs = min(batch, max(1, config.max_tokens_per_micro_batch // (2 * length)))
    loss = LOSSES[config.loss]
    return Stage(
        name="DPO" if config.loss == "dpo" else config.loss.upper(),
        role=Role(name="policy", shape=shapes["policy"], trained=True, on_base=True),
        at=Pass(rows=2 * pairs, prompt=length - response, response=response),
        passes=math.ceil(batch / pairs),
        checkpointing=_checkpointing(config),
        unit=2,
        reference=Role(name="reference", shape=shapes["reference"], trained=False, on_base=True)
        if loss.needs_reference
        else None,
        reads_first=config.precompute_ref_log_probs and not loss.needs_ref_kl,
        once=config.gather_once,
    )


def _reward(config: Any, recipe: Recipe, shape: Shape) -> Stage:
    length = config.max_length or UNKNOWN_LENGTH
    role = Role(name="policy", shape=shape, trained=True, speaks=False, on_base=recipe.reward_model is None)
    at = Pass(rows=2 * config.per_device_train_batch_size, prompt=length - 1, response=1, masked=True)
    passes, again = config.gradient_accumulation_steps, _checkpointing(config)
    return Stage(name="reward", role=role, at=at, passes=passes, checkpointing=again, unit=2)


def _iteration(config: Any, recipe: Recipe, method: str, shapes: Mapping[str, Shape]) -> Iteration:
    from rto.rollout.samplers.transformers import CACHE_BYTES

    policy, *others = _roles(recipe, method, shapes)
    response = recipe.completion_length
    return Iteration(
        policy=policy,
        critic=next((role for role in others if role.name == "critic"), None),
        frozen=tuple(role for role in others if not role.trained),
        rollouts=config.per_device_train_batch_size,
        prompt=config.max_prompt_length or response,
        response=response,
        tokens=config.max_tokens_per_micro_batch,
        decoded=CACHE_BYTES,
        epochs=config.num_ppo_epochs,
        mini_batches=config.num_mini_batches,
        checkpointing=_checkpointing(config),
        once=config.gather_once,
    )


def _checkpointing(config: Any) -> bool:
    return bool(getattr(config, "activation_checkpointing", None) or config.gradient_checkpointing)


def _state(config: Any) -> int:
    name = str(getattr(config.optim, "value", config.optim)).removeprefix("paged_")
    name = name.replace("adamw_8bit", "adam8").replace("adamw_bnb_8bit", "adam8").replace("adamw_torch_8bit", "adam8")
    known = next((size for start, size in STATE.items() if name.startswith(start)), None)
    if known is None:
        raise ValueError(
            f"optim: a plan does not know how much state {name} has; it knows AdamW, its 8-bit kind, SGD, Lion"
        )
    return known


def _notes(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    from rto.planning.shapes import MEASURED

    found = []
    if recipe.rounds > 1:
        later = "each method goes on from its policy, with the starting policy as reference beside it"
        found.append(
            f"{recipe.rounds} rounds: all stages but SFT run once a round, on the pairs of all rounds so far and an "
            f"equal part of the prompts; after the first {later}: memory is that of one round."
        )
    if recipe.reward_model is not None:
        found.append(
            "The critic is taken to have the policy's shape; it starts from the reward model where both read one "
            "tokenizer (--config critic=…)."
        )
    other = sorted({x.family for x in shapes.values()} - set(MEASURED))
    if other:
        found.append(f"Activations of {', '.join(other)} are those of a Llama of this size; they were not measured.")
    return found
