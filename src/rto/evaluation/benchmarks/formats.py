"""The benchmarks' own files, read and written: prompts, answers, judgments, half-written ones too.

AlpacaEval keeps JSON lists (``model_outputs.json``, ``annotations.json``), Arena-Hard v0.1 JSON lines in one folder
(``question.jsonl``, ``model_answer/MODEL.jsonl``, ``model_judgment/JUDGE/MODEL.jsonl``). What a file says is data:
names and texts are kept as they are and nothing in them is interpreted. A file that is read is never changed.
Sources: github.com/tatsu-lab/alpaca_eval; github.com/lmarena/arena-hard-auto at v0.1, and its answers as hosted since.
"""

import csv
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from rto.data.errors import DataError
from rto.evaluation.statistics.arena_hard import BASELINE, STYLE, VERDICTS, Outcome, markdown_counts, outcome
from rto.evaluation.statistics.length_control import GamedBaselines
from rto.evaluation.statistics.winrate import preference_share
from rto.files import Row, Rows, checked, read_rows, read_whole, safe_name, shown, write_atomically

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""A prompt's text or id, and how often it occurred before: benchmarks may ask the same thing twice."""


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


@dataclass(frozen=True, kw_only=True)
class Match:
    """A model's answers and a baseline's to the same questions."""

    benchmark: "Benchmark"
    model: str
    baseline: str
    battles: list[Battle]


@dataclass(frozen=True, kw_only=True)
class Game:
    """What a judge made of two texts in one order."""

    preference: float | None
    """In [1, 2]; 2 is for the second text; None where nothing could be read."""
    verdict: str | None = None
    """The five-way label, or None."""
    said: Any = None
    """The judge's words, or the candidates for its first token; offline, both scores."""
    prompt: str | None = None
    reason: str | None = None
    """Why nothing could be read."""
    seconds: float | None = None
    price: float | None = None
    """US dollars."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All games over one battle."""

    battle: Battle
    games: list[Game]
    switched: list[bool]
    """For each game: the model's answer was shown first."""

    @property
    def preference(self) -> float | None:
        """Mean over the games, in [1, 2]; 2 is for the model; None if a game could not be read."""
        found = [
            None if game.preference is None else 3 - game.preference if switched else game.preference
            for game, switched in zip(self.games, self.switched)
        ]
        return None if None in found else sum(x for x in found if x is not None) / len(found)


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


# --- the two formats


