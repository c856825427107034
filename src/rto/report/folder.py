"""What a run folder holds, read once. Any piece may be missing, half written or of another kind.

Nothing here raises on what it finds: a missing piece is ``None`` or empty, and what could not be read is counted in
``Run.notes``, which the page shows.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rto.report.table import REWARD_MODEL, measure
from rto.values import read_yaml

T = TypeVar("T")
Log = list[dict[str, Any]]
"""Rows of a ``log.jsonl``; not every row has every key."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A test prompt with the completion of each method."""

    prompt: str
    completions: dict[str, str]
    gold: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """A completion with the raw log π_dpo/π_ref of its tokens, nats."""

    prompt: str
    tokens: list[str]
    rewards: list[float]
    gold: float | None


@dataclass(kw_only=True)
class Run:
    """A run folder.

    Attributes:
        name: of the folder.
        recipe: the resolved recipe as it was written.
        settings: what it says; empty where it cannot be read.
        results: ``evaluation/results.json``.
        samples: ``evaluation/completions.jsonl``.
        token_rewards: ``evaluation/token_rewards.jsonl``.
        online: the log of each method that trained on its own rollouts, by the method's name.
        offline: the log of every other stage that logged a loss, by the method's or the stage's name.
        notes: what could not be read.
    """

    name: str
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    token_rewards: list[TokenRewards] = field(default_factory=list)
    online: dict[str, Log] = field(default_factory=dict)
    offline: dict[str, Log] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The evaluated methods, in the order of the evaluation."""
        return self.results.get("methods") or {}

    @property
    def gold_key(self) -> str:
        """Where training logs the gold of its rollouts; the score, where a reward model is the judge."""
        return "score" if self.judged_by == REWARD_MODEL else f"score/{self.judged_by or 'gold_reward'}"

    @property
    def judged_by(self) -> str | None:
        """Whose numbers the evaluation's are: a gold reward, or the run's own reward model."""
        without = "gold" in self.settings and self.settings["gold"] is None
        return self.results.get("gold") or (REWARD_MODEL if without else None)

    @property
    def measure(self) -> str:
        """What people are told that these numbers are."""
        return measure(self.judged_by)

    @property
    def fine_tuned(self) -> bool:
        """The starting policy was trained on demonstrations."""
        return self.settings.get("sft", {}) is not None


def read_run(folder: Path) -> Run:
    """Read what is there.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a run folder")
    run = Run(name=folder.resolve().name)
    evaluation = folder / "evaluation"
    if (recipe := folder / "recipe.yaml").is_file():
        run.recipe = recipe.read_text(encoding="utf-8", errors="replace")
        with suppress(ValueError):  # the page shows the text as it stands
            settings = read_yaml(run.recipe)
            run.settings = settings if isinstance(settings, dict) else {}
    if (results := evaluation / "results.json").is_file():
        try:
            run.results = _results(json.loads(results.read_bytes()))
        except ValueError as error:
            run.notes.append(f"evaluation/results.json is left out: {error}.")
    run.samples = _rows(folder, "evaluation/completions.jsonl", _sample, run.notes)
    run.token_rewards = _rows(folder, "evaluation/token_rewards.jsonl", _token_rewards, run.notes)

    names = {method.get("folder"): name for name, method in run.methods.items()}
    order = list(names)
    stages = sorted(path.parent.name for path in folder.glob("*/log.jsonl"))
    for stage in sorted(stages, key=lambda s: order.index(s) if s in order else len(order)):
        log = _rows(folder, f"{stage}/log.jsonl", _object, run.notes)
        if rows := [row for row in log if number(row.get("episodes")) is not None]:
            run.online[names.get(stage, stage.upper())] = rows
            if wild := sum(isinstance(x, float) and not math.isfinite(x) for row in rows for x in row.values()):
                run.notes.append(f"{stage}/log.jsonl: {wild} values are not finite; the curves leave them out.")
        elif any("loss" in row for row in log):
            run.offline[names.get(stage, stage)] = [row for row in log if "loss" in row]
    return run


def number(x: Any) -> float | None:
    """A finite number, or None for whatever else a JSON file may hold in its place."""
    return float(x) if isinstance(x, int | float) and math.isfinite(x) else None


def _rows(folder: Path, name: str, parse: Callable[[Any], T], notes: list[str]) -> list[T]:
    """The rows of a file of JSON lines. A row ends at "\\n" only: text may hold other line separators."""
    if not (folder / name).is_file():
        return []
    rows, unread = [], 0
    for line in (folder / name).read_bytes().split(b"\n"):
        if line.strip():
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError):
                unread += 1
    if unread:
        notes.append(f"{name}: {unread} unreadable line{'s' * (unread > 1)} skipped.")
    return rows


def _object(x: Any) -> dict[str, Any]:
    if not isinstance(x, dict):
        raise ValueError("not a JSON object")
    return x


def _results(x: Any) -> dict[str, Any]:
    for method in _object(_object(x).get("methods") or {}).values():
        _object(method)
    return x


def _sample(row: Any) -> Sample:
    row = _object(row)
    gold = {name: number(x) for name, x in _object(row.get("gold") or {}).items()}
    return Sample(
        prompt=str(row["prompt"]),
        completions={name: str(text) for name, text in _object(row["completions"]).items()},
        gold={name: x for name, x in gold.items() if x is not None},
    )


def _token_rewards(row: Any) -> TokenRewards:
    row = _object(row)
    tokens, rewards = row["tokens"], row["rewards"]
    if not isinstance(tokens, list) or not isinstance(rewards, list) or len(tokens) != len(rewards):
        raise ValueError("a reward for each token is needed")
    if not all(isinstance(x, int | float) for x in rewards):
        raise ValueError("rewards are numbers")
    return TokenRewards(
        prompt=str(row["prompt"]),
        tokens=[str(token) for token in tokens],
        rewards=[float(x) for x in rewards],
        gold=number(row.get("gold")),
    )
