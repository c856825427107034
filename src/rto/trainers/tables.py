"""The completions of training as a table in TensorBoard and Weights & Biases, beside the numbers that go there."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler


class CompletionsTable(TrainerCallback):
    """After each log, hands the new rows of ``completions.jsonl`` to the writers that the run reports to.

    It imports no tracker: it uses those that ``report_to`` has started, and does nothing without them. A row is told
    at the step that its rollout was drawn at.

    Args:
        callbacks: the trainer's, among which the trackers are.
    """

    def __init__(self, callbacks: CallbackHandler) -> None:
        self.callbacks, self._read = callbacks, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What a run that is resumed has told already is not told again."""
        path = _file(args)
        self._read = path.stat().st_size if path.is_file() else 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell what is new."""
        trackers = [c for c in self.callbacks.callbacks if isinstance(c, TensorBoardCallback | WandbCallback)]
        if not state.is_world_process_zero or not trackers or not _file(args).is_file():
            return
        with _file(args).open("rb") as file:
            file.seek(self._read)
            rows = [json.loads(line) for line in file]
            self._read = file.tell()
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("tokens", "token_rewards")))
        cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
        for tracker in trackers:
            if isinstance(tracker, WandbCallback):
                if tracker._wandb is not None and tracker._wandb.run is not None:
                    tracker._wandb.log({"completions": tracker._wandb.Table(columns=names, data=cells)})
            elif tracker.tb_writer is not None:
                tracker.tb_writer.add_text("completions", markdown(names, cells), rows[-1]["step"])


def markdown(names: list[str], rows: list[list[Any]]) -> str:
    """A table whose cells are text: a model's output is neither Markdown nor HTML, and a line break ends no row."""
    lines = [names, ["---"] * len(names), *([_escaped(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    marked = "".join(f"&#{ord(c)};" if c in "|\\`*_[]<>&#~!\"'" else c for c in text)
    return "<br>".join(marked.splitlines())


def _cell(x: Any) -> Any:
    return json.dumps(x, ensure_ascii=False) if isinstance(x, list | dict) else x


def _file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / "completions.jsonl"
