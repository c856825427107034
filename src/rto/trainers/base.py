"""What the trainers over an `Actor` share: arguments, backward over micro-batches, metrics, weights."""

import difflib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType

from rto.files import write_atomically
from rto.models.actor import Actor
from rto.models.loading import stop_at_eos
from rto.models.roles import Role, load_adapter_weights
from rto.ranges import COUNT, TRAINING, Range, check_arguments
from rto.trainers.alarms import AlarmArguments
from rto.trainers.checkpoints import CheckpointError, SealedCheckpoints
from rto.trainers.engine import check_layout, unwrapped
from rto.trainers.logs import tell_quietly
from rto.trainers.precision import PrecisionArguments, on_this_machine, prepare_trained
from rto.values import check_choice, json_mapping

_Part = TypeVar("_Part")

VALUE_MODEL = "value_model"


@dataclass(repr=False)
class TokenTrainingArguments(AlarmArguments, PrecisionArguments, TrainingArguments):
    """Arguments that every trainer here has, on top of those of `transformers.TrainingArguments`.

    Attributes:
        max_tokens_per_micro_batch: padded tokens in one forward and backward pass, per process. Memory follows
            this, results do not: losses are summed over micro-batches under one global denominator.
        gather_once: under FSDP2, gather what is trained once an update for all its passes, instead of layer by layer
            twice a pass. Less is exchanged; a model lies whole on each device meanwhile, in the compute precision, as
            it does while it decodes. None: where the base is frozen under adapters. Results do not depend on it.
        disable_dropout: set dropout to zero, so that a model's log-probabilities are a function of its input.
    """

    max_tokens_per_micro_batch: int = field(
        default=16384, metadata={"help": "Padded tokens in one forward and backward pass, per process."}
    )
    gather_once: bool | None = field(
        default=None,
        metadata={
            "help": "Under FSDP2, gather what is trained once an update, not layer by layer twice a pass; None: under "
            "adapters."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set dropout to zero in the trained models."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept at False: reward functions are given the data set's columns."}
    )

    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Kept at False: batches are token lists until their turn has come."}
    )

    ranges: ClassVar[Mapping[str, Range]] = {**TRAINING, "max_tokens_per_micro_batch": COUNT}

    def __post_init__(self) -> None:
        check_arguments(self, self.ranges)
        on_this_machine(self)
        check_layout(self)
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha is for fine-tuning (rto sft): with noise in its embeddings a model's "
                "log-probabilities are no function of its input; leave it out"
            )
        super().__post_init__()
        _ = self.init_kwargs  # refused here, not when models are loaded


def check_training(args: TrainingArguments) -> None:
    """What a library would refuse when all models are loaded: sizes and rates, the schedule, trackers.

    Raises:
        ValueError: with the argument, and the nearest known value or the remedy.
    """
    check_arguments(args, getattr(args, "ranges", TRAINING))
    for name in (f.name for f in fields(args) if f.name.endswith("_kwargs")):
        json_mapping(name, getattr(args, name))
    kind, kwargs = SchedulerType(args.lr_scheduler_type), json_mapping("lr_scheduler_kwargs", args.lr_scheduler_kwargs)
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs={kwargs} of {kind.value}: {error}") from error
    for part in str(args.optim_args or "").replace(" ", "").split(","):
        if args.optim_args and part.count("=") != 1:
            raise ValueError(f"optim_args={args.optim_args!r} must be KEY=VALUE, KEY=VALUE, …")
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        check_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "none", "all"))
        if name not in (*installed, "flyte"):  # which the library does not list, and checks itself
            raise ValueError(f"report_to={name!r}: the tracker is not installed: pip install {name}, or none")


NO_MEANING = {
    "compute_metrics": "evaluate computes this trainer's own metrics and keeps no logits: override evaluate, or log a "
    "number of your own from a TrainerCallback's on_evaluate",
    "preprocess_logits_for_metrics": "evaluate keeps no logits",
    "compute_loss_func": "the loss is what this trainer is for: see its own arguments",
    "data_collator": "rows stay token lists until their micro-batch is cut",
    "model_init": "give the model itself",
}
"""Arguments of `transformers.Trainer` that the trainers here would not use, and what to do instead."""


def check_trainer_arguments(trainer: type, given: Mapping[str, Any]) -> None:
    """Refuse what `transformers.Trainer` would keep and nobody would read, before any model is loaded.

    Raises:
        ValueError: an argument has no meaning here.
        TypeError: there is no such argument.
    """
    known = inspect.signature(Trainer.__init__).parameters
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*inspect.signature(trainer).parameters, *known], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{trainer.__name__} has no argument {name!r}{hint}")
        if name in NO_MEANING and value is not None:
            raise ValueError(f"{trainer.__name__} does not use {name}: {NO_MEANING[name]}")


