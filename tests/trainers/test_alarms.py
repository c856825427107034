"""Alarms against logs whose means are computed by hand, and in training."""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from rto import RTOTrainer
from rto.alarms import RULES, Bounds, check
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


WRONG = {
    # alarm: a log that sets it off, its value, and the same log within bounds
    "kl": (log(9, kl=lambda i: 2.0 * i), (8 + 10 + 12 + 14 + 16) / 5 / 20, log(9, kl=9.9)),
    "token_share": (log(9, share__token=0.95), 0.95, log(9, share__token=0.95, share__score=0.0)),
    "explained_variance": (log(15, explained_variance=-0.5), -0.5, log(14, explained_variance=-0.5)),
    "eos_fall": (log(9, completions__eos_rate=lambda i: 1 - i / 10), 0.8 - 0.4, log(9, completions__eos_rate=0.1)),
    "clip_ratio": (log(9, clip__ratio=0.5), 0.5, log(9, clip__ratio=lambda i: 0.9 if i < 4 else 0.2)),
    "clip_token_reward": (log(9, clip__token_reward=0.75), 0.75, log(9, clip__token_reward=0.5)),
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
    assert check(rows, Bounds(**{name: -2.0 if name == "explained_variance" else 2.0})) == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 9.0, "kl": 99.0}],  # not of a rollout
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
