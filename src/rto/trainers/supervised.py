"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer as TRLSFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from rto.data.chat import splits, whole_sides, without_tail
from rto.data.formats import (
    DataError,
    Pair,
    Rows,
    Skipped,
    listed,
    name_of,
    read_demonstration,
    read_pairs,
    read_sets,
    reason_of,
    special_in_row,
)
from rto.finite import together
from rto.models.loading import (
    Source,
    find_config,
    load_policy,
    load_scalar,
    max_positions,
    positions_of,
    source_name,
    stop_at_eos,
)
from rto.models.precision import check_derivative, taking_adapter
from rto.models.roles import trainable
from rto.models.saving import save_merged
from rto.models.scalars import scoring_wide
from rto.ranges import check_arguments
from rto.trainers.alarms import AlarmArguments
from rto.trainers.engine import check_layout, unwrapped
from rto.trainers.identity import adapter_digest
from rto.trainers.precision import PrecisionArguments, Reading, on_this_machine, prepare_trained
from rto.trainers.trl import FromTRL

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class StageDefaults(AlarmArguments, PrecisionArguments):
    """Where the supervised stages differ from TRL's defaults, to train as the other stages do.

    Attributes:
        bf16: compute in bfloat16 by autocast; off unless asked for.
        gradient_checkpointing: compute activations again in the backward pass; off unless asked for.
    """

    bf16: bool | None = field(default=False, metadata={"help": "Compute in bfloat16 by autocast."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )


@dataclass(repr=False)
class SFTConfig(StageDefaults, TRLSFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` with the defaults of the other stages."""

    def __post_init__(self) -> None:
        check_arguments(self)
        on_this_machine(self)
        check_layout(self)
        super().__post_init__()


@dataclass(repr=False)
class RewardConfig(StageDefaults, TRLRewardConfig):  # type: ignore[misc]
    """`trl.RewardConfig` with the defaults of the other stages."""

    def __post_init__(self) -> None:
        check_arguments(self)
        on_this_machine(self)
        check_layout(self)
        super().__post_init__()


def start_from(load: Callable[..., nn.Module], model: Source, reading: Reading, peft_config: Any) -> Any:
    """The model that a stage trains, read by ``load`` as every stage reads its own."""
    found = load(model, **reading.trained(model, adapted=peft_config is not None))
    check_derivative(source_name(model), found)
    return trainable(found) if hasattr(found, "peft_config") else found


class SFTTrainer(FromTRL, TRLSFTTrainer):
    """`trl.SFTTrainer` with our checkpoints, log and precision, on rows read as every other stage here reads them.

    Rows are TRL's: ``prompt`` and ``completion``, ``messages``, or text; token ids are those of `rto.data.chat`, where
    TRL moves the end of a prompt into the completion if the tokenizer merges across it. What a template writes after
    the end of turn has no part in the loss. TRL reads what it alone knows: rows of a ``formatting_func``, with images,
    with token ids, or for ``assistant_only_loss``, where marks in the template say what is learned.

    Args:
        model: a folder, a hub id or a model. An adapter goes on being trained.
        args: the configuration.
        processing_class: the tokenizer; None loads the model's.
        peft_config: train a new PEFT adapter instead of the whole model.
        kwargs: of `trl.SFTTrainer`.

    Raises:
        DataError: no row can be read; the message counts the rows.
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
        self.skipped: dict[str, Skipped] = {}
        self.adapters = {"model": adapter_digest(model)}
        reading = Reading.of(args, model)
        self._tokenizer = reading.read_tokenizer(model, processing_class)
        start = start_from(load_policy, model, reading, peft_config)
        with _read_already(args), taking_adapter(start, peft_config):
            super().__init__(start, args, processing_class=self._tokenizer, peft_config=peft_config, **kwargs)
        prepare_trained(self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        stop_at_eos(unwrapped(self.accelerator, self.model), self._tokenizer)
        super()._save(output_dir, state_dict)

    def save_merged(self, folder: Path) -> None:
        """Write the model under its adapter as a whole one, with the tokenizer; every process calls this."""
        model: Any = unwrapped(self.accelerator, self.model)
        stop_at_eos(model, self._tokenizer)
        with together(self.accelerator):
            if self.engine.sharded:
                save_merged(model, folder, self.engine.gather, writes=self.args.should_save)
            elif self.args.should_save:
                model.merge_and_unload().save_pretrained(folder)
            if self.args.should_save:
                self._tokenizer.save_pretrained(folder)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: TRLSFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = get_dataset_column_names(dataset)
        if formatting_func is None and "input_ids" not in columns and not args.assistant_only_loss:
            keywords = {
                "tokenizer": processing_class,
                "text": args.dataset_text_field,
                "completion_only": self.completion_only_loss,
            }
            what = f"{dataset_name}_dataset"
            if not isinstance(dataset, Dataset):
                dataset = Dataset.from_list([demonstration(row, **keywords) for row in listed(dataset, what)])
            else:
                workers = {"num_proc": args.dataset_num_proc}
                with global_then_local_main_first():
                    dataset = dataset.map(demonstration, fn_kwargs=keywords, remove_columns=columns, **workers)
            dataset = self._without_refused(dataset, dataset_name)
        elif splits(self._tokenizer):
            raise DataError(
                "split_special_tokens is for rows that are read here, not for a formatting_func, rows of token ids or "
                "assistant_only_loss, which TRL reads: leave one of the two out"
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _without_refused(self, dataset: Dataset, part: str) -> Dataset:
        """The rows of ``train`` or ``eval`` that could be read; the others are counted."""
        what = name_of(dataset, f"{part}_dataset")
        skipped = self.skipped[part] = Skipped(total=len(dataset))
        for i, reason in enumerate(dataset["refused"]):
            if reason:
                skipped.add(reason, i)
        for i, special in enumerate(dataset["special"]):
            skipped.note_special(Counter(json.loads(special)), i)
        if len(dataset) == sum(skipped.counts.values()):
            raise DataError(
                f"{skipped.report(what)}. Nothing is left to train on: every row needs a prompt and a completion, "
                "messages, or text."
            )
        if skipped.counts:
            logger.warning(skipped.report(what))
        skipped.tell_special(what, self._tokenizer)
        kept = dataset.filter(lambda reason: not reason, input_columns="refused")
        return kept.remove_columns(["refused", "special"])


def demonstration(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, text: str, completion_only: bool
) -> dict[str, Any]:
    """A row as token ids and labels (-100: not learned), or why the template refuses it.

    Args:
        row: with ``prompt`` and ``completion`` (cut off where ``completion_ended`` is false), ``messages``, or text.
        tokenizer: whose template and vocabulary.
        text: the column of text.
        completion_only: whether a prompt has no part in the loss.
    """
    try:
        prompt, ids = read_demonstration(row, tokenizer, text=text)
    except DataError as error:
        return {"input_ids": [], "labels": [], "refused": reason_of(error), "special": "{}"}
    learned = without_tail(ids, tokenizer)
    labels = ([-100] * len(prompt) if completion_only else prompt) + learned + [-100] * (len(ids) - len(learned))
    special = json.dumps(special_in_row(row, tokenizer, text))
    return {"input_ids": prompt + ids, "labels": labels, "refused": "", "special": special}


class RewardTrainer(FromTRL, TRLRewardTrainer):
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
        train_dataset: Rows,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        self.adapters = {"model": adapter_digest(model)}
        reading = Reading.of(args, model)
        self._tokenizer = reading.read_tokenizer(model, processing_class)
        self._max_length = args.max_length or 2**31
        if isinstance(model, nn.Module):
            self._context = max_positions(model)
        else:
            self._context = positions_of(find_config("model", model, **reading.tokenizer(model)))
        pairs, held_out, self.skipped = read_sets(self._read, train_dataset, eval_dataset)
        start = start_from(load_scalar, model, reading, peft_config)
        with _read_already(args), taking_adapter(start, peft_config):
            super().__init__(
                start,
                args,
                train_dataset=_both_sides(pairs),
                eval_dataset=_both_sides(held_out),
                processing_class=self._tokenizer,
                peft_config=peft_config,
                **kwargs,
            )
        prepare_trained(self.model)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As in TRL, with the head in fp32."""
        with scoring_wide(unwrapped(self.accelerator, model)):
            return super().compute_loss(model, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; new pairs are read as those that the trainer was made with."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            _, held_out, _ = read_sets(self._read, None, eval_dataset)
            eval_dataset = _both_sides(held_out)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _read(self, dataset: Rows, what: str) -> tuple[list[Pair], Skipped]:
        return read_pairs(
            dataset,
            self._tokenizer,
            max_length=self._max_length,
            context=self._context,
            what=what,
            encode=whole_sides,
        )


def _both_sides(pairs: Any) -> Any:
    """Pairs as `trl.RewardTrainer` has them once it has tokenized its rows."""
    if isinstance(pairs, dict):
        return {name: _both_sides(part) for name, part in pairs.items()}
    if pairs is None:
        return None
    return Dataset.from_list([{"chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs])


@contextmanager
def _read_already(args: Any) -> Iterator[None]:
    """TRL is given a model, and would say that it ignores ``model_init_kwargs``; they have been used."""
    given, args.model_init_kwargs = args.model_init_kwargs, None
    try:
        yield
    finally:
        args.model_init_kwargs = given