@dataclass(frozen=True)
class AlpacaEval:
    """``FOLDER/model_outputs.json``, a list of ``instruction, output, generator, dataset, datasplit``; T = 0.7."""

    name: ClassVar[str] = "alpaca_eval"
    temperature: ClassVar[float] = 0.7
    max_new_tokens: ClassVar[int] = 2048
    hub: ClassVar[tuple[str, str]] = ("tatsu-lab/alpaca_eval", "alpaca_eval.json")
    unique: ClassVar[bool] = False
    model_keys: ClassVar[tuple[str, ...]] = ("generator",)

    def question(self, row: Row, where: str) -> Question:
        """``instruction`` (with ``input`` after an empty line, if there is one) or ``prompt``."""
        text = _prompt(row, ("instruction", "prompt"), where)
        extra = checked(row.get("input") or "", f"{where}: input", str)
        text = f"{text}\n\n{extra}" if extra else text
        return Question(key=(text, 0), text=text, row=row)

    def answer(self, read: Rows, i: int) -> tuple[str, str]:
        """``instruction`` and ``output``."""
        return read.get(i, "instruction", str), read.get(i, "output", str)

    def asked(self, read: Rows, keys: Sequence[Key], questions: Path | None) -> dict[Key, Question]:
        """The instructions that stand beside the answers."""
        return {key: Question(key=key, text=key[0], row=row) for key, row in zip(keys, read.rows)}

    def answers_file(self, folder: Path, model: str) -> Path:
        """As in the official ``results/MODEL``."""
        return folder / "model_outputs.json"

    def folder(self, answers_file: Path) -> Path:
        """The output folder that an answers file stands in."""
        return answers_file.parent

    def judgments_file(self, folder: Path, judge: str, model: str) -> Path:
        """As in the official ``results/MODEL``: the folder is the model's."""
        return folder / safe_name(judge) / "annotations.json"

    def prepare(self, folder: Path, questions: Sequence[Question]) -> None:
        """Nothing: the instructions stand beside the answers."""
        folder.mkdir(parents=True, exist_ok=True)

    def answers(self, model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
        """A JSON list in the order of the prompts."""
        return _list(
            {
                "instruction": q.text,
                "output": a.text,
                "generator": model,
                "dataset": q.row.get("dataset") or q.row.get("source") or "custom",
                "datasplit": q.row.get("datasplit") or "eval",
            }
            for q, a in zip(questions, answers, strict=True)
        )

    def judgments(self, judge: str, model: str, baseline: str, contests: Sequence[Contest]) -> str:
        """``annotations.json``: 2 is for the model; ``is_switched_outputs`` says that it was shown first."""
        return _list(
            {
                "instruction": contest.battle.question.text,
                "output_1": contest.battle.baseline,
                "generator_1": baseline,
                "dataset": contest.battle.columns.get("dataset"),
                "output_2": contest.battle.answer,
                "generator_2": model,
                "annotator": judge,
                "preference": contest.preference,
                "is_switched_outputs": contest.switched[0],
                "raw_completion": contest.games[0].said,
                "time_per_example": contest.games[0].seconds,
                "price_per_example": contest.games[0].price,
                "unread": contest.games[0].reason,
            }
            for contest in contests
        )


@dataclass(frozen=True)
class ArenaHard:
    """``FOLDER/question.jsonl`` and ``FOLDER/model_answer/MODEL.jsonl`` of Arena-Hard v0.1; greedy.

    ``token_len`` is counted with the model's own tokenizer, where the official script has OpenAI's.
    """

    name: ClassVar[str] = "arena_hard"
    temperature: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 4096
    hub: ClassVar[tuple[str, str]] = ("lmarena-ai/arena-hard-auto", "data/arena-hard-v0.1/question.jsonl")
    unique: ClassVar[bool] = True
    model_keys: ClassVar[tuple[str, ...]] = ("model_id", "model")

    def question(self, row: Row, where: str) -> Question:
        """``question_id`` (or ``uid``) with ``turns`` of one turn, or ``prompt``."""
        name = row.get("question_id") or row.get("uid")
        if name is None:
            raise DataError(f"{where}: no 'question_id': Arena-Hard tells questions by it")
        checked(name, f"{where}: question_id", str)
        if "turns" in row:
            turns = row["turns"]
            if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
                raise DataError(f"{where}: 'turns' must be a list of one turn {{'content': text}}")
            return Question(key=(name, 0), text=_prompt(turns[0], ("content",), where), row=row)
        return Question(key=(name, 0), text=_prompt(row, ("prompt",), where), row=row)

    def answer(self, read: Rows, i: int) -> tuple[str, str]:
        """``question_id`` and ``choices``, or ``uid`` and ``messages`` as answers are hosted since version 2."""
        name = read.get(i, "uid" if "uid" in read.rows[i] else "question_id", str)
        return name, checked(_arena_turn(read, i)["content"], f"{read.where(i)}: content", str)

    def asked(self, read: Rows, keys: Sequence[Key], questions: Path | None) -> dict[Key, Question]:
        """``question.jsonl``, in the folder of the answers when not given."""
        path = questions or self.folder(read.path) / "question.jsonl"
        return {q.key: q for q in read_questions(path, self)}

    def answers_file(self, folder: Path, model: str) -> Path:
        """As in the official ``data/arena-hard-v0.1``."""
        return folder / "model_answer" / f"{model}.jsonl"

    def folder(self, answers_file: Path) -> Path:
        """The output folder: above the answers, among which nothing else may stand, as the official tools read all."""
        return answers_file.parent.parent

    def judgments_file(self, folder: Path, judge: str, model: str) -> Path:
        """As in the official ``data/arena-hard-v0.1``."""
        return folder / "model_judgment" / safe_name(judge) / f"{safe_name(model)}.jsonl"

    def prepare(self, folder: Path, questions: Sequence[Question]) -> None:
        """Write the questions where the judge looks for them, beside those that models of more context answered.

        Raises:
            DataError: the folder holds other questions.
        """
        path = folder / "question.jsonl"
        (folder / "model_answer").mkdir(parents=True, exist_ok=True)
        known = {q.key: q for q in read_questions(path, self)} if path.exists() else {}
        new = {q.key: q for q in questions}
        shared = known.keys() & new.keys()
        if any(known[key].text != new[key].text for key in shared) or (known and not shared):
            raise DataError(f"{path} holds other questions than the prompts given: choose another output folder")
        if len(shared) < len(new):
            rows = [
                {k: v for k, v in q.row.items() if k not in ("prompt", "uid", "turns")}
                | {"question_id": q.key[0], "turns": [{"content": q.text}]}
                for q in (known | new).values()
            ]
            write_atomically(path, _lines(rows))

    def answers(self, model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> str:
        """JSON lines in the order of the questions."""
        return _lines(
            {
                "question_id": q.key[0],
                "answer_id": hashlib.sha256("\0".join([model, q.key[0], a.text]).encode()).hexdigest()[:22],
                "model_id": model,
                "choices": [{"index": 0, "turns": [{"content": a.text, "token_len": a.tokens}]}],
                "tstamp": time.time(),
            }
            for q, a in zip(questions, answers, strict=True)
        )

    def judgments(self, judge: str, model: str, baseline: str, contests: Sequence[Contest]) -> str:
        """Game 1 shows the baseline as A, game 2 as B; a score is a label or null."""
        return _lines(
            {
                "question_id": contest.battle.question.key[0],
                "model": model,
                "judge": judge,
                "baseline": baseline,
                "games": [
                    {"user_prompt": game.prompt, "judgment": game.said, "score": game.verdict, "unread": game.reason}
                    for game in contest.games
                ],
            }
            for contest in contests
        )


Benchmark = AlpacaEval | ArenaHard
BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (AlpacaEval(), ArenaHard())}


_PARTS = ("instruction", "output", "generator", "question_id", "uid", "turns", "prompt")
"""Keys that are no columns for a reward function: they are the question and the answer themselves."""


def numbered(names: Iterable[str]) -> list[Key]:
    """Each name with how often it occurred before."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _list(rows: Iterable[Row]) -> str:
    return json.dumps(list(rows), indent=2) + "\n"


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _prompt(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The first of the named columns as text; a conversation of one user turn counts as text."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "user":
        value = value[0].get("content")
    expected = " or ".join(map(repr, names))
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {expected} must be non-empty text (or one user message)")
    return checked(value, f"{where}: {expected}", str)


def _arena_turn(read: Rows, i: int) -> Row:
    """``content``, and ``token_len`` where it is told, of an Arena-Hard answer in either form."""
    row = read.rows[i]
    try:
        if "messages" in row:
            return {"content": row["messages"][-1]["content"]["answer"]}
        turn = row["choices"][0]["turns"][0]
        content = turn["content"]
        return {**turn, "content": content["answer"] if isinstance(content, dict) else content}
    except (LookupError, TypeError) as error:
        raise DataError(f"{read.where(i)}: not an Arena-Hard answer: {type(error).__name__} {error}") from error


# --- prompts and answers, read


def read_questions(path: Path, benchmark: Benchmark) -> list[Question]:
    """Prompts of a benchmark from a file; one that occurs twice is told apart by its occurrence.

    Raises:
        DataError: a row has no prompt, or a question id occurs twice; the message names file and row.
    """
    read = read_whole(path)
    found = [benchmark.question(row, read.where(i)) for i, row in enumerate(read.rows)]
    keys = _keys(read, [q.key[0] for q in found], benchmark)
    return [Question(key=key, text=q.text, row=q.row) for key, q in zip(keys, found)]


def benchmark_of(path: Path) -> Benchmark:
    """The format that a file of prompts asks for: Arena-Hard where rows have a ``question_id``, else AlpacaEval.

    Raises:
        DataError: the file cannot be read.
    """
    first = read_whole(path).rows[0]
    return BENCHMARKS["arena_hard" if {"question_id", "uid"} & first.keys() else "alpaca_eval"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An answers file of either benchmark."""

    read: Rows
    benchmark: Benchmark
    model: str
    texts: dict[Key, str]


def read_answers(path: Path) -> Answers:
    """One model's answers.

    Raises:
        DataError: the file is not whole, names two models or answers a question twice.
    """
    read = read_whole(path)
    first = read.rows[0]
    benchmark = BENCHMARKS["arena_hard" if {"choices", "messages"} & first.keys() else "alpaca_eval"]
    found = [benchmark.answer(read, i) for i in range(len(read.rows))]
    keys = _keys(read, [name for name, _ in found], benchmark)
    model_key = next((key for key in benchmark.model_keys if key in first), benchmark.model_keys[0])
    return Answers(
        read=read,
        benchmark=benchmark,
        model=read.same(range(len(read.rows)), model_key),
        texts={key: text for key, (_, text) in zip(keys, found)},
    )


def _keys(read: Rows, names: Sequence[str], benchmark: Benchmark) -> list[Key]:
    keys = numbered(names)
    for i, (name, before) in enumerate(keys):
        if before and benchmark.unique:
            raise DataError(f"{read.where(i)}: question {shown(name)} occurs twice: remove one of the rows")
    return keys


def read_match(answers: Path, baseline: Path, questions: Path | None = None) -> Match:
    """The questions that a model answered, with its answers and the baseline's.

    Args:
        answers: an answers file of either benchmark.
        baseline: the baseline's, in the same format.
        questions: Arena-Hard's ``question.jsonl``; None looks for it in the folder of the answers.

    Raises:
        DataError: the formats differ, or the baseline lacks an answer; the message names file and row.
    """
    ours, theirs = read_answers(answers), read_answers(baseline)
    if ours.benchmark is not theirs.benchmark:
        raise DataError(f"{answers} and {baseline} are of two formats, one AlpacaEval's and one Arena-Hard's")
    asked = ours.benchmark.asked(ours.read, list(ours.texts), questions)
    battles = []
    for i, (key, text) in enumerate(ours.texts.items()):
        if key not in asked:
            raise DataError(f"{ours.read.where(i)}: question.jsonl has no question {shown(key[0])}")
        if key not in theirs.texts:
            raise DataError(f"{ours.read.where(i)}: {baseline} has no answer to {shown(key[0])}")
        columns = {k: v for k, v in asked[key].row.items() if k not in _PARTS}
        battles.append(Battle(question=asked[key], baseline=theirs.texts[key], answer=text, columns=columns))
    if left := len(theirs.texts) - len(battles):
        logger.warning("%s has %d answers to questions that %s lacks; these are not judged", baseline, left, answers)
    return Match(benchmark=ours.benchmark, model=ours.model, baseline=theirs.model, battles=battles)


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
        other = json.loads(note.read_text(encoding="utf-8"))["judge"]
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
            row = json.loads(file.readline())
            return str(next(row[key] for key in ArenaHard.model_keys if key in row))
        except (ValueError, TypeError, StopIteration, RecursionError):
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
    tokens = counts["token_len"] if "token_len" in counts else _arena_turn(read, i)["token_len"]
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
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{read.where(i)}: {key} is {shown(read.rows[i][key])}, expected a number")
    return value
