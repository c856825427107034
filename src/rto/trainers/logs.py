"""What a run tells while it trains: ``log.jsonl``, and a progress bar."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rto.batches import Rollout
from rto.data.pieces import drawn
from rto.files import write_atomically
from rto.functional.masked import AllReduce, masked_mean
from rto.rollout.rewards import Completed
from rto.trainers.alarms import AlarmCallback

logger = logging.getLogger(__name__)


def _says_more_than_a_fraction(record: logging.LogRecord) -> bool:
    """False for the library's warning that steps given as a share of training are no number of updates."""
    first, *rest = record.getMessage().split("\n")
    told = "do not match the ones in the `trainer_state.json`" in first and rest
    return not told or not all(re.match(r"\s*(logging|eval|save)_steps: 0\.\d+ \(from args\)", line) for line in rest)


logging.getLogger("transformers.trainer_utils").addFilter(_says_more_than_a_fraction)


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
    """Log to ``log.jsonl`` and a progress bar, not to the terminal; warn there when a bound is passed."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress)
    trainer.add_callback(JsonLines)
    if not any(isinstance(c, AlarmCallback) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(AlarmCallback(stop=getattr(trainer.args, "stop_on_alarm", False)))


def beginning(trainer: Any) -> str:
    """What training is about to read and to change, in a line."""
    weights = list(trainer.model.parameters())
    learning, every = (sum(p.numel() for p in weights if p.requires_grad or of) for of in (False, True))
    learns = f"{every:,} weights" if learning == every else f"{learning:,} of {every:,} weights"
    return f"{len(trainer.train_dataset):,} rows, {learns} learn"


class Phases:
    """Seconds of the phases of an iteration, by name; what was begun on the device is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, tokens: float) -> dict[str, float]:
        """Seconds of each phase, of all, and sampled tokens a second; the last two of whole iterations only."""
        found = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        if "sample" in self.seconds:  # false on the rest of a rollout that a checkpoint brought
            total = sum(self.seconds.values())
            found |= {"seconds/iteration": total, "tokens_per_second": tokens / total}
        return found


def mean_over(x: Float[Tensor, " B"], counted: Bool[Tensor, " B"] | None, all_reduce: AllReduce) -> Float[Tensor, ""]:
    """Mean over the rows of all processes; None counts all of them."""
    every = torch.ones_like(x, dtype=torch.bool) if counted is None else counted
    return masked_mean(x, every, all_reduce=all_reduce)


def score_metrics(
    scores: dict[str, Float[Tensor, " B"]], counted: Bool[Tensor, " B"] | None, all_reduce: AllReduce
) -> dict[str, Float[Tensor, ""]]:
    """Mean and deviation of each source's scores, where it gave one, and, under "", of their weighted sum.

    A source that gave none in this rollout is left out.
    """
    found: dict[str, Float[Tensor, ""]] = {}
    for name, x in scores.items():
        key = f"score/{name}" if name else "score"
        given = ~x.isnan() if counted is None else counted & ~x.isnan()
        if not all_reduce(given.sum().float()):
            continue
        mean = mean_over(x, given, all_reduce)
        found |= {key: mean, f"{key}_std": mean_over((x - mean).square(), given, all_reduce).sqrt()}
    return found


def length_metrics(
    lengths: Float[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    counted: Bool[Tensor, " B"] | None,
    all_reduce: AllReduce,
    gather: Callable[[Tensor], Tensor],
) -> dict[str, Float[Tensor, ""]]:
    """How long completions are, and how many ended by themselves."""
    everywhere = gather(lengths)
    if counted is not None:
        everywhere = everywhere[gather(counted)]
    return {
        "completions/mean_length": mean_over(lengths, counted, all_reduce),
        "completions/min_length": everywhere.min(),
        "completions/max_length": everywhere.max(),
        "completions/eos_rate": mean_over(ended.float(), counted, all_reduce),
    }


def write_completions(
    folder: Path,
    step: int,
    batch: Completed,
    scores: dict[str, Float[Tensor, " B"]],
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    evaluation: bool,
) -> None:
    """Add the first few completions of a rollout to ``completions.jsonl``; those of an evaluation say so.

    Where there is a token reward, its raw numbers stand beside the text of the tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, list[float | None]] = {
        f"score/{name}" if name else "score": [None if math.isnan(v) else v for v in x.tolist()]
        for name, x in scores.items()
    }
    with (folder / "completions.jsonl").open("a", encoding="utf-8") as file:
        for i in range(min(most, len(batch.prompts))):
            row = {"step": step, "prompt": batch.prompts[i], "completion": batch.completions[i]}
            row |= {"split": "eval"} if evaluation else {}
            row |= {name: column[i] for name, column in values.items()}
            if rollout.token_logratio is not None:
                rewards = rollout.token_logratio[i][rollout.mask[i]].tolist()
                row["tokens"] = drawn(tokenizer, batch.completion_ids[i])
                row["token_rewards"] = [float(f"{r:.6g}") for r in rewards]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
