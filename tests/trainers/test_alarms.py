"""Alarms against logs whose means are computed by hand, and in training."""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from datasets import Dataset

from rto import (
    PreferenceConfig,
    PreferenceTrainer,
    RewardConfig,
    RewardTrainer,
    RTOConfig,
    RTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rto.alarms import RULES, Bounds, check
from rto.functional.preference import Completions, PairLoss
from rto.trainers.alarms import AlarmCallback

FINE = {
    "kl": 2.0,
    "completions/mean_length": 20.0,
    "completions/eos_rate": 0.9,
    "share/token": 0.4,
    "share/score": 0.5,
    "explained_variance": 0.3,
    "clip/ratio": 0.1,
    "clip/token_reward": 0.1,
}


def log(n: int, **own: Any) -> list[dict[str, Any]]:
    """Rollouts that are fine, with other columns given as numbers or as functions of the rollout."""
    rows = []
    for i in range(n):
        named = {name.replace("__", "/"): x(i) if callable(x) else x for name, x in own.items()}
        rows.append({"episodes": 8 * (i + 1), **FINE, **named})
    return rows


def updates(n: int, **own: Any) -> list[dict[str, Any]]:
    """Rows of a stage over pairs, ten updates each, that are fine; other columns as in `log`."""
    fine = {"loss": 0.6, "accuracy": 0.7, "logratio/chosen": -0.05, "grad_norm": 1.0}
    rows = []
    for i in range(n):
        named = {name.replace("__", "/"): x(i) if callable(x) else x for name, x in own.items()}
        rows.append({"step": 10 * (i + 1), **fine, **named})
    return rows


def held_out(*losses: float, accuracy: float = 0.65) -> list[dict[str, Any]]:
    """Rows of training with an evaluation after each."""
    rows = updates(len(losses), accuracy=0.9)
    evaluated = [{"step": 10 * (i + 1), "eval_loss": x, "eval_accuracy": accuracy} for i, x in enumerate(losses)]
    return [row for pair in zip(rows, evaluated) for row in pair]


WRONG = {
    # alarm: a log that sets it off, its value, and the same log within bounds
    "kl": (log(9, kl=lambda i: 2.0 * i), (8 + 10 + 12 + 14 + 16) / 5 / 20, log(9, kl=9.9)),
    "token_share": (log(9, share__token=0.95), 0.95, log(9, share__token=0.95, share__score=0.0)),
    "explained_variance": (log(15, explained_variance=-0.5), -0.5, log(14, explained_variance=-0.5)),
    "eos_fall": (log(9, completions__eos_rate=lambda i: 1 - i / 10), 0.8 - 0.4, log(9, completions__eos_rate=0.1)),
    "clip_ratio": (log(9, clip__ratio=0.5), 0.5, log(9, clip__ratio=lambda i: 0.9 if i < 4 else 0.2)),
    "clip_token_reward": (log(9, clip__token_reward=0.75), 0.75, log(9, clip__token_reward=0.5)),
    "chosen_fall": (updates(7, logratio__chosen=lambda i: -i / 5), (0.4 + 0.6 + 0.8 + 1 + 1.2) / 5, updates(7)),
    "pair_accuracy": (updates(3, accuracy=lambda i: 0.8 - 0.3 * i), 0.35, updates(3, accuracy=lambda i: min(i, 0.5))),
    "held_out_gap": (held_out(0.6, 0.6, accuracy=0.5), 0.4, held_out(0.6, 0.6)),
    "held_out_rise": (held_out(0.6, 0.5, 0.7), 0.4, held_out(0.6, 0.5, 0.54)),
    "grad_norm": (
        updates(15, grad_norm=lambda i: 2.0 if i < 10 else 50.0),
        25.0,
        updates(14, grad_norm=lambda i: 2.0 if i < 10 else 50.0),
    ),
}


def test_every_rule_and_every_bound_is_tried() -> None:
    assert [rule.name for rule in RULES] == list(WRONG)
    assert {field.name for field in fields(Bounds)} == {*WRONG, "window", "warm_up"}


@pytest.mark.parametrize("name", WRONG)
def test_an_alarm_says_what_is_beyond_which_bound(name: str) -> None:
    rows, value, within = WRONG[name]
    (alarm,) = check(rows)
    assert (alarm.name, alarm.bound) == (name, getattr(Bounds(), name))
    assert alarm.value == pytest.approx(value)
    assert f"{value:.3g}, bound" in alarm.reading
    assert alarm.remedy
    assert check(within) == []
    assert check(rows, Bounds(**{name: None})) == []
    assert check(rows, Bounds(**{name: -2.0 if name in ("explained_variance", "pair_accuracy") else 99.0})) == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 9.0, "kl": 99.0}],  # not of a rollout
        [{"step": i, "eval_loss": None, "accuracy": "all", "logratio/chosen": float("nan")} for i in range(20)],
        [{"step": i, "grad_norm": 0.0, "eval_loss": -1.0} for i in range(20)],
        [{"episodes": 8}],
        [{"episodes": 8, "kl": None, "clip/ratio": float("nan"), "completions/mean_length": 0.0}] * 9,
        [{"episodes": 8, "kl": "high", "share/token": []}] * 9,
    ],
)
def test_what_was_not_logged_sets_nothing_off(rows: list[dict[str, Any]]) -> None:
    assert check(rows) == []


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="window is at least 1"):
        Bounds(window=0)


