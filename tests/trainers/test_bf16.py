"""Every setting of an on-line run and every loss of `prefer` under bf16, whole and with adapters on a narrow base."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from rto import PreferenceConfig, PreferenceTrainer, RTOTrainer
from rto.functional.preference import LOSSES

pytestmark = pytest.mark.slow

ONLINE: dict[str, dict[str, Any]] = {
    "PPO": {"dpo_coef": 0.0},
    "sentence": {"reward_placement": "sentence"},
    "final": {"reward_placement": "final"},
    "shaping": {"reward_shaping": True},
    "power": {"token_reward": "power", "token_reward_kwargs": {"power": 1.0}},
    "mean log-probability": {"token_reward": "mean_logprob"},
    "no critic": {"advantage_estimator": "reinforce++"},
    "several generations": {"num_generations": 2},
    "two passes": {"num_ppo_epochs": 2},
    "adaptive KL": {"kl_target": 1.0},
    "standardized scores": {"normalize_scores": True, "whiten_rewards": True},
    "warm-up": {"critic_warmup_steps": 2},
    "off-loaded": {"offload_frozen": True},
    "checkpointing": {"gradient_checkpointing": True},
    "cut": {"top_p": 0.9, "top_k": 20, "temperature": 0.7},
}


def finite(run: Any) -> bool:
    numbers = [x for row in run.state.log_history for x in row.values() if isinstance(x, float)]
    return bool(numbers) and all(map(math.isfinite, numbers))


@pytest.fixture(params=["whole", "lora"])
def adapter(request: Any) -> dict[str, Any]:
    """Arguments of a trainer."""
    return {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if request.param == "lora" else {}


@pytest.mark.parametrize("settings", ONLINE.values(), ids=ONLINE)
def test_an_online_run(trainer: Callable[..., RTOTrainer], settings: dict[str, Any], adapter: dict[str, Any]) -> None:
    run = trainer(bf16=True, max_steps=4, **settings, **adapter)
    run.train()
    assert run.state.global_step == 4
    assert finite(run)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_preferences(
    tiny_folder: Path, pairs: Dataset, tmp_path: Path, loss: str, adapter: dict[str, Any]
) -> None:
    args = PreferenceConfig(
        output_dir=str(tmp_path / "run"),
        loss=loss,
        bf16=True,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    run = PreferenceTrainer(str(tiny_folder), args, train_dataset=pairs, **adapter)
    run.train()
    assert run.state.global_step == 2
    assert finite(run)
