"""A small run of `PreferenceTrainer` as a program, so that a test can start several processes of it.

usage: preferring.py POLICY OUTPUT BATCH LOSS [LOSS ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from killable import WORDS

from rto import PreferenceConfig, PreferenceTrainer

ROWS = [{"prompt": w, "chosen": "bab" * (1 + i % 2), "rejected": "zq" * (1 + i % 3)} for i, w in enumerate(WORDS)]


def prefer(policy: str, output: str, loss: str, batch: int, **kwargs: Any) -> dict[str, float]:
    """Train with SGD, where a step is the gradient itself; write the weights, return the evaluation."""
    settings = {
        "output_dir": output,
        "loss": loss,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-1,
        "num_train_epochs": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    trainer = PreferenceTrainer(
        policy,
        PreferenceConfig(**settings | kwargs),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:7]),  # does not divide by two
    )
    trainer.train()
    trainer.save_model()
    found = trainer.evaluate()
    if trainer.is_world_process_zero():
        (Path(output) / "evaluation.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    policy, output, batch, *losses = sys.argv[1:]
    for loss in losses:
        prefer(policy, f"{output}/{loss}", loss, int(batch))
    sys.exit(0)
