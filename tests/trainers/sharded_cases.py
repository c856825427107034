"""Small runs that leave behind what two ways of laying a model over processes are compared by.

Each writes into ``output``: the exported model, ``history.json`` (what was logged at every update) and
``layout_RANK.json`` (how the models lay over the processes).
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from killable import WORDS, arm
from killable import build as build_rto
from peft import LoraConfig
from preferring import ROWS
from sharing import share
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rto import PreferenceConfig, PreferenceTrainer

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
    from datasets import Dataset

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
