"""Judgments of the two benchmarks, read for the table, and what stands beside them; half-written files too.

A file that is read is never changed.
"""

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rto.data.errors import DataError
from rto.evaluation.benchmarks.formats import ArenaHard, Match, arena_turn, numbered
from rto.evaluation.benchmarks.types import Key
from rto.evaluation.statistics.arena_hard import BASELINE, STYLE, VERDICTS, Outcome, markdown_counts, outcome
from rto.evaluation.statistics.length_control import GamedBaselines
from rto.evaluation.statistics.winrate import preference_share
from rto.files import Row, Rows, checked, parse_json, read_rows, shown, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AlpacaAnnotations:
    """One model's AlpacaEval annotations.

    Attributes:
        shares: y in [0, 1], nan where there is no verdict.
        baseline_length, model_length: characters.
        index: each row's place in the benchmark, which is where its difficulty stands; None when rows do not say.
        model_first: whether the judge saw the model's answer first; None when rows do not say.
        rows: as they are in the file.
    """

    path: Path
    model: str
    baseline: str
    judge: str
    prompts: list[Key]
    shares: Float[np.ndarray, " n"]
    baseline_length: Float[np.ndarray, " n"]
    model_length: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"] | None
    model_first: Bool[np.ndarray, " n"] | None
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class ArenaJudgments:
    """One model's Arena-Hard judgments.

    Attributes:
        games: with a verdict; the baseline is answer A in round 0, the model in round 1.
        rounds: of each game.
        missing: games without one of the five verdicts.
        model_style, baseline_style: token and markdown counts by question; None when no answers with counts are there.
    """

    path: Path
    model: str
    baseline: str
    judge: str
    games: list[Outcome]
    rounds: list[int]
    missing: int
    model_style: dict[str, np.ndarray] | None
    baseline_style: dict[str, np.ndarray] | None


def check_judged(path: Path, match: Match, judge: str) -> None:
    """Refuse to replace judgments of another match or by another judge, before anybody is asked.

    Args:
        path: where the judgments will go.
        match: what is judged.
        judge: who judges: a name alone does not tell two folders called ``checkpoint-100`` apart.

    Raises:
        DataError: the file there is of another model or baseline, or its folder is another judge's.
    """
    note = path.with_name(JUDGE_FILE)
    if note.is_file():
        other = parse_json(note.read_text(encoding="utf-8"))["judge"]
        if other != judge:
            raise DataError(f"{path.parent} holds judgments by {other}, not by {judge}: choose another --annotator")
    if not path.exists():
        return
    for row in read_rows(path).rows[:1]:
        model = row.get("generator_2", row.get("model"))
        baseline = row.get("generator_1", row.get("baseline", BASELINE))
        if (model, baseline) != (match.model, match.baseline):
            raise DataError(
                f"{path} holds judgments of {shown(model)} against {shown(baseline)}: choose another --output or "
                "--annotator"
            )


JUDGE_FILE = "judge.json"
"""Beside judgments: who made them."""


