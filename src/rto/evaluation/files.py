"""The benchmarks' own files, read and written: prompts, model answers, and answers side by side.

AlpacaEval keeps JSON lists (``instruction, output, generator, …``), Arena-Hard v0.1 JSON lines in one folder
(``question.jsonl``, ``model_answer/MODEL.jsonl``, ``model_judgment/JUDGE/MODEL.jsonl``).
Sources: github.com/tatsu-lab/alpaca_eval; github.com/lmarena/arena-hard-auto at v0.1.
"""

import fcntl
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from rto.data.formats import DataError
from rto.trainers.base import write_atomically

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Key = tuple[str, int]
"""What matches answers of two models: a question id, or an instruction and which occurrence of it this is."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of a benchmark."""

    key: Key
    text: str
    row: Row = field(default_factory=dict)
    """The prompt file's row."""
    messages: list[Row] | None = None
    """The prompt as a conversation, where it is given as one."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote on one question."""

    text: str
    tokens: int
    """Tokens of the model's own tokenizer, EOS included."""
    ended: bool
    """By itself, not at the length limit."""


@dataclass(frozen=True, kw_only=True)
class Battle:
    """One question with two answers to be judged."""

    question: Question
    baseline: str
    answer: str
    columns: Row = field(default_factory=dict)
    """What else a reward function may ask for."""


