"""An RTO run with five roles on one base, as a program, so that several processes can be started of it.

usage: sharing.py BASE DPO REWARD OUTPUT [--batch N] [--kill WHERE] [--resume]
"""

import argparse
import sys
from typing import Any

import torch
from datasets import Dataset
from killable import WORDS, arm
from peft import LoraConfig

from rto import RTOConfig, RTOTrainer
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler

OWN = ("peft_config", "value_model", "ref_model", "eval_dataset")


def share(base: str, dpo: str, reward: str, output: str, *, batch: int = 8, **kwargs: Any) -> RTOTrainer:
    """What is sampled does not depend on how prompts are spread over processes, and steps are gradients (SGD)."""
    own = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    own |= {name: kwargs.pop(name) for name in OWN if name in kwargs}
    settings = {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "num_mini_batches": 1,
        "num_train_epochs": 3,
        "max_completion_length": 6,
        "learning_rate": 0.3,
        "value_learning_rate": 0.1,
        "optim": "sgd",
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_find_unused_parameters": False,  # else DDP itself makes up for a backward pass that reaches only one role
    }
    trainer = RTOTrainer(
        base,
        RTOConfig(**settings | kwargs),
        dpo_model=dpo,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": word} for word in WORDS]),
        **own,
    )
    config = SamplingConfig(max_completion_length=6, temperature=0.0)
    eos, pad = trainer.sampler.eos_ids, trainer.sampler.pad_id
    trainer.sampler = TransformersSampler(config=config, eos_ids=eos, pad_id=pad)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs=4)
    parser.add_argument("--kill", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    run = share(*flags.folders, batch=flags.batch)
    arm(flags.kill, run)
    run.train(resume_from_checkpoint=flags.resume)
    run.save_model()
    sys.exit(0)
