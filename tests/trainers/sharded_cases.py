"""Small runs that leave behind what two ways of laying a model over processes are compared by.

Each writes into ``output``: the exported model, ``history.json`` (what was logged at every update) and
``layout_RANK.json`` (how the models lay over the processes).
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from killable import WORDS, arm
from peft import LoraConfig
from preferring import ROWS
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.rollout.sampling import SamplingConfig, TransformersSampler

SETTINGS = {
    "optim": "sgd",  # a step is the gradient itself
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "max_steps": 3,
}


def prefer(policy: str, output: str, loss: str, batch: int, **kwargs: Any) -> None:
    """Preference learning on rows of unlike lengths, in micro-batches that differ between processes."""
    own = {name: kwargs.pop(name) for name in ("ref_model",) if name in kwargs}
    if kwargs.pop("lora", False):
        own["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    settings = SETTINGS | {"loss": loss, "per_device_train_batch_size": batch, "learning_rate": 1e-1}
    settings |= {"max_tokens_per_micro_batch": 64}
    trainer = PreferenceTrainer(
        policy,
        PreferenceConfig(output_dir=output, **settings | kwargs),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:7]),  # does not divide by two
        **own,
    )
    finish(trainer, output, {"reference": trainer.reference})


RTO_SETTINGS = SETTINGS | {
    "num_mini_batches": 1,
    "num_train_epochs": 3,
    "max_steps": -1,
    "learning_rate": 0.03,
    "value_learning_rate": 0.01,
    "max_tokens_per_micro_batch": 64,
    "max_completion_length": 9,
    "missing_eos_penalty": 1.0,
}


def rto(models: list[str], output: str, batch: int, **kwargs: Any) -> None:
    """RTO, or PPO where β₁ = 0, with a model for each role, or (``lora``) a role for each on one base."""
    policy, dpo, reward = models
    own: dict[str, Any] = (
        {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if kwargs.pop("lora", 0) else {}
    )
    flow = {name: kwargs.pop(name) for name in ("kill", "resume") if name in kwargs}
    args = RTOConfig(output_dir=output, per_device_train_batch_size=batch, **RTO_SETTINGS | kwargs)
    if args.dpo_coef:
        own["dpo_model"] = dpo
    prompts = [{"prompt": word * (1 + i % 3)} for i, word in enumerate(WORDS)]
    trainer = RTOTrainer(policy, args, reward_funcs=reward, train_dataset=Dataset.from_list(prompts), **own)
    trainer.eval_dataset = trainer.train_dataset[:5]
    config = SamplingConfig(max_completion_length=9, temperature=0.0)  # not by which process a prompt is on
    trainer.sampler = TransformersSampler(
        config=config, eos_ids=trainer.sampler.eos_ids, pad_id=trainer.sampler.pad_id
    )
    finish(trainer, output, {n: m for n, m in trainer.models().items() if n != "model"}, **flow)


def finish(trainer: Any, output: str, frozen: dict[str, Any], kill: str = "", resume: bool = False) -> None:
    """Train, evaluate, export, and tell."""
    if kill:
        arm(kill, trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    found = trainer.evaluate()
    folder = Path(output)
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "evaluation.json").write_text(json.dumps(found))
    rank = dist.get_rank() if dist.is_initialized() else 0
    models = {"trained": trainer.model, **{n: m for n, m in frozen.items() if m is not None}}
    (folder / f"layout_{rank}.json").write_text(json.dumps({name: layout(m) for name, m in models.items()}))


def layout(model: Any) -> dict[str, Any]:
    """Units, kinds and precisions of a model's parameters; numbers here and in all."""
    parameters = list(model.parameters())
    return {
        "units": sum(isinstance(m, FSDPModule) for m in model.modules()),
        "cut": all(isinstance(p, DTensor) for p in parameters),
        "here": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters),
        "all": sum(p.numel() for p in parameters),
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }
