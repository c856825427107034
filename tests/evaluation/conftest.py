"""The published AlpacaEval and Arena-Hard files, read with the standard library."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sources import read_csv


@pytest.fixture(scope="session")
def alpaca_dir(data_dir: Path) -> Path:
    folder = data_dir / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip(f"no AlpacaEval files at {folder}")
    return folder


@pytest.fixture(scope="session")
def arena_dir(data_dir: Path) -> Path:
    folder = data_dir / "arena_hard"
    if not folder.is_dir():
        pytest.skip(f"no Arena-Hard files at {folder}")
    return folder


@pytest.fixture(scope="session")
def leaderboard(alpaca_dir: Path) -> dict[str, dict[str, str]]:
    return {row[""]: row for row in read_csv(alpaca_dir / "leaderboard.csv")}


@pytest.fixture(scope="session")
def difficulty(alpaca_dir: Path) -> np.ndarray:
    rows = read_csv(alpaca_dir / "instruction_difficulty_recovered.csv")
    assert [int(row["index"]) for row in rows] == list(range(805))
    return np.array([float(row["instruction_difficulty"]) for row in rows])


@pytest.fixture(scope="session")
def slim(alpaca_dir: Path) -> dict[str, dict[str, np.ndarray]]:
    """Columns of the slim annotations, by model."""
    models: dict[str, list[dict[str, str]]] = {}
    for row in read_csv(alpaca_dir / "annotations_slim.csv.gz"):
        models.setdefault(row["model"], []).append(row)
    keys = ("index", "preference", "len_output_1", "len_output_2")
    return {name: {key: np.array([float(r[key]) for r in rows]) for key in keys} for name, rows in models.items()}


@pytest.fixture(scope="session")
def battles(arena_dir: Path) -> list[dict]:
    with gzip.open(arena_dir / "battles_gpt-4-1106-preview_judge.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def arena_answers(arena_dir: Path) -> list[dict]:
    with gzip.open(arena_dir / "model_answers_3.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file.read().split("\n") if line]


@pytest.fixture
def annotations(tmp_path: Path) -> Callable[..., Path]:
    """Write an AlpacaEval annotations file: a preference and the model's length for each prompt."""

    def write(model: str, preferences: list, lengths: list[int] | None = None, name: str = "", **more: object) -> Path:
        lengths = lengths or [100] * len(preferences)
        rows = [
            {
                "instruction": f"prompt {i}",
                "output_1": "x" * 100,
                "output_2": "y" * length,
                "generator_1": "base",
                "generator_2": model,
                "annotator": "judge",
                "preference": preference,
                **more,
            }
            for i, (preference, length) in enumerate(zip(preferences, lengths))
        ]
        path = tmp_path / (name or model) / "annotations.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
        return path

    return write
