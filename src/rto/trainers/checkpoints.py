"""Checkpoints that are whole or not there: sealed when all is written, checked before a run goes on from one."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from rto.files import write_atomically
from rto.finite import Watch, check_weights

logger = logging.getLogger(__name__)

SEAL = "complete.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message names the file and the remedy."""


class SealedCheckpoints(Trainer):
    """Checkpoints that are whole or not there: written, then sealed; a folder without a seal does not count.

    What is not finite is not trained on and not saved: ``self.watch`` is looked at before every update, and every
    weight before it is written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = Watch(self.accelerator)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the last *whole* checkpoint, or starts anew.

        Raises:
            CheckpointError: a named checkpoint is not whole.
            NotFiniteError: a number is NaN or infinite; the last whole checkpoint stays, no model is written.
        """
        self.args.logging_nan_inf_filter = False  # it writes a loss of 0 where there is none
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint:
            check_seal(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last number before an update; with it, everything that was noted for this update is looked at."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor) and self.accelerator.scaler is None:  # a scaler skips such updates by itself
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self.watch.see(whole, "gradient norm of the policy")
        self.watch.check(self.state.global_step + 1)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`.

        Raises:
            NotFiniteError: a weight is NaN or infinite; nothing is written.
        """
        check_weights(self.accelerator, cast(nn.Module, self.model), self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.exists():
            shutil.rmtree(folder)  # left by a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._save_state(folder)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _save_state(self, folder: Path) -> None:
        """What a subclass adds to a checkpoint; called on every process."""

    def _load_state(self, folder: Path) -> None:
        """Take up what `_save_state` wrote; called on every process."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_state(Path(checkpoint))


def seal(folder: Path) -> None:
    """Declare a checkpoint whole: flush its files to disk and write their sizes, by rename, last."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_atomically(folder / SEAL, json.dumps({"files": sizes}, indent=1))


def check_seal(folder: Path) -> None:
    """Compare a checkpoint's files with its seal.

    Raises:
        CheckpointError: there is no seal, or a file is missing or has another size.
    """
    remedy = "delete this folder and resume from an earlier checkpoint"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    if not (folder / SEAL).is_file():
        raise CheckpointError(
            f"{folder}: not a whole checkpoint ({SEAL} is missing, writing it was cut off): {remedy}"
        )
    for name, size in json.loads((folder / SEAL).read_text())["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path} {state}: the checkpoint is damaged; {remedy}")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run; folders whose writing was cut off are passed over with a warning.

    Raises:
        CheckpointError: the newest sealed one was damaged afterwards.
    """
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        if (folder / SEAL).is_file():
            check_seal(folder)
            return str(folder)
        logger.warning("%s was not written to its end; passing over it", folder)
    return None
