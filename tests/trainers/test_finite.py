"""A run stops at the first number that is not finite: it names it, keeps its checkpoint and writes no model."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.finite import NotFiniteError, StoppedElsewhereError, check_files, together
from rto.functional.preference import LOSSES
from rto.models.scalars import check_critic
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers.supervised import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

SETTINGS = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 1, "logging_steps": 1}
DEMOS = [{"prompt": w, "completion": w + w} for w in ("ab", "cab", "back", "dab", "a", "bac", "crab", "jab")]
PAIRS = [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in ("ab", "cab", "back", "dab")]


def spoil(trainer: Any, step: int) -> None:
    """One weight is NaN when an update begins."""
    original = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            with torch.no_grad():
                next(trainer.model.parameters()).view(-1)[0] = torch.nan
        return original(*args, **kwargs)

    trainer.training_step = training_step


def sft(folder: str, output: Path) -> SFTTrainer:
    args = SFTConfig(output_dir=str(output), per_device_train_batch_size=2, **SETTINGS)
    return SFTTrainer(folder, args, train_dataset=Dataset.from_list(DEMOS))


def reward(folder: str, output: Path) -> RewardTrainer:
    args = RewardConfig(output_dir=str(output), per_device_train_batch_size=1, **SETTINGS)
    return RewardTrainer(folder, args, train_dataset=Dataset.from_list(PAIRS))


def prefer(folder: str, output: Path) -> PreferenceTrainer:
    args = PreferenceConfig(output_dir=str(output), per_device_train_batch_size=1, **SETTINGS)
    return PreferenceTrainer(folder, args, train_dataset=Dataset.from_list(PAIRS))


def on_line(folder: str, output: Path, **kwargs: Any) -> RTOTrainer:
    own = {"reward_funcs": lambda completions: list(map(float, map(len, completions)))}
    own |= {name: kwargs.pop(name) for name in ("reward_funcs", "dpo_model") if name in kwargs}
    small = {"per_device_train_batch_size": 4, "num_mini_batches": 2, "max_completion_length": 4, "dpo_coef": 0.0}
    args = RTOConfig(output_dir=str(output), **SETTINGS | small | kwargs)
    return RTOTrainer(folder, args, train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in DEMOS]), **own)


@pytest.mark.parametrize("build", [sft, reward, prefer, on_line])
@pytest.mark.parametrize("filtered", [True, False])
def test_training_stops_and_keeps_the_last_checkpoint(
    build: Callable, filtered: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    run = build(str(tiny_folder), tmp_path)
    run.args.logging_nan_inf_filter = filtered
    spoil(run, 1)
    with pytest.raises(NotFiniteError, match=r"step 2: the .* of the \w+ is not finite in row \d \(.+\)"):
        run.train()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in rows] in ([1], [])  # no loss of 0 where there was none
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    check_files(tmp_path / "checkpoint-1")
    with pytest.raises(NotFiniteError, match=r"weight .* is not finite: no model is written"):
        run.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_that_an_update_has_spoilt_are_not_saved(tiny_folder: Path, tmp_path: Path) -> None:
    """The last update of a run: no loss is looked at after it."""
    run = prefer(str(tiny_folder), tmp_path)
    run.args.max_steps = 1
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda *_: next(run.model.parameters()).data.view(-1)[:1].fill_(torch.inf))
    with pytest.raises(NotFiniteError, match=r"step 1: the weight policy\..* is not finite: no model is written"):
        run.train()
    assert not list(tmp_path.rglob("model*.safetensors"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_names_the_prompt(temperature: float, tiny_model: Callable) -> None:
    model = tiny_model(tie_word_embeddings=False)
    sampler = TransformersSampler(
        config=SamplingConfig(max_completion_length=3, temperature=temperature), eos_ids=(2,), pad_id=0
    )
    sampler.check(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    sampler(model, [[5, 6]], seed=0)  # token 9 is not read
    with pytest.raises(NotFiniteError, match="the logits of the sampled model are not finite, row 1"):
        sampler(model, [[5, 6], [7, 9], [4]], seed=0)


def spoilt(folder: Path, out: Path, tokenizer: Any, **changes: float) -> str:
    """A copy of a model whose weights at the end are NaN: its log-probabilities are."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"model\.safetensors: the weight model\.norm\.weight"):
        check_files(out)
    return str(out)


