"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, SFTConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTTrainer as TRLSFTTrainer
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml
from trl.trainer.utils import global_then_local_main_first

from rto.data.chat import completion_ids, conversation_ids, template_options, whole_ids, whole_sides, without_tail
from rto.data.formats import DataError, Skipped, read_pairs
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
            workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            with global_then_local_main_first():
                dataset = dataset.map(demonstration, fn_kwargs=keywords, remove_columns=columns, **workers)
            dataset = self._without_refused(dataset, f"{dataset_name}_dataset")
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _without_refused(self, dataset: Dataset | IterableDataset, what: str) -> Dataset | IterableDataset:
        """The rows that could be read; of a stream, whose rows come in training, nothing is counted."""
        if isinstance(dataset, Dataset):
            skipped = self.skipped[what.removesuffix("_dataset")] = Skipped(total=len(dataset))
            for i, reason in enumerate(dataset["refused"]):
                if reason:
                    skipped.add(f"because {reason}", i)
            if skipped.counts:
                if len(dataset) == sum(skipped.counts.values()):
                    raise DataError(f"{skipped.report(what)}. Nothing is left to train on.")
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
        prompt, ids = _read(row, tokenizer, text)
    except DataError as error:
        return {"input_ids": [], "labels": [], "refused": str(error)}
    learned = without_tail(ids, tokenizer)
    labels = ([-100] * len(prompt) if completion_only else prompt) + learned + [-100] * (len(ids) - len(learned))
    return {"input_ids": prompt + ids, "labels": labels, "refused": ""}


def _read(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    options = template_options(row)
    if "prompt" in row and "completion" in row:
        ended = row.get("completion_ended") is not False
        return completion_ids(row["prompt"], row["completion"], tokenizer, ended=ended, **options)
    if "conversations" in row:
        row = maybe_convert_to_chatml(dict(row))
    if "messages" in row:
        return [], conversation_ids(row["messages"], tokenizer, **options)
    if text in row:
        return [], whole_ids("", row[text], tokenizer)
    raise DataError(f"a row has {', '.join(map(repr, row))}: it needs prompt and completion, messages, or {text}")


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
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        self.skipped: dict[str, Skipped] = {}
        length = args.max_length or 2**31
        data: dict[str, Dataset | None] = {"train": None, "eval": None}
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            if dataset is not None:
                pairs, self.skipped[name] = read_pairs(
                    dataset, processing_class, max_length=length, what=f"{name}_dataset", encode=whole_sides
                )
                data[name] = Dataset.from_list([{"chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs])
        super().__init__(
            model,
            args,
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            processing_class=processing_class,
            **kwargs,
        )
        tell_quietly(self)
