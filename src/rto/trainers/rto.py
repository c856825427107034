"""Stage 2: Reinforced Token Optimization. Read `RTOTrainer.training_step` first; it is the algorithm.

One update of `transformers.Trainer` is one minibatch here. A rollout serves ``num_ppo_epochs × num_mini_batches``
updates; on the first of them it is sampled, scored and turned into targets. Prompts come through a data loader,
rollouts never do: they are drawn when their turn has come, with the weights of that moment.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Sampler as IndexSampler
from transformers import PreTrainedTokenizerBase, set_seed

from rto.batches import Rollout, Samples, Sequences, Targets
from rto.data.chat import completion_texts, split_special_tokens
from rto.data.errors import DataError
from rto.data.formats import Prompt, Rows, Skipped, read_prompts, read_sets
from rto.files import shown, write_atomically
from rto.finite import NotFiniteError, together
from rto.functional.advantages import GAE, Estimator, ReinforcePlusPlus
from rto.functional.masked import masked_mean, masked_sum, whiten
from rto.functional.ppo import approx_kl, explained_variance, policy_loss, value_loss
from rto.functional.rewards import PLACEMENTS, AdaptiveKL, RewardTerms, RTOReward, RunningMoments, shares
from rto.models.actor import Actor, TokenOutputs, check_output_layer, score_logprobs
from rto.models.loading import (
    Source,
    check_same_vocabulary,
    clone,
    find_config,
    freeze,
    is_adapter,
    load_policy,
    load_scalar,
    shared_context,
    source_name,
    trusts,
)
from rto.models.precision import check_derivative, hold
from rto.models.roles import Role, SharedBase, adapt, place, shared_base, trainable
from rto.models.scalars import check_critic, critic_of, why_no_critic
from rto.ranges import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SHARE, Range, check_arguments
from rto.rollout.rewards import Completed, RewardFunc, RewardModel, distinct, reward_source
from rto.rollout.sampling import Sampler, SamplingConfig, TransformersSampler
from rto.rollout.token_rewards import TOKEN_REWARDS, Ensemble, TokenRewardSpec, TokenSource, token_source
from rto.trainers.base import (
    VALUE_MODEL,
    TokenTrainer,
    TokenTrainingArguments,
    check_trainer_arguments,
)
from rto.trainers.checkpoints import CheckpointError
from rto.trainers.precision import Reading
from rto.values import check_choice

logger = logging.getLogger(__name__)
ESTIMATORS = ("gae", "reinforce++")


@dataclass
class RTOConfig(TokenTrainingArguments):
    """Configuration of `RTOTrainer`. Names follow TRL's ``PPOConfig`` and ``GRPOConfig`` where they exist there.

    ``per_device_train_batch_size`` is the number of rollouts a process draws in one iteration. Results do not
    depend on ``max_tokens_per_micro_batch``, so there is no ``gradient_accumulation_steps`` to set.

    Attributes:
        learning_rate: of the policy (paper: 5e-7).
        value_learning_rate: of the critic (paper: 9e-6).
        total_episodes: stop after so many rollouts on all processes; None goes by ``num_train_epochs``.
        num_ppo_epochs: passes over each rollout batch.
        num_mini_batches: updates in one pass.
        dpo_coef: β₁; 0 runs no DPO model: PPO.
        kl_coef: β₂.
        score_coef: β₃; 0 needs no reward function.
        token_reward: what is read from ``dpo_model``: logratio, or mean_logprob (SimPO's reward, no reference).
        token_reward_pessimism: κ: several DPO models count as their mean less κ standard deviations.
        token_reward_clip: bound on the raw log-ratio, before β₁; None for no bound.
        reward_placement: where token rewards are paid: token (RTO), sentence (Semi-RTO), final (DDPO).
        reward_shaping: subtract their sum at the last token (RS-PPO).
        advantage_estimator: gae (with a critic) or reinforce++ (without).
        missing_eos_penalty: subtracted from the reward of a completion that was cut off.
        kl_target: steer β₂ towards this KL, nats a completion; None keeps β₂.
        normalize_scores: subtract the running mean of the scores and divide by their running deviation.
        reward_weights: one weight a reward function; a weight of 0 only logs it. None: all 1.
        max_cache_tokens: tokens that rows decoded side by side may have together, prompts and length limits; None
            means what 8 GiB of key-value cache hold. Which rows share a batch decides their random numbers.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of the policy."})
    value_learning_rate: float = field(default=9e-6, metadata={"help": "Learning rate of the critic."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second decay rate, as in the paper."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Rollouts a process draws in one iteration."}
    )
    total_episodes: int | None = field(default=None, metadata={"help": "Stop after so many rollouts."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts."})
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over each batch of rollouts."})
    num_mini_batches: int = field(default=4, metadata={"help": "Updates in one pass over a batch of rollouts."})

    dpo_coef: float = field(default=0.05, metadata={"help": "β₁, the weight of the token reward; 0 is PPO."})
    kl_coef: float = field(default=0.01, metadata={"help": "β₂, the weight of the KL penalty."})
    score_coef: float = field(default=1.0, metadata={"help": "β₃, the weight of the sentence score."})
    token_reward: str = field(default="logratio", metadata={"help": f"One of {', '.join(TOKEN_REWARDS)}."})
    token_reward_pessimism: float = field(
        default=0.0, metadata={"help": "κ: mean over the DPO models less κ standard deviations."}
    )
    token_reward_clip: float | None = field(default=1.0, metadata={"help": "Bound on the raw log-ratio, before β₁."})
    reward_placement: str = field(
        default="token", metadata={"help": "Where token rewards are paid: token, sentence or final."}
    )
    reward_shaping: bool = field(default=False, metadata={"help": "Make token rewards add up to zero (RS-PPO)."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward function."})
    missing_eos_penalty: float = field(default=0.0, metadata={"help": "Price of a completion that was cut off."})
    normalize_scores: bool = field(default=False, metadata={"help": "Standardize scores by running statistics."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to unit variance, keep their mean."})
    kl_target: float | None = field(default=None, metadata={"help": "Steer β₂ towards this KL a completion."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Rollouts over which β₂ is steered."})

    advantage_estimator: str = field(default="gae", metadata={"help": "gae or reinforce++."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Standardize advantages over each rollout batch."})
    cliprange: float = field(default=0.2, metadata={"help": "ε of the clipped surrogate."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "ε of the clipped value loss."})
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})

    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts are left out."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens in a completion, EOS included."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of every log-probability."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k most likely tokens; 0: all."})
    max_cache_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of all rows decoded side by side; None: what 8 GiB of cache hold."}
    )
    log_completions: int = field(default=2, metadata={"help": "Completions a rollout to keep in completions.jsonl."})
    logging_steps: float = field(default=0, metadata={"help": "Log every so many updates; 0: once a rollout."})

    ranges: ClassVar[Mapping[str, Range]] = {
        **TokenTrainingArguments.ranges,
        "value_learning_rate": NOT_NEGATIVE,
        "total_episodes": COUNT,
        "num_ppo_epochs": COUNT,
        "num_mini_batches": COUNT,
        "dpo_coef": NOT_NEGATIVE,
        "kl_coef": NOT_NEGATIVE,
        "token_reward_pessimism": NOT_NEGATIVE,
        "token_reward_clip": POSITIVE,
        "missing_eos_penalty": NOT_NEGATIVE,
        "kl_target": POSITIVE,
        "kl_horizon": COUNT,
        "gamma": SHARE,
        "lam": SHARE,
        "cliprange": POSITIVE,
        "cliprange_value": POSITIVE,
        "vf_coef": NOT_NEGATIVE,
        "max_prompt_length": COUNT,
        "max_completion_length": COUNT,
        "temperature": NOT_NEGATIVE,
        "top_p": POSITIVE_SHARE,
        "top_k": NOT_NEGATIVE,
        "log_completions": NOT_NEGATIVE,
        "max_cache_tokens": COUNT,
    }

    def __post_init__(self) -> None:
        check_arguments(self, self.ranges)
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(f"reward_weights must be finite numbers, got {self.reward_weights}")
        if self.logging_steps == 0:
            self.logging_steps = self.num_ppo_epochs * self.num_mini_batches
        super().__post_init__()
        self.sampling()
        choices: tuple[tuple[str, Any], ...] = (
            ("token_reward", TOKEN_REWARDS),
            ("reward_placement", PLACEMENTS),
            ("advantage_estimator", ESTIMATORS),
        )
        for name, known in choices:
            check_choice(name, getattr(self, name), known)
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps has no meaning here: set max_tokens_per_micro_batch to what memory "
                "allows and per_device_train_batch_size to the rollouts of an iteration"
            )
        if self.temperature == 0:
            raise ValueError("temperature=0 explores nothing: reinforcement learning needs temperature > 0")
        if self.per_device_train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} does not divide into "
                f"num_mini_batches={self.num_mini_batches}"
            )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates that one batch of rollouts serves."""
        return self.num_ppo_epochs * self.num_mini_batches

    def sampling(self) -> SamplingConfig:
        """How completions are drawn."""
        return SamplingConfig(
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def reward(self) -> RTOReward:
        """Eq. 4.7 with these coefficients."""
        return RTOReward(
            dpo_coef=self.dpo_coef,
            kl_coef=self.kl_coef,
            score_coef=self.score_coef,
            token_reward_clip=self.token_reward_clip,
            shaping=self.reward_shaping,
            missing_eos_penalty=self.missing_eos_penalty,
        )

    def estimator(self) -> Estimator:
        """Rewards to advantages."""
        if self.advantage_estimator == "gae":
            return GAE(gamma=self.gamma, lam=self.lam)
        return ReinforcePlusPlus(gamma=self.gamma)


class RTOTrainer(TokenTrainer):
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
        sampler: draws completions; None decodes with transformers.
        peft_config: train a new PEFT adapter on the policy instead of the whole model. Where the policy is an
            adapter, each other model that is given as the folder of an adapter on the same base shares that base
            (`rto.models.roles`); any other model is one of its own.

    Raises:
        DataError: the prompts cannot be used.
        ValueError: models, rewards and coefficients do not fit together, checked before any model runs; or an
            argument of `transformers.Trainer` has no meaning here.
    """

    args: RTOConfig
    row_type = Prompt

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
        sampler: Sampler | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        check_trainer_arguments(type(self), kwargs)
        args = args or RTOConfig(output_dir="rto")
        reading = Reading.of(args, model)
        functions = _listed(reward_funcs)
        token_rewards = _listed(dpo_model)
        _check_rewards(args, token_rewards, functions)
        tokenizer = reading.read_tokenizer(model, processing_class)
        roles: list[tuple[str, Any]] = [("model", model), ("ref_model", ref_model)]
        if args.dpo_coef != 0:
            roles += [("dpo_ref_model", dpo_ref_model), *(("dpo_model", spec) for spec in token_rewards)]
        readers = [(role, other) for role, other in roles if isinstance(other, str | Path | nn.Module)]
        start = model if isinstance(model, nn.Module) else find_config("model", model, **reading.tokenizer(model))
        for role, other in readers[1:]:
            check_same_vocabulary(role, other, tokenizer, start, **reading.frozen(other))
        self.args, self.processing_class = args, tokenizer
        self._context = _room(args, shared_context(readers, reading.tokenizer))
        prompts, held_out, self.skipped = read_sets(self._read, train_dataset, eval_dataset)
        _fit_batch(args, prompts)

        policy = load_policy(model, **reading.trained(model, adapted=peft_config is not None))
        check_derivative(source_name(model), policy)
        check_output_layer(policy)
        self.sampler: Sampler = sampler or TransformersSampler.of(
            policy, tokenizer, args.sampling(), max_cache_tokens=args.max_cache_tokens
        )
        if peft_config is not None:
            set_seed(args.seed)  # new adapters start at random, the same ones each time a run is started
            policy = adapt(policy, peft_config, revision=reading.init.get("revision"))
        base = shared_base(policy, trust_remote_code=trusts(reading.init))
        budget = args.max_tokens_per_micro_batch
        tokenizers = _listed(reward_processing_classes) or [None] * len(functions)
        self.estimator = args.estimator()
        seeds_critic = self.estimator.needs_values and value_model is None and base is None
        scorers = [place(base, f, "reward_model", scalar=True) for f in functions]
        self.score_sources = [
            reward_source(
                placed,
                t or _tokenizer_on_base(placed, tokenizer),
                max_tokens=budget,
                **(reading.trained(f) if seeds_critic and _is_whole(f) else reading.frozen(f)),
            )
            for f, placed, t in zip(functions, scorers, tokenizers, strict=True)
        ]
        for judge in self._reward_models():  # a policy that writes EOS in words must not end a text by that
            split_special_tokens(judge.tokenizer, args.split_special_tokens)
        self.score_names = distinct([source.name for source in self.score_sources])
        self.score_weights = args.reward_weights or [1.0] * len(functions)
        prompts, held_out, _ = read_sets(self._with_room, prompts, held_out)
        _fit_batch(args, prompts)
        critic = None
        if self.estimator.needs_values:
            critic = self._critic(base, value_model, policy, tokenizer, reading, new_adapter=peft_config is not None)
        for f, source in zip(functions, self.score_sources):
            if isinstance(source, RewardModel) and _is_whole(f):  # the critic has copied its weights as they were read
                hold(source.model, reading.frozen_dtype)
        if ref_model is not None:
            reference = load_policy(place(base, ref_model, "ref_model"), **reading.frozen(ref_model))
        elif base is None:
            reference = clone(policy, reading.frozen_dtype)
        else:
            reference = base.without_adapter() if peft_config is not None else base.copy(None, "ref_model")
        self.reference = freeze(reference)
        self.token_reward: TokenSource | None = None
        if args.dpo_coef != 0:
            learners = [place(base, spec, "dpo_model") for spec in token_rewards]
            self.token_reward = token_source(
                [load_policy(m, **reading.frozen(m)) if isinstance(m, str | Path) else m for m in learners],
                place(base, dpo_ref_model, "dpo_ref_model"),
                kind=args.token_reward,
                pessimism=args.token_reward_pessimism,
                temperature=args.temperature,
                max_tokens=budget,
                **reading.frozen(dpo_ref_model),
            )
        self.reward = args.reward()
        self.kl_control = None
        if args.kl_target is not None:
            self.kl_control = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_moments = RunningMoments()
        self._targets: Targets | None = None
        self._seconds: dict[str, float] = {}

        super().__init__(
            Actor(policy, critic),
            args,
            train_dataset=prompts,
            eval_dataset=held_out,
            processing_class=tokenizer,
            **kwargs,
        )
        self.reference.to(self.args.device)
        for scorer in (self.token_reward, *(s.model for s in self._reward_models())):
            if scorer is not None:
                scorer.to(self.args.device)

    # --- the algorithm

    def models(self) -> dict[str, nn.Module]:
        """Policy, critic, reference, and what token rewards and scores come from."""
        found = {**super().models(), "reference": self.reference}
        sources = self.token_reward.members if isinstance(self.token_reward, Ensemble) else [self.token_reward]
        for i, source in enumerate(sources):
            model = getattr(source, "dpo_model", getattr(source, "model", None))
            if isinstance(model, nn.Module):
                found[f"dpo_model {i}"] = model
        return found | {f"reward model {i}": s.model for i, s in enumerate(self._reward_models())}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One update on the rollouts of a list of `Prompt`; on the first of them: sample → score → credit."""
        args = self.args
        iteration, update = divmod(self.state.global_step, args.updates_per_rollout)
        if update == 0:
            self._seconds = {}
            with self._phase("sample"):
                samples = self.sample(model, inputs, self._seed(iteration))
            with self._phase("score"):
                rollout = self.score(model, samples, inputs)
            with self._phase("credit"):
                self._targets = self.credit(rollout)
        assert self._targets is not None
        epoch, part = divmod(update, args.num_mini_batches)
        shuffle = torch.Generator().manual_seed(self._seed(iteration) + epoch)
        rows = torch.randperm(len(self._targets), generator=shuffle).chunk(args.num_mini_batches)[part]
        with self._phase("update"):
            loss = self.update(model, self._targets.rows(rows))
        if update == args.updates_per_rollout - 1:
            self._record_seconds()
        return loss

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], seed: int) -> Samples:
        """Draw one completion for each prompt from the policy as it is now.

        Raises:
            NotFiniteError: the sampler's logits are NaN or infinite.
        """
        actor: Actor = self.accelerator.unwrap_model(model)
        with together(self.accelerator), self.accelerator.autocast():
            try:
                return self.sampler(actor.policy, [p.ids for p in prompts], seed)
            except NotFiniteError as error:
                at = "" if error.row is None else f" ({_shown_prompt(prompts, error.row)})"
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
        acting, completed = self._act(model, samples), self._completed(samples, prompts)
        with self.accelerator.autocast():
            ref_logp = self._reference_logprobs(samples)
            logratio = None
            if self.token_reward is not None:
                logratio = self.token_reward(samples, ref_logp=ref_logp, completed=completed)
        assert acting.logp is not None
        assert acting.entropy is not None
        rollout = Rollout(
            **samples.tensors(),
            policy_logp=acting.logp,
            ref_logp=ref_logp,
            token_logratio=logratio,
            values=acting.values,
            scores=self._scores(samples, completed, counted),
        )
        self._check(rollout, prompts)
        mask = samples.mask if counted is None else samples.mask & counted[:, None]
        self.record(entropy=masked_mean(acting.entropy, mask, all_reduce=self.all_reduce))
        return rollout

    def _check(self, rollout: Rollout, prompts: Sequence[Prompt]) -> None:
        """Every number of a rollout is finite before any is used."""
        per_token = {
            "log-probability of the policy": rollout.policy_logp,
            "log-probability of the reference": rollout.ref_logp,
            "token reward of the DPO model": rollout.token_logratio,
            "value of the critic": rollout.values,
        }
        for what, x in per_token.items():
            if x is not None:
                self.watch.see(x, what, mask=rollout.mask, tell=lambda row: _shown_prompt(prompts, row))
        self.watch.see(rollout.scores, "score", tell=lambda row: _shown_prompt(prompts, row))
        self.watch.check(self.state.global_step + 1)

    def credit(self, rollout: Rollout) -> Targets:
        """Eq. 4.7, then advantages; whitening is over the rollouts of all processes."""
        args, mask, reduce = self.args, rollout.mask, self.all_reduce
        reward = self.reward if self.kl_control is None else replace(self.reward, kl_coef=self.kl_control.coef)
        anchors = PLACEMENTS[args.reward_placement](rollout.responses, mask, self._token_text)
        terms = reward(
            policy_logp=rollout.policy_logp,
            ref_logp=rollout.ref_logp,
            token_logratio=rollout.token_logratio,
            scores=rollout.scores,
            ended=rollout.ended,
            mask=mask,
            anchors=anchors,
        )
        rewards = terms.total
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, center=False, all_reduce=reduce)
        advantages, returns = self.estimator(rewards, rollout.values, mask)
        self._record_rollout(rollout, terms, returns, reward)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce=reduce)
        return Targets(
            tokens=rollout.tokens,
            prompt_mask=rollout.prompt_mask,
            mask=mask,
            old_logp=rollout.policy_logp,
            advantages=advantages,
            old_values=rollout.values,
            returns=None if rollout.values is None else returns,
        )

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
                total = total + masked_sum(policy.loss, part.mask)
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

        # The policy's graph is gone before the critic's is built: a step holds the activations of one model. Sharded
        # models run in step with each other and keep to one pass.
        passes = [("policy", "value")] if self.sharded else [("policy",), ("value",)]
        passes = passes if self.estimator.needs_values else [("policy",)]
        shares_of = [(rows, parts) for rows in self.micro_batches(batch.lengths.cpu()) for parts in passes]
        total = self.backward(model, shares_of, loss, whole=len(passes) == 1)
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
        return TokenOutputs(logp, values if self.estimator.needs_values else None, entropy)

    def _reference_logprobs(self, samples: Sequences) -> Float[Tensor, "B T"]:
        args = self.args
        return score_logprobs(
            self.reference, samples, temperature=args.temperature, max_tokens=args.max_tokens_per_micro_batch
        )

    def _scores(
        self, samples: Samples, batch: Completed, counted: Bool[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """Σ weight · score over the reward functions, standardized if asked for."""
        total = torch.zeros(len(samples), device=samples.tokens.device)
        if not self.score_sources:
            self._keep_completions(batch, {}, counted)
            return total
        logged: dict[str, list[float]] = {}
        for name, source, weight in zip(self.score_names, self.score_sources, self.score_weights):
            with together(self.accelerator), self.accelerator.autocast():
                scores = logged[name] = source(batch)
            as_float32 = torch.tensor(scores, dtype=torch.float32, device=total.device)
            self.watch.see(as_float32, f"score of {name} (as float32)", tell=lambda row: shown(batch.completions[row]))
            total += weight * as_float32
        self.watch.check(self.state.global_step + 1)
        logged[""] = total.tolist()
        self._record_scores(logged, counted)
        self._keep_completions(batch, logged, counted)
        if self.args.normalize_scores:
            self.score_moments.update(total, all_reduce=self.all_reduce)
            total = self.score_moments.normalize(total)
        return total

    def _completed(self, samples: Samples, prompts: Sequence[Prompt]) -> Completed:
        ids = [row[keep].tolist() for row, keep in zip(samples.responses.cpu(), samples.mask.cpu())]
        texts = completion_texts(self.processing_class, [p.ids for p in prompts], ids)
        return Completed.of(prompts, texts, samples.ended.tolist(), ids)

    def _token_text(self, token: int) -> str:
        return str(self.processing_class.decode([token]))

    def _reward_models(self) -> list[RewardModel]:
        return [s for s in self.score_sources if isinstance(s, RewardModel)]

    def _with_room(self, prompts: Iterable[Prompt], what: str) -> tuple[list[Prompt], Skipped]:
        """Prompts that leave room for a completion in the context of every reward model; others are counted.

        A completion counts as ``max_completion_length`` tokens. Where a reward model's tokenizer makes more of one
        than that, the reward model says so when it is given it.

        Raises:
            DataError: none is left.
        """
        prompts, reasons = list(prompts), dict[int, str]()
        skipped = Skipped(total=len(prompts))
        for model in self._reward_models():
            if model.context is not None:
                room = model.context - self.args.max_completion_length
                reason = f"with no room for a completion in the {model.context} tokens that {model.name} reads"
                for i, n in enumerate(model.prompt_lengths(prompts)):
                    if n > room:
                        reasons.setdefault(i, reason)
        for i, reason in reasons.items():
            skipped.add(reason, i)
        kept = [p for i, p in enumerate(prompts) if i not in reasons]
        if not kept:
            remedy = "lower max_completion_length, or take a reward model of a longer context"
            raise DataError(f"{skipped.report(what)}. Nothing is left to train on: {remedy}.")
        if reasons:
            logger.warning(skipped.report(what))
        return kept, skipped

    def _critic(
        self,
        base: SharedBase | None,
        value_model: Source | None,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        *,
        new_adapter: bool,
    ) -> nn.Module:
        """V's start: the given model, a reward model that can be read at every token, or the policy's backbone."""
        if value_model is not None:
            placed = place(base, value_model, VALUE_MODEL, scalar=True, new_head=True)
            given = load_scalar(placed, **reading.trained(value_model))
            return trainable(given if isinstance(given, Role) else check_critic(given))
        if base is not None:
            shared = next((s.model for s in self._reward_models() if isinstance(s.model, Role)), None)
            if shared is None:
                return trainable(base.new_critic(VALUE_MODEL, from_policy=not new_adapter))
            return trainable(base.copy(shared, VALUE_MODEL))
        for scorer in self._reward_models():
            if scorer.tokenizer.get_vocab() == tokenizer.get_vocab() and why_no_critic(scorer.model) is None:
                return trainable(clone(scorer.model))
        return critic_of(policy)

    # --- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer, two learning rates: the policy's and the critic's."""
        if self.optimizer is None:
            acting = self.model if model is None else model
            critic = set(map(id, self.accelerator.unwrap_model(acting).value_parameters))
            decayed = set(self.get_decay_parameter_names(acting))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in acting.named_parameters():
                if parameter.requires_grad:
                    lr = self.args.value_learning_rate if id(parameter) in critic else self.args.learning_rate
                    decay = self.args.weight_decay if name in decayed else 0.0
                    groups.setdefault((lr, decay), []).append(parameter)
            kind: Any
            kind, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast(Any, acting)
            )
            kwargs = {name: x for name, x in kwargs.items() if name != "lr"}
            self.optimizer = kind(
                [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
                lr=self.args.learning_rate,
                **kwargs,
            )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip policy and critic each by its own norm: a young critic's large gradient must not stall the policy."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        actor: Actor = self.accelerator.unwrap_model(model)
        self.accelerator.unscale_gradients()  # under fp16; once, for one optimizer has the weights of both
        norm = nn.utils.clip_grad_norm_(actor.policy_parameters, self.args.max_grad_norm)
        if actor.value_model is not None:
            value_norm = nn.utils.clip_grad_norm_(actor.value_parameters, self.args.max_grad_norm)
            self.watch.see(value_norm, "gradient norm of the critic")
            self.record(**{"grad_norm/value": value_norm})
        self.record(**{"grad_norm/policy": norm})
        return norm

    # --- data

    def get_train_dataloader(self) -> DataLoader:
        """Prompts of this process, the same batch for every update of a rollout."""
        batch = self.args.per_device_train_batch_size * self.accelerator.num_processes
        if tail := len(self.train_dataset) % batch:
            total = len(self.train_dataset)
            logger.warning("each pass over %d prompts leaves out %d, which fill no batch of %d", total, tail, batch)
        sampler = RolloutSampler(
            size=len(self.train_dataset),
            rollouts=self.args.per_device_train_batch_size,
            repeats=self.args.updates_per_rollout,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            updates_done=lambda: self.state.global_step,
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def _seed(self, iteration: int) -> int:
        """Seed of everything random in an iteration: a function of what a checkpoint knows, so nothing is lost."""
        return (self.args.seed * 1_000_003 + iteration) * 1_009 + 101 * self.accelerator.process_index

    # --- evaluation

    def _read(self, dataset: Any, what: str) -> tuple[list[Prompt], Skipped]:
        longest = self.args.max_prompt_length or 2**31
        return read_prompts(dataset, self.processing_class, max_length=longest, context=self._context, what=what)

    def evaluate_rows(self, prompts: Sequence[Prompt], metric_key_prefix: str) -> dict[str, float]:
        """Sample held-out prompts with a fixed seed: scores, KL, length and EOS rate."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        at = range(rank, math.ceil(len(prompts) / world) * world, world)  # as many on every process
        mine = [prompts[i % len(prompts)] for i in at]
        counted = torch.tensor([i < len(prompts) for i in at], device=self.args.device)
        kept, self._metrics = self._metrics, defaultdict(list)
        moments, self.score_moments = self.score_moments, replace(self.score_moments)
        samples = self.sample(self.model, mine, seed=self.args.seed)
        rollout = self.score(self.model, samples, mine, counted)
        self._record_lengths(rollout, counted)
        kl = masked_sum(rollout.policy_logp - rollout.ref_logp, rollout.mask, dim=-1)
        self.record(kl=self._mean(kl, counted))
        found = {f"{metric_key_prefix}_{name}": values[-1] for name, values in self._metrics.items()}
        self._metrics, self.score_moments = kept, moments
        super(TokenTrainer, self).log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # --- metrics

    def _mean(self, x: Float[Tensor, " B"], counted: Bool[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
        every = torch.ones_like(x, dtype=torch.bool) if counted is None else counted
        return masked_mean(x, every, all_reduce=self.all_reduce)

    def _record_rollout(self, rollout: Rollout, terms: RewardTerms, returns: Tensor, reward: RTOReward) -> None:
        """What a rollout tells: per source, per completion; everything over all processes."""
        mask, reduce = rollout.mask, self.all_reduce
        kl = self._mean(masked_sum(rollout.policy_logp - rollout.ref_logp, mask, dim=-1))
        weights = {name: reduce(x) for name, x in shares(terms, mask).items()}
        everything = sum(weights.values(), torch.tensor(1e-12, device=mask.device))
        self.record(
            kl=kl,
            kl_coef=reward.kl_coef,
            **{
                "return": self._mean(masked_sum(terms.total, mask, dim=-1)),
                "episodes": (self.state.global_step // self.args.updates_per_rollout + 1)
                * self.args.per_device_train_batch_size
                * self.accelerator.num_processes,
            },
            **{f"reward/{n}": self._mean(masked_sum(getattr(terms, n), mask, dim=-1)) for n in weights},
            **{f"share/{n}": w / everything for n, w in weights.items()},
        )
        if rollout.token_logratio is not None:
            ratio = rollout.token_logratio
            self.record(**{"logratio/dpo": self._mean(masked_sum(ratio, mask, dim=-1))})
            clipped = (reward.clip(ratio) != ratio).float()
            self.record(**{"clip/token_reward": masked_mean(clipped, mask, all_reduce=reduce)})
        if rollout.values is not None:
            explained = explained_variance(rollout.values, returns, mask, all_reduce=reduce)
            self.record(explained_variance=explained)
            self.record(value=masked_mean(rollout.values, mask, all_reduce=reduce))
        self._record_lengths(rollout)
        if self.kl_control is not None:
            self.kl_control.update(float(kl), int(self.all_reduce(torch.tensor(float(len(mask)), device=mask.device))))

    def _record_lengths(self, rollout: Rollout, counted: Bool[Tensor, " B"] | None = None) -> None:
        lengths = rollout.mask.sum(1).float()
        everywhere = self.accelerator.gather(lengths)
        if counted is not None:
            everywhere = everywhere[self.accelerator.gather(counted)]
        self.record(
            **{
                "completions/mean_length": self._mean(lengths, counted),
                "completions/min_length": everywhere.min(),
                "completions/max_length": everywhere.max(),
                "completions/eos_rate": self._mean(rollout.ended.float(), counted),
            }
        )

    def _record_scores(self, scores: dict[str, list[float]], counted: Bool[Tensor, " B"] | None) -> None:
        for name, values in scores.items():
            x = torch.tensor(values, device=self.args.device)
            key = f"score/{name}" if name else "score"
            mean = self._mean(x, counted)
            self.record(**{key: mean, f"{key}_std": self._mean((x - mean).square(), counted).sqrt()})

    def _keep_completions(
        self, batch: Completed, scores: dict[str, list[float]], counted: Bool[Tensor, " B"] | None
    ) -> None:
        """A few completions of a rollout, or of an evaluation within training, which say so."""
        if self.args.log_completions and self.is_world_process_zero() and self.is_in_train:
            path = Path(str(self.args.output_dir)) / "completions.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                for i in range(min(self.args.log_completions, len(batch.prompts))):
                    row = {
                        "step": self.state.global_step,
                        "prompt": batch.prompts[i],
                        "completion": batch.completions[i],
                        **({} if counted is None else {"split": "eval"}),
                    }
                    row |= {f"score/{name}" if name else "score": values[i] for name, values in scores.items()}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _record_seconds(self) -> None:
        total = sum(self._seconds.values())
        self.record(**{f"seconds/{name}": seconds for name, seconds in self._seconds.items()})
        if "sample" in self._seconds:  # false on the rest of a rollout that a checkpoint brought
            assert self._targets is not None
            tokens = float(self.all_reduce(self._targets.mask.sum().float()))
            self.record(**{"seconds/iteration": total, "tokens_per_second": tokens / total})

    # --- checkpoints

    def _save_state(self, folder: Path) -> None:
        """Controller, running statistics, and the rollout in progress where a checkpoint falls between its updates."""
        super()._save_state(folder)
        if self.is_world_process_zero():
            state = {
                "kl_control": None if self.kl_control is None else self.kl_control.state_dict(),
                "score_moments": self.score_moments.state_dict(),
                "processes": self.accelerator.num_processes,
                "seconds": self._seconds,
            }
            write_atomically(folder / "rto_state.json", json.dumps(state))
        if self.state.global_step % self.args.updates_per_rollout:
            assert self._targets is not None
            tensors = {name: x.cpu().contiguous() for name, x in self._targets.tensors().items()}
            safetensors.torch.save_file(tensors, folder / f"rollout_{self.accelerator.process_index}.safetensors")

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        state = json.loads((folder / "rto_state.json").read_text())
        if state["processes"] != self.accelerator.num_processes:
            raise CheckpointError(
                f"{folder} was written by {state['processes']} processes, this run has "
                f"{self.accelerator.num_processes}: resume with as many"
            )
        self._seconds = state.get("seconds", {})
        self.score_moments.load_state_dict(state["score_moments"])
        if self.kl_control is not None and state["kl_control"] is not None:
            self.kl_control.load_state_dict(state["kl_control"])
        rollout = folder / f"rollout_{self.accelerator.process_index}.safetensors"
        if rollout.is_file():
            fields: dict[str, Any] = dict.fromkeys(Targets.__dataclass_fields__) | safetensors.torch.load_file(rollout)
            self._targets = Targets(**fields).to(self.args.device)


class RolloutSampler(IndexSampler[list[int]]):
    """Indices of the prompts of each update: a rollout's batch, once for each update it serves.

    The order of an epoch is a permutation seeded by (seed, epoch), cut into global batches, of which each process
    takes its slice. The epoch follows from the number of updates done, which a checkpoint knows.
    """

    def __init__(
        self,
        *,
        size: int,
        rollouts: int,
        repeats: int,
        seed: int,
        rank: int,
        world: int,
        updates_done: Callable[[], int],
    ) -> None:
        self.size, self.rollouts, self.repeats, self.seed = size, rollouts, repeats, seed
        self.rank, self.world, self.updates_done = rank, world, updates_done

    def __len__(self) -> int:
        return self.size // (self.rollouts * self.world) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.updates_done() // len(self)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=shuffle).tolist()
        batch = self.rollouts * self.world
        for start in range(0, self.size - batch + 1, batch):
            mine = order[start + self.rank * self.rollouts : start + (self.rank + 1) * self.rollouts]
            for _ in range(self.repeats):
                yield mine


def _shown_prompt(prompts: Sequence[Prompt], row: int) -> str:
    return f"prompt {shown(prompts[row].raw)}"


def _tokenizer_on_base(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """An adapter's folder may come without a tokenizer: it reads its base's, the policy's."""
    if isinstance(model, Role) and not (Path(model.source) / "tokenizer_config.json").is_file():
        return tokenizer
    return None


def _is_whole(source: Any) -> bool:
    """A whole model's folder or hub id: not an adapter, and no object."""
    return isinstance(source, str | Path) and not is_adapter(source)


def _listed(x: Any) -> list[Any]:
    if x is None:
        return []
    return list(x) if isinstance(x, list | tuple) else [x]


def _check_rewards(args: RTOConfig, token_rewards: list[TokenRewardSpec], functions: list[RewardFunc]) -> None:
    if args.dpo_coef != 0 and not token_rewards:
        raise ValueError(
            f"dpo_coef={args.dpo_coef} asks for a token reward: pass dpo_model, or set dpo_coef=0 for PPO"
        )
    if args.score_coef != 0 and not functions:
        raise ValueError(
            f"score_coef={args.score_coef} asks for a sentence score: pass reward_funcs, or set score_coef=0"
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ValueError(f"reward_weights has {len(args.reward_weights)} entries for {len(functions)} reward_funcs")


def _room(args: RTOConfig, context: int | None) -> int | None:
    """The longest prompt that leaves room for a completion.

    Raises:
        ValueError: a completion alone fills the models' context.
    """
    if context is not None and context <= args.max_completion_length:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's context "
            f"of {context} tokens"
        )
    return None if context is None else context - args.max_completion_length


def _fit_batch(args: RTOConfig, prompts: list[Prompt] | None) -> None:
    """Check that the prompts fill a batch of rollouts, and turn ``total_episodes`` into updates.

    A batch size that nobody chose is lowered to what the prompts fill.

    Raises:
        ValueError: the prompts do not fill one batch.
    """
    size, world = args.per_device_train_batch_size, args.world_size
    if prompts is not None and len(prompts) < size * world:
        fits = len(prompts) // world // args.num_mini_batches * args.num_mini_batches
        if fits == 0 or size != RTOConfig.per_device_train_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts do not fill one batch of {size * world} rollouts ({size} on each of {world} "
                "processes): lower per_device_train_batch_size or bring more prompts"
            )
        logger.warning(
            "%d prompts do not fill a batch of %d rollouts: per_device_train_batch_size is %d in this run",
            len(prompts),
            size * world,
            fits,
        )
        args.per_device_train_batch_size = fits
    if args.total_episodes is not None:
        batch = args.per_device_train_batch_size * world
        args.max_steps = math.ceil(args.total_episodes / batch) * args.updates_per_rollout
