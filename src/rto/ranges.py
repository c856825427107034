"""Numbers of configurations and the ranges they must lie in, NaN and infinity in none."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


def is_finite(x: float) -> bool:
    """Whether a float can hold the number: a whole number of JSON or of Python may be too large for any."""
    try:
        return math.isfinite(x)
    except OverflowError:
        return False


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval of numbers; an open end is outside of it."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return is_finite(x) and above and below

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"be in {'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"
        if self.low == 0:
            return "be positive" if self.open_low else "not be negative"
        return f"be at least {self.low:g}"


FINITE = Range()
POSITIVE = Range(low=0, open_low=True)
NOT_NEGATIVE = Range(low=0)
COUNT = Range(low=1)
SHARE = Range(low=0, high=1)
POSITIVE_SHARE = Range(low=0, high=1, open_low=True)
DECAY = Range(low=0, high=1, open_high=True)


def check_ranges(of: object, **ranges: Range) -> None:
    """Look at attributes of an object; None, where an attribute may be it, is in every range.

    Raises:
        ValueError: one is out of its range; the message names it.
    """
    for name, allowed in ranges.items():
        value = getattr(of, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not is_finite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if value not in allowed:
            raise ValueError(f"{name} must {allowed}, got {value}")


ADAPTER = {"r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": SHARE}
"""Ranges of PEFT's ``LoraConfig``."""
TRAINING = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "warmup_steps": NOT_NEGATIVE,
    "label_smoothing_factor": DECAY,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "logging_steps": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "eval_steps": NOT_NEGATIVE,
    "seed": NOT_NEGATIVE,
    "data_seed": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "max_length": COUNT,
    "dataset_num_proc": COUNT,
    "eval_accumulation_steps": COUNT,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "center_rewards_coefficient": NOT_NEGATIVE,
}
"""Ranges of `transformers.TrainingArguments`, and of what TRL's configurations add."""


def check_arguments(args: Any, ranges: Mapping[str, Range] = TRAINING) -> None:
    """Look at every number of a configuration: at those with a range, and that no other is NaN or infinite.

    Raises:
        ValueError: a number is out of its range; the message names it.
    """
    named = {f.name: getattr(args, f.name, None) for f in fields(args)}
    check_ranges(args, **{name: allowed for name, allowed in ranges.items() if name in named})
    for name, value in named.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
