"""A small run as a program, so that a test can kill it or start several processes of it.

usage: killable.py POLICY DPO OUTPUT [--kill WHERE] [--resume] [--batch N] [--mini_batches N] [--greedy] [--optim NAME]
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from rto import RTOConfig, RTOTrainer
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers import checkpoints

WORDS = [
    "ab",
    "cab",
    "back",
    "abacus",
    "a",
    "bac",
    "crab",
    "dab",
    "baobab",
    "cabbage",
    "fable",
    "garb",
    "habit",
    "jab",
    "kebab",
    "lab",
]


def kill(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill()


def arm(where: str, trainer: RTOTrainer) -> None:
    """Die at a chosen point: between the updates of a rollout, while writing a checkpoint, before its seal."""
    if where == "mid-rollout":
        trainer.add_callback(KillAtStep(5))
    elif where == "half-written":
        original = trainer._save_optimizer_and_scheduler

        def save(folder: str) -> None:
            if folder.endswith("checkpoint-6"):
                kill()
            original(folder)

        trainer._save_optimizer_and_scheduler = save
    elif where == "before-seal":
        original_seal = checkpoints.seal

        def seal(folder: Path) -> None:
            if folder.name == "checkpoint-6":
                kill()
            original_seal(folder)

        checkpoints.seal = seal


def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    return [len(set(ids)) + 0.3 * len(prompt) for prompt, ids in zip(prompts, completion_ids)]


def build(policy: str, dpo: str, output: str, *, batch: int = 8, greedy: bool = False, **kwargs: Any) -> RTOTrainer:
    settings = {
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "num_train_epochs": 3,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "normalize_scores": True,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "save_steps": 3,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = RTOTrainer(
        policy,
        RTOConfig(**settings | kwargs),
        dpo_model=dpo,
        reward_funcs=score,
        train_dataset=Dataset.from_list([{"prompt": word} for word in WORDS]),
    )
    if greedy:  # what is sampled must not depend on how prompts are spread over processes
        config = SamplingConfig(max_completion_length=6, temperature=0.0)
        eos, pad = trainer.sampler.eos_ids, trainer.sampler.pad_id
        trainer.sampler = TransformersSampler(config=config, eos_ids=eos, pad_id=pad)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs=3)
    parser.add_argument("--kill", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--mini_batches", type=int, default=2)
    parser.add_argument("--optim", default="adamw_torch_fused")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    run = build(
        *flags.folders, batch=flags.batch, greedy=flags.greedy, num_mini_batches=flags.mini_batches, optim=flags.optim
    )
    arm(flags.kill, run)
    run.train(resume_from_checkpoint=flags.resume)
    run.save_model()
    found = run.evaluate(run.train_dataset[:5])  # a number that two processes do not share evenly
    if run.is_world_process_zero():
        (Path(flags.folders[2]) / "evaluation.json").write_text(json.dumps(found))
    sys.exit(0)
