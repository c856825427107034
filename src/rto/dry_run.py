"""`rto run RECIPE --dry_run`: what each stage would do and cost, told before anything is trained.

Rows are read, every one, as the stages read them, so what would be left out is counted with its reason; no weight is
loaded but those of a recipe whose model is a Python function. Memory is `rto.planning`'s; time is a guess: its
arithmetic by the rate of a matrix product on this machine.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rto.data.chat import whole_sides
from rto.data.formats import DataError, Skipped, read_demonstration, read_pairs, read_prompts, reason_of
from rto.errors import users_code
from rto.functional.preference import UnpairedLoss
from rto.models.loading import find_config, load_tokenizer, max_positions, positions_of
from rto.planning.configs import shape_of
from rto.planning.job import Phase, Rates, Stage
from rto.planning.memory import Placement
from rto.planning.workload import ROLES, Workload, shapes_of, workload
from rto.recipe import Recipe, is_function, part, resolve, stage_config, stage_folder
from rto.trainers.examples import read_examples
from rto.trainers.prompts import fit_batch, room

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage.

    Attributes:
        stage: its name.
        models: that are in memory.
        rows: that it reads.
        left_out: of them, with why.
        tokens: that it reads or writes, at most.
        updates: of its model; None where it trains none.
        memory: bytes at the worst moment; None where it cannot be told.
        seconds: a guess; None where it cannot be made.
        done: there is nothing left to do.
    """

    stage: str
    models: str
    rows: int
    left_out: str = ""
    tokens: int
    updates: int | None = None
    memory: float | None = None
    seconds: float | None = None
    done: bool = False


def dry_run(recipe: Recipe, folder: Path) -> list[Planned]:
    """Every stage of a recipe.

    Raises:
        RecipeError: a model cannot be had.
        DataError: rows cannot be used.
    """
    plan = _Plan(recipe, folder)
    with _quietly():
        return list(plan.stages())


