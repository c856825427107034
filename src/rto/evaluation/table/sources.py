"""The rows of a comparison, gathered from what a user names: run folders, judgments, folders with such files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rto.data.errors import DataError
from rto.evaluation.benchmarks.formats import numbered
from rto.evaluation.benchmarks.judgments import AlpacaAnnotations, ArenaJudgments, read_annotations, read_judgments
from rto.evaluation.benchmarks.types import Key
from rto.files import Row, checked, parse_json, read_rows, shown
from rto.ranges import is_finite
from rto.report.table import measure


@dataclass(frozen=True, kw_only=True)
class RunMethod:
    """One method of an `rto run` folder: its row of results.json, and its gold reward of each prompt."""

    run: Path
    method: str
    gold_name: str
    baseline: str | None
    summary: Row
    gold: dict[Key, float]


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
        return [Entry(model=a.model, source=path, arena=a) for a in read_judgments(read, notes)]
    if "preference" in read.rows[0]:
        return [Entry(model=a.model, source=path, alpaca=a) for a in read_annotations(read)]
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


def read_run_methods(folder: Path, notes: list[str]) -> list[RunMethod]:
    """Methods of an `rto run` folder; what results.json lost is taken from completions.jsonl.

    Raises:
        DataError: a row of completions.jsonl cannot be used.
    """
    results, completions = folder / "evaluation" / "results.json", folder / "evaluation" / "completions.jsonl"
    told = _results(results, notes)
    what = measure(told.get("gold"))
    gold: dict[str, dict[Key, float]] = {}
    if completions.is_file():
        read = read_rows(completions)
        notes += read.notes
        for i, prompt in enumerate(numbered(read.get(i, "prompt", str) for i in range(len(read.rows)))):
            for method, value in read.get(i, "gold", dict).items():
                where = f"{read.where(i)}: the {what} of {shown(method)}"
                if not is_finite(checked(value, where, int, float)):
                    raise DataError(f"{where} is {value}; leave it out")
                gold.setdefault(method, {})[prompt] = float(value)
    methods: Row = told.get("methods") or {}
    if methods and not gold:
        notes.append(f"{completions}: not there; the {what} of {folder.name} cannot be tested, only shown.")
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
        results = parse_json(path.read_bytes())
        methods = results.get("methods", {}) if isinstance(results, dict) else None
        if not isinstance(methods, dict) or not all(isinstance(m, dict) for m in methods.values()):
            raise ValueError("not an object with methods")
        return results
    except ValueError as error:
        notes.append(
            f"{path}: not readable ({error}); gold rewards are taken from completions.jsonl, the rest is lost."
        )
        return {}
