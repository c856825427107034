"""What the folder of a run, or of one stage, holds, read once; a piece may be missing, half written, of another kind.

Nothing here raises on what it finds: a missing piece is ``None`` or empty, and what could not be read is counted in
``Run.notes``, which the page shows.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rto.files import parse_json, plain
from rto.ranges import is_finite
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


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A completion that the policy drew in training, as the trainer kept it."""

    step: int
    prompt: str
    completion: str
    scores: dict[str, float]
    tokens: list[str]
    """Empty, as ``rewards``, where training had no token reward."""
    rewards: list[float]


NEWEST = 6
"""Completions of training that are read, the last ones."""


@dataclass(kw_only=True)
class Run:
    """A run folder, or one stage's.

    Attributes:
        name: of the folder.
        recipe: the resolved recipe as it was written.
        settings: what it says; empty where it cannot be read.
        results: ``evaluation/results.json``.
        samples: ``evaluation/completions.jsonl``.
        token_rewards: ``evaluation/token_rewards.jsonl``.
        online: the log of each method that trained on its own rollouts, by the method's name, over all rounds.
        offline: the log of every other stage that logged a loss, in training or on held-out rows, by the method's or
            the stage's name.
        drawn: the newest completions of each on-line method in training.
        stage: the folder is one stage's: its log is its own.
        made_by: how the stage's model was trained, where the trainer has left it (``rto_config.json``).
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
    drawn: dict[str, list[Drawn]] = field(default_factory=dict)
    stage: bool = False
    made_by: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The evaluated methods, in the order of the evaluation."""
        return self.results.get("methods") or {}

    @property
    def by_labels(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluated rounds of each learner and method, the start before them; empty without counted labels."""
        start = [method for method in self.methods.values() if method.get("round") == 0]
        found: dict[str, list[dict[str, Any]]] = {}
        for method in self.methods.values():
            if isinstance(of := method.get("of"), str):
                found.setdefault(plain(of), [*start]).append(method)
        return found

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
    def missing(self) -> list[str]:
        """Files of a whole run that are not there."""
        found = {
            "recipe.yaml": self.recipe is not None,
            "evaluation/results.json": bool(self.methods),
            "evaluation/completions.jsonl": bool(self.samples),
            "evaluation/token_rewards.jsonl": bool(self.token_rewards),
            "log.jsonl of a stage": bool(self.online or self.offline),
        }
        return [name for name, there in found.items() if not there]

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
        raise NotADirectoryError(f"{folder} is not a run folder: name that of a run or of one stage")
    run = Run(name=folder.resolve().name)
    evaluation = folder / "evaluation"
    if (recipe := folder / "recipe.yaml").is_file():
        run.recipe = recipe.read_text(encoding="utf-8", errors="replace")
        with suppress(ValueError):  # the page shows the text as it stands
            settings = read_yaml(run.recipe)
            run.settings = settings if isinstance(settings, dict) else {}
    if (results := evaluation / "results.json").is_file():
        try:
            run.results = _results(parse_json(results.read_bytes()))
        except ValueError as error:
            run.notes.append(f"evaluation/results.json is left out: {error}.")
    run.samples = _rows(folder, "evaluation/completions.jsonl", _sample, run.notes)
    run.token_rewards = _rows(folder, "evaluation/token_rewards.jsonl", _token_rewards, run.notes)

    names = {method.get("folder"): name for name, method in run.methods.items()}
    order = list(names)
    found = [path.parent.relative_to(folder).as_posix() for p in LOGS for path in folder.glob(p)]
    stages = sorted(found, key=lambda stage: (round_of(stage)[::-1], stage))
    run.stage = (folder / "log.jsonl").is_file()
    if run.stage:
        _read_stage(run, folder, "", run.name)
        run.made_by = _made_by(folder / "rto_config.json")
    for stage in sorted(stages, key=lambda s: order.index(s) if s in order else len(order)):
        _read_stage(run, folder, f"{stage}/", names.get(stage))
    return run


LOGS = ("*/log.jsonl", "round-*/*/log.jsonl")
"""Of the stages of a run; those of a later round have a folder of their own."""


def round_of(stage: str) -> tuple[int, str]:
    """The round of a stage's folder, and the stage."""
    head, _, own = stage.rpartition("/")
    number = head.removeprefix("round-")
    return (int(number) if number.isdecimal() else 1), own


def continued(before: Log, after: Log) -> Log:
    """The log of a method and that of its next round, prompts and updates counted through."""
    shift = {key: max((n for row in before if (n := number(row.get(key))) is not None), default=0) for key in COUNTED}
    return before + [
        {**row, **{k: row[k] + shift[k] for k in COUNTED if number(row.get(k)) is not None}} for row in after
    ]


COUNTED = ("episodes", "step")


def _made_by(about: Path) -> str:
    """Method, rows and updates in words; empty where they are not told."""
    try:
        told = _object(parse_json(about.read_bytes()))
        rows, steps = number(_object(told.get("data") or {}).get("rows")), number(told.get("steps"))
    except (OSError, ValueError):
        return ""
    counts = [f"{n:,.0f} {what}" for n, what in ((rows, "rows"), (steps, "updates")) if n is not None]
    return ", ".join([str(told.get("method", "")), *counts])


def _read_stage(run: Run, folder: Path, inner: str, name: str | None) -> None:
    """The log of a stage, which goes on with that of its method's former round, if there is one."""
    log = _rows(folder, f"{inner}log.jsonl", _object, run.notes)
    k, own = round_of(inner.rstrip("/"))
    several = run.settings.get("rounds", 1) != 1
    if rows := [row for row in log if number(row.get("episodes")) is not None]:
        of = run.methods.get(name or "", {}).get("of")
        name = plain(of) if isinstance(of, str) else name or plain(own).upper()
        run.online[name] = continued(run.online.get(name, []), rows)
        if wild := sum(isinstance(x, float) and not math.isfinite(x) for row in rows for x in row.values()):
            run.notes.append(f"{inner}log.jsonl: {wild} values are not finite; the curves leave them out.")
        drawn = _rows(folder, f"{inner}completions.jsonl", _drawn, run.notes)
        if newest := [row for row in drawn if row is not None][-NEWEST:]:
            run.drawn[name] = newest[::-1]
    elif any("loss" in row for row in log):
        if name is None:
            name = f"{plain(own)}, round {k}" if several and own != "sft" else plain(own)
        run.offline[name] = [row for row in log if "loss" in row or "eval_loss" in row]


def number(x: Any) -> float | None:
    """A finite number, or None for whatever else a JSON file may hold in its place."""
    return float(x) if isinstance(x, int | float) and is_finite(x) else None


def _rows(folder: Path, name: str, parse: Callable[[Any], T], notes: list[str]) -> list[T]:
    """The rows of a file of JSON lines. A row ends at "\\n" only: text may hold other line separators."""
    if not (folder / name).is_file():
        return []
    rows, unread = [], 0
    for line in (folder / name).read_bytes().split(b"\n"):
        if line.strip():
            try:
                rows.append(parse(parse_json(line)))
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
    methods = _object(_object(x).get("methods") or {})
    return {**x, "methods": {plain(name): _object(method) for name, method in methods.items()}}


def _sample(row: Any) -> Sample:
    row = _object(row)
    gold = {plain(name): number(x) for name, x in _object(row.get("gold") or {}).items()}
    return Sample(
        prompt=str(row["prompt"]),
        completions={plain(name): str(text) for name, text in _object(row["completions"]).items()},
        gold={name: x for name, x in gold.items() if x is not None},
    )


def _token_rewards(row: Any) -> TokenRewards:
    row = _object(row)
    tokens, rewards = _per_token(row["tokens"], row["rewards"])
    return TokenRewards(prompt=str(row["prompt"]), tokens=tokens, rewards=rewards, gold=number(row.get("gold")))


def _drawn(row: Any) -> Drawn | None:
    """A row of a trainer's ``completions.jsonl``; None for one that was drawn in an evaluation."""
    row = _object(row)
    if "split" in row:
        return None
    tokens, rewards = _per_token(row.get("tokens", []), row.get("token_rewards", []))
    scores = {name.removeprefix("score/"): number(x) for name, x in row.items() if name.split("/")[0] == "score"}
    return Drawn(
        step=int(row["step"]),
        prompt=_said(row["prompt"]),
        completion=_said(row["completion"]),
        scores={plain(name): x for name, x in scores.items() if x is not None},
        tokens=tokens,
        rewards=rewards,
    )


def _per_token(tokens: Any, rewards: Any) -> tuple[list[str], list[float]]:
    if not isinstance(tokens, list) or not isinstance(rewards, list) or len(tokens) != len(rewards):
        raise ValueError("a reward for each token is needed")
    if not all(isinstance(x, int | float) for x in rewards):
        raise ValueError("rewards are numbers")
    return [str(token) for token in tokens], [float(x) for x in rewards]


def _said(x: Any) -> str:
    """Text, or what the messages of a conversation say."""
    if isinstance(x, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in x)
    return str(x)
