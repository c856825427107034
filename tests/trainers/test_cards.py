"""What a model card says of a configuration; `test_cli` reads the cards that the four stages write."""

from collections import Counter
from types import SimpleNamespace

import pytest
import trl

from rto import RTOConfig
from rto.credit import METHODS, Credit
from rto.functional.preference import LOSSES
from rto.trainers.cards import BIBLIOGRAPHY, _hub_name, card, method_of, settings
from rto.trainers.config import settings_of
from rto.trainers.preference import PreferenceConfig


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_paper_is_called_by_its_name(name: str) -> None:
    args = RTOConfig(output_dir="x", use_cpu=True, **settings_of(Credit.of(name)))
    assert method_of(args).tag == name
    assert ("rto" in method_of(args).cites) == (args.dpo_coef != 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_cited(loss: str) -> None:
    method = method_of(PreferenceConfig(output_dir="x", use_cpu=True, loss=loss))
    assert loss.rstrip("1") in method.cites


def test_a_loss_is_told_with_the_values_that_nobody_gave() -> None:
    args = PreferenceConfig(output_dir="x", use_cpu=True, loss="rdpo", loss_kwargs='{"alpha": 0.25}')
    assert settings(args)["loss_kwargs"] == {"beta": 0.1, "alpha": 0.25}
    text = card(trainer(args=args), "mine")
    assert "| `loss_kwargs` | beta 0.1, alpha 0.25 |" in text
    assert " None |" not in text


def trainer(**given: object) -> SimpleNamespace:
    args = RTOConfig(output_dir="/home/somebody/runs/mine", use_cpu=True, model_init_kwargs={"token": "secret"})
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="owner/base"))
    state = SimpleNamespace(global_step=3, log_history=[{"kl": 1.0, "score": 2.0}, {"kl": 4.0}, {"eval_score": 5.0}])
    accelerator = SimpleNamespace(unwrap_model=lambda x: x)
    own = {"args": args, "model": model, "state": state, "accelerator": accelerator, "processing_class": None}
    skipped = {"train_dataset": SimpleNamespace(counts=Counter({"without a prompt": 2}))}
    return SimpleNamespace(**{**own, "train_dataset": [1, 2], "skipped": skipped, **given})


def test_a_card_says_what_others_may_know() -> None:
    told = trainer(data_names=["owner/prompts", "/home/somebody/prompts.jsonl"])
    text = card(told, "mine")
    assert "secret" not in text
    assert "/home/somebody" not in text
    assert "base_model: owner/base" in text
    assert "datasets:\n- owner/prompts\n" in text
    assert "Data: owner/prompts, prompts.jsonl, 2 rows." in text
    assert "Left out of train_dataset: 2 without a prompt." in text
    told_of = {line for line in text.splitlines() if line.startswith(("| `score`", "| `kl`", "| `eval_score`"))}
    assert told_of == {"| `kl` | 4 |", "| `score` | 2 |", "| `eval_score` | 5 |"}
    assert all(f"eprint        = {{{BIBLIOGRAPHY[key][3]}}}" in text for key in ("rto", "ppo", "dpo"))
    assert "model_init_kwargs" not in settings(told.args)
    assert settings(told.args)["dpo_coef"] == told.args.dpo_coef


def test_a_configuration_of_trl_has_a_card_too() -> None:
    args = trl.RewardConfig(output_dir="x", use_cpu=True, bf16=False)
    assert settings(args)["learning_rate"] == args.learning_rate
    assert method_of(args).task == "text-classification"


def test_what_is_a_hub_name() -> None:
    names = {"owner/base": True, "trl-lib/tldr": True, "gpt2": False, "/a/b": False, "./a": False, "a/b/c": False}
    assert {name: _hub_name(name) is not None for name in names} == names
