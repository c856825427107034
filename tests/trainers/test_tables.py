"""Completions kept in training: their tokens with rewards, and their table in the trackers.

TensorBoard is the real one, read back from its file; Weights & Biases, which needs an account, is a stand-in that
keeps what it is given.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import WandbCallback

from rto.data.pieces import drawn
from rto.models.loading import load_policy
from rto.trainers.tables import markdown


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_stand_beside_the_text_with_their_log_ratio(
    trainer: Callable, tmp_path: Path, dpo_folder: Path, tiny_folder: Path
) -> None:
    """Checked with the two models loaded anew, on the completions as they were kept."""
    built, drawn_ids = trainer(total_episodes=16), []
    score = built.score

    def noted(model: Any, samples: Any, *rest: Any) -> Any:
        drawn_ids.extend(row[keep].tolist() for row, keep in zip(samples.responses[:2], samples.mask[:2]))
        return score(model, samples, *rest)

    built.score = noted
    built.train()
    rows, tokenizer = rows_of(tmp_path / "run" / "completions.jsonl"), built.processing_class
    models = [load_policy(str(folder)).eval() for folder in (dpo_folder, tiny_folder)]
    for row, ids in zip(rows, drawn_ids, strict=True):
        assert row["tokens"] == drawn(tokenizer, ids)
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        with torch.no_grad():
            learner, reference = (m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in models)
        ratio = (learner - reference)[len(prompt) - 1 : -1]
        expected = [float(ratio[t, token]) for t, token in enumerate(ids)]
        assert row["token_rewards"] == pytest.approx(expected, abs=1e-4)


def test_without_a_token_reward_there_is_text_alone(trainer: Callable, tmp_path: Path) -> None:
    trainer(total_episodes=8, dpo_coef=0.0).train()
    assert {tuple(row) for row in rows_of(tmp_path / "run" / "completions.jsonl")} == {
        ("step", "prompt", "completion", "score/count_b", "score")
    }


def test_tensorboard_has_the_completions(trainer: Callable, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    built = trainer(total_episodes=16, report_to="tensorboard")
    built.train()
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.*")}
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    told = events.Tensors("completions/text_summary")
    assert [event.step for event in told] == [0, 2]
    rows = rows_of(tmp_path / "run" / "completions.jsonl")
    for event, own in zip(told, (rows[:2], rows[2:])):
        (text,) = event.tensor_proto.string_val
        lines = text.decode().split("\n")
        assert lines[0] == "| step | prompt | completion | score/count_b | score |"
        assert [line.split(" | ")[1] for line in lines[2:]] == [row["prompt"] for row in own]


class Wandb(WandbCallback):
    """Weights & Biases without an account: a table is its columns and rows, and what is logged is kept."""

    def __init__(self) -> None:
        self.logged: list[Any] = []
        self._wandb = SimpleNamespace(run="a run", Table=lambda columns, data: (columns, data), log=self.logged.append)
        self._initialized = True

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        return super().__getattribute__(name)


def test_weights_and_biases_has_the_completions(trainer: Callable, tmp_path: Path) -> None:
    built, wandb = trainer(total_episodes=16), Wandb()
    built.add_callback(wandb)
    built.train()
    rows = rows_of(tmp_path / "run" / "completions.jsonl")
    names = ["step", "prompt", "completion", "score/count_b", "score"]
    expected = [(names, [[row[name] for name in names] for row in part]) for part in (rows[:2], rows[2:])]
    assert wandb.logged == [{"completions": table} for table in expected]


def test_a_cell_is_text() -> None:
    table = markdown(["a"], [["<script>|x`\n## b"], [1.5]])
    assert table == "| a |\n| --- |\n| &#60;script&#62;&#124;x&#96;<br>&#35;&#35; b |\n| 1.5 |"
