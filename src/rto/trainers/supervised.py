"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from rto.data.formats import Skipped, read_pairs
from rto.models.loading import Source, load_policy, load_scalar, load_tokenizer, source_name
from rto.models.roles import trainable
from rto.trainers.base import SealedCheckpoints, tell_quietly
from rto.trainers.precision import PrecisionArguments, Reading, on_this_machine, prepare_trained


@dataclass
class StageDefaults(PrecisionArguments):
    """Where the supervised stages differ from TRL's defaults, to train as the other stages do.

    Attributes:
        bf16: compute in bfloat16 by autocast; off unless asked for.
        gradient_checkpointing: compute activations again in the backward pass; off unless asked for.
    """

    bf16: bool | None = field(default=False, metadata={"help": "Compute in bfloat16 by autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )


@dataclass
class SFTConfig(StageDefaults, TRLSFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` with the defaults of the other stages."""

    def __post_init__(self) -> None:
        on_this_machine(self)
        super().__post_init__()


@dataclass
class RewardConfig(StageDefaults, TRLRewardConfig):  # type: ignore[misc]
    """`trl.RewardConfig` with the defaults of the other stages."""

    def __post_init__(self) -> None:
        on_this_machine(self)
        super().__post_init__()


def start_from(
    load: Callable[..., nn.Module],
    model: Source,
    args: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model that a stage trains, read by ``load`` as every stage reads its own, and its tokenizer."""
    reading = Reading.of(args, model)
    if tokenizer is None:
        tokenizer = load_tokenizer(source_name(model), **reading.tokenizer(model))
    found = load(model, **reading.trained(model, adapted=peft_config is not None))
    return (trainable(found) if hasattr(found, "peft_config") else found), tokenizer


class SFTTrainer(SealedCheckpoints, TRLSFTTrainer):
    """`trl.SFTTrainer` with our checkpoints, log and precision.

    Args:
        model: a folder, a hub id or a model. An adapter goes on being trained.
        args: the configuration.
        processing_class: the tokenizer; None loads the model's.
        peft_config: train a new PEFT adapter instead of the whole model.
        kwargs: of `trl.SFTTrainer`.

    Raises:
        ValueError: it is no language model that can be trained.
    """

    def __init__(
        self,
        model: Source,
        args: TRLSFTConfig,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        start, tokenizer = start_from(load_policy, model, args, processing_class, peft_config)
        with _read_already(args):
            super().__init__(start, args, processing_class=tokenizer, peft_config=peft_config, **kwargs)
        prepare_trained(self.model)
        tell_quietly(self)


class RewardTrainer(SealedCheckpoints, TRLRewardTrainer):
    """`trl.RewardTrainer` with our checkpoints, log and precision, on pairs read as every other stage reads them.

    Args:
        model: a folder, a hub id or a model; of a language model, its backbone under a head that starts at zero.
        args: the configuration.
        train_dataset: pairs in TRL's preference format.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; None loads the model's.
        peft_config: train a new PEFT adapter instead of the whole model.
        kwargs: of `trl.RewardTrainer`.

    Raises:
        DataError: the pairs cannot be used; the message names the column or counts the rows.
        ValueError: the model has more than one output.
    """

    def __init__(
        self,
        model: Source,
        args: TRLRewardConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        start, processing_class = start_from(load_scalar, model, args, processing_class, peft_config)
        self.skipped: dict[str, Skipped] = {}
        length = args.max_length or 2**31
        data: dict[str, Dataset | None] = {"train": None, "eval": None}
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            if dataset is not None:
                pairs, self.skipped[name] = read_pairs(
                    dataset, processing_class, max_length=length, what=f"{name}_dataset"
                )
                data[name] = Dataset.from_list(
                    [{"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in pairs]
                )
        with _read_already(args):
            super().__init__(
                start,
                args,
                train_dataset=data["train"],
                eval_dataset=data["eval"],
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        prepare_trained(self.model)
        tell_quietly(self)


@contextmanager
def _read_already(args: Any) -> Iterator[None]:
    """TRL is given a model, and would say that it ignores ``model_init_kwargs``; they have been used."""
    given, args.model_init_kwargs = args.model_init_kwargs, None
    try:
        yield
    finally:
        args.model_init_kwargs = given
