"""The formats of the two benchmarks: how each writes prompts, answers and judgments, and prompts and answers read.

AlpacaEval keeps JSON lists (``model_outputs.json``, ``annotations.json``), Arena-Hard v0.1 JSON lines in one folder
(``question.jsonl``, ``model_answer/MODEL.jsonl``, ``model_judgment/JUDGE/MODEL.jsonl``). What a file says is data:
names and texts are kept as they are and nothing in them is interpreted. A file that is read is never changed.
Sources: github.com/tatsu-lab/alpaca_eval; github.com/lmarena/arena-hard-auto at v0.1, and its answers as hosted since.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rto.data.errors import DataError
from rto.evaluation.benchmarks.types import Answer, Battle, Contest, Key, Question
from rto.files import Row, Rows, checked, read_whole, safe_name, shown, write_atomically

logger = logging.getLogger(__name__)

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
        return name, checked(arena_turn(read, i)["content"], f"{read.where(i)}: content", str)

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


def arena_turn(read: Rows, i: int) -> Row:
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
class Match:
    """A model's answers and a baseline's to the same questions."""

    benchmark: Benchmark
    model: str
    baseline: str
    battles: list[Battle]


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
