"""Judgments as other tools and runs leave them: AlpacaEval and Arena-Hard files, run folders, half-written ones too.

What a file says is data: names and texts are kept as they are and nothing in them is interpreted. A file is never
changed. A file that a kill cut short gives its whole rows, and a note that says what was not used.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rto.data.errors import DataError
from rto.evaluation.arena_hard import BASELINE, STYLE, VERDICTS, Game, game, markdown_counts
from rto.evaluation.length_control import GamedBaselines

Row = dict[str, Any]
Prompt = tuple[str, int]
"""A prompt's text or id, and which time it occurs: benchmarks may ask the same thing twice."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Whole rows of a file, and what could not be used."""

    path: Path
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


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
    prompts: tuple[Prompt, ...]
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
    games: list[Game]
    rounds: list[int]
    missing: int
    model_style: dict[str, np.ndarray] | None
    baseline_style: dict[str, np.ndarray] | None


@dataclass(frozen=True, kw_only=True)
class RunMethod:
    """One method of an `rto run` folder: its row of results.json, and its gold reward of each prompt."""

    run: Path
    method: str
    gold_name: str
    baseline: str | None
    summary: Row
    gold: dict[Prompt, float]


@dataclass(kw_only=True)
class Entry:
    """One row of the comparison."""

    model: str
    source: Path
    alpaca: AlpacaAnnotations | None = None
    arena: ArenaJudgments | None = None
    run: RunMethod | None = None


