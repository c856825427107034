"""Reward functions as TRL's GRPO takes them: async, with nothing to say of a row, told where training is."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from rto import RTOConfig, RTOTrainer
from rto.rollout.rewards import Completed, FunctionReward
from rto.trainers.logs import score_metrics
from rto.trainers.prompts import RolloutSampler

BATCH = Completed(
    prompts=["a", "b", "c"], completions=["x", "yy", "zzz"], completion_ids=[[1], [2], [3]], ended=[True] * 3
)


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def lengths_later(completions: list[str], **columns: Any) -> list[float]:
    async def one(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    return list(await asyncio.gather(*map(one, completions)))


class Later:
    """An object whose ``__call__`` is async."""

    async def __call__(self, completions: list[str]) -> list[float]:
        return await lengths_later(completions)


@pytest.mark.parametrize("function", [lengths, lengths_later, Later()])
def test_async_functions_score_as_others_do(function: Callable[..., Any]) -> None:
    assert FunctionReward(function)(BATCH) == [1.0, 2.0, 3.0]


def test_async_functions_run_where_a_loop_runs_already() -> None:
    async def notebook() -> list[float]:
        return FunctionReward(lengths_later)(BATCH)

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


def test_an_error_of_an_async_function_is_its_own() -> None:
    async def broken(completions: list[str]) -> list[float]:
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs") as raised:
        FunctionReward(broken)(BATCH)
    assert any("broken" in note for note in raised.value.__notes__)


def test_none_is_for_rows_that_a_function_does_not_judge() -> None:
    def some(completions: list[str]) -> list[float | None]:
        return [None if text == "yy" else 1.0 for text in completions]

    source = FunctionReward(some)
    assert source.given(BATCH) == [1.0, None, 1.0]
    with pytest.raises(ValueError, match="returned None for completion 1"):
        source(BATCH)  # who must have a number of every row says so
    with pytest.raises(ValueError, match="returned nan for completion 0"):
        FunctionReward(lambda completions: [float("nan"), None, None]).given(BATCH)


def test_means_are_over_the_rows_with_a_score() -> None:
    scores = {"f": torch.tensor([1.0, float("nan"), 3.0, 100.0])}
    counted = torch.tensor([True, True, True, False])
    found = score_metrics(scores, counted, lambda x: x)
    assert float(found["score/f"]) == 2.0
    assert float(found["score/f_std"]) == 1.0
    assert score_metrics({"f": torch.full((4,), torch.nan)}, counted, lambda x: x) == {}  # 0 would be a score


@pytest.mark.parametrize("name", ["log_metric", "log_extra", "environments"])
def test_what_only_grpo_hands_over_is_refused_with_what_to_do(name: str) -> None:
    asks: dict[str, Any] = {}
    exec(f"def f(completions, {name}, **columns): ...\ndef g(completions, {name}=None, **columns): ...", asks)
    with pytest.raises(ValueError, match=f"reward function f asks for {name}: "):
        FunctionReward(asks["f"])
    FunctionReward(asks["g"])  # can do without


@pytest.mark.parametrize("world", [1, 2])
def test_answers_to_a_prompt_stand_side_by_side(world: int) -> None:
    """Every prompt that is drawn is drawn so many times, in one process; n = 1 is what it was."""

    def drawn(answers: int, rank: int) -> list[list[int]]:
        given = {"size": 10, "rollouts": 8 // world, "repeats": 1, "seed": 3, "rank": rank, "world": world}
        sampler = RolloutSampler(**given, updates_done=lambda: 0, answers=answers)
        batches = list(sampler)
        assert len(sampler) == len(batches) == 10 * answers // 8
        return batches

    for rank in range(world):
        for batch in drawn(4, rank):
            assert batch == [i for i in batch[::4] for _ in range(4)]
    every = [i for batches in zip(*(drawn(4, rank) for rank in range(world))) for batch in batches for i in batch]
    once = [i for batches in zip(*(drawn(1, rank) for rank in range(world))) for batch in batches for i in batch]
    assert every[::4][: len(once)] == once
    assert len(set(every)) == 10


def test_a_run_with_all_of_it(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two prompts answered four times; one function knows half of the rows, another is told where training is."""
    seen: list[int] = []

    def short_only(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [1.0 if prompt == "ab" else None for prompt in prompts]

    async def told(completions: list[str], trainer_state: TrainerState, **columns: Any) -> list[float | None]:
        seen.append(trainer_state.global_step)
        assert columns["tone"] == ["kind"] * 4 + ["rude"] * 4 or columns["tone"] == ["rude"] * 4 + ["kind"] * 4
        return [0.5 if tone == "kind" else None for tone in columns["tone"]]

    args = RTOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        num_mini_batches=2,
        num_train_epochs=2,
        max_completion_length=4,
        dpo_coef=0.0,
        log_completions=8,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"prompt": "ab", "tone": "kind"}, {"prompt": "cab", "tone": "rude"}]
    trainer = RTOTrainer(str(tiny_folder), args, reward_funcs=[short_only, told], train_dataset=rows)
    trainer.train()
    assert seen == [0, 2]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first = next(row for row in log if "score" in row)
    assert (first["score/short_only"], first["score/told"], first["score"]) == (1.0, 0.5, 0.75)
    kept = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["score/told"] for row in kept} == {"ab": 0.5, "cab": None}
    assert "4 of 8 completions have no score from any reward function" in caplog.text


def test_a_batch_holds_whole_groups() -> None:
    with pytest.raises(ValueError, match="no multiple of num_generations=3"):
        RTOConfig(output_dir="x", use_cpu=True, per_device_train_batch_size=8, num_generations=3)
