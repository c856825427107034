"""A small run with a win rate, as a program for several processes.

usage: watched.py POLICY BASELINE OUTPUT [broken]; it learns nothing
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rto import RTOConfig, RTOTrainer
from rto.evaluation.judging.callback import WinRateCallback
from rto.rollout.samplers.base import SamplingConfig

HELD_OUT = [{"prompt": w * (1 + i % 3)} for i, w in enumerate(["ab", "cab", "fable", "jab", "kebab", "lab", "dab"])]
TRAIN = [{"prompt": w} for w in ["back", "a", "bac", "crab", "garb", "habit", "abacus", "cabbage"]]


def fuller(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(completion)) + 0.01 * len(completion) for completion in completions]


def build(policy: str, output: str, judge: Any = fuller, **kwargs: Any) -> tuple[RTOTrainer, WinRateCallback]:
    own = {name: kwargs.pop(name) for name in ("baseline", "sampling", "seed", "prompts") if name in kwargs}
    settings = {
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "num_train_epochs": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "dpo_coef": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = RTOTrainer(
        policy,
        RTOConfig(**settings | kwargs),
        reward_funcs=fuller,
        train_dataset=Dataset.from_list(TRAIN),
        eval_dataset=Dataset.from_list(HELD_OUT[:4]),
    )
    prompts = Dataset.from_list(own.pop("prompts", HELD_OUT))
    callback = WinRateCallback(trainer, prompts, judge, batch_size=3, **own)
    trainer.add_callback(callback)
    return trainer, callback


class Broken:
    """A judge that fails."""

    name, games = "broken", 1

    def __call__(self, sights: list) -> list:
        raise ValueError("no judge today")


if __name__ == "__main__":
    torch.set_num_threads(1)
    policy, baseline, output, *rest = sys.argv[1:]
    trainer, callback = build(
        policy,
        output,
        Broken() if rest == ["broken"] else fuller,
        baseline=baseline,
        sampling=SamplingConfig(max_completion_length=6, temperature=1.0),
        learning_rate=0.0,
        value_learning_rate=0.0,
        max_steps=2,
        per_device_train_batch_size=2,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_win_rate" in row]
    Path(output, f"rank{trainer.args.process_index}.json").write_text(json.dumps(rows))
    trainer.accelerator.end_training()  # nobody leaves while another still talks
