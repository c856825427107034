"""Stage 1: learn π_dpo from preference pairs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto.batches import PairBatch, Sequences, collate, micro_batches
from rto.data.formats import Pair, read_pairs
from rto.functional.preference import LOSSES, Completions, PairLoss, PreferenceLoss
from rto.models.actor import Actor, check_output_layer, score_logprobs
from rto.models.loading import (
    Source,
    check_same_vocabulary,
    clone,
    freeze,
    load_policy,
    load_tokenizer,
    source_name,
    trusts,
)
from rto.trainers.base import TokenTrainer, TokenTrainingArguments


@dataclass
class PreferenceConfig(TokenTrainingArguments):
    """Configuration of `PreferenceTrainer`; names and defaults follow TRL's ``DPOConfig`` where they exist there.

    Attributes:
        loss: name of the loss in `rto.functional.preference.LOSSES`.
        loss_kwargs: fields of the loss, such as ``{"beta": 0.1}``.
        max_length: pairs with a longer prompt + completion are left out with a count.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second decay rate, as in the paper."})
    loss: str = field(default="dpo", metadata={"help": f"Which loss: {', '.join(LOSSES)}."})
    loss_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the loss, as JSON: {"beta": 0.1, "label_smoothing": 0.0}.'}
    )
    max_length: int = field(default=1024, metadata={"help": "Longer pairs (prompt + completion) are left out."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_loss()

    def make_loss(self) -> PreferenceLoss:
        """The loss object that ``loss`` and ``loss_kwargs`` describe.

        Raises:
            ValueError: there is no such loss, or it has no such field.
        """
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not known; choose from {', '.join(LOSSES)}")
        kwargs = _json(self.loss_kwargs)
        try:
            return LOSSES[self.loss](**kwargs)
        except TypeError as error:
            known = ", ".join(LOSSES[self.loss].__dataclass_fields__)
            raise ValueError(f"loss_kwargs of {self.loss}: {error}; its fields are {known}") from error


def _json(value: dict | str | None) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value or {})


class PreferenceTrainer(TokenTrainer):
    """Direct preference learning with any `PreferenceLoss`.

    Args:
        model: the starting policy: a folder, a hub id or a model.
        ref_model: π_ref; None means the starting policy itself, or the base model under a PEFT adapter.
        args: the configuration.
        train_dataset: pairs in TRL's preference format, standard or conversational.
        eval_dataset: the same, for ``evaluate``: loss, pair accuracy and margin on held-out pairs.
        processing_class: the tokenizer; None loads the model's.
        loss: a loss object; None makes the one that ``args`` describes.
        peft_config: train a PEFT adapter instead of the whole model.

    Raises:
        DataError: the pairs cannot be used; the message names the column or counts the rows.
        ValueError: ``ref_model`` has another vocabulary.
    """

    args: PreferenceConfig

    def __init__(
        self,
        model: Source,
        args: PreferenceConfig | None = None,
        *,
        ref_model: Source | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        loss: PreferenceLoss | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or PreferenceConfig(output_dir="preference")
        init = dict(args.init_kwargs)
        tokenizer = processing_class or load_tokenizer(source_name(model), trust_remote_code=trusts(init))
        self.loss: PreferenceLoss = loss or args.make_loss()
        self.skipped = {}
        pairs: dict[str, list[Pair] | None] = {"train": None, "eval": None}
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            if dataset is not None:
                pairs[name], self.skipped[name] = read_pairs(
                    dataset, tokenizer, max_length=args.max_length, what=f"{name}_dataset"
                )
        policy = load_policy(model, **init)
        if ref_model is not None:
            check_same_vocabulary("ref_model", ref_model, tokenizer, policy)
        check_output_layer(policy)
        self.reference: nn.Module | None = None
        if self.loss.needs_reference and (ref_model is not None or peft_config is None):
            self.reference = freeze(clone(policy) if ref_model is None else load_policy(ref_model, **init))
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        super().__init__(
            Actor(policy),
            args,
            train_dataset=pairs["train"],
            eval_dataset=pairs["eval"],
            processing_class=tokenizer,
            **kwargs,
        )
        if self.reference is not None:
            self.reference.to(self.args.device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of the mean loss over the pairs of one update, on all processes."""
        model.train()
        assert num_items_in_batch is not None
        loss, stats = self._losses(model, inputs, num_items_in_batch, train=True)
        self.record(**self._means(stats, len(inputs)))
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss, pair accuracy (with its standard error) and margin on held-out pairs."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(data, Dataset):
            data, _ = read_pairs(data, self.processing_class, max_length=self.args.max_length, what="eval_dataset")
        mine = data[self.accelerator.process_index :: self.accelerator.num_processes]
        self.model.eval()
        with torch.no_grad():
            total, stats = self._losses(self.model, mine, len(data), train=False)
        means = self._means(stats, len(mine))
        accuracy = means["accuracy"]
        metrics = {
            "loss": float(total),
            **means,
            "accuracy_se": (accuracy * (1 - accuracy) / len(data)) ** 0.5,
            "pairs": float(len(data)),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super(TokenTrainer, self).log(dict(metrics))  # what training has recorded waits for its own log
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _means(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means over the pairs of all processes."""
        numbers = torch.tensor([*sums.values(), float(count)], dtype=torch.float64, device=self.args.device)
        *totals, n = self.all_reduce(numbers).tolist()
        return {name: total / n for name, total in zip(sums, totals)}

    def _losses(
        self, model: nn.Module, pairs: Sequence[Pair], denominator: Tensor | int, *, train: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """Σ loss / denominator over all pairs, with gradients if ``train``; and sums of statistics."""
        stats = dict.fromkeys(("accuracy", "margin", "reward/chosen", "reward/rejected"), 0.0)
        lengths = torch.tensor([2 * (len(p.prompt) + max(len(p.chosen), len(p.rejected))) for p in pairs])
        parts = [[pairs[i] for i in rows] for rows in micro_batches(lengths, self.args.max_tokens_per_micro_batch)]

        def loss(part: list[Pair]) -> Tensor:
            out = self._pair_loss(model, self._collate(part))
            stats["accuracy"] += float((out.chosen_reward > out.rejected_reward).sum())
            stats["margin"] += float((out.chosen_reward - out.rejected_reward).sum())
            stats["reward/chosen"] += float(out.chosen_reward.sum())
            stats["reward/rejected"] += float(out.rejected_reward.sum())
            return out.loss.sum() / denominator

        if train:
            return self.backward(model, parts, loss), stats
        return self.all_reduce(sum((loss(part) for part in parts), torch.zeros((), device=self.args.device))), stats

    def _pair_loss(self, model: nn.Module, pairs: PairBatch) -> PairLoss:
        """One forward pass over both sides of the pairs."""
        both = pairs.stacked()
        logp = model(both.tokens, both.prompt_mask, both.mask).logp
        ref = self._reference_logprobs(both) if self.loss.needs_reference else None
        n = len(pairs)
        chosen, rejected = (
            Completions(logp=logp[side], ref_logp=None if ref is None else ref[side], mask=both.mask[side])
            for side in (slice(0, n), slice(n, 2 * n))
        )
        return self.loss(chosen, rejected)

    @torch.no_grad()
    def _reference_logprobs(self, sequences: Sequences) -> Tensor:
        score = partial(score_logprobs, temperature=1.0, max_tokens=self.args.max_tokens_per_micro_batch)
        with self.accelerator.autocast():
            if self.reference is not None:
                return score(self.reference, sequences)
            policy: Any = self.accelerator.unwrap_model(self.model).policy
            with policy.disable_adapter():
                return score(policy, sequences)

    def _collate(self, pairs: Sequence[Pair]) -> PairBatch:
        prompts = [p.prompt for p in pairs]
        pad = self.processing_class.pad_token_id
        sides = ([p.chosen for p in pairs], [p.rejected for p in pairs])
        chosen, rejected = (collate(prompts, side, pad=pad, device=self.args.device) for side in sides)
        return PairBatch(chosen=chosen, rejected=rejected)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs in one update, on all processes: the denominator of the loss."""
        return self.all_reduce(torch.tensor(float(sum(map(len, batch_samples))), device=device))