def write_judgments(path: Path, judgments: str, judge: str) -> None:
    """Judgments, and who made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_name(JUDGE_FILE), json.dumps({"judge": judge}))
    write_atomically(path, judgments)


# --- judgments, read


def read_annotations(read: Rows) -> list[AlpacaAnnotations]:
    """AlpacaEval annotations by model (``generator_2``).

    Raises:
        DataError: a key is missing or of another kind; a preference is out of range; one model has two judges or
            baselines, or two rows with the same ``index``.
    """
    return [_annotations(read, model, at) for model, at in read.by("generator_2").items()]


def _annotations(read: Rows, model: str, at: list[int]) -> AlpacaAnnotations:
    rows = [read.rows[i] for i in at]
    baseline_length, model_length = (
        np.array([len(read.get(i, key, str)) for i in at], dtype=float) for key in ("output_1", "output_2")
    )
    shares = np.array([_share(read, i) for i in at], dtype=float)
    if np.isnan(shares).all():
        raise DataError(f"{read.path}: no row of {shown(model)} has a preference")
    index, switched = _column(rows, "index"), _column(rows, "is_switched_outputs")
    if index is not None and len(set(index)) < len(index):
        raise DataError(
            f"{read.path}: {shown(model)} has two rows with index {Counter(index).most_common(1)[0][0]}; keep one"
        )
    return AlpacaAnnotations(
        path=read.path,
        model=model,
        baseline=read.same(at, "generator_1"),
        judge=read.same(at, "annotator", default="unnamed judge"),
        prompts=numbered(read.get(i, "instruction", str) for i in at),
        shares=shares,
        baseline_length=baseline_length,
        model_length=model_length,
        index=None if index is None else np.array(index, dtype=int),
        model_first=None if switched is None else np.array(switched, dtype=bool),
        rows=rows,
    )


def _share(read: Rows, i: int) -> float:
    try:
        return preference_share(read.get(i, "preference", int, float, NoneType))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{read.where(i)}: {error}") from error


def _column(rows: list[Row], key: str) -> list[Any] | None:
    """A column that every row has as a whole number or truth value, or None."""
    values = [row.get(key) for row in rows]
    return values if all(isinstance(v, int) and abs(v) < 2**31 for v in values) else None


def read_judgments(read: Rows, notes: list[str]) -> list[ArenaJudgments]:
    """Judgments by model, with the style counts of ``model_answer/`` beside ``model_judgment/`` where it is there.

    Raises:
        DataError: a key is missing or of another kind, a question was judged twice, or rows have several judges.
    """
    return [_judgments(read, model, at, notes) for model, at in read.by("model").items()]


def _judgments(read: Rows, model: str, at: list[int], notes: list[str]) -> ArenaJudgments:
    seen: dict[str, int] = {}
    games, rounds, missing = [], [], 0
    for i in at:
        question = read.get(i, "question_id", str)
        if question in seen:
            raise DataError(
                f"{read.where(i)}: question {shown(question)} was judged in row {seen[question]} already; keep one"
            )
        seen[question] = i
        for round_, verdict in enumerate(_verdicts(read, i)):
            decided = outcome(model, question, verdict, round_=round_)
            if decided is None:
                missing += 1
            else:
                games.append(decided)
                rounds.append(round_)
    if not games:
        raise DataError(f"{read.path}: no game of {shown(model)} has one of the verdicts {', '.join(VERDICTS)}")
    baseline = read.same(at, "baseline", default=BASELINE)
    answers = read.path.resolve().parent.parent.parent / "model_answer"
    return ArenaJudgments(
        path=read.path,
        model=model,
        baseline=baseline,
        judge=read.same(at, "judge", default=read.path.parent.name),
        games=games,
        rounds=rounds,
        missing=missing,
        model_style=_style_of(model, answers, notes),
        baseline_style=_style_of(baseline, answers, notes),
    )


def _verdicts(read: Rows, i: int) -> list[str | None]:
    games = read.get(i, "games", list)
    if len(games) not in (1, 2) or not all(isinstance(g, dict) and "score" in g for g in games):
        raise DataError(f"{read.where(i)}: games must be one or two objects with a 'score', got {shown(games)}")
    return [checked(g["score"], f"{read.where(i)}: score", str, NoneType) for g in games]


def _style_of(model: str, answers: Path, notes: list[str]) -> dict[str, np.ndarray] | None:
    """Of the file whose rows name the model, or whose own name does; no path is made from what a file says."""
    for path in sorted(answers.glob("*.jsonl")):
        if _answering(path) == model:
            read = read_rows(path)
            notes += read.notes
            return read_style(read, notes)
    return None


def _answering(path: Path) -> str:
    """The model that a file of answers is of, by its first row or else its name."""
    with path.open("rb") as file:
        try:
            row = parse_json(file.readline())
            return str(next(row[key] for key in ArenaHard.model_keys if key in row))
        except (ValueError, TypeError, StopIteration):
            return path.stem


def read_style(read: Rows, notes: list[str]) -> dict[str, np.ndarray] | None:
    """Token, header, list and bold counts of each answer (``STYLE``); None, with a note, when they are not to be had.

    The official counts (``conv_metadata``, or ``metadata`` since version 2) are taken as they are; without them
    markdown is counted in the text, and ``token_len`` must be there.
    """
    found = {}
    for i in range(len(read.rows)):
        try:
            question, text = ArenaHard().answer(read, i)
            found[question] = _style(read, i, text)
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            notes.append(
                f"{read.where(i)} has no usable token_len or text ({error!r}): no style control for this model."
            )
            return None
    return found


def _style(read: Rows, i: int, text: str) -> np.ndarray:
    row = read.rows[i]
    counts = row.get("conv_metadata") or row.get("metadata") or {}
    tokens = counts["token_len"] if "token_len" in counts else arena_turn(read, i)["token_len"]
    if "header_count" in counts:
        kinds = [counts[key] for key in ("header_count", "list_count", "bold_count")]
        rest = [sum(x.values()) if isinstance(x, Mapping) else x for x in kinds]
    else:
        rest = [markdown_counts(text)[key] for key in STYLE[1:]]
    style = np.array([float(tokens), *map(float, rest)])
    if not (np.isfinite(style) & (style >= 0)).all():
        raise ValueError(f"counts {style.tolist()}")
    return style


# --- AlpacaEval's extra files


def read_difficulties(path: Path) -> dict[int, float]:
    """The official ``instruction_difficulty.csv``: place in the benchmark → γ.

    Raises:
        DataError: the file is missing, or a row is not an index and a number.
    """
    read = _csv(path, ["instruction_difficulty"])
    key = next(iter(read.rows[0]))
    return {int(_number(read, i, key)): _number(read, i, "instruction_difficulty") for i in range(len(read.rows))}


def read_gamed(path: Path) -> GamedBaselines:
    """The official ``df_gamed.csv``; its preferences are in [0, 1].

    Raises:
        DataError: the file is missing, has other columns, or a value is not a number in range.
    """
    read = _csv(path, ["preference", "std_delta_len", "instruction_difficulty"])
    at = range(len(read.rows))
    shares = [_number(read, i, "preference") if read.rows[i]["preference"] else math.nan for i in at]
    for i, share in enumerate(shares):
        if share < 0 or share > 1:
            raise DataError(
                f"{read.where(i)}: preference {share:g} is not in [0, 1]; is this the official df_gamed.csv?"
            )
    length, difficulty = (
        np.array([_number(read, i, key) for i in at]) for key in ("std_delta_len", "instruction_difficulty")
    )
    return GamedBaselines(shares=np.array(shares), std_delta_len=length, difficulty=difficulty)


def _csv(path: Path, needed: list[str]) -> Rows:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    has = list(reader.fieldnames or [])
    if missing := [name for name in needed if name not in has]:
        raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, has))}")
    if not rows:
        raise DataError(f"{path}: no rows")
    return Rows(path=path, rows=rows)


def _number(read: Rows, i: int, key: str) -> float:
    try:
        value = float(read.rows[i][key])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{read.where(i)}: {key} is {shown(read.rows[i][key])}, expected a number")
    return value
