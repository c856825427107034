"""Checkpoints that are whole or not there: sealed when all is written, checked before a run goes on from one."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rto import signals
from rto.errors import writing
from rto.files import alone, digest, parse_json, write_atomically
from rto.finite import Watch, check_weights, together
from rto.models.roles import save_part
from rto.trainers import cards
from rto.trainers.engine import Engine
from rto.trainers.identity import compare, identity
from rto.trainers.precision import for_saving

logger = logging.getLogger(__name__)

SEAL = "complete.json"
RUN = "run.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, or written; the message names the file and the remedy."""


class SealedCheckpoints(Trainer):
    """Checkpoints that are whole or not there: written, then sealed; a folder without a seal does not count.

    What is not finite is not trained on and not saved: ``self.watch`` is looked at before every update, and every
    weight before it is written. One process a folder trains; a checkpoint knows the run it belongs to.
    """

    create_model_card: Any = cards.create_model_card
    adapters: Mapping[str, str | None] = {}
    """Digests of the adapters that training starts from, by part; None for a part that starts from none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine = Engine(self.accelerator)
        self.engine.tell_of_layout(self.args)
        self.watch = Watch(self.accelerator)
        self._identity: dict[str, Any] | None = None
        self._progress: dict[str, float] = {}
        self._begun = time.time()
        self.add_callback(_TakeUp(self))

    def models(self) -> dict[str, nn.Module]:
        """Every model that decides the results, by its part."""
        return {"model": cast(nn.Module, self.model)}

    def decide(self) -> dict[str, Any]:
        """What decides the results besides settings, rows and weights that stay, by its name."""
        return {f"adapter of {part}": found for part, found in self.adapters.items()}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True, "true", "last": resume from the last *whole* checkpoint, or start anew.

        Starting anew sets aside what another run has left in ``output_dir``: its checkpoints and logs go to
        ``earlier-N``.

        Raises:
            CheckpointError: a named checkpoint is not whole, or belongs to another run.
            DataError: another process trains into this folder.
            NotFiniteError: a number is NaN or infinite; the last whole checkpoint stays, no model is written.
            Interrupted: a signal asked to stop; what was done is saved.
        """
        self.args.logging_nan_inf_filter = False  # it writes a loss of 0 where there is none
        folder = Path(str(self.args.output_dir))
        named = str(resume_from_checkpoint).lower()
        with ExitStack() as stack:
            start: str | None = None
            with together(self.accelerator):
                if self.is_world_process_zero():
                    stack.enter_context(alone(folder))
            self.engine.ready(cast(nn.Module, self.model))
            if self._identity is None:
                self._identity = identity(self)
            with together(self.accelerator):
                if named in ("true", "last"):
                    start = last_checkpoint(folder)
                elif named not in ("none", "false", ""):
                    start = str(resume_from_checkpoint)
                    check_seal(Path(start))
                if self.is_world_process_zero():
                    self._check_run(start)
                    step = 0 if start is None else _step(Path(start))
                    set_aside(folder, lambda found: found > step)
            self.accelerator.wait_for_everyone()
            self._progress, self._begun = {}, time.time()
            stack.enter_context(signals.patiently())
            found = super().train(start, *args, **kwargs)
        if (signum := signals.asked()) is not None:
            again = "the same rto run or reproduce goes on from it, a stage with --resume_from_checkpoint true"
            raise signals.Interrupted(signum, f"step {self.state.global_step} is saved; {again}: stopped")
        return found

    def _check_run(self, start: str | None) -> None:
        """Refuse to go on with another run's checkpoint."""
        path = Path(str(start)) / RUN
        if start is None or not path.is_file():  # checkpoints of earlier versions do not say
            return
        difference = compare(parse_json(path.read_text(encoding="utf-8")), json.loads(json.dumps(self._identity)))
        if difference is not None:
            raise CheckpointError(
                f"{start} belongs to another run: {difference}. Resume with what it was started with, or start "
                "anew in another output_dir"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self.engine.ready(cast(nn.Module, self.model))
        if self.engine.sharded:
            self.engine.keep_weights_of(self.create_optimizer())
        return super()._prepare_for_training(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in `transformers.Trainer`, which does this once the optimizer is prepared and before a state is read."""
        self.engine.restore_weights_of(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last number before an update; with it, everything that was noted for this update is looked at."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor) and self.accelerator.scaler is None:  # a scaler skips such updates by itself
            self.watch.see(self.engine.gather(norm), "gradient norm of the policy")
        self.watch.check(self.state.global_step + 1)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`.

        Raises:
            NotFiniteError: a weight is NaN or infinite; nothing is written.
        """
        check_weights(self.accelerator, cast(nn.Module, self.model), self.state.global_step)
        with nullcontext() if _internal_call else writing(output_dir or str(self.args.output_dir)):
            self._write_model(output_dir, _internal_call)

    def _write_model(self, output_dir: str | None, _internal_call: bool) -> None:
        if not (self.engine.sharded or self.engine.deepspeed):
            super().save_model(output_dir, _internal_call)
            return
        if _internal_call and output_dir and self.engine.in_pieces:  # a checkpoint has its pieces
            return
        # The library's own writes nothing where checkpoints are kept in pieces, and a tied weight twice.
        with together(self.accelerator):
            if self.args.should_save or self.engine.sharded:
                self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write(self, parts: Mapping[Path, Any]) -> None:
        """Write models that are trained, each with the tokenizer; settings and card with the first.

        Args:
            parts: by folder; None is left out. Where weights lie in pieces every process calls this.
        """
        writes = bool(self.args.should_save)
        for folder, part in parts.items():
            if part is not None:
                save_part(part, folder, self.engine.gather, writes=writes)
                if writes and self.processing_class is not None:
                    cast(Any, self.processing_class).save_pretrained(folder)
        if writes:
            folder = next(iter(parts))
            torch.save(for_saving(self.args), folder / "training_args.bin")
            cards.write_card(self, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.exists():
            remove(folder)  # left by a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with together(self.accelerator):
                super()._save_checkpoint(model, trial)
                self._save_state(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} cannot be written ({' '.join(str(error).split())[:200]}): make room or choose another "
                "output_dir, and resume"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            rotate(folder.parent, limit, self.state.best_model_checkpoint)

    def _save_state(self, folder: Path) -> None:
        """What a subclass adds to a checkpoint; called on every process."""
        loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean()
        if self.is_world_process_zero():
            progress = {
                "loss_not_logged": float(loss),
                "loss_logged": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "seconds": self._progress.get("seconds", 0.0) + time.time() - self._begun,
            }
            write_atomically(folder / "progress.json", json.dumps(progress))
            write_atomically(folder / RUN, json.dumps(self._identity, indent=1))

    def _load_state(self, folder: Path) -> None:
        """Take up what `_save_state` wrote; called on every process."""
        path = folder / "progress.json"
        if path.is_file():  # checkpoints of earlier versions have none
            self._progress = parse_json(path.read_text(encoding="utf-8"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.engine.take_up_settings(self.optimizer, Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            schedule: Any = self.lr_scheduler
            schedule.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        if checkpoint is not None:
            self._load_state(Path(checkpoint))

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """The run's summary is over all attempts; what is removed at its end is unsealed first."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        earlier = self._progress.get("seconds", 0.0)
        try:
            found = super()._finalize_training(trial, num_train_samples, start_time - earlier)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None and signals.asked() is None:
            for folder in checkpoints(self._get_output_dir(trial)):
                if not folder.samefile(best):
                    remove(folder)
        return found


class _TakeUp(TrainerCallback):
    """Takes up the counters of a checkpoint when training begins, and ends it where a signal asks."""

    def __init__(self, trainer: SealedCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """`transformers` starts these from zero: losses and the time would be of the last attempt."""
        trainer: Any = self.trainer
        if trainer._progress:
            trainer._tr_loss += trainer._progress["loss_not_logged"]
            trainer._total_loss_scalar = trainer._progress["loss_logged"]
            trainer._globalstep_last_logged = trainer._progress["last_logged"]
            trainer._initial_global_step = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All processes stop after the same update."""
        accelerator = self.trainer.accelerator
        stop = signals.asked() is not None
        if accelerator.num_processes > 1:
            stop = bool(accelerator.gather(torch.tensor([float(stop)], device=accelerator.device)).any())
        if stop:
            control.should_save = control.should_training_stop = True


def seal(folder: Path) -> None:
    """Declare a checkpoint whole: flush its files to disk and write their sizes and digests, by rename, last."""
    sizes, digests = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SEAL):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = str(path.relative_to(folder))
        sizes[name], digests[name] = path.stat().st_size, digest(path)
    write_atomically(folder / SEAL, json.dumps({"files": sizes, "blake2b": digests}, indent=1))


def check_seal(folder: Path) -> None:
    """Compare a checkpoint's files with its seal; seals of earlier versions hold sizes only.

    Raises:
        CheckpointError: there is no seal, or a file is missing or is another; the message names it.
    """
    remedy = "delete this folder and resume from an earlier checkpoint"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    path = folder / SEAL
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: not a whole checkpoint ({SEAL} is missing, writing it was cut off): {remedy}"
        )
    try:
        sealed = parse_json(path.read_text(encoding="utf-8"))
        sizes = dict(sealed["files"])
        digests = dict(sealed["blake2b"]) if "blake2b" in sealed else {}
        if "blake2b" in sealed and digests.keys() != sizes.keys():
            raise ValueError("its sizes and digests are of different files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: the checkpoint is damaged; {remedy}") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path} {state}: the checkpoint is damaged; {remedy}")
        if name in digests and digest(path) != digests[name]:
            raise CheckpointError(f"{path} has other bytes than were written: the checkpoint is damaged; {remedy}")


def remove(folder: Path) -> None:
    """Delete a checkpoint, its seal first: what a kill leaves of it is no checkpoint."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, sealed or not, in the order of their steps."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and p.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest checkpoints, ``limit`` with the best one; None or 0 keeps all."""
    if limit is None or limit <= 0:
        return
    every = checkpoints(output_dir)
    kept = {every[-1], *([Path(best)] if best is not None else [])}
    for folder in reversed(every):
        if len(kept) < limit:
            kept.add(folder)
    for folder in every:
        if folder not in kept:
            remove(folder)


def set_aside(output_dir: Path, of: Callable[[int], bool]) -> None:
    """Move whole checkpoints of some steps to ``earlier-N``: of another run, or of this one's other continuation.

    Where none is left, the logs go with them.
    """
    old = [p for p in checkpoints(output_dir) if of(_step(p)) and (p / SEAL).is_file()]
    if not old:
        return
    number = 1
    while (aside := output_dir / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    everything = len(old) == sum((p / SEAL).is_file() for p in checkpoints(output_dir))
    for path in [*old, *((output_dir / name) for name in ("log.jsonl", "completions.jsonl") if everything)]:
        if path.exists():
            path.rename(aside / path.name)
    logger.warning("%s held %d checkpoints of an earlier run: they are in %s now", output_dir, len(old), aside)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run; folders whose writing was cut off are passed over with a warning.

    Raises:
        CheckpointError: the newest sealed one was damaged afterwards.
    """
    for folder in reversed(checkpoints(output_dir)):
        if (folder / SEAL).is_file():
            check_seal(folder)
            return str(folder)
        logger.warning("%s was not written to its end; passing over it", folder)
    return None