def count(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def own(built: Any, **kwargs: Any) -> None:
    """Put a callback of one's own in the place of the one that every trainer has."""
    built.remove_callback(AlarmCallback)
    built.add_callback(AlarmCallback(**kwargs))


def test_training_tells_an_alarm_once_and_goes_on(trainer: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """A KL that is beyond its bound from the second rollout on, since the first is the reference's own."""
    built = trainer(total_episodes=40)
    own(built, bounds=Bounds(kl=1e-5, clip_token_reward=None))
    with caplog.at_level(logging.WARNING, logger="rto.trainers.alarms"):
        built.train()
    assert built.state.global_step == 10
    told = [record.getMessage() for record in caplog.records if record.name == "rto.trainers.alarms"]
    assert len([line for line in told if "KL from the reference" in line]) == 1
    assert told[0].startswith("step 4: KL from the reference, nats a token: ")


def test_training_stops_at_an_alarm_if_asked(trainer: Callable, caplog: pytest.LogCaptureFixture) -> None:
    built = trainer(total_episodes=40)
    own(built, bounds=Bounds(kl=1e-5, clip_token_reward=None), stop=True)
    with caplog.at_level(logging.WARNING, logger="rto.trainers.alarms"):
        built.train()
    assert built.state.global_step == 4
    assert "training stops at step 4" in caplog.text


def test_every_trainer_has_the_alarms(trainer: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Most token rewards of two models that have nothing in common are beyond the clip."""
    built = trainer(total_episodes=40, stop_on_alarm=True)
    with caplog.at_level(logging.WARNING, logger="rto.trainers.alarms"):
        built.train()
    assert built.state.global_step == 2
    assert "share of tokens with a clipped token reward" in caplog.text


def test_a_callback_of_ones_own_replaces_them(tiny_folder: Any, config: Callable, prompts: Any) -> None:
    mine = AlarmCallback(Bounds(kl=3.0))
    args = config(dpo_coef=0.0)
    built = RTOTrainer(str(tiny_folder), args, reward_funcs=count, train_dataset=prompts, callbacks=[mine])
    assert [c for c in built.callback_handler.callbacks if isinstance(c, AlarmCallback)] == [mine]


class Displacing:
    """A loss that makes the rejected side unlikely and the chosen side with it."""

    needs_reference, needs_ref_kl = True, False

    def __call__(self, chosen: Completions, rejected: Completions) -> PairLoss:
        down = chosen.logratio + 2 * rejected.logratio
        return PairLoss(down, chosen.logratio.detach(), rejected.logratio.detach())


def test_preference_learning_stops_at_an_alarm_if_asked(
    tiny_folder: Any, pairs: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    args = PreferenceConfig(
        output_dir=str(tmp_path / "run"),
        learning_rate=0.05,
        max_steps=8,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        stop_on_alarm=True,
    )
    built = PreferenceTrainer(str(tiny_folder), args, train_dataset=pairs, loss=Displacing())
    with caplog.at_level(logging.WARNING, logger="rto.trainers.alarms"):
        built.train()
    assert built.state.global_step < 8
    assert "fall of the preferred completions' log-probability" in caplog.text
    first, *_, last = (row for row in built.state.log_history if "logratio/chosen" in row)
    assert first["logratio/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert last["logratio/chosen"] < -0.5


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, PreferenceConfig, RTOConfig])
def test_every_stage_can_stop(kind: Any, tmp_path: Any) -> None:
    assert not kind(output_dir=str(tmp_path)).stop_on_alarm
    assert kind(output_dir=str(tmp_path), stop_on_alarm=True).stop_on_alarm


def test_the_supervised_stages_have_the_alarms(tiny_folder: Any, pairs: Any, tmp_path: Any) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "stop_on_alarm": True}
    demos = Dataset.from_list([{"prompt": "ab", "completion": "ba"}])
    for built in (
        SFTTrainer(str(tiny_folder), SFTConfig(**common), train_dataset=demos),
        RewardTrainer(str(tiny_folder), RewardConfig(**common), train_dataset=pairs),
    ):
        (alarms,) = (c for c in built.callback_handler.callbacks if isinstance(c, AlarmCallback))
        assert alarms.stop
