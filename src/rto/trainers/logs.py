"""What a run tells while it trains: ``log.jsonl``, and a progress bar."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rto.files import write_atomically

logger = logging.getLogger(__name__)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows of a JSON-lines file, a last line that a kill cut off, and damaged lines, which are told."""
    if not path.exists():
        return
    kept, damaged = [], []
    for i, line in enumerate(path.read_bytes().split(b"\n")[:-1]):  # what follows the last line break is half a line
        try:
            text = line.decode()
            if keep(json.loads(text)):
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(i + 1)
    if damaged:
        what = "%s: %d damaged lines are dropped, the first is line %d: they hold no JSON row with a step"
        logger.warning(what, path, len(damaged), damaged[0])
    write_atomically(path, "".join(kept))


def tell_quietly(trainer: Trainer) -> None:
    """Log to ``log.jsonl`` and a progress bar, not to the terminal."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress)
    trainer.add_callback(JsonLines)


class JsonLines(TrainerCallback):
    """Every log as one line of ``log.jsonl`` in the run folder."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the run's logs back to the step that training starts from: what follows is written again."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            step = state.global_step  # an attempt that was stopped has written its summary
            keep_lines(folder / "log.jsonl", lambda row: row["step"] <= step and "train_runtime" not in row)
            keep_lines(folder / "completions.jsonl", lambda row: row["step"] < step + (row.get("split") == "eval"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a line."""
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / "log.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class Progress(ProgressCallback):
    """The progress bar of `transformers`, with a few numbers beside it instead of a dictionary below it."""

    shown: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "accuracy": "acc",
        "score": "score",
        "kl": "kl",
        "completions/mean_length": "len",
    }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the few."""
        if state.is_world_process_zero and self.training_bar is not None:
            found = {short: f"{logs[name]:.3g}" for name, short in self.shown.items() if logs and name in logs}
            self.training_bar.set_postfix(found)
