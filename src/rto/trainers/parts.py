"""The models of an on-line run, from what its user named: checked first, loaded then, each in its precision."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from rto.data.chat import split_special_tokens
from rto.models.actor import check_output_layer
from rto.models.loading import (
    Source,
    check_same_vocabulary,
    clone,
    find_config,
    freeze,
    is_adapter,
    load_policy,
    load_scalar,
    source_name,
    trusts,
)
from rto.models.precision import check_derivative, hold
from rto.models.roles import Role, SharedBase, adapt, place, shared_base, trainable
from rto.models.scalars import check_critic, critic_of, why_no_critic
from rto.rollout.rewards import FunctionReward, RewardFunc, RewardModel, reward_source
from rto.rollout.samplers.base import SampleFunction, Sampler
from rto.rollout.samplers.config import sampler_of
from rto.rollout.samplers.engines import EngineSampler
from rto.rollout.scoring import Scoring
from rto.rollout.token_rewards import TOKEN_REWARDS, TokenRewardSpec, TokenSource, token_source
from rto.trainers.base import VALUE_MODEL
from rto.trainers.config import RTOConfig
from rto.trainers.precision import Reading


def listed(x: Any) -> list[Any]:
    """One, several or none, as a list."""
    if x is None:
        return []
    return list(x) if isinstance(x, list | tuple) else [x]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `RTOTrainer` stands on; see its arguments."""

    policy: nn.Module
    critic: nn.Module | None
    sampler: Sampler | SampleFunction
    scoring: Scoring


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the user of `RTOTrainer` named; see its arguments."""

    model: Source
    token_rewards: list[TokenRewardSpec]
    dpo_ref_model: Source | None
    ref_model: Source | None
    value_model: Source | None
    reward_funcs: list[RewardFunc]
    reward_tokenizers: list[PreTrainedTokenizerBase | None]
    sampler: Sampler | SampleFunction | None
    peft_config: Any

    def check(self, args: RTOConfig) -> None:
        """Refuse models that do not go with coefficients.

        Raises:
            ValueError: a term of the reward has a weight and no source, or weights are not as many as sources.
        """
        weights, functions = args.reward_weights, self.reward_funcs
        if args.dpo_coef != 0 and not self.token_rewards:
            raise ValueError(
                f"dpo_coef={args.dpo_coef} asks for a token reward: pass dpo_model, or set dpo_coef=0 for PPO"
            )
        if args.score_coef != 0 and not functions:
            raise ValueError(
                f"score_coef={args.score_coef} asks for a sentence score: pass reward_funcs, or set score_coef=0"
            )
        if args.use_vllm and self.sampler is not None:
            raise ValueError("use_vllm names a sampler, and another one is given: leave out one of them")
        if args.async_rollouts and not isinstance(self.sampler, EngineSampler | None):
            raise ValueError(
                "async_rollouts draws while the policy moves, so a sampler that is given must hold weights of its "
                "own: an EngineSampler (rto.rollout.samplers.engines), or async_rollouts=0"
            )
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward_funcs")

    def readers(
        self, args: RTOConfig, tokenizer: PreTrainedTokenizerBase, reading: Reading
    ) -> list[tuple[str, Source]]:
        """Every model that reads the policy's tokens, by its role, the policy first.

        Raises:
            ValueError: one has another vocabulary.
        """
        roles: list[tuple[str, Any]] = [("model", self.model), ("ref_model", self.ref_model)]
        if args.dpo_coef != 0:
            roles += [("dpo_ref_model", self.dpo_ref_model), *(("dpo_model", spec) for spec in self.token_rewards)]
        found = [(role, other) for role, other in roles if isinstance(other, str | Path | nn.Module)]
        model = self.model
        start = model if isinstance(model, nn.Module) else find_config("model", model, **reading.tokenizer(model))
        for role, other in found[1:]:
            check_same_vocabulary(role, other, tokenizer, start, **reading.frozen(other))
        return found

    def load(
        self, args: RTOConfig, tokenizer: PreTrainedTokenizerBase, reading: Reading, *, needs_values: bool
    ) -> Parts:
        """Load everything.

        Raises:
            ValueError: a model cannot be trained, sampled or read as it has to be.
        """
        policy = load_policy(self.model, **reading.trained(self.model, adapted=self.peft_config is not None))
        check_derivative(source_name(self.model), policy)
        check_output_layer(policy)
        sampler = self._sampler(policy, tokenizer, args)
        if self.peft_config is not None:
            set_seed(args.seed)  # new adapters start at random, the same ones each time a run is started
            policy = adapt(policy, self.peft_config, revision=reading.init.get("revision"))
        base = shared_base(policy, trust_remote_code=trusts(reading.init))
        seeds_critic = needs_values and self.value_model is None and base is None
        sources = self._score_sources(base, tokenizer, reading, args, seeds_critic=seeds_critic)
        scorers = [s for s in sources if isinstance(s, RewardModel)]
        critic = self._critic(base, policy, tokenizer, reading, scorers) if needs_values else None
        for named, source in zip(self.reward_funcs, sources):
            if isinstance(source, RewardModel) and _is_whole(named):  # the critic has copied its weights by now
                hold(source.model, reading.frozen_dtype)
        scoring = Scoring(
            reference=freeze(self._reference(base, policy, reading)),
            tokenizer=tokenizer,
            token_reward=self._token_reward(base, reading, args) if args.dpo_coef != 0 else None,
            sources=sources,
            weights=args.reward_weights,
            temperature=args.temperature,
            max_tokens=args.max_tokens_per_micro_batch,
            offload=args.offload_frozen,
        )
        return Parts(policy=policy, critic=critic, sampler=sampler, scoring=scoring)

    def _sampler(
        self, policy: nn.Module, tokenizer: PreTrainedTokenizerBase, args: RTOConfig
    ) -> Sampler | SampleFunction:
        if self.sampler is not None:
            return self.sampler
        return sampler_of(args, args.sampling(), policy, tokenizer)

    def _score_sources(
        self,
        base: SharedBase | None,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        args: RTOConfig,
        *,
        seeds_critic: bool,
    ) -> list[RewardModel | FunctionReward]:
        """Reward models and functions; a model that the critic may copy is read as trained models are."""
        tokenizers = self.reward_tokenizers or [None] * len(self.reward_funcs)
        placed = [place(base, f, "reward_model", scalar=True) for f in self.reward_funcs]
        sources = [
            reward_source(
                model,
                own or _tokenizer_on_base(model, tokenizer),
                max_tokens=args.max_tokens_per_micro_batch,
                **(reading.trained(named) if seeds_critic and _is_whole(named) else reading.frozen(named)),
            )
            for named, model, own in zip(self.reward_funcs, placed, tokenizers, strict=True)
        ]
        for source in sources:
            if isinstance(source, RewardModel):  # a policy that writes EOS in words must not end a text by that
                split_special_tokens(source.tokenizer, reading.split)
        return sources

    def _critic(
        self,
        base: SharedBase | None,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        scorers: list[RewardModel],
    ) -> nn.Module:
        """V's start: the given model, a reward model that can be read at every token, or the policy's backbone."""
        if self.value_model is not None:
            placed = place(base, self.value_model, VALUE_MODEL, scalar=True, new_head=True)
            given = load_scalar(placed, **reading.trained(self.value_model))
            return trainable(given if isinstance(given, Role) else check_critic(given))
        if base is not None:
            shared = next((s.model for s in scorers if isinstance(s.model, Role)), None)
            if shared is None:
                return trainable(base.new_critic(VALUE_MODEL, from_policy=self.peft_config is None))
            return trainable(base.copy(shared, VALUE_MODEL))
        for scorer in scorers:
            if scorer.tokenizer.get_vocab() == tokenizer.get_vocab() and why_no_critic(scorer.model) is None:
                return trainable(clone(scorer.model))
        return critic_of(policy)

    def _reference(self, base: SharedBase | None, policy: nn.Module, reading: Reading) -> nn.Module:
        """π_ref: the given model, or the policy as it starts."""
        if self.ref_model is not None:
            return load_policy(place(base, self.ref_model, "ref_model"), **reading.frozen(self.ref_model))
        if base is None:
            return clone(policy, reading.frozen_dtype)
        return base.without_adapter() if self.peft_config is not None else base.copy(None, "ref_model")

    def _token_reward(self, base: SharedBase | None, reading: Reading, args: RTOConfig) -> TokenSource:
        scalar = TOKEN_REWARDS[args.token_reward].scalar
        load = partial(load_scalar, new_head=False) if scalar else load_policy
        learners: list[Any] = [place(base, spec, "dpo_model", scalar=scalar) for spec in self.token_rewards]
        return token_source(
            [load(m, **reading.frozen(m)) if isinstance(m, str | Path) else m for m in learners],
            place(base, self.dpo_ref_model, "dpo_ref_model"),
            kind=args.token_reward,
            pessimism=args.token_reward_pessimism,
            temperature=args.temperature,
            max_tokens=args.max_tokens_per_micro_batch,
            **args.token_reward_settings(),
            **reading.frozen(self.dpo_ref_model),
        )


def _tokenizer_on_base(model: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """An adapter's folder may come without a tokenizer: it reads its base's, the policy's."""
    if isinstance(model, Role) and not (Path(model.source) / "tokenizer_config.json").is_file():
        return tokenizer
    return None


def _is_whole(source: Any) -> bool:
    """A whole model's folder or hub id: not an adapter, and no object."""
    return isinstance(source, str | Path) and not is_adapter(source)
