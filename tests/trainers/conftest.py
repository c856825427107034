"""Small runs: the tiny model, prompts of different lengths, a reward that counts a letter."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from killable import WORDS
from transformers import LlamaConfig, LlamaForSequenceClassification

from rto import RTOConfig, RTOTrainer


def count_b(completions: list[str], **columns: Any) -> list[float]:
    return [completion.count("b") + 0.1 * len(completion) for completion in completions]


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": word * (1 + i % 3)} for i, word in enumerate(WORDS)])


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    rows = [{"prompt": w, "chosen": "bab" * (1 + i % 2), "rejected": "zq" * (1 + i % 3)} for i, w in enumerate(WORDS)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def dpo_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, tokenizer: Any) -> Path:
    """A DPO model: other weights, same vocabulary."""
    folder = tmp_path_factory.mktemp("dpo")
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A reward model with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RTOConfig]:
    def build(**kwargs: Any) -> RTOConfig:
        small = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_mini_batches": 2,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "value_learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return RTOConfig(**small | kwargs)

    return build


@pytest.fixture
def trainer(tiny_folder: Path, dpo_folder: Path, prompts: Dataset, config: Callable) -> Callable[..., RTOTrainer]:
    def build(**kwargs: Any) -> RTOTrainer:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in inspect.signature(RTOTrainer).parameters}
        args = config(**kwargs)
        inputs = {"reward_funcs": count_b, "train_dataset": prompts}
        inputs |= {"dpo_model": str(dpo_folder)} if args.dpo_coef != 0 else {}
        return RTOTrainer(str(tiny_folder), args, **inputs | own)

    return build
