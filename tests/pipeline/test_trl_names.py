"""Every argument of TRL's preference and on-line trainers is taken, put where it belongs, or refused with a remedy."""

import re
from contextlib import nullcontext
from dataclasses import MISSING, fields
from typing import Any

import pytest
import trl

from rto import PreferenceConfig, RTOConfig
from rto.cli import DataArguments
from rto.trl_names import ONLINE, PREFERENCE, ROWS, As, Not

PPO = {
    *("learning_rate", "dataset_num_proc", "num_mini_batches", "total_episodes", "local_rollout_forward_batch_size"),
    *(
        "num_sample_generations",
        "response_length",
        "stop_token",
        "stop_token_id",
        "temperature",
        "missing_eos_penalty",
    ),
    *("sft_model_path", "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size"),
    *(
        "local_mini_batch_size",
        "mini_batch_size",
        "push_to_hub",
        "reward_model_path",
        "model_adapter_name",
        "exp_name",
    ),
    *(
        "ref_adapter_name",
        "num_ppo_epochs",
        "whiten_rewards",
        "kl_coef",
        "kl_estimator",
        "cliprange",
        "vf_coef",
        "lam",
    ),
    *("cliprange_value", "gamma", "ds3_gather_for_generation"),
}
"""Fields of ``PPOConfig`` beside those of `transformers.TrainingArguments`, in TRL 1.12, the last that had it."""
THEIRS = {
    "DPOConfig": PreferenceConfig,
    "KTOConfig": PreferenceConfig,
    "GRPOConfig": RTOConfig,
    "RLOOConfig": RTOConfig,
}
REFUSED = [
    (kind, f)
    for kind, ours in THEIRS.items()
    for f in fields(getattr(trl, kind))
    if isinstance(ours.trl_names.get(f.name), Not)
]


def default(f: Any) -> Any:
    return f.default_factory() if f.default is MISSING and f.default_factory is not MISSING else f.default


@pytest.mark.parametrize("kind", THEIRS)
def test_no_name_of_theirs_is_unknown(kind: str) -> None:
    ours = THEIRS[kind]
    known = {f.name for f in fields(ours)} | ours.trl_names.keys()
    assert {f.name for f in fields(getattr(trl, kind))} <= known


def test_no_name_of_ppo_is_unknown() -> None:
    assert {f.name for f in fields(RTOConfig)} | ONLINE.keys() >= PPO


def test_no_name_of_the_scripts_is_unknown() -> None:
    assert {f.name for f in fields(trl.ScriptArguments)} <= {f.name for f in fields(DataArguments)} | ROWS.keys()


def test_the_tables_name_nothing_of_ours() -> None:
    """A name that both have is ours; what a name stands for is a field here."""
    for kind, table in ((PreferenceConfig, PREFERENCE), (RTOConfig, ONLINE), (DataArguments, ROWS)):
        names = {f.name for f in fields(kind)}
        assert not names & table.keys()
        assert {x.name for x in table.values() if isinstance(x, As)} <= names


@pytest.mark.parametrize(("kind", "f"), REFUSED, ids=[f"{kind}.{f.name}" for kind, f in REFUSED])
def test_their_defaults_that_ask_for_nothing_pass(kind: str, f: Any) -> None:
    """Or are refused with what to set: those that ask for something."""
    meant = pytest.raises(ValueError, match=f"{f.name}=.*{re.escape(str(THEIRS[kind].trl_names[f.name]))}")
    with meant if f.name in MEANT else nullcontext():
        THEIRS[kind](output_dir="x", use_cpu=True, **{f.name: default(f)})


MEANT = {
    "truncation_mode",  # TRL cuts rows by default
    "scale_rewards",
}
"""Defaults of TRL that ask for what is not done here."""


@pytest.mark.parametrize("table", [PREFERENCE, ONLINE, ROWS])
def test_what_is_refused_says_what_to_do(table: dict[str, As | Not]) -> None:
    kind = {id(PREFERENCE): PreferenceConfig, id(ONLINE): RTOConfig}.get(id(table))
    for name, theirs in table.items():
        if isinstance(theirs, Not):
            with pytest.raises(ValueError, match=name) as refused:
                (kind or DataArguments)(**{"output_dir": "x"} if kind else {"dataset_name": "x"}, **{name: object()})
            assert theirs.instead in str(refused.value)


def test_values_land_where_they_belong() -> None:
    preference = PreferenceConfig(output_dir="x", use_cpu=True, beta=0.3, loss_type=["sigmoid"], label_smoothing=0.1)
    assert preference.make_loss() == type(preference.make_loss())(beta=0.3, label_smoothing=0.1)
    assert preference.loss == "dpo"
    assert PreferenceConfig(output_dir="x", use_cpu=True, loss_type="ipo", beta=0.2).make_loss().beta == 0.2
    kto = PreferenceConfig(
        output_dir="x", use_cpu=True, loss="kto", loss_kwargs='{"beta": 0.5}', undesirable_weight=1.33
    ).make_loss()
    assert (kto.beta, kto.undesirable_weight) == (0.5, 1.33)
    config = RTOConfig(output_dir="x", use_cpu=True, beta=0.04, epsilon=0.1, num_iterations=2, response_length=53)
    assert (config.kl_coef, config.cliprange, config.num_ppo_epochs, config.max_completion_length) == (
        0.04,
        0.1,
        2,
        53,
    )


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        RTOConfig(output_dir="x", use_cpu=True, beta=0.04, kl_coef=0.01)
    with pytest.raises(ValueError, match="loss_kwargs"):
        PreferenceConfig(output_dir="x", use_cpu=True, beta=0.04, loss_kwargs={"beta": 0.1})
    with pytest.raises(ValueError, match="hinge"):
        PreferenceConfig(output_dir="x", use_cpu=True, loss_type="hinge")