class TokenTrainer(SealedCheckpoints):
    """A `transformers.Trainer` over an `Actor`, whose checkpoints are whole or not there.

    A folder written by `save_model` holds the policy as `from_pretrained` reads it, and the critic, where there
    is one, in the sub-folder ``value_model``.
    """

    args: TokenTrainingArguments
    model: Actor
    processing_class: PreTrainedTokenizerBase
    train_dataset: Any
    eval_dataset: Any
    row_type: ClassVar[type]
    """What a row of its data sets is once it has been read."""

    def __init__(self, model: Actor, args: TokenTrainingArguments, **kwargs: Any) -> None:
        if args.disable_dropout:
            _disable_dropout(model)
        kwargs.pop("data_collator", None)
        prepare_trained(*model.children())
        super().__init__(model=model, args=args, data_collator=_as_it_is, **kwargs)
        self.engine.tell_of_clipping(1 if model.value_model is None else 2, args.max_grad_norm)
        self._norms: dict[str, Tensor] = {}
        if self.optimizer is not None:
            _check_optimizer(self.optimizer, model)
        self.model_accepts_loss_kwargs = False
        self._metrics: dict[str, list[float]] = defaultdict(list)
        tell_quietly(self)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics on held-out rows; of a dictionary of data sets on each, as ``eval_NAME_…``.

        Args:
            eval_dataset: rows as the trainer's own data sets have them, a dictionary of such, or the name of one in
                the trainer's dictionary; None evaluates on what the trainer was given.
            ignore_keys: of `transformers.Trainer`; not used.
            metric_key_prefix: what the metrics' names begin with.

        Raises:
            DataError: the rows cannot be used.
            ValueError: there is nothing to evaluate on.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = self.eval_dataset[data]
        if data is None:
            raise ValueError("evaluate has no rows: pass eval_dataset, here or when the trainer is made")
        if isinstance(data, dict):
            found: dict[str, float] = {}
            for name, part in data.items():
                found |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if not (isinstance(data, list) and data and isinstance(data[0], self.row_type)):
            data, _ = self._read(data, "eval_dataset")
        self.engine.ready(self.model)
        return self.evaluate_rows(data, metric_key_prefix)

    def evaluate_rows(self, rows: Any, metric_key_prefix: str) -> dict[str, float]:
        """Metrics on rows that have been read, logged."""
        raise NotImplementedError

    def _read(self, dataset: Any, what: str) -> tuple[list[Any], Any]:
        """A data set as rows of ``row_type``, and what was left out."""
        raise NotImplementedError

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return self.engine.all_reduce(x)

    @property
    def sharded(self) -> bool:
        """Passes through the model are collective (FSDP, DeepSpeed)."""
        return self.engine.sharded or self.engine.deepspeed

    @property
    def gathers_once(self) -> bool:
        """What is trained is gathered once an update: see ``gather_once``."""
        if self.args.gather_once is None:
            return self.engine.sharded and not all(p.requires_grad for p in self.model.parameters())
        return self.engine.sharded and self.args.gather_once

    def backward(
        self,
        model: nn.Module,
        parts: Sequence[_Part],
        loss: Callable[[_Part], Tensor],
        *,
        whole: bool = True,
        reads: Callable[[_Part], nn.Module | None] | None = None,
    ) -> Tensor:
        """`Engine.backward`; what was noted for this update is looked at where it steps by itself."""
        step = self.state.global_step + 1
        reads = (reads or (lambda part: self.model)) if self.gathers_once else None
        return self.engine.backward(
            model, parts, loss, whole=whole, before_step=lambda: self.watch.check(step), reads=reads
        )

    def micro_batches(self, lengths: Tensor) -> list[Tensor]:
        """Cuts by the token budget; as many on every process, since sharded models run in step."""
        return self.engine.in_step(lengths, self.args.max_tokens_per_micro_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic each by its own norm: a young critic's large gradient must not stall the policy."""
        actor: Actor = unwrapped(self.accelerator, model)
        groups = {"policy": actor.policy_parameters}
        if actor.value_model is not None:
            groups["value"] = actor.value_parameters
        self._norms = self.engine.clip(groups, self.args.max_grad_norm)
        return next(iter(self._norms.values()))

    def record(self, **metrics: float | Tensor) -> None:
        """Keep metrics, already global, for the next log; several values of one name are averaged."""
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what was recorded since the last time."""
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        super().log({**logs, **means}, start_time)

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        if self.is_world_process_zero():
            write_atomically(folder / "metrics.json", json.dumps(self._metrics))

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        self._metrics.update(json.loads((folder / "metrics.json").read_text()))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        actor: Actor = unwrapped(self.accelerator, self.model)
        stop_at_eos(actor.policy, self.processing_class)
        self._write({folder: actor.policy, folder / VALUE_MODEL: actor.value_model})

    def _load_best_model(self) -> None:
        if self.sharded:
            super()._load_best_model()
            return
        # The library's own looks for weights under the actor's names, finds none, and goes on with a warning.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:  # one sharded state for the whole actor
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        for part, where in ((self.model.policy, folder), (self.model.value_model, folder / VALUE_MODEL)):
            if part is not None:
                load_weights(part, where)


def _disable_dropout(model: nn.Module) -> None:
    """Dropout as a layer, and as a probability that a layer hands to a function (attention, most often)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse one that was made before the trainer and so does not know its critic or a new adapter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(
                f"the optimizer in optimizers does not hold {name}, which is trained: set optim and learning_rate in "
                "the arguments, or pass optimizer_cls_and_kwargs"
            )


def _as_it_is(rows: list[Any]) -> Any:
    """Rows stay lists of token ids until their micro-batch is cut."""
    return rows


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a folder written by ``save_pretrained`` into ``model``, in place.

    Raises:
        CheckpointError: a weight is missing or left over.
    """
    try:
        if isinstance(model, Role):
            model.load_weights(folder)
            return
        if hasattr(model, "peft_config"):
            load_adapter_weights(model, model.active_adapter, folder)
            return
    except ValueError as error:
        raise CheckpointError(f"{error}: resume with the models this run started from") from error
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= safetensors.torch.load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            f"{folder}: weights do not fit the model (missing {sorted(set(missing) - tied)[:3]}, unknown "
            f"{sorted(unexpected)[:3]}): resume with the model this run started from"
        )
