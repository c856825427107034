"""What TRL's trainers are given here: numbers that are watched, checkpoints with their counters, our log."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rto.files import shown, write_atomically
from rto.trainers.cards import write_card
from rto.trainers.checkpoints import SealedCheckpoints
from rto.trainers.engine import unwrapped
from rto.trainers.logs import tell_quietly
from rto.trainers.precision import for_saving


class FromTRL(SealedCheckpoints):
    """Stands before one of TRL's trainers among the bases of a class."""

    _metrics: dict[str, Any]
    _total_train_tokens: int
    processing_class: Any

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self._texts: list[Tensor] = []  # of the rows of an update
        cast(nn.Module, self.model).register_forward_hook(self._see_outputs, with_kwargs=True)
        tell_quietly(self)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As TRL's; the loss is noted."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.see(loss, "loss of the model")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._texts = []
        return norm

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """The last log is of training, and TRL tells that by the model's mode: also where no update was left to do."""
        cast(nn.Module, self.model).train()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _see_outputs(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        """Note what the loss is made of, row by row: log-probabilities of a language model, scores of another."""
        ids = kwargs.get("input_ids")
        if not model.training or ids is None:
            return
        scores = getattr(outputs, "log_probs", None) is None
        values = outputs.logits if scores else outputs.log_probs
        if values is None or len(values) != len(ids) or (scores and values.shape[-1] != 1):
            return
        texts, start = self._texts, len(self._texts)
        self._texts.extend(ids)
        self.watch.see(
            values,
            "score of the model" if scores else "log-probability of the model",
            rows=torch.arange(start, len(self._texts), device=values.device),
            tell=lambda row: shown(self.processing_class.decode(texts[row], skip_special_tokens=True)),
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        args, folder = self.args, Path(output_dir or str(self.args.output_dir))
        if self.engine.sharded:
            self._write({folder: unwrapped(self.accelerator, self.model)})
            return
        self.args = for_saving(args)  # the library writes it beside the weights
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
        write_card(self, folder)

    def _save_state(self, folder: Path) -> None:
        """TRL's counters: what it has seen, and what it has not logged yet."""
        super()._save_state(folder)
        if self.is_world_process_zero():
            counters = {"tokens": self._total_train_tokens, "metrics": self._metrics["train"]}
            write_atomically(folder / "trl_state.json", json.dumps(counters))

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        path = folder / "trl_state.json"
        if path.is_file():  # checkpoints of earlier versions have none
            counters = json.loads(path.read_text(encoding="utf-8"))
            self._total_train_tokens = counters["tokens"]
            self._metrics["train"].update(counters["metrics"])