def read_sources(paths: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """The rows of a comparison, and notes about what was left out.

    A source is an `rto run` folder, an annotations or judgments file, or a folder that holds such files. Official
    files that name the same model give one row, whichever source they came from; methods of a run stay that run's.

    Raises:
        DataError: a source does not exist, holds nothing to compare, or has a row that cannot be used.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found = _read_source(path, notes)
        if not found:
            raise DataError(
                f"{path}: nothing to compare here; expected evaluation/results.json or completions.jsonl of "
                "`rto run`, annotations*.json of AlpacaEval, or model_judgment/JUDGE/MODEL.jsonl of Arena-Hard"
            )
        for entry in found:
            if not _merged(entries, entry):
                entries.append(entry)
    _tell_apart(entries)
    return entries, notes


def _read_source(path: Path, notes: list[str]) -> list[Entry]:
    if path.is_file():
        return _read_file(path, notes)
    found = [Entry(model=m.method, source=path, run=m) for m in read_run_methods(path, notes)]
    files = [p for p in sorted(path.rglob("annotations*.json*")) if p.suffix in (".json", ".jsonl")]
    for file in [*files, *sorted(path.rglob("model_judgment/*/*.jsonl"))]:
        found += _read_file(file, notes)
    return found


def _read_file(path: Path, notes: list[str]) -> list[Entry]:
    read = read_rows(path)
    notes += read.notes
    if not read.rows:
        raise DataError(f"{path}: no rows")
    if "games" in read.rows[0]:
        arena = read_arena(read, notes)
        return [Entry(model=a.model, source=path, arena=a) for a in arena]
    if "preference" in read.rows[0]:
        return [Entry(model=a.model, source=path, alpaca=a) for a in read_alpaca(read)]
    raise DataError(
        f"{path}: row 0 has keys {', '.join(map(repr, read.rows[0]))}; expected 'preference' (AlpacaEval annotations) "
        "or 'games' (Arena-Hard judgments)"
    )


def _merged(entries: list[Entry], new: Entry) -> bool:
    """Put official results beside those of the same model, if it has none of that kind yet."""
    if new.run is not None:
        return False
    for old in entries:
        free = (old.alpaca is None or new.alpaca is None) and (old.arena is None or new.arena is None)
        if old.model == new.model and old.run is None and free:
            old.alpaca, old.arena = old.alpaca or new.alpaca, old.arena or new.arena
            return True
    return False


def _tell_apart(entries: list[Entry]) -> None:
    """Rows of one name get their source's, then a number."""
    for name in (lambda e, i: f"{e.model} ({e.source.resolve().name})", lambda e, i: f"{e.model} #{i}"):
        counts = Counter(e.model for e in entries)
        seen: Counter[str] = Counter()
        for entry in entries:
            if counts[entry.model] > 1:
                seen[old := entry.model] += 1
                entry.model = name(entry, seen[old])


# --- JSON


def read_rows(path: Path) -> Rows:
    """Rows of a JSON list or of JSON lines; whole rows only, when the file ends within one.

    Raises:
        DataError: the file has a row that is not a JSON object and is not the cut end of it.
    """
    data, notes = path.read_bytes(), []
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise DataError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        text = data[: error.start].decode()  # cut within a character: the row it stands in is cut too
    rows, rest = (_list_rows if text.lstrip().startswith("[") else _line_rows)(text, path)
    if rest:
        notes.append(
            f"{path}: cut off in row {len(rows)}; the {len(rows):,} whole rows before it are used, the last "
            f"{len(rest.encode()):,} bytes are not. Finish or rerun what wrote it for the rest."
        )
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {i} is not a JSON object but {_shown(row)}")
    return Rows(path=path, rows=rows, notes=notes)


def _line_rows(text: str, path: Path) -> tuple[list[Any], str]:
    """Rows, and the cut end. A row ends at "\\n" only: text may hold other line separators."""
    *lines, last = text.split("\n")
    rows = []
    for i, line in enumerate(lines):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: row {i} (line {i + 1}) is not JSON: {error}; repair or delete it") from error
    if last.strip():
        try:
            rows.append(json.loads(last))
        except json.JSONDecodeError:
            return rows, last
    return rows, ""


def _list_rows(text: str, path: Path) -> tuple[list[Any], str]:
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        whole = error
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    rows: list[Any] = []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            ran_out = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
            if text.rstrip().endswith("]") and not ran_out:  # the list was closed: this is damage, not a cut
                raise DataError(f"{path}: row {len(rows)} is not JSON: {whole}; repair or delete it") from error
            return rows, text[at:] or "["
        rows.append(row)


def _get(row: Row, key: str, kind: type | tuple[type, ...], path: Path, i: int) -> Any:
    if key not in row:
        raise DataError(f"{path}: row {i} has no key {key!r}; it has {', '.join(map(repr, row))}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{path}: row {i}: {key} is {_shown(value)}, expected {names}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# --- AlpacaEval


def read_alpaca(read: Rows) -> list[AlpacaAnnotations]:
    """Annotations by model (``generator_2``).

    Raises:
        DataError: a key is missing or of another kind; a preference is out of range; one model has two judges or
            baselines, or two rows with the same ``index``.
    """
    by_model: dict[str, list[int]] = {}
    for i, row in enumerate(read.rows):
        by_model.setdefault(_get(row, "generator_2", str, read.path, i), []).append(i)
    return [_alpaca(read, model, at) for model, at in by_model.items()]


def _alpaca(read: Rows, model: str, at: list[int]) -> AlpacaAnnotations:
    path, rows = read.path, [read.rows[i] for i in at]
    shares, lengths = [], []
    for i, row in zip(at, rows):
        shares.append(_share(row, path, i))
        lengths.append([len(_get(row, key, str, path, i)) for key in ("output_1", "output_2")])
    lengths_of = np.array(lengths, dtype=float)
    index = _column(rows, "index")
    if index is not None and len(set(index)) < len(index):
        raise DataError(f"{path}: {model!r} has two rows with index {Counter(index).most_common(1)[0][0]}; keep one")
    switched = _column(rows, "is_switched_outputs")
    return AlpacaAnnotations(
        path=path,
        model=model,
        baseline=_same(rows, at, "generator_1", path),
        judge=_same(rows, at, "annotator", path, default="unnamed judge"),
        prompts=numbered(_get(row, "instruction", str, path, i) for i, row in zip(at, rows)),
        shares=np.array(shares, dtype=float),
        baseline_length=lengths_of[:, 0],
        model_length=lengths_of[:, 1],
        index=None if index is None else np.array(index, dtype=int),
        model_first=None if switched is None else np.array(switched, dtype=bool),
        rows=rows,
    )


def _share(row: Row, path: Path, i: int) -> float:
    preference = _get(row, "preference", (int, float, type(None)), path, i)
    if preference is None or math.isnan(preference):
        return math.nan
    if preference == 0:
        return 0.5
    if not 1 <= preference <= 2:
        raise DataError(
            f"{path}: row {i}: preference {preference:g} is not in [1, 2] (2: the model wins; 1.5 or 0: a draw; "
            "null: no verdict)"
        )
    return preference - 1


def _column(rows: list[Row], key: str) -> list[Any] | None:
    """A column that every row has as a whole number or truth value, or None."""
    values = [row.get(key) for row in rows]
    return values if all(isinstance(v, int) for v in values) else None


def _same(rows: list[Row], at: list[int], key: str, path: Path, default: str | None = None) -> str:
    """The one value that a key has in all rows."""
    if default is not None and key not in rows[0]:
        return default
    first = _get(rows[0], key, str, path, at[0])
    for i, row in zip(at, rows):
        if (value := _get(row, key, str, path, i)) != first:
            raise DataError(
                f"{path}: row {i}: {key} is {_shown(value)}, but {_shown(first)} in row {at[0]} of the same model; "
                "keep judgments of different kinds in different files"
            )
    return first


def numbered(prompts: Any) -> tuple[Prompt, ...]:
    """Each prompt with how often it occurred before."""
    seen: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        out.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return tuple(out)


def read_difficulties(path: Path) -> dict[int, float]:
    """The official ``instruction_difficulty.csv``: place in the benchmark → γ.

    Raises:
        DataError: the file is missing, or a row is not an index and a number.
    """
    rows = _csv(path, ["instruction_difficulty"])
    key = next(iter(rows[0]))
    return {
        int(_number(row, key, path, i)): _number(row, "instruction_difficulty", path, i) for i, row in enumerate(rows)
    }


def read_gamed(path: Path) -> GamedBaselines:
    """The official ``df_gamed.csv``; its preferences are in [0, 1].

    Raises:
        DataError: the file is missing, has other columns, or a value is not a number in range.
    """
    rows = _csv(path, ["preference", "std_delta_len", "instruction_difficulty"])
    shares = [_number(row, "preference", path, i) if row["preference"] else math.nan for i, row in enumerate(rows)]
    for i, share in enumerate(shares):
        if share < 0 or share > 1:
            raise DataError(
                f"{path}: row {i}: preference {share:g} is not in [0, 1]; is this the official df_gamed.csv?"
            )
    length, difficulty = (
        np.array([_number(row, key, path, i) for i, row in enumerate(rows)])
        for key in ("std_delta_len", "instruction_difficulty")
    )
    return GamedBaselines(shares=np.array(shares), std_delta_len=length, difficulty=difficulty)


def _csv(path: Path, needed: list[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    missing = [name for name in needed if name not in (reader.fieldnames or [])]
    if missing:
        has = ", ".join(map(repr, reader.fieldnames or []))
        raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {has}")
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _number(row: dict[str, str], key: str, path: Path, i: int) -> float:
    try:
        value = float(row[key])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: row {i}: {key} is {_shown(row[key])}, expected a number")
    return value


# --- Arena-Hard


def read_arena(read: Rows, notes: list[str]) -> list[ArenaJudgments]:
    """Judgments by model, with the style counts of ``model_answer/`` beside ``model_judgment/`` where it is there.

    Raises:
        DataError: a key is missing or of another kind, a question was judged twice, or rows have several judges.
    """
    by_model: dict[str, list[int]] = {}
    for i, row in enumerate(read.rows):
        by_model.setdefault(_get(row, "model", str, read.path, i), []).append(i)
    return [_arena(read, model, at, notes) for model, at in by_model.items()]


def _arena(read: Rows, model: str, at: list[int], notes: list[str]) -> ArenaJudgments:
    path, rows = read.path, [read.rows[i] for i in at]
    seen: dict[str, int] = {}
    games, rounds, missing = [], [], 0
    for i, row in zip(at, rows):
        question = _get(row, "question_id", str, path, i)
        if question in seen:
            raise DataError(
                f"{path}: row {i}: question {question!r} was judged in row {seen[question]} already; keep one"
            )
        seen[question] = i
        for round_, played in enumerate(_games(row, path, i)):
            decided = game(model, question, played["score"], round_=round_)
            if decided is None:
                missing += 1
            else:
                games.append(decided)
                rounds.append(round_)
    if not games:
        raise DataError(f"{path}: no game of {model!r} has one of the verdicts {', '.join(VERDICTS)}")
    baseline = _same(rows, at, "baseline", path, default=BASELINE)
    answers = path.resolve().parent.parent.parent / "model_answer"
    return ArenaJudgments(
        path=path,
        model=model,
        baseline=baseline,
        judge=_same(rows, at, "judge", path, default=path.parent.name),
        games=games,
        rounds=rounds,
        missing=missing,
        model_style=_style_of(model, answers, notes),
        baseline_style=_style_of(baseline, answers, notes),
    )


def _games(row: Row, path: Path, i: int) -> list[Row]:
    games = _get(row, "games", list, path, i)
    if len(games) not in (1, 2) or not all(isinstance(g, dict) and "score" in g for g in games):
        raise DataError(f"{path}: row {i}: games must be one or two objects with a 'score', got {_shown(games)}")
    for g in games:
        if g["score"] is not None and not isinstance(g["score"], str):
            raise DataError(f"{path}: row {i}: score is {_shown(g['score'])}, expected a verdict or null")
    return games


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
            return str(json.loads(file.readline())["model_id"])
        except (ValueError, KeyError, TypeError):
            return path.stem


def read_style(read: Rows, notes: list[str]) -> dict[str, np.ndarray] | None:
    """Token, header, list and bold counts of each answer (``STYLE``); None, with a note, when they are not to be had.

    ``conv_metadata`` is taken as it is; without it markdown is counted in the text, and ``token_len`` must be there.
    """
    found = {}
    for i, row in enumerate(read.rows):
        try:
            found[_get(row, "question_id", str, read.path, i)] = _style(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            notes.append(
                f"{read.path}: row {i} has no usable token_len or text ({error!r}): no style control for this model."
            )
            return None
    return found


def _style(row: Row) -> np.ndarray:
    turn = row["choices"][0]["turns"][0]
    counts = row.get("conv_metadata") or {}
    tokens = counts.get("token_len", turn.get("token_len"))
    if "header_count" in counts:
        kinds = [counts[key] for key in ("header_count", "list_count", "bold_count")]
        rest = [sum(x.values()) if isinstance(x, Mapping) else x for x in kinds]
    else:
        content = turn["content"]
        text = content if isinstance(content, str) else content["answer"]
        rest = [markdown_counts(text)[key] for key in STYLE[1:]]
    return np.array([float(tokens), *map(float, rest)])


# --- run folders


def read_run_methods(folder: Path, notes: list[str]) -> list[RunMethod]:
    """Methods of an `rto run` folder; what results.json lost is taken from completions.jsonl.

    Raises:
        DataError: a row of completions.jsonl cannot be used.
    """
    results, completions = folder / "evaluation" / "results.json", folder / "evaluation" / "completions.jsonl"
    told = _results(results, notes)
    gold: dict[str, dict[Prompt, float]] = {}
    if completions.is_file():
        read = read_rows(completions)
        notes += read.notes
        prompts = numbered(_get(row, "prompt", str, completions, i) for i, row in enumerate(read.rows))
        for i, (prompt, row) in enumerate(zip(prompts, read.rows)):
            for method, value in _get(row, "gold", dict, completions, i).items():
                if not math.isfinite(_get(row["gold"], method, (int, float), completions, i)):
                    raise DataError(f"{completions}: row {i}: the gold reward of {method!r} is {value}; leave it out")
                gold.setdefault(method, {})[prompt] = float(value)
    methods: Row = told.get("methods") or {}
    if methods and not gold:
        notes.append(f"{completions}: not there; the gold rewards of {folder.name} cannot be tested, only shown.")
    return [
        RunMethod(
            run=folder,
            method=method,
            gold_name=told.get("gold") or "gold",
            baseline=told.get("baseline"),
            summary=methods.get(method) or {},
            gold=gold.get(method) or {},
        )
        for method in [*methods, *(m for m in gold if m not in methods)]
    ]


def _results(path: Path, notes: list[str]) -> Row:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes())
        if not isinstance(results, dict) or not all(isinstance(m, dict) for m in results.get("methods", {}).values()):
            raise ValueError("not an object with methods")
        return results
    except ValueError as error:
        notes.append(
            f"{path}: not readable ({error}); gold rewards are taken from completions.jsonl, the rest is lost."
        )
        return {}
