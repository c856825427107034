"""`RTOConfig`: every setting of an on-line run. What credit assignment has of them is built by `RTOConfig.credit`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from rto.credit import Credit
from rto.functional.advantages import GAE, Estimator, QAdvantage, ReinforcePlusPlus
from rto.functional.rewards import PLACEMENTS, AdaptiveKL, RTOReward
from rto.ranges import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SHARE, Range, check_arguments, is_finite
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.config import VLLMArguments
from rto.rollout.token_rewards import TOKEN_REWARDS
from rto.trainers.base import TokenTrainingArguments
from rto.trl_names import ONLINE, by_trl_names
from rto.values import check_choice, json_mapping, nearest

ESTIMATORS = ("gae", "reinforce++", "q")


@by_trl_names(ONLINE)
@dataclass(repr=False)
class RTOConfig(VLLMArguments, TokenTrainingArguments):
    """Configuration of `RTOTrainer`. Names follow TRL's ``PPOConfig`` and ``GRPOConfig`` where they exist there.

    ``per_device_train_batch_size`` is the number of rollouts a process draws in one iteration. Results do not
    depend on ``max_tokens_per_micro_batch``, so there is no ``gradient_accumulation_steps`` to set. Who draws, and how
    its distance to the policy is made up for, say the arguments of `rto.rollout.samplers.config.VLLMArguments`.

    Attributes:
        learning_rate: of the policy (paper: 5e-7).
        value_learning_rate: of the critic (paper: 9e-6).
        critic_warmup_steps: updates in which the critic alone learns, before the policy moves.
        total_episodes: stop after so many rollouts on all processes; None goes by ``num_train_epochs``.
        num_ppo_epochs: passes over each rollout batch.
        num_mini_batches: updates in one pass.
        num_generations: completions of each prompt in an iteration; rollouts of a prompt are credited like any others.
        dpo_coef: β₁; 0 runs no DPO model: PPO.
        kl_coef: β₂.
        score_coef: β₃; 0 needs no reward function.
        token_reward: what is read from ``dpo_model``: logratio; power, the log-ratio bounded by a power transform;
            mean_logprob (SimPO's reward, no reference); or q, the scalar of a model trained with the loss qrm.
        token_reward_kwargs: settings of its own that a token reward has: ``{"power": 1.0}`` of power.
        token_reward_pessimism: κ: several DPO models count as their mean less κ standard deviations.
        token_reward_clip: bound on the raw log-ratio, before β₁; None for no bound.
        reward_placement: where token rewards are paid: token (RTO), sentence (Semi-RTO), final (DDPO).
        reward_shaping: subtract their sum at the last token (RS-PPO).
        advantage_estimator: gae (with a critic), reinforce++ (without), or q for token rewards that are Q-values:
            they are not summed, and the critic is their baseline.
        value_coef: how much of that baseline is subtracted; of q alone.
        missing_eos_penalty: subtracted from the reward of a completion that was cut off.
        kl_target: steer β₂ towards this KL, nats a completion; None keeps β₂.
        normalize_scores: subtract the running mean of the scores and divide by their running deviation.
        reward_weights: one weight a reward function; a weight of 0 only logs it. None: all 1.
        max_cache_tokens: tokens that rows decoded side by side may have together, prompts and length limits; None
            means what 8 GiB of key-value cache hold.
        offload_frozen: keep each model that is only read in host memory until it is read; adapters on a shared base
            and quantized models stay on the device.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of the policy."})
    value_learning_rate: float = field(default=9e-6, metadata={"help": "Learning rate of the critic."})
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Updates in which the critic alone learns, before the policy moves."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second decay rate, as in the paper."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Rollouts a process draws in one iteration."}
    )
    total_episodes: int | None = field(default=None, metadata={"help": "Stop after so many rollouts."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts."})
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over each batch of rollouts."})
    num_generations: int = field(default=1, metadata={"help": "Completions of each prompt in an iteration."})
    num_mini_batches: int = field(default=4, metadata={"help": "Updates in one pass over a batch of rollouts."})

    dpo_coef: float = field(default=0.05, metadata={"help": "β₁, the weight of the token reward; 0 is PPO."})
    kl_coef: float = field(default=0.01, metadata={"help": "β₂, the weight of the KL penalty."})
    score_coef: float = field(default=1.0, metadata={"help": "β₃, the weight of the sentence score."})
    token_reward: str = field(default="logratio", metadata={"help": f"One of {', '.join(TOKEN_REWARDS)}."})
    token_reward_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Settings of a token reward, as JSON: {"power": 1.0}.'}
    )
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

    advantage_estimator: str = field(default="gae", metadata={"help": f"One of {', '.join(ESTIMATORS)}."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE."})
    value_coef: float = field(default=1.0, metadata={"help": "Share of the critic's baseline that q subtracts."})
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
    offload_frozen: bool = field(
        default=False, metadata={"help": "Keep models that are only read in host memory until they are read."}
    )
    log_completions: int = field(default=2, metadata={"help": "Completions a rollout to keep in completions.jsonl."})
    logging_steps: float = field(default=0, metadata={"help": "Log every so many updates; 0: once a rollout."})

    ranges: ClassVar[Mapping[str, Range]] = {
        **TokenTrainingArguments.ranges,
        **VLLMArguments.vllm_ranges,
        "value_learning_rate": NOT_NEGATIVE,
        "critic_warmup_steps": NOT_NEGATIVE,
        "total_episodes": COUNT,
        "num_ppo_epochs": COUNT,
        "num_mini_batches": COUNT,
        "num_generations": COUNT,
        "dpo_coef": NOT_NEGATIVE,
        "kl_coef": NOT_NEGATIVE,
        "token_reward_pessimism": NOT_NEGATIVE,
        "token_reward_clip": POSITIVE,
        "missing_eos_penalty": NOT_NEGATIVE,
        "kl_target": POSITIVE,
        "kl_horizon": COUNT,
        "gamma": SHARE,
        "lam": SHARE,
        "value_coef": SHARE,
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
        if not all(map(is_finite, self.reward_weights or [])):
            raise ValueError(f"reward_weights must be finite numbers, got {self.reward_weights}")
        if self.logging_steps == 0:
            self.logging_steps = self.num_ppo_epochs * self.num_mini_batches
        super().__post_init__()
        self.sampling()
        self.check_vllm()
        choices: tuple[tuple[str, Any], ...] = (
            ("token_reward", TOKEN_REWARDS),
            ("reward_placement", PLACEMENTS),
            ("advantage_estimator", ESTIMATORS),
        )
        for name, known in choices:
            check_choice(name, getattr(self, name), known)
        self.token_reward_settings()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps has no meaning here: set max_tokens_per_micro_batch to what memory "
                "allows and per_device_train_batch_size to the rollouts of an iteration"
            )
        if self.critic_warmup_steps and self.advantage_estimator == "reinforce++":
            raise ValueError("critic_warmup_steps asks for a critic: advantage_estimator=reinforce++ has none")
        if self.temperature == 0:
            raise ValueError("temperature=0 explores nothing: reinforcement learning needs temperature > 0")
        if self.per_device_train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} does not divide into "
                f"num_mini_batches={self.num_mini_batches}"
            )
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}, the rollouts of an iteration, are "
                f"no multiple of num_generations={self.num_generations}, the completions of each prompt"
            )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates that one batch of rollouts serves."""
        return self.num_ppo_epochs * self.num_mini_batches

    def token_reward_settings(self) -> dict[str, Any]:
        """What ``token_reward_kwargs`` holds, known to the token reward.

        Raises:
            ValueError: it has no such setting.
        """
        given = json_mapping("token_reward_kwargs", self.token_reward_kwargs)
        known = TOKEN_REWARDS[self.token_reward].settings
        for name in given:
            if name not in known:
                raise ValueError(
                    f"token_reward_kwargs: token_reward={self.token_reward} has no setting {name}"
                    f"{nearest(name, known) or ' and none else'}"
                )
        return {name: float(value) for name, value in given.items()}

    def sampling(self) -> SamplingConfig:
        """How completions are drawn."""
        return SamplingConfig(
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def credit(self) -> Credit:
        """Credit assignment with these settings, at its beginning."""
        target, horizon = self.kl_target, self.kl_horizon
        estimators: dict[str, Estimator] = {
            "gae": GAE(gamma=self.gamma, lam=self.lam),
            "reinforce++": ReinforcePlusPlus(gamma=self.gamma),
            "q": QAdvantage(value_coef=self.value_coef),
        }
        return Credit(
            reward=RTOReward(
                dpo_coef=self.dpo_coef,
                kl_coef=self.kl_coef,
                score_coef=self.score_coef,
                token_reward_clip=self.token_reward_clip,
                shaping=self.reward_shaping,
                missing_eos_penalty=self.missing_eos_penalty,
            ),
            placement=self.reward_placement,
            estimator=estimators[self.advantage_estimator],
            whiten_rewards=self.whiten_rewards,
            whiten_advantages=self.whiten_advantages,
            normalize_scores=self.normalize_scores,
            kl_control=None if target is None else AdaptiveKL(self.kl_coef, target, horizon),
        )

    def adopt(self, credit: Credit) -> None:
        """Take over the settings that a given credit assignment has, so that what is saved with a run says them.

        Raises:
            ValueError: a setting was given here, too, and is another.
        """
        theirs = settings_of(credit)
        standard = {f.name: f.default for f in fields(self)}
        for name, value in theirs.items():
            if getattr(self, name) not in (value, standard[name]):
                raise ValueError(
                    f"{name}={getattr(self, name)} in args contradicts the credit that is given, which has {value}: "
                    "say it in one of them"
                )
        for name, value in theirs.items():
            setattr(self, name, value)


def settings_of(credit: Credit) -> dict[str, Any]:
    """Credit assignment as arguments of `RTOConfig`; of an estimator that no argument names, nothing."""
    reward, estimator, control = credit.reward, credit.estimator, credit.kl_control
    found: dict[str, Any] = {
        "dpo_coef": reward.dpo_coef,
        "kl_coef": credit.kl_coef,
        "score_coef": reward.score_coef,
        "token_reward_clip": reward.token_reward_clip,
        "reward_shaping": reward.shaping,
        "missing_eos_penalty": reward.missing_eos_penalty,
        "reward_placement": credit.placement,
        "whiten_rewards": credit.whiten_rewards,
        "whiten_advantages": credit.whiten_advantages,
        "normalize_scores": credit.normalize_scores,
        "kl_target": None if control is None else control.target,
    }
    if control is not None:
        found["kl_horizon"] = control.horizon
    if isinstance(estimator, GAE):
        found |= {"advantage_estimator": "gae", "gamma": estimator.gamma, "lam": estimator.lam}
    elif isinstance(estimator, ReinforcePlusPlus):
        found |= {"advantage_estimator": "reinforce++", "gamma": estimator.gamma}
    elif isinstance(estimator, QAdvantage):
        found |= {"advantage_estimator": "q", "value_coef": estimator.value_coef}
    return found