@runtime_checkable
class Benchmark(Protocol):
    """A file format with its protocol's defaults."""

    name: ClassVar[str]
    temperature: ClassVar[float]
    max_new_tokens: ClassVar[int]
    hub: ClassVar[tuple[str, str]]

    def question(self, row: Row, where: str) -> Question:
        """One row of a prompt file."""

    def answers_file(self, folder: Path, model: str) -> Path:
        """Where the answers of a model belong in an output folder."""

    def prepare(self, folder: Path, questions: Sequence[Question]) -> None:
        """Write what else an output folder holds."""

    def answers(self, model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
        """The text of an answers file."""


@dataclass(frozen=True)
class AlpacaEval:
    """``FOLDER/model_outputs.json``, a list of ``instruction, output, generator, dataset, datasplit``; T = 0.7."""

    name: ClassVar[str] = "alpaca_eval"
    temperature: ClassVar[float] = 0.7
    max_new_tokens: ClassVar[int] = 2048
    hub: ClassVar[tuple[str, str]] = ("tatsu-lab/alpaca_eval", "alpaca_eval.json")

    def question(self, row: Row, where: str) -> Question:
        """``instruction`` (with ``input`` after an empty line, if there is one) or ``prompt``."""
        text = _text(row, ("instruction", "prompt"), where)
        extra = row.get("input") or ""
        text = f"{text}\n\n{extra}" if extra else text
        return Question(key=(text, 0), text=text, row=row)

    def answers_file(self, folder: Path, model: str) -> Path:
        """As in the official ``results/MODEL``."""
        return folder / "model_outputs.json"

    def prepare(self, folder: Path, questions: Sequence[Question]) -> None:
        """Nothing: the instructions stand beside the answers."""
        folder.mkdir(parents=True, exist_ok=True)

    def answers(self, model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
        """A JSON list in the order of the prompts."""
        rows = [
            {
                "instruction": q.text,
                "output": a.text,
                "generator": model,
                "dataset": q.row.get("dataset") or q.row.get("source") or "custom",
                "datasplit": q.row.get("datasplit") or "eval",
            }
            for q, a in zip(questions, answers, strict=True)
        ]
        return json.dumps(rows, indent=2) + "\n"


@dataclass(frozen=True)
class ArenaHard:
    """``FOLDER/question.jsonl`` and ``FOLDER/model_answer/MODEL.jsonl`` of Arena-Hard v0.1; greedy.

    ``token_len`` is counted with the model's own tokenizer, where the official script has OpenAI's.
    """

    name: ClassVar[str] = "arena_hard"
    temperature: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 4096
    hub: ClassVar[tuple[str, str]] = ("lmarena-ai/arena-hard-auto", "data/arena-hard-v0.1/question.jsonl")

    def question(self, row: Row, where: str) -> Question:
        """``question_id`` (or ``uid``) with ``turns`` of one turn, or ``prompt``."""
        name = row.get("question_id") or row.get("uid")
        if not isinstance(name, str):
            raise DataError(f"{where}: no 'question_id': Arena-Hard tells questions by it")
        if "turns" in row:
            turns = row["turns"]
            if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
                raise DataError(f"{where}: 'turns' must be a list of one turn {{'content': text}}")
            return Question(key=(name, 0), text=_text(turns[0], ("content",), where), row=row)
        return Question(key=(name, 0), text=_text(row, ("prompt",), where), row=row)

    def answers_file(self, folder: Path, model: str) -> Path:
        """As in the official ``data/arena-hard-v0.1``."""
        return folder / "model_answer" / f"{model}.jsonl"

    def prepare(self, folder: Path, questions: Sequence[Question]) -> None:
        """Write the questions where the judge looks for them.

        Raises:
            DataError: the folder holds other questions.
        """
        path = folder / "question.jsonl"
        (folder / "model_answer").mkdir(parents=True, exist_ok=True)
        rows = [
            {k: v for k, v in q.row.items() if k not in ("prompt", "uid", "turns")}
            | {"question_id": q.key[0], "turns": [{"content": q.text}]}
            for q in questions
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            known = {q.key: q.text for q in read_questions(path, self)}
            if known != {q.key: q.text for q in questions}:
                raise DataError(f"{path} holds other questions than the prompts given: choose another output folder")
            return
        write_atomically(path, text)

    def answers(self, model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
        """JSON lines in the order of the questions."""
        rows = [
            {
                "question_id": q.key[0],
                "answer_id": hashlib.sha256("\0".join([model, q.key[0], a.text]).encode()).hexdigest()[:22],
                "model_id": model,
                "choices": [{"index": 0, "turns": [{"content": a.text, "token_len": a.tokens}]}],
                "tstamp": time.time(),
            }
            for q, a in zip(questions, answers, strict=True)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)


BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (AlpacaEval(), ArenaHard())}


def benchmark_of(path: Path) -> Benchmark:
    """The format that a file of prompts asks for: Arena-Hard where rows have a ``question_id``, else AlpacaEval.

    Raises:
        DataError: the file cannot be read.
    """
    first = read_rows(path)[0]
    return BENCHMARKS["arena_hard" if {"question_id", "uid"} & set(first) else "alpaca_eval"]


def read_questions(path: Path, benchmark: Benchmark) -> list[Question]:
    """Prompts of a benchmark from a file; one that occurs twice is told apart by its occurrence.

    Raises:
        DataError: a row has no prompt, or a question id occurs twice; the message names file and row.
    """
    seen: Counter[str] = Counter()
    questions = []
    for i, row in enumerate(read_rows(path)):
        question = benchmark.question(row, f"{path}, row {i}")
        name = question.key[0]
        if seen[name] and benchmark.name == "arena_hard":
            raise DataError(f"{path}, row {i}: question {name} occurs twice: remove one of the rows")
        questions.append(Question(key=(name, seen[name]), text=question.text, row=row))
        seen[name] += 1
    return questions


def read_battles(answers: Path, baseline: Path, questions: Path | None = None) -> tuple[str, str, list[Battle]]:
    """The model's name, the baseline's, and the questions that the model answered with both answers.

    Args:
        answers: an answers file of either benchmark.
        baseline: the baseline's, in the same format.
        questions: Arena-Hard's ``question.jsonl``; None looks for it in the folder of the answers.

    Raises:
        DataError: the formats differ, or the baseline lacks an answer; the message names file and row.
    """
    ours, theirs = read_rows(answers), read_rows(baseline)
    if _of_arena(ours[0]) != _of_arena(theirs[0]):
        raise DataError(f"{answers} and {baseline} are of two formats, one AlpacaEval's and one Arena-Hard's")
    if _of_arena(ours[0]):
        return _arena_battles(answers, ours, baseline, theirs, questions or answers.parent.parent / "question.jsonl")
    return _alpaca_battles(answers, ours, baseline, theirs)


def answers_benchmark(path: Path) -> Benchmark:
    """The format of an answers file."""
    return BENCHMARKS["arena_hard" if _of_arena(read_rows(path)[0]) else "alpaca_eval"]


def _of_arena(row: Row) -> bool:
    return "choices" in row or "messages" in row


def _alpaca_battles(
    answers: Path, ours: list[Row], baseline: Path, theirs: list[Row]
) -> tuple[str, str, list[Battle]]:
    known = {key: row for key, _, row in _alpaca_rows(baseline, theirs)}
    battles = []
    for key, i, row in _alpaca_rows(answers, ours):
        if key not in known:
            raise DataError(f"{answers}, row {i}: {baseline} has no answer to {key[0][:80]!r}")
        question = Question(key=key, text=row["instruction"], row=row)
        columns = {k: v for k, v in row.items() if k not in ("instruction", "output", "generator")}
        battles.append(Battle(question=question, baseline=known[key]["output"], answer=row["output"], columns=columns))
    _tell_left(baseline, len(known) - len(battles), answers)
    return _one_name(answers, ours, "generator"), _one_name(baseline, theirs, "generator"), battles


def _alpaca_rows(path: Path, rows: list[Row]) -> list[tuple[Key, int, Row]]:
    seen: Counter[str] = Counter()
    keyed = []
    for i, row in enumerate(rows):
        for name in ("instruction", "output", "generator"):
            if not isinstance(row.get(name), str):
                raise DataError(f"{path}, row {i}: {name!r} must be text: AlpacaEval's format asks for it")
        keyed.append(((row["instruction"], seen[row["instruction"]]), i, row))
        seen[row["instruction"]] += 1
    return keyed


def _arena_battles(
    answers: Path, ours: list[Row], baseline: Path, theirs: list[Row], questions: Path
) -> tuple[str, str, list[Battle]]:
    asked = {q.key[0]: q for q in read_questions(questions, BENCHMARKS["arena_hard"])}
    mine, known = _arena_rows(answers, ours), _arena_rows(baseline, theirs)
    battles = []
    for i, (name, text) in enumerate(mine.items()):
        for where, there in ((questions, asked), (baseline, known)):
            if name not in there:
                raise DataError(f"{answers}, row {i}: {where} has no question {name}")
        battles.append(Battle(question=asked[name], baseline=known[name], answer=text))
    _tell_left(baseline, len(known) - len(battles), answers)
    return _one_name(answers, ours, "model_id", "model"), _one_name(baseline, theirs, "model_id", "model"), battles


def _arena_rows(path: Path, rows: list[Row]) -> dict[str, str]:
    found: dict[str, str] = {}
    for i, row in enumerate(rows):
        try:
            if "messages" in row:  # as the files are hosted since version 2 of the benchmark
                name, text = row["uid"], row["messages"][-1]["content"]["answer"]
            else:
                name, text = row["question_id"], row["choices"][0]["turns"][0]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{path}, row {i}: not an Arena-Hard answer: {type(error).__name__} {error}") from error
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{path}, row {i}: question_id and content must be text")
        if name in found:
            raise DataError(f"{path}, row {i}: a second answer to question {name}: remove one of the rows")
        found[name] = text
    return found


def _one_name(path: Path, rows: list[Row], *columns: str) -> str:
    names = {next((row[column] for column in columns if column in row), None) for row in rows}
    if len(names) != 1 or not isinstance(name := names.pop(), str):
        raise DataError(f"{path}: {' or '.join(map(repr, columns))} must name one model, the same in every row")
    return name


def _tell_left(baseline: Path, left: int, answers: Path) -> None:
    if left > 0:
        logger.warning("%s has %d answers to questions that %s lacks; these are not judged", baseline, left, answers)


def _text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The first of the named columns as text; a conversation of one user turn counts as text."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "user":
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        expected = " or ".join(map(repr, names))
        raise DataError(f"{where}: {expected} must be non-empty text (or one user message)")
    if re.search("[\ud800-\udfff]", value):
        raise DataError(f"{where}: holds half of a surrogate pair, which is no text: repair the file's encoding")
    return value


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON list or a JSON-lines file, compressed (.gz, .xz) or not.

    Raises:
        DataError: there is no such file, no row, or a row that is no JSON object; the message names file and row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            text = file.read()
        rows = json.loads(text) if text.lstrip()[:1] == "[" else _lines(text)
    except (UnicodeDecodeError, EOFError, OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON or JSON lines: {error}") from error
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: not a JSON object")
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _lines(text: str) -> list[Any]:
    """JSON lines, split at line feeds only: text may hold other line separators."""
    rows = []
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"line {i + 1}: {error.msg}", error.doc, error.pos) from error
    return rows


class Journal:
    """Rows on their way to a results file: appended whole, flushed to disk, taken up again after a kill.

    The first line holds the settings that the rows come from; a journal of other settings is refused. A last line
    that a kill cut off is set aside in ``PATH.cut``. One process at a time.

    Raises:
        DataError: other settings, a damaged line, or another process that is writing.
    """

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise DataError(
                f"{path}: another process is writing here: wait for it, or choose another output"
            ) from error
        try:
            self._take_up(settings)
        except DataError:
            self.close()
            raise

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; they are on disk when this returns."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        while data:  # a write may be short where the disk is nearly full
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.rows.extend(rows)

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take_up(self, settings: Row) -> None:
        data = self.path.read_bytes()
        whole, cut = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        if cut:
            aside = self.path.with_name(self.path.name + ".cut")
            with aside.open("ab") as file:
                file.write(cut + b"\n")
            os.ftruncate(self._file, len(whole))
            logger.warning("%s: the last line was cut off after %d bytes; set aside in %s", self.path, len(cut), aside)
        rows = []
        for i, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{self.path}, line {i + 1}: damaged ({error}): remove this line to go on") from error
        if not rows:
            self.append([{"settings": settings}])
            self.rows = []
            return
        check_settings(self.path, rows[0].get("settings", {}), settings)
        self.rows = rows[1:]


def check_settings(path: Path, there: Row, here: Row) -> None:
    """Refuse to go on with results of other settings.

    Raises:
        DataError: a setting differs; the message names the first one.
    """
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise DataError(
                f"{path} was written with other settings ({name} is {there.get(name)!r} there and {here.get(name)!r} "
                "here): choose another output, or remove it"
            )


def safe_name(name: str) -> str:
    """A name that is one plain part of a path, in any file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "_"