def test_models_that_are_not_finite_are_named_before_the_first_step(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The policy that `train` would sample from, and the reference that `prefer` reads beforehand."""
    bad = spoilt(tiny_folder, tmp_path / "bad", tokenizer)
    with pytest.raises(NotFiniteError, match=rf"the logits of the sampled model {bad} are not finite: look at"):
        on_line(bad, tmp_path / "a").train()
    args = PreferenceConfig(output_dir=str(tmp_path / "b"), per_device_train_batch_size=1, **SETTINGS)
    with pytest.raises(
        NotFiniteError,
        match=r"before step 1: the log-probability of the reference is not finite in row 0 \(prompt 'ab'",
    ):
        PreferenceTrainer(str(tiny_folder), args, ref_model=bad, train_dataset=Dataset.from_list(PAIRS))
    assert not list((tmp_path / "b").rglob("*.safetensors"))


RATES: dict[str, list[str]] = {
    "sft": ["sft"],
    "reward": ["reward"],
    **{f"prefer, {loss}": ["prefer", "--loss", loss] for loss in LOSSES},
    "train": ["train", "--value_learning_rate", "1e-3"],
    "train, its critic": ["train", "--learning_rate", "1e-3", "--value_learning_rate", "1e30"],
}


@pytest.mark.parametrize("learner", RATES)
def test_every_learner_stops_at_a_rate_beyond_all_bounds(
    learner: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command: one line with step, quantity and model, exit code 2, and no model."""
    from rto.cli import main

    rows = {"sft": DEMOS, "train": [{"prompt": row["prompt"]} for row in DEMOS]}.get(RATES[learner][0], PAIRS * 2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"train": "--dpo_model {0} --score_coef 0 --max_completion_length 4 --num_mini_batches 2 --value_model {0}"}
    words = [
        *("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--use_cpu", "true"),
        *RATES[learner][1:],
        *own.get(RATES[learner][0], "").format(tiny_folder).split(),
        *("--model_name_or_path", str(tiny_folder), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--num_train_epochs", "3"),
        *("--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"),
    ]
    flags = dict(zip(words[::2], words[1::2], strict=True))  # the last one counts
    assert main([RATES[learner][0], *(word for pair in flags.items() for word in pair)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rto ")]
    assert len(said) == 1
    assert re.match(
        rf"rto {RATES[learner][0]}: step \d+: the .+ of the (policy|model|critic|reference|DPO model)", said[0]
    )
    assert "not finite" in said[0]
    assert not list((tmp_path / "out").rglob("*model.safetensors"))


def test_what_is_read_is_named(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    bad = spoilt(tiny_folder, tmp_path / "bad", tokenizer)
    with pytest.raises(NotFiniteError, match=r"step 1: the token reward of the DPO model is not finite in row 0 \(p"):
        on_line(str(tiny_folder), tmp_path / "a", dpo_coef=0.1, dpo_model=bad).train()
    huge = {"reward_funcs": lambda completions: [0.0, 1e39, 0.0, 0.0][: len(completions)]}  # inf in float32
    with pytest.raises(NotFiniteError, match=r"score of <lambda> \(as float32\) is not finite in row 1"):
        on_line(str(tiny_folder), tmp_path / "c", **huge).train()


def test_a_critic_of_weights_that_are_not_finite_is_called_that(tiny_model: Callable) -> None:
    critic = LlamaForSequenceClassification(tiny_model(num_labels=1).config)
    check_critic(critic)
    with torch.no_grad():
        critic.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="its hidden states are not finite"):
        check_critic(critic)


@pytest.mark.parametrize("process", [0, 1])
def test_all_processes_go_on_or_none(process: int) -> None:
    """The one that failed says why; the others say which one it was."""

    class Two:
        num_processes, process_index, device = 2, process, torch.device("cpu")

        def __init__(self, other_failed: bool) -> None:
            self.other = torch.tensor([float(other_failed)])

        def gather(self, own: torch.Tensor) -> torch.Tensor:
            return torch.cat([own, self.other] if process == 0 else [self.other, own])

    done = []
    with together(Two(False)):
        done.append("both")
    with pytest.raises(OSError, match="full"), together(Two(False)):
        raise OSError("full")
    with (
        pytest.raises(StoppedElsewhereError, match=f"stopped with process {1 - process}, which says why"),
        together(Two(True)),
    ):
        done.append("here")
    assert done == ["both", "here"]


# --- ranges

MAY_BE_NEGATIVE = {
    *("max_steps", "score_coef", "router_aux_loss_coef", "save_total_limit", "dataset_num_proc", "pad_to_multiple_of"),
    *(
        "eval_delay",
        "eval_accumulation_steps",
        "ddp_bucket_cap_mb",
        "ddp_timeout",
        "local_rank",
        "torch_empty_cache_steps",
    ),
}
"""Coefficients of a sign of their own, and what the libraries themselves read or check."""


@pytest.mark.parametrize("config", [RTOConfig, PreferenceConfig, SFTConfig, RewardConfig])
def test_no_number_is_nan_infinite_or_senseless(config: Any, tmp_path: Path) -> None:
    """A walk over every number that a configuration has."""
    kinds = {f.name: str(f.type) for f in fields(config) if "int" in str(f.type) or "float" in str(f.type)}
    assert {"learning_rate", "num_train_epochs", "weight_decay"} < set(kinds)
    for name, kind in kinds.items():
        for value in (math.nan, math.inf, -1.0) if "float" in kind else (-1,):
            if value == -1 and name in MAY_BE_NEGATIVE:
                continue
            settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, name: value}
            with pytest.raises((ValueError, TypeError)):
                config(**settings)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2"),
        ({"lam": -5.0}, r"lam must be in \[0, 1\], got -5"),
        ({"cliprange": -0.2}, "cliprange must be positive, got -0.2"),
        ({"kl_target": 0.0}, "kl_target must be positive, got 0"),
        ({"total_episodes": 0}, "total_episodes must be at least 1, got 0"),
        ({"dpo_coef": float("nan")}, "dpo_coef must be a finite number, got nan"),
        ({"reward_weights": [float("nan")]}, "reward_weights must be finite numbers"),
    ],
)
def test_coefficients_of_the_algorithm(given: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        RTOConfig(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize("loss", LOSSES)
def test_fields_of_losses(loss: str) -> None:
    for f in fields(LOSSES[loss]):
        for value in (float("nan"), float("inf"), -1.0):
            with pytest.raises(ValueError, match=f"{f.name} must"):
                LOSSES[loss](**{f.name: value})
    with pytest.raises(ValueError, match="beta must be positive"):
        LOSSES[loss](beta=0.0)
