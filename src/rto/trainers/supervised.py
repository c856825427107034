"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, SFTConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTTrainer as TRLSFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from rto.data.chat import whole_sides, without_tail
from rto.data.formats import (
    DataError,
    Pair,
    Rows,
    Skipped,
    listed,
    read_demonstration,
    read_pairs,
    read_sets,
    reason_of,
)
from rto.models.loading import find_config, max_positions, positions_of
from rto.trainers.base import SealedCheckpoints, tell_quietly

logger = logging.getLogger(__name__)


class SFTTrainer(SealedCheckpoints, TRLSFTTrainer):
    """`trl.SFTTrainer` with our checkpoints and log, on rows read as every other stage here reads them.

    Rows are TRL's: ``prompt`` and ``completion``, ``messages``, or text; token ids are those of `rto.data.chat`, where
    TRL moves the end of a prompt into the completion if the tokenizer merges across it. What a template writes after
    the end of turn has no part in the loss. TRL reads what it alone knows: rows of a ``formatting_func``, with images,
    with token ids, or for ``assistant_only_loss``, where marks in the template say what is learned.

    Raises:
        DataError: no row can be read; the message counts the rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.skipped: dict[str, Skipped] = {}
        super().__init__(*args, **kwargs)
        tell_quietly(self)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: SFTConfig,
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
            dataset = self._without_refused(dataset, what)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _without_refused(self, dataset: Dataset, what: str) -> Dataset:
        """The rows that could be read; the others are counted."""
        skipped = self.skipped[what.removesuffix("_dataset")] = Skipped(total=len(dataset))
        for i, reason in enumerate(dataset["refused"]):
            if reason:
                skipped.add(reason, i)
        if len(dataset) == sum(skipped.counts.values()):
            raise DataError(
                f"{skipped.report(what)}. Nothing is left to train on: every row needs a prompt and a completion, "
                "messages, or text."
            )
        if skipped.counts:
            logger.warning(skipped.report(what))
        return dataset.filter(lambda reason: not reason, input_columns="refused").remove_columns("refused")


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
        return {"input_ids": [], "labels": [], "refused": reason_of(error)}
    learned = without_tail(ids, tokenizer)
    labels = ([-100] * len(prompt) if completion_only else prompt) + learned + [-100] * (len(ids) - len(learned))
    return {"input_ids": prompt + ids, "labels": labels, "refused": ""}


class RewardTrainer(SealedCheckpoints, TRLRewardTrainer):
    """`trl.RewardTrainer` with our checkpoints and log, on pairs read as every other stage here reads them.

    Raises:
        DataError: the pairs cannot be used; the message names the column or counts the rows.
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        *,
        train_dataset: Rows,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        self._tokenizer = processing_class
        self._max_length = args.max_length or 2**31
        if isinstance(model, nn.Module):
            self._context = max_positions(model)
        else:
            self._context = positions_of(find_config("model", model))
        pairs, held_out, self.skipped = read_sets(self._read, train_dataset, eval_dataset)
        super().__init__(
            model,
            args,
            train_dataset=_both_sides(pairs),
            eval_dataset=_both_sides(held_out),
            processing_class=processing_class,
            **kwargs,
        )
        tell_quietly(self)

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
