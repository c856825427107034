"""The supervised stages, as TRL does them: fine-tuning on demonstrations, and the sentence reward model."""

from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig
from trl import RewardTrainer as TRLRewardTrainer
from trl import SFTTrainer as TRLSFTTrainer

from rto.data.chat import whole_sides
from rto.data.formats import Pair, Rows, Skipped, read_pairs, read_sets
from rto.models.loading import find_config, max_positions, positions_of
from rto.trainers.base import SealedCheckpoints, tell_quietly


class SFTTrainer(SealedCheckpoints, TRLSFTTrainer):
    """`trl.SFTTrainer` with our checkpoints and log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tell_quietly(self)


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
