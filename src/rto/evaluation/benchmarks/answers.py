"""Model answers to a benchmark's prompts, in its own file format; a killed run goes on where it stopped.

Prompts are cut into fixed batches of like length. Batch k is drawn with a seed that depends on (seed, k) alone, so
what a resumed run writes is what an uninterrupted one would have written.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rto.data.chat import prompt_ids, special_tokens_in
from rto.data.formats import DataError, Skipped
from rto.evaluation.benchmarks.formats import Benchmark
from rto.evaluation.benchmarks.types import Answer, Question
from rto.files import Journal, Row, check_settings, parse_json, write_atomically
from rto.rollout import scoring
from rto.rollout.samplers.base import SampleFunction, Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Questions as token ids, those that fit."""

    questions: list[Question]
    ids: list[list[int]]
    skipped: Skipped
    template: str
    """``chat`` where the tokenizer has a template, ``plain`` where prompts are continued as text."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Where the answers are and how they came about."""

    path: Path
    answers: int
    new: int
    """Answers that this call drew; the others were there."""
    mean_tokens: float
    ended: int
    """Answers that ended by themselves."""


def encode(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, system: str | None = None
) -> Encoded:
    """Questions as prompts: a conversation where the tokenizer has a chat template, else plain text.

    Raises:
        DataError: no prompt fits in ``max_length`` tokens, or a system message is asked for without a template.
    """
    chat = tokenizer.chat_template is not None
    if system and not chat:
        raise DataError("a system message needs a chat template, which this tokenizer lacks: leave it out")
    if not chat:
        logger.warning("the tokenizer has no chat template: prompts are continued as plain text")
    skipped = Skipped(total=len(questions))
    kept: list[Question] = []
    ids: list[list[int]] = []
    for i, question in enumerate(questions):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question.text})
        row = prompt_ids(messages if chat else question.text, tokenizer)
        if len(row) > max_length:
            skipped.add(f"with a prompt over {max_length} tokens", i)
        else:
            kept.append(question)
            ids.append(row)
            skipped.note_special(special_tokens_in(question.text, tokenizer), i)
    if not kept:
        raise DataError(f"{skipped.report('prompts')}: lower max_new_tokens, or take a model with a longer context")
    if skipped.counts:
        logger.warning(skipped.report("prompts"))
    skipped.tell_special("prompts", tokenizer)
    return Encoded(questions=kept, ids=ids, skipped=skipped, template="chat" if chat else "plain")


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    benchmark: Benchmark,
    folder: Path,
    *,
    name: str,
    sampler: Sampler | SampleFunction,
    settings: Row,
    batch_size: int = 32,
    seed: int = 0,
) -> Generated:
    """Answer every question once and write the benchmark's answers file.

    Args:
        model: what answers; any model that ``sampler`` can draw from.
        tokenizer: its tokenizer.
        encoded: the questions.
        benchmark: the file format.
        folder: the output folder.
        name: the model's name in the file.
        sampler: draws completions; same seed, same samples.
        settings: what decides the answers besides the rest here; a run of other settings is not continued.
        batch_size: questions drawn side by side. It is part of what decides the answers.
        seed: of sampling.

    Raises:
        DataError: the folder holds answers of other settings.
    """
    path = benchmark.answers_file(folder, name)
    settings = _settings(encoded, benchmark, settings, name=name, batch_size=batch_size, seed=seed)
    if (done := finished(path, settings)) is not None:
        return done
    benchmark.prepare(folder, encoded.questions)
    with Journal(journal_of(path), settings) as journal:
        before = len(journal.rows)
        answers = _answer_all(model, tokenizer, encoded, sampler, journal, batch_size, seed)
        write_atomically(path, benchmark.answers(name, encoded.questions, answers))
        summary = {
            "settings": settings,
            "answers": len(answers),
            "left_out": dict(encoded.skipped.counts),
            "mean_tokens": sum(a.tokens for a in answers) / len(answers),
            "ended": sum(a.ended for a in answers),
        }
        write_atomically(record_of(path), json.dumps(summary, indent=1) + "\n")
        journal.path.unlink()  # last: until here a kill loses nothing
    return _generated(path, summary, new=len(answers) - before)


def _answer_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    sampler: Sampler | SampleFunction,
    journal: Journal,
    batch_size: int,
    seed: int,
) -> list[Answer]:
    """What the journal lacks is drawn and entered; all answers, in the order of the questions."""
    found = {row["index"]: row for row in journal.rows}
    for k, batch in enumerate(batches(encoded.ids, batch_size)):
        missing = [i for i in batch if i not in found]
        if missing:  # the whole batch again: a draw depends on what stands beside it
            rows = draw(model, tokenizer, sampler, encoded.ids, batch, batch_seed(seed, k))
            journal.append([row for row in rows if row["index"] in missing])
            found.update({row["index"]: row for row in rows})
    return [Answer(**{k: found[i][k] for k in ("text", "tokens", "ended")}) for i in range(len(encoded.ids))]


def finished(path: Path, settings: Row) -> Generated | None:
    """What an earlier run has finished here, or None if there is work left.

    Raises:
        DataError: the answers come from other settings, or from elsewhere.
    """
    if journal_of(path).exists() or not path.exists():
        return None
    record = record_of(path)
    if not record.exists():
        raise DataError(f"{path} is there, but no {record.name} says how it was made: choose another output")
    summary = parse_json(record.read_text(encoding="utf-8"))
    check_settings(path, summary["settings"], settings)
    return _generated(path, summary, new=0)


def batches(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of the prompts, like lengths together, ``size`` at a time: a function of the prompts alone."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def batch_seed(seed: int, k: int) -> int:
    """Seed of the k-th batch."""
    return seed * 1_000_003 + k


def draw(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler | SampleFunction,
    ids: Sequence[list[int]],
    batch: Sequence[int],
    seed: int,
) -> list[Row]:
    """Answer the questions of one batch: rows of ``index`` and the fields of `Answer`."""
    drawn = scoring.draw(sampler, model, tokenizer, [ids[i] for i in batch], seed)
    return [
        {"index": i, **asdict(Answer(text=text, tokens=len(row), ended=ended))}
        for i, text, row, ended in zip(batch, drawn.texts, drawn.ids, drawn.ended, strict=True)
    ]


def journal_of(path: Path) -> Path:
    """Answers on their way to ``path``; the name is not one that the benchmark's own tools read."""
    return path.with_name(path.name + ".journal")


def record_of(path: Path) -> Path:
    """How the answers in ``path`` came about."""
    return path.with_name(path.stem + ".run.json")


def weights_digest(folder: Path) -> str | None:
    """A digest of a model folder's weights (sizes, and both ends of each file); None for what is no folder.

    It tells a model from one that was trained on in the same place, without reading gigabytes.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest, end = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(end))
            data.seek(max(size - end, 0))
            digest.update(data.read(end))
    return digest.hexdigest()[:16]


def _settings(encoded: Encoded, benchmark: Benchmark, given: Row, **own: Any) -> Row:
    prompts = hashlib.sha256(json.dumps(encoded.ids).encode()).hexdigest()[:16]
    return {"benchmark": benchmark.name, "prompts": prompts, "template": encoded.template, **own, **given}


def _generated(path: Path, summary: Row, *, new: int) -> Generated:
    return Generated(
        path=path, answers=summary["answers"], new=new, mean_tokens=summary["mean_tokens"], ended=summary["ended"]
    )
