"""What an on-line trainer is beside its algorithm: turns, optimizer, order of prompts, checkpoints.

`rto.trainers.rto` is the algorithm. Here stands what serves it: rollouts that are drawn one turn before, what is
logged of a rollout and refused in it, two learning rates, the order of prompts and seeds, and what a checkpoint needs
so that none of it is lost.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rto.batches import Rollout, Samples, Targets
from rto.credit import Credit
from rto.data.formats import Prompt, Skipped, read_prompts
from rto.files import shown
from rto.finite import together
from rto.functional.importance import log_ratio, mismatch
from rto.functional.masked import masked_mean
from rto.models.actor import TokenOutputs
from rto.rollout.samplers.ahead import Ahead
from rto.rollout.samplers.base import SamplerError
from rto.rollout.samplers.randomness import row_seeds
from rto.rollout.scoring import Scored
from rto.trainers.base import TokenTrainer
from rto.trainers.config import RTOConfig
from rto.trainers.engine import unwrapped
from rto.trainers.logs import Phases, length_metrics, score_metrics, write_completions
from rto.trainers.prompts import RolloutSampler, shown_prompt
from rto.trainers.rollout_state import load_state, load_targets, save_state, save_targets

logger = logging.getLogger(__name__)


class OnlineTrainer(TokenTrainer):
    """A `TokenTrainer` whose batches are prompts, each drawn for when its turn has come, or one turn before."""

    args: RTOConfig
    row_type = Prompt
    credit: Credit
    _ahead: Ahead | None
    _context: int | None
    _phase: Phases
    _targets: Targets | None

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], seed: int) -> Samples:
        """Draw one completion for each prompt from the policy as it is now."""
        raise NotImplementedError

    def _rollouts(self, model: nn.Module, prompts: Sequence[Prompt], iteration: int) -> Samples:
        """The samples of an iteration; with ``async_rollouts`` those that were begun one before, if they were."""
        if self._ahead is None:
            return self.sample(model, prompts, self._seed(iteration))
        with together(self.accelerator):
            samples = self._ahead.take(iteration)
        if samples is None:
            samples = self.sample(model, prompts, self._seed(iteration))
        if iteration - samples.version > self.args.async_rollouts:
            raise SamplerError(
                f"step {self.state.global_step + 1}: these rollouts are of version {samples.version} of the weights, "
                f"the policy is of version {iteration}: async_rollouts={self.args.async_rollouts} allows no more"
            )
        if (iteration + 1) * self.args.updates_per_rollout < self.state.max_steps:
            following = [self.train_dataset[i].ids for i in self._prompt_order().batch(iteration + 1)]
            seeds = row_seeds(self._seed(iteration + 1), len(following))
            policy = unwrapped(self.accelerator, model).policy
            with together(self.accelerator), self.accelerator.autocast():
                self._ahead.begin(policy, following, seeds, iteration=iteration + 1, version=iteration)
        return samples

    @property
    def _iteration(self) -> int:
        """Batches of rollouts that were learned from."""
        return self.state.global_step // self.args.updates_per_rollout

    def _episodes(self, iterations: int) -> int:
        return iterations * self.args.per_device_train_batch_size * self.accelerator.num_processes

    # --- what a rollout says of itself

    def _tell_of(self, scored: Scored, acting: TokenOutputs, counted: Bool[Tensor, " B"] | None) -> None:
        """Record scores, entropy and lengths of a rollout; while training the first rows are written as text.

        Args:
            scored: a rollout, and where its scores come from.
            acting: the policy's own numbers on it.
            counted: which rows the metrics are of; None: all.
        """
        rollout, scores = scored.rollout, scored.by_source
        if scores:
            scores = {**scores, "": rollout.scores}
        self.record(**score_metrics(scores, counted, self.all_reduce))
        assert acting.entropy is not None
        mask = rollout.mask if counted is None else rollout.mask & counted[:, None]
        self.record(entropy=masked_mean(acting.entropy, mask, all_reduce=self.all_reduce))
        lengths = rollout.mask.sum(1).float()
        self.record(**length_metrics(lengths, rollout.ended, counted, self.all_reduce, self.accelerator.gather))
        if self.args.log_completions and self.is_world_process_zero() and self.is_in_train:
            write_completions(
                Path(str(self.args.output_dir)),
                self.state.global_step,
                scored.completed,
                scores,
                rollout,
                self.processing_class,
                most=self.args.log_completions,
                evaluation=counted is not None,
            )

    def _check(self, scored: Scored, prompts: Sequence[Prompt]) -> None:
        """Every number of a rollout is finite before any is used."""
        rollout, completions = scored.rollout, scored.completed.completions
        for name, scores in scored.by_source.items():
            given = ~scores.isnan()  # a reward function may have nothing to say of a row
            self.watch.see(
                scores, f"score of {name} (as float32)", mask=given, tell=lambda row: shown(completions[row])
            )
        self.watch.check(self.state.global_step + 1)
        per_token = {
            "log-probability of the policy": rollout.policy_logp,
            "log-probability of the reference": rollout.ref_logp,
            "token reward of the DPO model": rollout.token_logratio,
            "value of the critic": rollout.values,
        }
        for what, x in per_token.items():
            if x is not None:
                self.watch.see(x, what, mask=rollout.mask, tell=lambda row: shown_prompt(prompts, row))
        self.watch.see(rollout.scores, "score", tell=lambda row: shown_prompt(prompts, row))
        self.watch.check(self.state.global_step + 1)

    def _distance(self, rollout: Rollout) -> dict[str, Tensor]:
        """How far what drew the rollout is from the policy, where it says so."""
        if rollout.sampler_logp is None:
            return {}
        known = rollout.mask & ~rollout.sampler_logp.isnan()
        if not self.all_reduce(known.sum().float()):
            return {}
        found = mismatch(
            log_ratio(rollout.policy_logp, rollout.sampler_logp, known), known, all_reduce=self.all_reduce
        )
        return {
            "sampling/sampling_logp_difference/mean": found.mean,
            "sampling/sampling_logp_difference/max": self.accelerator.gather(found.largest).max(),
            "sampling/kl": found.kl,
            "sampling/effective_sample_size": found.effective,
        }

    # --- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer, two learning rates: the policy's and the critic's."""
        if self.optimizer is None:
            acting = self.model if model is None else model
            critic = set(map(id, unwrapped(self.accelerator, acting).value_parameters))
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
        norm = super()._clip_grad_norm(model)
        if "value" in self._norms:
            self.watch.see(self._norms["value"], "gradient norm of the critic")
        self.record(**{f"grad_norm/{name}": x for name, x in self._norms.items()})
        return norm

    # --- data

    def get_train_dataloader(self) -> DataLoader:
        """Prompts of this process, the same batch for every update of a rollout."""
        batch = self.args.per_device_train_batch_size * self.accelerator.num_processes
        total, answers = len(self.train_dataset), self.args.num_generations
        if tail := total * answers % batch // answers:
            logger.warning("each pass over %d prompts leaves out %d, which fill no batch of %d", total, tail, batch)
        return DataLoader(self.train_dataset, batch_sampler=self._prompt_order(), collate_fn=list)

    def _prompt_order(self) -> RolloutSampler:
        return RolloutSampler(
            size=len(self.train_dataset),
            rollouts=self.args.per_device_train_batch_size,
            repeats=self.args.updates_per_rollout,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            updates_done=lambda: self.state.global_step,
            answers=self.args.num_generations,
        )

    def _seed(self, iteration: int) -> int:
        """Seed of everything random in an iteration: a function of what a checkpoint knows, so nothing is lost."""
        return (self.args.seed * 1_000_003 + iteration) * 1_009 + 101 * self.accelerator.process_index

    def _read(self, dataset: Any, what: str) -> tuple[list[Prompt], Skipped]:
        longest = self.args.max_prompt_length or 2**31
        return read_prompts(dataset, self.processing_class, max_length=longest, context=self._context, what=what)

    # --- checkpoints

    def _save_state(self, folder: Path) -> None:
        """Credit assignment's state, and the rollout in progress where a checkpoint falls between its updates."""
        super()._save_state(folder)
        if self.is_world_process_zero():
            state = {**self.credit.state_dict(), "seconds": self._phase.seconds}
            save_state(folder, state, processes=self.accelerator.num_processes)
        if self.state.global_step % self.args.updates_per_rollout:
            assert self._targets is not None
            save_targets(folder, self._targets, rank=self.accelerator.process_index)
        if self._ahead is not None:
            self._ahead.save(self._ahead_file(folder))

    def _ahead_file(self, folder: Path) -> Path:
        return folder / f"ahead_{self.accelerator.process_index}.safetensors"

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        state = load_state(folder, processes=self.accelerator.num_processes)
        self._phase.seconds = dict(state.get("seconds", {}))
        self.credit.load_state_dict(state)
        if (targets := load_targets(folder, rank=self.accelerator.process_index)) is not None:
            self._targets = targets.to(self.args.device)
        if self._ahead is not None:
            self._ahead.load(self._ahead_file(folder), self.args.device)
