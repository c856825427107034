"""Which prompts a run has, in which order, and whether completions fit behind them."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler as IndexSampler

from rto.data.errors import DataError
from rto.data.formats import Prompt, Skipped
from rto.files import shown
from rto.rollout.rewards import RewardModel
from rto.trainers.config import RTOConfig

logger = logging.getLogger(__name__)


class RolloutSampler(IndexSampler[list[int]]):
    """Indices of the prompts of each update: a rollout's batch, once for each update it serves.

    The order of an epoch is a permutation seeded by (seed, epoch), cut into global batches, of which each process
    takes its slice. The epoch follows from the number of updates done, which a checkpoint knows. Where a prompt is
    answered several times, its rollouts stand side by side, in one process.
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
        answers: int = 1,
    ) -> None:
        self.answers = answers  # of each prompt
        self.size, self.rollouts, self.repeats, self.seed = size, rollouts, repeats, seed
        self.rank, self.world, self.updates_done = rank, world, updates_done

    def __len__(self) -> int:
        return self.size * self.answers // (self.rollouts * self.world) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        for mine in self._epoch(self.updates_done() // len(self)):
            for _ in range(self.repeats):
                yield mine

    def batch(self, iteration: int) -> list[int]:
        """What this process draws in an iteration, counted from the beginning of the run."""
        epoch, at = divmod(iteration, len(self) // self.repeats)
        return self._epoch(epoch)[at]

    def _epoch(self, epoch: int) -> list[list[int]]:
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=shuffle).repeat_interleave(self.answers).tolist()
        batch = self.rollouts * self.world
        first = range(self.rank * self.rollouts, len(order) - batch + 1 + self.rank * self.rollouts, batch)
        return [order[start : start + self.rollouts] for start in first]


def room(args: RTOConfig, context: int | None) -> int | None:
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


def with_room(
    prompts: Iterable[Prompt], what: str, *, scorers: Sequence[RewardModel], completion: int
) -> tuple[list[Prompt], Skipped]:
    """Prompts that leave room for a completion in the context of every reward model; others are counted.

    Where a reward model's tokenizer makes more tokens of a completion than ``completion``, the reward model says so
    when it is given it.

    Args:
        prompts: the prompts.
        what: the data set's name, for messages.
        scorers: the reward models.
        completion: tokens that a completion counts as.

    Raises:
        DataError: none is left.
    """
    prompts, reasons = list(prompts), dict[int, str]()
    skipped = Skipped(total=len(prompts))
    for model in scorers:
        if model.context is not None:
            left = model.context - completion
            reason = f"with no room for a completion in the {model.context} tokens that {model.name} reads"
            for i, n in enumerate(model.prompt_lengths(prompts)):
                if n > left:
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


def fit_batch(args: RTOConfig, prompts: list[Prompt] | None) -> None:
    """Check that the prompts fill a batch of rollouts, and turn ``total_episodes`` into updates.

    A batch size that nobody chose is lowered to what the prompts fill.

    Raises:
        ValueError: the prompts do not fill one batch.
    """
    size, world, answers = args.per_device_train_batch_size, args.world_size, args.num_generations
    if prompts is not None and len(prompts) * answers < size * world:
        whole = math.lcm(args.num_mini_batches, answers)
        fits = len(prompts) * answers // world // whole * whole
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


def shown_prompt(prompts: Sequence[Prompt], row: int) -> str:
    """A prompt the way messages name it."""
    return f"prompt {shown(prompts[row].raw)}"
