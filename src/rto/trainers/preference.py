"""Stage 1: learn π_dpo from preferences."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from rto.batches import Sequences, collate, micro_batches
from rto.data.formats import Rows, Skipped, read_sets
from rto.files import shown
from rto.finite import NotFiniteError
from rto.functional.logprobs import scatter
from rto.functional.preference import LOSSES, Completions, PreferenceLoss, UnpairedLoss, needs_scalar_head
from rto.models.actor import (
    Actor,
    TokenOutputs,
    TokenScorer,
    check_output_layer,
    output_layer,
    policy_logprobs,
    response_states,
)
from rto.models.loading import (
    Source,
    check_same_vocabulary,
    clone,
    freeze,
    load_policy,
    load_scalar,
    pad_id,
    shared_context,
    source_name,
    trusts,
)
from rto.models.precision import check_derivative
from rto.models.roles import Role, adapt, place, shared_base
from rto.models.scalars import check_token_scorer
from rto.trainers.base import TokenTrainer, TokenTrainingArguments, check_trainer_arguments
from rto.trainers.engine import unwrapped
from rto.trainers.examples import (
    Example,
    load_reference,
    read_examples,
    reference_key,
    save_reference,
    sequences_of,
    with_reference,
)
from rto.trainers.identity import adapter_digest, weights_digest
from rto.trainers.precision import Reading
from rto.trl_names import PREFERENCE, by_trl_names
from rto.values import check_choice, json_mapping, typed


@by_trl_names(PREFERENCE)
@dataclass(repr=False)
class PreferenceConfig(TokenTrainingArguments):
    """Configuration of `PreferenceTrainer`; names and defaults follow TRL's ``DPOConfig`` where they exist there.

    Attributes:
        loss: name of the loss in `rto.functional.preference.LOSSES`.
        loss_kwargs: fields of the loss, such as ``{"beta": 0.1}``.
        swap_pairs: learn the opposite of every preference, held-out rows as well: the model of what is *not* wanted,
            which may be the reference of a token reward (AlignDistil's reverse DPO model).
        max_length: rows with a longer prompt + completion are left out with a count; so are those over the model's
            context.
        precompute_ref_log_probs: π_ref reads the data once, before training, and is then let go: one model less in
            memory, and a later run on the same data, model and template finds the numbers. Unlike TRL's, on by
            default; off where the model is sharded (FSDP, DeepSpeed) and for losses that need π_ref's distribution.
        ref_cache_dir: where these numbers are kept; None: in ``output_dir``. Give runs one folder to share them.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second decay rate, as in the paper."})
    loss: str = field(default="dpo", metadata={"help": f"Which loss: {', '.join(LOSSES)}."})
    loss_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the loss, as JSON: {"beta": 0.1, "label_smoothing": 0.0}.'}
    )
    swap_pairs: bool = field(
        default=False, metadata={"help": "Learn the opposite: rejected sides count as chosen, and chosen as rejected."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longer rows (prompt + completion) are left out."})
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Let π_ref read the data once, before training, and keep its numbers."}
    )
    ref_cache_dir: str | None = field(
        default=None, metadata={"help": "Where π_ref's numbers are kept; in output_dir when not given."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_loss()

    def make_loss(self) -> PreferenceLoss | UnpairedLoss:
        """The loss object that ``loss`` and ``loss_kwargs`` describe.

        Raises:
            ValueError: there is no such loss, or it has no such field.
        """
        check_choice("loss", self.loss, LOSSES)
        kind: Any = LOSSES[self.loss]
        given = json_mapping("loss_kwargs", self.loss_kwargs)
        try:
            return kind(**typed(kind, given, "loss_kwargs"))
        except ValueError as error:
            names = ", ".join(f.name for f in fields(kind))
            raise ValueError(f"{error} (loss {self.loss}; its fields are {names})") from error


class Outcome(NamedTuple):
    """What the loss says of n examples; NaN where an example has no such completion."""

    loss: Float[Tensor, " n"]
    accuracy: Float[Tensor, " n"]
    """1 where the chosen side has the higher implicit reward; alone: where a completion is on its label's side."""
    chosen: Float[Tensor, " n"]
    """Implicit reward of chosen or desirable completions."""
    rejected: Float[Tensor, " n"]
    kept: Float[Tensor, " n"]
    """log π/π_ref of the chosen or desirable completion, nats a token; NaN where the loss has no reference, too."""


class PreferenceTrainer(TokenTrainer):
    """Direct preference learning with any `PreferenceLoss` or `UnpairedLoss`.

    Args:
        model: the starting policy: a folder, a hub id or a model.
        ref_model: π_ref; None means the starting policy itself, which under a new adapter is the base.
        args: the configuration.
        train_dataset: pairs in TRL's preference format, standard or conversational; for an unpaired loss, rows in
            TRL's unpaired format or pairs.
        eval_dataset: the same, or a dictionary of them, for ``evaluate``: loss, accuracy, margin on held-out rows.
        processing_class: the tokenizer; None loads the model's.
        loss: a loss object; None makes the one that ``args`` describes.
        peft_config: train a PEFT adapter instead of the whole model.

    Raises:
        DataError: the data cannot be used; the message names the column or counts the rows.
        ValueError: ``ref_model`` has another vocabulary, or an argument of `transformers.Trainer` has no meaning here.
    """

    args: PreferenceConfig
    row_type = Example

    def __init__(
        self,
        model: Source,
        args: PreferenceConfig | None = None,
        *,
        ref_model: Source | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        loss: PreferenceLoss | UnpairedLoss | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        check_trainer_arguments(type(self), kwargs)
        args = args or PreferenceConfig(output_dir="preference")
        reading = Reading.of(args, model)
        tokenizer = reading.read_tokenizer(model, processing_class)
        self.loss = loss or args.make_loss()
        self.args, self.processing_class = args, tokenizer
        readers = [("model", model)] + ([("ref_model", ref_model)] if ref_model is not None else [])
        self._context = shared_context(readers, reading.tokenizer)
        examples, held_out, self.skipped = read_sets(self._read, train_dataset, eval_dataset)
        load = load_scalar if needs_scalar_head(self.loss) else load_policy
        policy = load(model, **reading.trained(model, adapted=peft_config is not None))
        check_derivative(source_name(model), policy)
        if ref_model is not None:
            check_same_vocabulary("ref_model", ref_model, tokenizer, policy, **reading.frozen(ref_model))
        (check_token_scorer if needs_scalar_head(self.loss) else check_output_layer)(policy)
        self.reference: nn.Module | None = None
        self._new_adapter = peft_config is not None  # its base is π_ref; one that came with the model belongs to π_ref
        if peft_config is not None:
            set_seed(args.seed)  # a new adapter starts at random, the same each time a run is started
            policy = adapt(policy, peft_config, revision=reading.init.get("revision"))
        self._base = shared_base(policy, trust_remote_code=trusts(reading.init))
        self._frozen_dtype = reading.frozen_dtype
        if ref_model is not None and self.loss.needs_reference:
            placed = place(self._base, ref_model, "ref_model")
            self.reference = freeze(load_policy(placed, **reading.frozen(ref_model)))
        self._reference_digest: str | None = None
        self.adapters = {"model": adapter_digest(model)}
        self._update: list[Example] = []
        self._baseline: Tensor | None = None  # z₀ of the update
        super().__init__(
            (TokenScorer if needs_scalar_head(self.loss) else Actor)(policy),
            args,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=tokenizer,
            **kwargs,
        )
        if self.loss.needs_reference:
            self._prepare_reference()

    def _prepare_reference(self) -> None:
        """Read π_ref's numbers beforehand and let it go, or keep it beside the policy."""
        if self.reference is not None:
            self._reference_digest = weights_digest(self.reference, self.engine.all_reduce)
        ahead = self.args.precompute_ref_log_probs and not self.loss.needs_ref_kl and not self.sharded
        if self.reference is None and not self._new_adapter and not ahead:
            base, dtype = self._base, self._frozen_dtype
            copied = clone(self.model.policy, dtype) if base is None else base.copy(None, "ref_model")
            self.reference = freeze(copied)
        if self.reference is not None:
            self.engine.lay_out(self.reference)
        if ahead:
            self.engine.ready(self.model)  # whole: what is read is in its own precision
            self.train_dataset, self.eval_dataset = map(self._precomputed, (self.train_dataset, self.eval_dataset))
            self.reference = None

    def decide(self) -> dict[str, Any]:
        """The loss, and a reference that was given."""
        return {**super().decide(), "the loss": self.loss, "weights of ref_model": self._reference_digest}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Gradients of the mean loss over the examples of one update, on all processes."""
        model.train()
        assert num_items_in_batch is not None
        if self._baseline is None:  # of the whole update, before its first gradient
            self._baseline = self._kl(model, self._update)
        kl = self._baseline
        outcomes: list[Outcome] = []

        def loss(rows: Tensor) -> Tensor:
            outcome = self._outcome(model, [inputs[i] for i in rows], kl)
            counts = _counts([inputs[i] for i in rows], outcome.loss)
            outcomes.append(Outcome(*(x.where(counts, torch.nan) for x in outcome)))
            self.watch.see(outcome.loss, "loss of the policy", rows=rows, tell=tell)
            return outcome.loss.where(counts, 0.0).sum() / num_items_in_batch

        def tell(row: int) -> str:
            return f"prompt {shown(self.processing_class.decode(inputs[row].prompt))}"

        apart = None if isinstance(self.reference, Role) else self.reference
        with self.engine.whole(apart):  # gathered once an update, also for a distribution that is compared with
            total = self.backward(model, self._cuts(inputs), loss)
        self.record(**self._means(outcomes), **({"kl": kl} if isinstance(self.loss, UnpairedLoss) else {}))
        return total

    @torch.no_grad()
    def evaluate_rows(self, data: Sequence[Example], metric_key_prefix: str) -> dict[str, float]:
        """Means on held-out examples, with standard errors: loss, accuracy, margin, implicit rewards.

        Raises:
            ValueError: the data came after π_ref was let go.
        """
        if self.loss.needs_reference and not self._has_reference and not data[0].ref_logp:
            raise ValueError(
                "π_ref has been let go after it read the data: give eval_dataset to the trainer when it is made, or "
                "set precompute_ref_log_probs=False"
            )
        outcome = self._everywhere(data)
        columns = {"loss": outcome.loss, "accuracy": outcome.accuracy, "margin": outcome.chosen - outcome.rejected}
        columns |= {"reward/chosen": outcome.chosen, "reward/rejected": outcome.rejected}
        columns |= {"logratio/chosen": outcome.kept}
        metrics: dict[str, float] = {"pairs" if len(data[0].labels) == 2 else "completions": float(len(data))}
        for name, column in columns.items():
            column = column[~column.isnan()]
            if len(column):
                metrics[name] = float(column.mean())
                metrics[f"{name}_se"] = float(column.std() / len(column) ** 0.5) if len(column) > 1 else float("nan")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super(TokenTrainer, self).log(dict(metrics))  # what training has recorded waits for its own log
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _everywhere(self, data: Sequence[Example]) -> Outcome:
        """The outcome of every example, each computed by one process and known to all."""
        self.model.eval()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(range(rank, len(data), world))
        examples = [data[i] for i in mine]
        table = torch.zeros(len(Outcome._fields), len(data), dtype=torch.float64, device=self.args.device)
        with self.engine.whole(self.model, self.reference):  # processes may have different numbers of examples
            kl = self._kl(self.model, examples)
            for rows in self._cuts(examples):
                with self.compute_loss_context_manager():
                    outcome = self._outcome(self.model, [examples[i] for i in rows], kl)
                table[:, [mine[i] for i in rows]] = torch.stack(outcome).double()
        return Outcome(*self.all_reduce(table).unbind())

    # --- one micro-batch

    def _outcome(self, model: nn.Module, examples: Sequence[Example], kl: Tensor) -> Outcome:
        """One forward pass over the completions of some examples, and what the loss says of them."""
        scored = self._score(model, examples, [e.completions for e in examples])
        n, sides = len(examples), len(examples[0].completions)
        kept = _part(scored, slice(0, n)).drift
        if isinstance(self.loss, UnpairedLoss):
            labels = torch.tensor([e.labels for e in examples], device=self.args.device).T
            per_completion = self.loss(scored, labels.flatten(), kl)
            loss, rewards = per_completion.loss.view(sides, n).mean(0), per_completion.reward.view(sides, n)
            if sides == 1:  # alone, a completion is right where its reward is on its label's side of z₀
                right = (per_completion.reward > per_completion.baseline) == labels[0]
                nan = rewards.new_tensor(torch.nan)
                chosen, rejected = (torch.where(labels[0] == side, rewards[0], nan) for side in (True, False))
                return Outcome(loss, right.float(), chosen, rejected, torch.where(labels[0], kept, nan))
            chosen, rejected = rewards
        else:
            loss, chosen, rejected = self.loss(_part(scored, slice(0, n)), _part(scored, slice(n, 2 * n)))
        return Outcome(loss, (chosen > rejected).float(), chosen, rejected, kept)

    def _score(
        self, model: nn.Module, examples: Sequence[Example], completions: Sequence[tuple[list[int], ...]]
    ) -> Completions:
        """The policy's and the reference's numbers on completions of the examples."""
        sequences = sequences_of(examples, completions, pad=pad_id(self.processing_class), device=self.args.device)
        if self.loss.needs_ref_kl:
            return self._score_with_kl(model, sequences)
        out: TokenOutputs = model(sequences.tokens, sequences.prompt_mask, sequences.mask)
        assert out.logp is not None
        logp, ref = out.logp, None
        if self.loss.needs_reference and examples[0].ref_logp:
            first = 0 if completions[0] is examples[0].completions else len(examples[0].completions)
            known = [e.ref_logp[first + side] for side in range(len(completions[0])) for e in examples]
            ref = scatter(torch.cat(known).to(logp.device), sequences.mask)
        elif self.loss.needs_reference:
            with self._as_reference() as reference:
                ref = policy_logprobs(reference, sequences)
        return Completions(logp=logp, ref_logp=ref, mask=sequences.mask)

    def _score_with_kl(self, model: nn.Module, sequences: Sequences) -> Completions:
        """The same with KL(π_ref ‖ π) at every token; π_ref is read once for both."""
        with self._as_reference() as reference:
            ref_logp = policy_logprobs(reference, sequences)
            ref_hidden = response_states(reference, sequences)
            ref_head = output_layer(reference)
        out: TokenOutputs = model(
            sequences.tokens, sequences.prompt_mask, sequences.mask, ref_hidden=ref_hidden, ref_head=ref_head
        )
        assert out.logp is not None
        return Completions(logp=out.logp, ref_logp=ref_logp, mask=sequences.mask, ref_kl=out.ref_kl)

    @torch.no_grad()
    def _kl(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Mean log-ratio of the mismatched completions of one update, over all processes; 0 where there are none."""
        total = torch.zeros(2, device=self.args.device)
        if isinstance(self.loss, UnpairedLoss):
            for rows in self._cuts(examples, mismatched=True):
                part = [examples[i] for i in rows]
                with self.compute_loss_context_manager():
                    ratio = self._score(model, part, [e.mismatched for e in part]).logratio
                counts = _counts(part, ratio).repeat(len(ratio) // len(part))
                total += torch.stack([ratio.where(counts, 0.0).sum(), counts.sum().to(ratio)])
        total = self.all_reduce(total)
        return total[0] / total[1].clamp(min=1)

    def _means(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Means over the examples of one update, of all processes; a mean of nothing is left out."""
        columns = [torch.cat(column).detach().double() for column in zip(*outcomes)]
        sums = torch.stack([torch.stack([x.nansum(), (~x.isnan()).sum()]) for x in columns])
        totals = {name: s / n for name, (s, n) in zip(Outcome._fields, self.all_reduce(sums).tolist()) if n}
        means = {"accuracy": totals["accuracy"]}
        means |= {f"reward/{side}": totals[side] for side in ("chosen", "rejected") if side in totals}
        if "chosen" in totals and "rejected" in totals:
            means["margin"] = totals["chosen"] - totals["rejected"]
        means |= {"logratio/chosen": totals["kept"]} if "kept" in totals else {}
        return means

    # --- the reference

    @property
    def _has_reference(self) -> bool:
        return self.reference is not None or self._new_adapter

    @contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """π_ref: a model of its own, the base under a new adapter, or before training the policy itself."""
        reference = self.reference
        if reference is None and self._new_adapter:
            assert self._base is not None
            reference = self._base.without_adapter().eval()
        if reference is None:
            reference = unwrapped(self.accelerator, self.model).policy
        with torch.no_grad(), self.accelerator.autocast(), self.engine.whole(reference):
            yield reference

    def _precomputed(self, examples: Any) -> Any:
        """The examples with π_ref's numbers, found or computed; before training the policy itself may be π_ref.

        Raises:
            NotFiniteError: one of them is NaN or infinite; on every process, and nothing is kept.
        """
        if isinstance(examples, dict):
            return {name: self._precomputed(part) for name, part in examples.items()}
        if not examples:
            return examples
        with self._as_reference() as reference:
            key = reference_key(reference, examples, f"{self.accelerator.mixed_precision}")
            folder = Path(self.args.ref_cache_dir or Path(str(self.args.output_dir)) / "_ref_log_probs")
            path = folder / f"{key}.safetensors"
            found = load_reference(path)
            missing = torch.tensor(float(found is None), device=self.args.device)
            if self.all_reduce(missing).item() == 0:
                assert found is not None
                return with_reference(examples, found)
            logp = self._read_by_reference(reference, examples)
        if not logp.isfinite().all():
            read = enumerate(with_reference(examples, logp))
            row, bad = next((i, e) for i, e in read if not torch.cat(e.ref_logp).isfinite().all())
            raise NotFiniteError(
                f"before step 1: the log-probability of the reference is not finite in row {row} (prompt "
                f"{shown(self.processing_class.decode(bad.prompt))}): look at that row and at the model"
            )
        if self.is_world_process_zero():
            save_reference(path, logp)
        return with_reference(examples, logp)

    def _read_by_reference(self, reference: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Log π_ref of all scored tokens, in the order of the examples; each process reads its share."""
        training, _ = reference.training, reference.eval()
        every = [(e.prompt, ids) for e in examples for ids in e.scored]
        starts = torch.tensor([0, *(len(ids) for _, ids in every)]).cumsum(0)
        logp = torch.zeros(int(starts[-1]), device=self.args.device)
        mine = torch.arange(self.accelerator.process_index, len(every), self.accelerator.num_processes)
        lengths = torch.tensor([len(every[i][0]) + len(every[i][1]) for i in mine])
        for cut in micro_batches(lengths, self.args.max_tokens_per_micro_batch):
            rows = mine[cut].tolist()
            sequences = collate(
                [every[i][0] for i in rows],
                [every[i][1] for i in rows],
                pad=pad_id(self.processing_class),
                device=self.args.device,
            )
            scored = policy_logprobs(reference, sequences)
            for i, row, keep in zip(rows, scored, sequences.mask):
                logp[starts[i] : starts[i + 1]] = row[keep]
        reference.train(training)
        return self.all_reduce(logp)

    # --- help

    def _read(self, dataset: Rows, what: str) -> tuple[list[Example], Skipped]:
        return read_examples(
            dataset,
            self.processing_class,
            unpaired=isinstance(self.loss, UnpairedLoss),
            max_length=self.args.max_length,
            context=self._context,
            swapped=self.args.swap_pairs,
            what=what,
        )

    def _cuts(self, examples: Sequence[Example], *, mismatched: bool = False) -> list[Tensor]:
        """Micro-batches of whole examples."""
        sides = [(e.prompt, e.mismatched if mismatched else e.completions) for e in examples]
        lengths = torch.tensor([len(s) * (len(x) + max(map(len, s))) for x, s in sides], dtype=torch.long)
        if self.model.training:
            return self.micro_batches(lengths)
        return micro_batches(lengths, self.args.max_tokens_per_micro_batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Examples in one update, on all processes: the denominator of the loss. What fills up a batch is marked."""
        if batch_samples and not self.args.dataloader_drop_last:
            last = batch_samples[-1]
            more = self.engine.filled_up(len(last), len(cast(Any, self.train_dataset)))
            last[len(last) - more :] = [replace(example, counts=False) for example in last[len(last) - more :]]
        self._update, self._baseline = [example for batch in batch_samples for example in batch], None
        return self.all_reduce(torch.tensor(float(sum(e.counts for e in self._update)), device=device))


def _counts(examples: Sequence[Example], like: Tensor) -> Tensor:
    """Which examples count."""
    return torch.tensor([example.counts for example in examples], device=like.device)


def _part(completions: Completions, rows: slice) -> Completions:
    ref, kl = completions.ref_logp, completions.ref_kl
    return Completions(
        logp=completions.logp[rows],
        ref_logp=None if ref is None else ref[rows],
        mask=completions.mask[rows],
        ref_kl=None if kl is None else kl[rows],
    )
