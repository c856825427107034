"""Stage 2: Reinforced Token Optimization. Read `RTOTrainer.training_step` first; it is the algorithm.

One update of `transformers.Trainer` is one minibatch here. A rollout serves ``num_ppo_epochs × num_mini_batches``
updates; on the first of them it is sampled, scored and turned into targets. Prompts come through a data loader,
rollouts never do: they are drawn when their turn has come, with the weights of that moment; with ``async_rollouts``
one turn before, while the policy learns from those of the last, and weighed for it.

Beside it: settings in `rto.trainers.config`, models in `rto.trainers.parts`, prompts in `rto.trainers.prompts`, turns,
optimizer and checkpoints in `rto.trainers.online`; below it: what frozen models say in `rto.rollout.scoring`, rewards
and advantages in `rto.credit`.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto.batches import Rollout, Samples, Sequences, Targets
from rto.credit import Credit
from rto.data.formats import Prompt, Rows, read_sets
from rto.files import shown
from rto.finite import NotFiniteError, together
from rto.functional.importance import log_ratio
from rto.functional.masked import masked_sum
from rto.functional.ppo import approx_kl, policy_loss, value_loss
from rto.models.actor import Actor, TokenOutputs
from rto.models.loading import Source, shared_context
from rto.rollout.rewards import RewardFunc
from rto.rollout.samplers.ahead import Ahead
from rto.rollout.samplers.base import SampleFunction, Sampler, as_sampler
from rto.rollout.scoring import complete
from rto.rollout.token_rewards import TOKEN_REWARDS, TokenRewardSpec
from rto.trainers.base import VALUE_MODEL, TokenTrainer, check_trainer_arguments
from rto.trainers.config import RTOConfig
from rto.trainers.engine import unwrapped
from rto.trainers.identity import adapter_digest
from rto.trainers.logs import Phases, mean_over
from rto.trainers.online import OnlineTrainer
from rto.trainers.parts import Named, listed
from rto.trainers.precision import Reading
from rto.trainers.prompts import fit_batch, room, shown_prompt, with_room
from rto.trainers.tables import CompletionsTable

__all__ = ["RTOConfig", "RTOTrainer"]
logger = logging.getLogger(__name__)


class RTOTrainer(OnlineTrainer):
    """Reinforced Token Optimization, and everything that is a value of it.

    Args:
        model: the starting policy: a folder, a hub id or a model. An adapter goes on being trained.
        args: the configuration.
        dpo_model: π_dpo, whose log-ratio to the reference is the token reward. Not run when β₁ = 0. Or any other
            `TokenRewardSpec`: a token source, a Python function; a list of them counts as their mean.
        dpo_ref_model: π_dpo's own reference; None means ``ref_model``.
        ref_model: π_ref; None means the starting policy itself, or the base model under a new adapter.
        value_model: what the critic starts from, a causal model with one linear head; None means the first such
            reward model that shares the policy's tokenizer, or else the policy's backbone as it is now, with a head
            that starts at zero. On a shared base: the first reward model that shares it, or else an adapter that
            starts as the policy's.
        reward_funcs: as in TRL's GRPO: a reward model (folder, hub id, object), a Python function, or a list of
            these. Needed unless β₃ = 0.
        reward_processing_classes: tokenizers of reward models given as objects, in the order of ``reward_funcs``.
        train_dataset: prompts in TRL's prompt-only format; other columns are handed to reward functions.
        eval_dataset: prompts for ``evaluate``, or a dictionary of such data sets.
        processing_class: the tokenizer; None loads the model's.
        sampler: draws completions: a `Sampler`, or a function of policy, prompts and seed; None: as ``args`` says.
        peft_config: train a new PEFT adapter on the policy instead of the whole model. Where the policy is an
            adapter, each other model that is given as the folder of an adapter on the same base shares that base
            (`rto.models.roles`); any other model is one of its own.
        credit: how rollouts become targets; None: as ``args`` says. ``args`` takes over what it says.

    Raises:
        DataError: the prompts cannot be used.
        ValueError: models, rewards and coefficients do not fit together, checked before any model runs; ``credit``
            contradicts ``args``; or an argument of `transformers.Trainer` has no meaning here.
    """

    args: RTOConfig

    def __init__(
        self,
        model: Source,
        args: RTOConfig | None = None,
        *,
        dpo_model: TokenRewardSpec | list[TokenRewardSpec] | None = None,
        dpo_ref_model: Source | None = None,
        ref_model: Source | None = None,
        value_model: Source | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        sampler: Sampler | SampleFunction | None = None,
        peft_config: Any = None,
        credit: Credit | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainer_arguments(type(self), kwargs)
        args = args or RTOConfig(output_dir="rto")
        if credit is not None:
            args.adopt(credit)
        self.credit = credit or args.credit()
        self.correction = args.correction()
        named = Named(
            model=model,
            token_rewards=listed(dpo_model),
            dpo_ref_model=dpo_ref_model,
            ref_model=ref_model,
            value_model=value_model,
            reward_funcs=listed(reward_funcs),
            reward_tokenizers=listed(reward_processing_classes),
            sampler=sampler,
            peft_config=peft_config,
        )
        named.check(args)
        reading = Reading.of(args, model)
        tokenizer = reading.read_tokenizer(model, processing_class)
        readers = named.readers(args, tokenizer, reading)
        self.args, self.processing_class = args, tokenizer
        scoring = ("dpo_model",) if TOKEN_REWARDS[args.token_reward].scalar else ()
        self._context = room(args, shared_context(readers, reading.tokenizer, scoring=scoring))
        prompts, held_out, self.skipped = read_sets(self._read, train_dataset, eval_dataset)
        fit_batch(args, prompts)
        parts = named.load(args, tokenizer, reading, needs_values=self.credit.needs_values)
        self.sampler, self.scoring = parts.sampler, parts.scoring
        self._ahead = Ahead(as_sampler(self.sampler)) if args.async_rollouts else None
        fits = partial(with_room, scorers=self.scoring.reward_models, completion=args.max_completion_length)
        prompts, held_out, _ = read_sets(fits, prompts, held_out)
        fit_batch(args, prompts)
        self.adapters = {"model": adapter_digest(model), VALUE_MODEL: adapter_digest(value_model)}
        self._targets: Targets | None = None
        self._phase = Phases()

        super().__init__(
            Actor(parts.policy, parts.critic),
            args,
            train_dataset=prompts,
            eval_dataset=held_out,
            processing_class=tokenizer,
            **kwargs,
        )
        self.add_callback(CompletionsTable(self.callback_handler))
        if args.offload_frozen and self.engine.sharded:
            raise ValueError("offload_frozen does not go with FSDP: let it off-load (fsdp_config: cpu_offload)")
        self.scoring.reading = self._reading
        self.scoring.state = lambda: self.state
        self.scoring.lay_out(self.args.device, self.engine.lay_out)

    # --- the algorithm

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One update on the rollouts of a list of `Prompt`; on the first of them: sample → score → credit."""
        args = self.args
        iteration, update = divmod(self.state.global_step, args.updates_per_rollout)
        if update == 0:
            self._phase.seconds.clear()
            with self.engine.whole(self.model.policy):  # gathered once for all that is read of it
                with self._phase("sample"):
                    samples = self._rollouts(model, inputs, iteration)
                with self._phase("score"):
                    rollout = self.score(model, samples, inputs)
            with self._phase("credit"):
                credited = self.credit(rollout, text=self._token_text, all_reduce=self.all_reduce)
            self._targets = credited.targets
            self.record(**credited.metrics, **self._distance(rollout), episodes=self._episodes(iteration + 1))
        assert self._targets is not None
        epoch, part = divmod(update, args.num_mini_batches)
        shuffle = torch.Generator().manual_seed(self._seed(iteration) + epoch)
        rows = torch.randperm(len(self._targets), generator=shuffle).chunk(args.num_mini_batches)[part]
        with self._phase("update"):
            loss = self.update(model, self._targets.rows(rows))
        if update == args.updates_per_rollout - 1:
            tokens = self.all_reduce(self._targets.mask.sum().float())
            self.record(**self._phase.metrics(float(tokens)))
        return loss

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], seed: int) -> Samples:
        """Draw one completion for each prompt from the policy as it is now.

        Raises:
            NotFiniteError: the sampler's logits are NaN or infinite.
        """
        actor: Actor = unwrapped(self.accelerator, model)
        if self._ahead is not None:
            self._ahead.wait()  # what is being drawn is drawn with the weights it was begun with
        with self.engine.whole(actor.policy), together(self.accelerator), self.accelerator.autocast():
            try:
                return complete(self.sampler, actor.policy, [p.ids for p in prompts], seed, version=self._iteration)
            except NotFiniteError as error:
                at = "" if error.row is None else f" ({shown_prompt(prompts, error.row)})"
                raise NotFiniteError(f"step {self.state.global_step + 1}: {error}{at}: look at the policy") from error

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        samples: Samples,
        prompts: Sequence[Prompt],
        counted: Bool[Tensor, " B"] | None = None,
    ) -> Rollout:
        """Everything the reward needs, each number from one forward pass of the model it belongs to.

        Args:
            model: policy and critic, as they are wrapped.
            samples: what was drawn.
            prompts: what for.
            counted: which rows the metrics are of; None: all.

        Raises:
            NotFiniteError: a number is NaN or infinite; the message names model and row.
        """
        model.eval()
        with self.engine.whole(self.model):
            acting = self._act(model, samples)
        scored = self.scoring(samples, acting, prompts)
        self._check(scored, prompts)
        self._tell_of(scored, acting, counted)
        return scored.rollout

    def update(self, model: nn.Module, batch: Targets) -> Tensor:
        """Gradients of the clipped losses over one minibatch; every mean is over its tokens on all processes."""
        args = self.args
        model.train()
        tokens = self.all_reduce(batch.mask.sum().float())
        stats: dict[str, Tensor] = {}

        def tell(row: int) -> str:
            prompt = batch.tokens[row, : batch.prompt_mask.shape[1]][batch.prompt_mask[row]]
            return f"prompt {shown(self.processing_class.decode(prompt))}"

        def loss(share: tuple[Tensor, tuple[str, ...]]) -> Tensor:
            part = batch.rows(share[0]).trim()
            out: TokenOutputs = model(part.tokens, part.prompt_mask, part.mask, args.temperature, parts=share[1])
            terms: dict[str, Tensor] = {}
            total = torch.zeros((), device=part.mask.device)
            if out.logp is not None:
                policy = policy_loss(out.logp, part.old_logp, part.advantages, cliprange=args.cliprange)
                terms |= {
                    "loss/policy": policy.loss,
                    "clip/ratio": policy.clipped.float(),
                    "approx_kl": approx_kl(out.logp, part.old_logp),
                }
                self.watch.see(policy.loss, "loss of the policy", mask=part.mask, rows=share[0], tell=tell)
                weighted = policy.loss
                if self.correction is not None and part.sampler_logp is not None:
                    drawn = self.correction(log_ratio(part.old_logp, part.sampler_logp, part.mask))
                    weighted = drawn.weights * weighted
                    terms["clip/importance"] = drawn.clipped.float()
                total = total + masked_sum(weighted, part.mask)
            if out.values is not None:
                assert part.old_values is not None
                assert part.returns is not None
                value = value_loss(out.values, part.old_values, part.returns, cliprange=args.cliprange_value)
                terms |= {"loss/value": value.loss, "clip/value": value.clipped.float()}
                self.watch.see(value.loss, "loss of the critic", mask=part.mask, rows=share[0], tell=tell)
                total = total + args.vf_coef * masked_sum(value.loss, part.mask)
            for name, x in terms.items():
                stats[name] = stats.get(name, 0.0) + masked_sum(x.detach(), part.mask)
            return total / tokens

        # The policy's graph is gone before the critic's is built: a step holds the activations of one model.
        passes = [("policy", "value")] if self.engine.joint else [("policy",), ("value",)]
        passes = passes if self.credit.needs_values else [("policy",)]
        if self.state.global_step < args.critic_warmup_steps:
            passes = [("value",)]
        cuts = self.micro_batches(batch.lengths.cpu())
        shares_of = [(rows, parts) for rows in cuts for parts in passes]
        if self.gathers_once:  # one model after the other
            shares_of = [(rows, parts) for parts in passes for rows in cuts]
        models = {"policy": self.model.policy, "value": self.model.value_model}
        reads = lambda share: models[share[1][0]]  # noqa: E731
        total = self.backward(model, shares_of, loss, whole=len(passes) == 1, reads=reads)
        means = self.all_reduce(torch.stack(list(stats.values()))) / tokens
        self.record(**dict(zip(stats, means)))
        return total

    # --- scoring

    def _act(self, model: nn.Module, samples: Sequences) -> TokenOutputs:
        """The policy's and the critic's numbers before the update, in micro-batches."""
        shape, device = samples.mask.shape, samples.mask.device
        logp, entropy, values = (torch.zeros(shape, device=device) for _ in range(3))
        for rows in self.micro_batches(samples.lengths.cpu()):
            part = samples.rows(rows).trim()
            out: TokenOutputs = model(
                part.tokens, part.prompt_mask, part.mask, self.args.temperature, with_entropy=True
            )
            at, width = rows.to(device), part.mask.shape[1]
            assert out.logp is not None
            assert out.entropy is not None
            logp[at, :width], entropy[at, :width] = out.logp.float(), out.entropy
            if out.values is not None:
                values[at, :width] = out.values
        return TokenOutputs(logp, values if self.credit.needs_values else None, entropy)

    @contextmanager
    def _reading(self, *models: Any) -> Iterator[None]:
        """How `Scoring` reads a model: whole, in the precision of the run, and every process or none."""
        with self.engine.whole(*models), together(self.accelerator), self.accelerator.autocast():
            yield

    def _token_text(self, token: int) -> str:
        return str(self.processing_class.decode([token]))

    # --- models

    @property
    def reference(self) -> nn.Module:
        """π_ref."""
        return self.scoring.reference

    def models(self) -> dict[str, nn.Module]:
        """Policy, critic, reference, and what token rewards and scores come from."""
        critic = self.model.value_model
        own = {} if critic is None else {VALUE_MODEL: critic}  # before the whole of both, so that it is called so
        return {**own, **super().models(), **self.scoring.models()}

    def decide(self) -> dict[str, Any]:
        """Credit assignment, and where scores come from."""
        return {**super().decide(), "credit": self.credit, "reward_funcs": self.scoring.names}

    # --- evaluation

    def evaluate_rows(self, prompts: Sequence[Prompt], metric_key_prefix: str) -> dict[str, float]:
        """Sample held-out prompts with a fixed seed: scores, KL, length and EOS rate."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        at = range(rank, math.ceil(len(prompts) / world) * world, world)  # as many on every process
        mine = [prompts[i % len(prompts)] for i in at]
        counted = torch.tensor([i < len(prompts) for i in at], device=self.args.device)
        kept, self._metrics = self._metrics, defaultdict(list)
        with self.engine.whole(self.model.policy):
            samples = self.sample(self.model, mine, seed=self.args.seed)
            rollout = self.score(self.model, samples, mine, counted)
        kl = masked_sum(rollout.policy_logp - rollout.ref_logp, rollout.mask, dim=-1)
        self.record(kl=mean_over(kl, counted, self.all_reduce))
        found = {f"{metric_key_prefix}_{name}": values[-1] for name, values in self._metrics.items()}
        self._metrics = kept
        super(TokenTrainer, self).log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found