class _Plan:
    """A recipe with what can be known of its models."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        trust: dict[str, Any] = {"trust_remote_code": True} if getattr(recipe, "trust_remote_code", False) else {}
        if is_function(recipe.model):
            function = resolve(recipe.model, "model:")
            with users_code(recipe.model):
                model, self.tokenizer = function(recipe.seed)
            config, self.context = model.config, max_positions(model)
        else:
            config = find_config("model", recipe.model, **trust)
            self.tokenizer, self.context = load_tokenizer(recipe.model, **trust), positions_of(config)
        self.work = self._workload(config)
        self.rates = None if self.work is None else measured(self.work.compute)

    def _workload(self, config: Any) -> Workload | None:
        """The recipe's work as `rto.planning` counts it; None for architectures that it does not know."""
        try:
            if is_function(self.recipe.model) and self.recipe.reward_model is None:
                shapes = dict.fromkeys(ROLES, shape_of(config, type(config).__name__))
            else:
                shapes = shapes_of(self.recipe, {})
            self.shapes = shapes
            return workload(self.recipe, shapes)
        except ValueError:
            return None

    def stages(self) -> Iterator[Planned]:
        """In the order in which they run."""
        recipe = self.recipe
        if recipe.data.eval_pairs is not None:  # no stage of its own, and read by two
            recipe.data.load("eval_pairs", recipe.seed)
        if recipe.sft is not None:
            yield self._done("sft", self.sft())
        sampled: Planned | None = None  # of all rounds so far
        for k in range(1, recipe.rounds + 1):
            planned: list[tuple[str, Planned]] = []
            if k in recipe.sampled:
                fresh = self.pairs(k)
                planned.append(("pairs", fresh))
                before = (0, 0) if sampled is None else (sampled.rows, sampled.tokens)
                sampled = replace(fresh, rows=fresh.rows + before[0], tokens=fresh.tokens + before[1])
            planned += [(name, self.learner(name, sampled, k)) for name in recipe.learners]
            if recipe.reward is not None:
                planned.append(("reward", self.reward(sampled, k)))
            planned += [(name, self.method(name, k)) for name in recipe.methods]
            for name, found in planned:
                named = name if recipe.rounds == 1 else f"{name}, round {k}"
                yield self._done(stage_folder(name, k), replace(found, stage=named))
        yield self._done("evaluation", self.evaluation())

    def _done(self, folder: str, planned: Planned) -> Planned:
        return replace(planned, done=(self.folder / folder / "done.json").is_file())

    def sft(self) -> Planned:
        """Demonstrations as `SFTTrainer` reads them; it cuts rows over its ``max_length``."""
        config = stage_config(self.recipe, "sft", self.folder)
        rows = self.recipe.data.load("demonstrations", self.recipe.seed)
        skipped, lengths = Skipped(total=len(rows)), []
        for i, row in enumerate(rows):
            try:
                prompt, ids = read_demonstration(row, self.tokenizer, text=config.dataset_text_field)
                lengths.append(min(len(prompt) + len(ids), config.max_length or 2**31))
            except DataError as error:
                skipped.add(reason_of(error), i)
        return self._trained("sft", "policy", config, skipped, lengths, phase="SFT")

    def pairs(self, k: int) -> Planned:
        """Two completions of each prompt."""
        rows, length = self.recipe.data.load("pair_prompts", self.recipe.seed), self.recipe.completion_length
        rows = part(rows, self.recipe.sampled, k)
        kept, skipped = read_prompts(rows, self.tokenizer, max_length=self._room(), what="data.pair_prompts")
        tokens = 2 * sum(len(p.ids) + length for p in kept)
        told = _left(skipped)
        writers = 1 if k == 1 else len(self.recipe.writers)
        models = "policy" if writers == 1 else f"{writers} policies, one after the other"
        return Planned(stage="pairs", models=models, rows=len(rows), left_out=told, tokens=tokens)

    def learner(self, name: str, sampled: Planned | None, k: int = 1) -> Planned:
        """Pairs as `PreferenceTrainer` reads them, those to come at full length."""
        config = stage_config(self.recipe, name, self.folder, k)
        models = "policy and reference"
        if self.recipe.data.pairs is None:
            assert sampled is not None
            return self._of_sampled(name, models, config, sampled)
        examples, skipped = read_examples(
            self.recipe.data.load("pairs", self.recipe.seed),
            self.tokenizer,
            unpaired=isinstance(config.make_loss(), UnpairedLoss),
            max_length=config.max_length,
            context=self.context,
            what="data.pairs",
        )
        lengths = [sum(len(e.prompt) + len(side) for side in e.completions) for e in examples]
        return self._trained(name, models, config, *_with(sampled, skipped, lengths), phase="DPO")

    def reward(self, sampled: Planned | None, k: int = 1) -> Planned:
        """Pairs as `RewardTrainer` reads them; of a family of its own with that family's tokenizer."""
        config = stage_config(self.recipe, "reward", self.folder, k)
        if self.recipe.data.pairs is None:
            assert sampled is not None
            return self._of_sampled("reward", "reward model", config, sampled)
        own = self.recipe.reward_model
        tokenizer = self.tokenizer if own is None else load_tokenizer(own)
        context = self.context if own is None else positions_of(find_config("reward_model", own))
        pairs, skipped = read_pairs(
            self.recipe.data.load("pairs", self.recipe.seed),
            tokenizer,
            max_length=config.max_length or 2**31,
            context=context,
            what="data.pairs",
            encode=whole_sides,
        )
        lengths = [2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
        return self._trained("reward", "reward model", config, *_with(sampled, skipped, lengths), phase="reward")

    def method(self, name: str, k: int = 1) -> Planned:
        """Prompts as `RTOTrainer` reads them; completions of full length."""
        recipe = self.recipe
        config = stage_config(recipe, name, self.folder, k)
        rows = part(recipe.data.load("prompts", recipe.seed), range(1, recipe.rounds + 1), k)
        longest = min(config.max_prompt_length or 2**31, 2**31)
        prompts, skipped = read_prompts(
            rows, self.tokenizer, max_length=longest, context=room(config, self.context), what="data.prompts"
        )
        fit_batch(config, prompts)
        batch = config.per_device_train_batch_size
        updates = config.max_steps
        if updates <= 0:
            updates = math.ceil(len(prompts) // batch * config.num_train_epochs) * config.updates_per_rollout
        iterations = math.ceil(updates / config.updates_per_rollout)
        mean = sum(len(p.ids) for p in prompts) / len(prompts)
        models = ["policy", "critic"] if config.advantage_estimator != "reinforce++" else ["policy"]
        models += ["reference", *(f"π of {learner}" for learner in recipe.learners_of(name))]
        models += ["reward model"] if "reward" in recipe.rewards(name) else []
        phases: list[Phase] = []
        if self.work is not None:
            work = workload(recipe, self.shapes, method=name)
            phases = list(work.job.parts[-1].phases(self._place(work)))
        return Planned(
            stage=name,
            models=", ".join(models),
            rows=len(rows),
            left_out=_left(skipped),
            tokens=round(iterations * batch * (mean + config.max_completion_length)),
            updates=updates,
            memory=max((x.memory.total for x in phases), default=None),
            seconds=self._seconds(phases, iterations),
        )

    def evaluation(self) -> Planned:
        """One completion of every policy for each held-out prompt."""
        rows, length = self.recipe.data.load("test_prompts", self.recipe.seed), self.recipe.completion_length
        kept, skipped = read_prompts(rows, self.tokenizer, max_length=self._room(), what="data.test_prompts")
        tokens = len(self.recipe.policies) * sum(len(p.ids) + length for p in kept)
        models = f"{len(self.recipe.policies)} policies, one after the other"
        return Planned(stage="evaluation", models=models, rows=len(rows), left_out=_left(skipped), tokens=tokens)

    def _room(self) -> int:
        return 2**31 if self.context is None else self.context - self.recipe.completion_length

    def _of_sampled(self, stage: str, models: str, config: Any, sampled: Planned) -> Planned:
        """On pairs that are not there yet: as many as there will be, of full length."""
        rows = sampled.rows
        lengths = _lengths(sampled)
        phase = "reward" if stage == "reward" else "DPO"
        return self._trained(stage, models, config, Skipped(total=rows), lengths, phase=phase)

    def _trained(
        self, stage: str, models: str, config: Any, skipped: Skipped, lengths: list[int], *, phase: str
    ) -> Planned:
        """A stage over rows of these lengths."""
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        updates = config.max_steps
        if updates <= 0:
            updates = math.ceil(math.ceil(len(lengths) / batch) * config.num_train_epochs)
        tokens = round(updates * batch * sum(lengths) / max(len(lengths), 1))
        phases: list[Phase] = []
        full = 1.0
        if self.work is not None:
            part = next(x for x in self.work.job.parts if isinstance(x, Stage) and x.name == phase)
            phases = list(part.phases(self._place(self.work)))
            full = updates * part.passes * part.at.rows * (part.at.prompt + part.at.response)
        seconds = self._seconds(phases, updates)
        return Planned(
            stage=stage,
            models=models,
            rows=skipped.total,
            left_out=_left(skipped),
            tokens=tokens,
            updates=updates,
            memory=max((x.memory.total for x in phases), default=None),
            seconds=None
            if seconds is None
            else seconds * min(1.0, tokens / full),  # rows are shorter than they may be
        )

    @staticmethod
    def _place(work: Workload) -> Placement:
        packed = not torch.accelerator.is_available()
        return Placement(devices=1, compute=work.compute, moments=work.moments, lora=work.lora, packed=packed)

    def _seconds(self, phases: list[Phase], times: int) -> float | None:
        if not phases or self.rates is None:
            return None
        return times * sum(x.seconds(self.rates, 1) for x in phases)


def _lengths(sampled: Planned) -> list[int]:
    return [sampled.tokens // max(sampled.rows, 1)] * sampled.rows


def _with(sampled: Planned | None, skipped: Skipped, lengths: list[int]) -> tuple[Skipped, list[int]]:
    """Given pairs, and beside them those that later rounds will have sampled."""
    if sampled is None:
        return skipped, lengths
    return replace(skipped, total=skipped.total + sampled.rows), lengths + _lengths(sampled)


def measured(compute: int) -> Rates:
    """Matrix products and copies on this machine, the faster of two; a run on a processor comes near to that."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if compute == 2 else torch.float32
    a, big = torch.randn(size, size, device=device, dtype=dtype), torch.zeros(2**24, device=device)

    def fastest(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(2):
            begun = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            found.append(time.perf_counter() - begun)
        return min(found)

    operations = 2 * size**3 / fastest(lambda: a @ a)
    bandwidth = 2 * 4 * len(big) / fastest(big.clone)
    return Rates(operations=operations, bandwidth=bandwidth, utilisation=1.0 if device.type == "cpu" else 0.4)


def _left(skipped: Skipped) -> str:
    return "; ".join(f"{n:,} {reason}" for reason, n in skipped.counts.most_common())


@contextmanager
def _quietly() -> Iterator[None]:
    """What is left out stands in the table."""
    loggers = [logging.getLogger(name) for name in ("rto.data.formats", "rto.trainers.prompts")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels):
            x.setLevel(level)


def show(found: list[Planned], console: Console) -> None:
    """The plan as a table, and in a line what it is made of."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns: Mapping[str, str] = dict.fromkeys(("rows", "tokens", "updates", "memory", "time"), "right")
    for heading in ("stage", "models", "rows", "left out", "tokens", "updates", "memory", "time"):
        table.add_column(heading, justify=columns.get(heading, "left"), overflow="fold")  # type: ignore[arg-type]
    for x in found:
        numbers = (f"{x.tokens:,}", "–" if x.updates is None else f"{x.updates:,}", _gb(x.memory))
        spent = "done" if x.done else _time(x.seconds)
        table.add_row(x.stage, x.models, f"{x.rows:,}", x.left_out or "0", *numbers, spent)
    console.print(table)
    left = [x.seconds for x in found if not x.done and x.seconds is not None]
    console.print(
        f"Tokens are an upper bound: completions of full length. Memory is that of models and their work, not of "
        f"libraries. Time is a lower bound, arithmetic at the rate of a matrix product on this machine; training "
        f"alone {_time(sum(left))}. Nothing was trained.",
        highlight=False,
    )


def _gb(memory: float | None) -> str:
    return "–" if memory is None else f"{memory / GB:.1f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
