"""Alarms while a run trains: told once each, and if asked, the end of it."""

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rto.alarms import Alarm, Bounds, check

logger = logging.getLogger(__name__)


@dataclass
class AlarmArguments:
    """What every stage's configuration says of its alarms.

    Attributes:
        stop_on_alarm: end training at the first alarm of `rto.alarms`; an `AlarmCallback` of one's own sets bounds.
    """

    stop_on_alarm: bool = field(
        default=False, metadata={"help": "End training when KL, held-out loss, … pass a bound (rto.alarms)."}
    )


class AlarmCallback(TrainerCallback):
    """Watches what a trainer logs and warns when a bound is passed, with what to do about it.

    It keeps nothing of its own: what it knows is the trainer's log, which a checkpoint holds, so a resumed run warns
    as the whole one would have.

    Args:
        bounds: None means the defaults of `rto.alarms.Bounds`.
        stop: end training at the first alarm; what is trained so far is saved as at any other end.
    """

    def __init__(self, bounds: Bounds | None = None, *, stop: bool = False) -> None:
        self.bounds, self.stop = bounds or Bounds(), stop

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the log with its new row; every process sees the same numbers and decides alike."""
        known = {alarm.name for alarm in check(state.log_history[:-1], self.bounds)}
        found = check(state.log_history, self.bounds)
        if state.is_world_process_zero:
            for alarm in found:
                if alarm.name not in known:
                    logger.warning("%s", said(alarm, state.global_step))
        if found and self.stop:
            if state.is_world_process_zero:
                logger.warning("training stops at step %d: stop_on_alarm is set", state.global_step)
            control.should_training_stop = True


def said(alarm: Alarm, step: int) -> str:
    """An alarm in a line."""
    return f"step {step}: {alarm.reading}: {alarm.remedy}"
