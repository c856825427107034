"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTTrainer as TRLSFTTrainer

from rto.data.formats import Skipped, read_pairs
from rto.trainers.trl import FromTRL


class SFTTrainer(FromTRL, TRLSFTTrainer):
    """`trl.SFTTrainer` with our checkpoints and log."""


class RewardTrainer(FromTRL, TRLRewardTrainer):
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
                    dataset, processing_class, max_length=length, what=f"{name}_dataset"
                )
                data[name] = Dataset.from_list(
                    [{"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected} for p in pairs]
                )
        super().__init__(
            model,
            args,
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            processing_class=processing_class,
            **kwargs,
        )
