"""recipes/paper, recipes/rewards: each is run, stage by stage, with tiny random models in the hub's place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)

from rto.pipeline import Pipeline
from rto.recipe import folder_of, load_recipe

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
QUICK = ("rto", "simpo")
SMALL: dict[str, Any] = {
    "completion_length": 16,
    "prefer.per_device_train_batch_size": 4,
    "prefer.max_steps": 2,
    "prefer.max_length": 120,
    "prefer.bf16": False,
    "reward.per_device_train_batch_size": 4,
    "reward.max_steps": 2,
    "reward.max_length": 120,
    "reward.bf16": False,
    "train.per_device_train_batch_size": 8,
    "train.num_mini_batches": 2,
    "train.num_ppo_epochs": 1,
    "train.total_episodes": 8,
    "train.max_prompt_length": 100,
    "train.bf16": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversational pairs and prompts, as the data sets of the recipes have them."""
    folder = tmp_path_factory.mktemp("rows")
    asked = [[{"role": "user", "content": f"Say {word}."}] for word in ("ab", "cab")]  # KTO needs another prompt
    answers = {
        "chosen": [{"role": "assistant", "content": "ab ab"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    files = {"pairs": [{"prompt": x, **answers} for x in asked] * 6, "prompts": [{"prompt": x} for x in asked] * 6}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: folder / f"{name}.jsonl" for name in files}


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: Any
) -> dict[str, str]:
    """A Llama with grouped heads and its own output layer, as Llama 3 has; a GPT-NeoX, which Pythia is."""
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    made = {"llama": tiny_model(tie_word_embeddings=False), "pythia": GPTNeoXForCausalLM(neox)}
    folders = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted([*PAPER.glob("*.yaml"), *PAPER.with_name("rewards").glob("*.yaml")])
    ],
)
def test_every_recipe_takes_two_steps(
    path: Path, rows: dict[str, Path], models: dict[str, str], tmp_path: Path
) -> None:
    model = models["pythia" if "pythia" in path.stem else "llama"]
    data = {
        f"data.{key}": {"path": str(rows[kind])}
        for kind, keys in {"pairs": ("pairs", "eval_pairs"), "prompts": ("prompts", "test_prompts")}.items()
        for key in keys
    }
    recipe = load_recipe(path, {"model": model, "reward_model": model, **data, **SMALL})
    pipeline = Pipeline(recipe, tmp_path, Console(quiet=True))
    pipeline.sft()
    for name in recipe.learners:
        pipeline.prefer(name)
    pipeline.reward()
    for name in recipe.methods:
        pipeline.train(name)
    started = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    for name in [*recipe.learners, *recipe.methods]:
        scores = name in recipe.learners and recipe.has_scalar_head(name)
        load = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        trained = load.from_pretrained(tmp_path / folder_of(name)).state_dict()
        if scores:  # its head is new, and starts at zero: nothing behind it has moved after one step
            trained = {"score.weight": trained["score.weight"]}
            started["score.weight"] = torch.zeros_like(trained["score.weight"])
        assert any(not torch.equal(trained[key], started[key]) for key in trained), name
    for name in recipe.methods:
        (row,) = [
            json.loads(x) for x in (tmp_path / folder_of(name) / "log.jsonl").read_text().split("\n") if "kl" in x
        ]
        own = {**recipe.train, **recipe.methods[name]}
        assert row["episodes"] == 8
        assert (row["share/token"] != 0) == (own["dpo_coef"] != 0)
        assert ("loss/value" in row) == (own.get("advantage_estimator", "gae") != "reinforce++")


def test_the_papers_settings() -> None:
    """The table of settings in the paper's appendix, on eight processes."""
    settings = {
        "ppo": (8e-7, 0.0),
        "rto": (5e-7, 0.05),
        "reinforce++": (5e-7, 0.0),
        "rto-reinforce++": (5e-7, 0.05),
    }
    for name, (rate, dpo_coef) in settings.items():
        recipe = load_recipe(PAPER / f"{name}.yaml")
        (own,) = recipe.methods.values()
        train = {**recipe.train, **own}
        assert (train["learning_rate"], train["dpo_coef"]) == (rate, dpo_coef)
        assert (train["kl_coef"], train["score_coef"], train["token_reward_clip"]) == (0.01, 1.0, 1.0)
        assert (8 * train["per_device_train_batch_size"], train["num_mini_batches"]) == (1024, 8)
        assert (train["value_learning_rate"], train["gamma"], train["lam"], train["cliprange"]) == (9e-6, 1, 0.95, 0.2)
    losses = {
        "dpo": {"beta": 0.1},
        "rdpo": {"beta": 0.1, "alpha": 0.001},
        "simpo": {"beta": 2.5, "gamma": 0.5},
        "tdpo": {"beta": 0.1, "alpha": 0.2},
    }
    for name, kwargs in losses.items():
        recipe = load_recipe(PAPER / f"{name}.yaml")
        (own,) = recipe.learners.values()
        prefer = {**recipe.prefer, **own}
        assert (prefer["loss"], prefer["loss_kwargs"]) == (name, kwargs)
        assert (prefer["learning_rate"], 8 * prefer["per_device_train_batch_size"]) == (5e-7, 256)
