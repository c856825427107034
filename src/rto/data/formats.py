"""Data sets in TRL's formats to token ids, with every row that cannot be used counted and named.

Prompt-only: ``prompt``. Preference: ``prompt`` (or an implicit prompt), ``chosen``, ``rejected``. Unpaired preference:
``prompt``, ``completion``, ``label``. Each standard (text) or conversational (messages, rendered by the tokenizer's
chat template; ``tools`` and ``chat_template_kwargs`` of a row go to the template).

All readers are one mechanism: `_read` takes each row to the reader of one row, which returns what was read or raises a
`DataError`, whose words are the reason that is counted. `rto.data.values` tells what a value of a row says, whatever
tool wrote it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rto.data.chat import (
    conversation_ids,
    prompt_ids,
    side_ids,
    special_tokens_in,
    splits,
    template_options,
    whole_ids,
)
from rto.data.errors import DataError
from rto.data.files import load_rows
from rto.data.values import Said, Unusable, blank, common_prompt, is_true, read_value, unanswered

__all__ = [
    "DataError",
    "Labelled",
    "Pair",
    "Prompt",
    "Rows",
    "Skipped",
    "column_names",
    "listed",
    "load_rows",
    "name_of",
    "normalized",
    "read_demonstration",
    "read_labelled",
    "read_pairs",
    "read_prompts",
    "read_sets",
    "reason_of",
]

logger = logging.getLogger(__name__)

Rows = Iterable[Any]
"""A `datasets.Dataset`, a stream (`datasets.IterableDataset`), or dictionaries of columns."""
Kept = TypeVar("Kept")
STREAM_ROWS = 2**20
"""A stream is read whole before training, so it needs an end: this many rows at the latest."""


@dataclass
class Skipped:
    """How many rows were left out, why, and where the first of each kind stands."""

    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    special: Counter[str] = field(default_factory=Counter)
    """Special tokens that stand in the text of rows which were not left out."""
    holding: list[int] = field(default_factory=list)
    """The rows that they stand in."""

    def add(self, reason: str, row: int) -> None:
        """Count one row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, row)

    def note_special(self, found: Counter[str], row: int) -> None:
        """Count the special tokens in one row's text."""
        if found:
            self.special.update(found)
            self.holding.append(row)

    def tell_special(self, what: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn of special tokens in text, and of how they are read."""
        if self.holding:
            tokens = ", ".join(f"{token} {n} times" for token, n in self.special.most_common(REASONS))
            how = "text" if splits(tokenizer) else "tokens (split_special_tokens: true reads them as text)"
            logger.warning(
                f"{what}: {len(self.holding)} of {self.total} rows hold special tokens in their text ({tokens}; "
                f"first: row {self.holding[0]}), which are read as {how}"
            )

    def report(self, what: str) -> str:
        """One line for people."""
        parts = [f"{n} {reason} (first: row {self.first[reason]})" for reason, n in self.counts.most_common(REASONS)]
        others = sum(self.counts.values()) - sum(n for _, n in self.counts.most_common(REASONS))
        parts += [f"{others} for other reasons"] if others else []
        return f"{what}: {sum(self.counts.values())} of {self.total} rows left out: " + "; ".join(parts)


REASONS = 12
"""How many reasons a report names; a template can refuse every row in words of its own."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be completed."""

    ids: list[int]
    raw: Any
    """Text or messages: what reward functions are given."""
    columns: dict[str, Any]
    """The row's other columns, as the data set has them."""


@dataclass(frozen=True)
class Pair:
    """One preference pair as token ids; completions end with EOS, or as the chat template ends a conversation."""

    prompt: list[int]
    """Empty where both sides were read whole, with the prompt."""
    chosen: list[int]
    rejected: list[int]
    row: int = 0
    """Where the data set has it."""


@dataclass(frozen=True)
class Labelled:
    """One completion with its label, as token ids."""

    prompt: list[int]
    completion: list[int]
    desirable: bool


@dataclass(frozen=True)
class Room:
    """How many tokens something may have, and the reason that it is left out for where it has more."""

    tokens: int
    reason: str

    def check(self, tokens: int) -> None:
        """Compare.

        Raises:
            Unusable: there are more.
        """
        if tokens > self.tokens:
            raise Unusable(self.reason)


def _room(max_length: int, context: int | None) -> Room:
    """The smaller one of ``max_length`` and the model's context, and which of the two it is."""
    if context is not None and context < max_length:
        return Room(context, f"over the model's context of {context} tokens")
    return Room(max_length, f"over {max_length} tokens")


def _prompt_room(max_length: int, context: int | None) -> Room:
    """The same for a prompt; ``context`` is what a completion leaves of the model's."""
    if context is not None and context < max_length:
        return Room(
            context, f"with a prompt over {context} tokens, all that a completion leaves of the model's context"
        )
    return Room(max_length, f"with a prompt over {max_length} tokens")


def read_prompts(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    what: str = "train_dataset",
) -> tuple[list[Prompt], Skipped]:
    """Tokenize prompts; one longer than ``max_length`` tokens, or empty, is left out, never cut.

    Args:
        dataset: its rows; a stream is read to its end.
        tokenizer: of the policy.
        max_length: tokens of the longest prompt.
        context: the same by the model's context, less what a completion needs; None where nothing limits it.
        what: how messages call the data set.

    Raises:
        DataError: there is no ``prompt`` column, or no row is left.
    """
    room = _prompt_room(max_length, context)

    def read(i: int, row: dict[str, Any]) -> Prompt:
        said = _prompt(row)
        ids = prompt_ids(said, tokenizer, **template_options(row))
        room.check(len(ids))
        return Prompt(ids, said, {k: v for k, v in row.items() if k != "prompt"})

    remedy = "raise max_prompt_length or the model's context, or bring shorter prompts"
    return _read(dataset, ("prompt",), read, what, remedy, tokenizer)


def read_pairs(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    what: str = "train_dataset",
    encode: Callable[..., tuple[list[int], list[list[int]]]] = side_ids,
) -> tuple[list[Pair], Skipped]:
    """Tokenize preference pairs; what cannot be learned from or does not fit is left out with a count.

    Completions count as ended unless a column ``chosen_ended`` or ``rejected_ended`` says that one was cut off
    at a length limit: such a one gets no EOS, since nobody wrote it.

    Args:
        dataset: its rows; a stream is read to its end.
        tokenizer: of the model.
        max_length: tokens of the longest prompt + completion.
        context: the same by the model's context; None where nothing limits it.
        what: how messages call the data set.
        encode: how a prompt and its two completions become token ids.

    Raises:
        DataError: ``chosen`` or ``rejected`` is missing, or no row is left.
    """
    room = _room(max_length, context)

    def read(i: int, row: dict[str, Any]) -> Pair:
        prompt, (chosen, rejected) = _tokens(row, ("chosen", "rejected"), tokenizer, encode)
        room.check(len(prompt) + max(len(chosen), len(rejected)))
        if chosen == rejected:
            raise Unusable("with sides that are equal as tokens")
        return Pair(prompt, chosen, rejected, i)

    remedy = "every pair needs a prompt and two different, non-empty completions that fit max_length"
    return _read(dataset, ("chosen", "rejected"), read, what, remedy, tokenizer)


def read_labelled(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    what: str = "train_dataset",
) -> tuple[list[Labelled], Skipped]:
    """Tokenize completions that are labelled one by one; what cannot be used is left out with a count.

    A column ``completion_ended`` says, as for pairs, which completions were cut off at a length limit.

    Args:
        dataset: its rows; a stream is read to its end.
        tokenizer: of the model.
        max_length: tokens of the longest prompt + completion.
        context: the same by the model's context; None where nothing limits it.
        what: how messages call the data set.

    Raises:
        DataError: a column is missing, no row is left, or all labels are the same.
    """
    room = _room(max_length, context)

    def read(i: int, row: dict[str, Any]) -> Labelled:
        label = is_true(row["label"], "a label")
        if label is None:
            raise Unusable("without a label")
        prompt, (ids,) = _tokens(row, ("completion",), tokenizer)
        room.check(len(prompt) + len(ids))
        return Labelled(prompt, ids, label)

    remedy = "every row needs a prompt, a non-empty completion that fits max_length, and a label"
    kept, skipped = _read(dataset, ("prompt", "completion", "label"), read, what, remedy, tokenizer)
    if len({row.desirable for row in kept}) == 1:
        raise DataError(
            f"{name_of(dataset, what)}: every label is {kept[0].desirable}: a preference needs desirable (true) and "
            "undesirable (false) completions"
        )
    return kept, skipped


def read_demonstration(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, text: str = "text"
) -> tuple[list[int], list[int]]:
    """Token ids of a demonstration: of a prompt and its completion, or of messages or text as a whole.

    Args:
        row: with ``prompt`` and ``completion`` (cut off where ``completion_ended`` is false), with ``messages`` (or
            ``conversations``, as ShareGPT calls them), or with text.
        tokenizer: whose template and vocabulary.
        text: the column of text.

    Raises:
        DataError: there is nothing to learn from; `reason_of` tells why.
    """
    if row.get("completion") is not None:
        prompt, (ids,) = _tokens(row, ("completion",), tokenizer)
        return prompt, ids
    column = next((name for name in ("messages", "conversations", text) if row.get(name) is not None), None)
    if column is None:
        raise Unusable(f"without a prompt and a completion, messages, or {text}")
    said = read_value(row[column], column)
    if blank(said):
        raise Unusable(f"whose {column} says nothing")
    if isinstance(said, str):
        return [], whole_ids("", said, tokenizer)
    return [], conversation_ids(said, tokenizer, **template_options(row))


def read_sets(
    read: Callable[[Rows, str], tuple[list[Kept], Skipped]], train: Rows | None, held_out: Any
) -> tuple[list[Kept] | None, list[Kept] | dict[str, list[Kept]] | None, dict[str, Skipped]]:
    """The data sets of a trainer: one to train on, one or a dictionary of them to evaluate on.

    Args:
        read: reads one data set, with the name that messages call it.
        train: ``train_dataset``.
        held_out: ``eval_dataset``.

    Returns:
        Both, read, and what was left out of each: ``train``, ``eval`` or ``eval_NAME``.
    """
    skipped: dict[str, Skipped] = {}
    rows: list[Kept] | None = None
    if train is not None:
        rows, skipped["train"] = read(train, "train_dataset")
    if not isinstance(held_out, dict):
        if held_out is None:
            return rows, None, skipped
        others, skipped["eval"] = read(held_out, "eval_dataset")
        return rows, others, skipped
    named: dict[str, list[Kept]] = {}
    for name, dataset in held_out.items():
        named[name], skipped[f"eval_{name}"] = read(dataset, f"eval_dataset[{name!r}]")
    return rows, named or None, skipped


# --- one row


def normalized(row: Mapping[str, Any], sides: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The row with its prompt and completions as text or as messages, all of one kind; other columns as they are.

    A prompt that is implied (two sides that begin alike) is cut from them. Where one part is text and another is
    messages, the text is the user's message (prompt) or the assistant's (completion); a text prompt beside sides that
    begin with the user's message repeats that message, and the sides count.

    Raises:
        Unusable: the row has no prompt or an empty completion, two equal ones, or something that says nothing.
    """
    said = [read_value(row[side], side) for side in sides]
    if not all(said):
        raise Unusable(_empty(sides))
    if len(said) == 2 and said[0] == said[1]:
        raise Unusable("with two equal sides")
    prompt, said = _one_kind(read_value(row.get("prompt"), "prompt"), said, tokenizer)
    if not prompt:
        prompt, said = common_prompt(said, tokenizer) if len(said) == 2 else _last_answer(said[0])
    if any(map(unanswered, said)):
        raise Unusable(_empty(sides))
    if blank(prompt):
        raise Unusable("with an empty prompt")  # no token would predict the completion's first one
    for side, name in zip(said, sides):
        if not isinstance(side, str) and all(message["role"] in ASKING for message in side):
            raise Unusable(f"whose {name} is no answer of the assistant")
    return {**row, "prompt": prompt, **dict(zip(sides, said))}


ASKING = ("user", "system", "developer")
"""Roles that speak to the assistant: a side that begins with one is a whole conversation."""


def _one_kind(prompt: Said, said: list[Said], tokenizer: PreTrainedTokenizerBase) -> tuple[Said, list[Said]]:
    """Prompt and completions, all text or all messages."""
    text = [isinstance(side, str) for side in said]
    if all(text) and (isinstance(prompt, str) or not prompt):
        return prompt or "", said
    if not prompt and any(text):
        raise Unusable("with text beside messages and no prompt")
    if isinstance(prompt, str):
        if tokenizer.chat_template is None and all(map(_answer, said)):
            return prompt, [_answer(side) for side in said]  # no template that messages could need
        repeated = not any(text) and all(side[0]["role"] in ASKING for side in said)  # type: ignore[index]
        prompt = [] if repeated or not prompt else [{"role": "user", "content": prompt}]
    messages = [[{"role": "assistant", "content": x}] if isinstance(x, str) else x for x in said]
    return prompt, [x[len(prompt) :] if x[: len(prompt)] == prompt else x for x in messages]


def _answer(side: Said) -> str:
    """The text of a completion that is text, or one message and nothing else."""
    if isinstance(side, str):
        return side
    return str(side[0]["content"]) if len(side) == 1 and set(side[0]) == {"role", "content"} else ""


def _last_answer(side: Said) -> tuple[Said, list[Said]]:
    """A conversation as a prompt and its last message."""
    return ("", [side]) if isinstance(side, str) else (side[:-1], [side[-1:]])


def _empty(sides: tuple[str, ...]) -> str:
    return "with an empty side" if len(sides) == 2 else f"with an empty {sides[0]}"


def _prompt(row: Mapping[str, Any]) -> Said:
    said = read_value(row["prompt"], "prompt")
    if blank(said):
        raise Unusable("with an empty prompt")
    return said


def _tokens(
    row: Mapping[str, Any],
    sides: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[..., tuple[list[int], list[list[int]]]] = side_ids,
) -> tuple[list[int], list[list[int]]]:
    """Prompt and completions of a row."""
    ended = [is_true(row.get(f"{side}_ended"), f"a {side}_ended") is not False for side in sides]
    row = normalized(row, sides, tokenizer)
    said = [row[side] for side in sides]
    return encode(row["prompt"], said, tokenizer, ended=ended, **template_options(row))


# --- all rows


def _read(
    dataset: Rows,
    columns: tuple[str, ...],
    read: Callable[[int, dict[str, Any]], Kept],
    what: str,
    remedy: str,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Kept], Skipped]:
    """Every row by ``read``, or counted with the reason that it is left out for.

    Raises:
        DataError: it is no data set, lacks a column, or no row is left.
    """
    what = name_of(dataset, what)
    rows = listed(dataset, what)
    found = column_names(rows)
    if len(rows):
        _need_columns(columns, found, what)
    skipped, kept = Skipped(), []
    empty = dict.fromkeys(found)
    for i, row in enumerate(rows):
        skipped.total += 1
        try:
            kept.append(read(i, {**empty, **row}))
            skipped.note_special(special_in_row(row, tokenizer), i)
        except DataError as error:
            skipped.add(reason_of(error), i)
    if not kept:
        why = skipped.report(what) if skipped.total else f"{what} has no rows"
        raise DataError(f"{why}. Nothing is left to train on: {remedy}.")
    if skipped.counts:
        logger.warning(skipped.report(what))
    skipped.tell_special(what, tokenizer)
    return kept, skipped


def special_in_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, text: str = "text") -> Counter[str]:
    """The special tokens in what a row says; ``text`` is its column of text, if it has one."""
    columns = ("prompt", "completion", "chosen", "rejected", "messages", "conversations", text)
    return special_tokens_in([row[name] for name in columns if name in row], tokenizer)


def reason_of(error: DataError) -> str:
    """Why a row is left out: in the words of its reader, or because of what the reading of the template says."""
    words = " ".join(str(error).split())
    return words if isinstance(error, Unusable) else f"because {words:.200}"


def listed(dataset: Rows, what: str) -> Dataset | list[Mapping[str, Any]]:
    """A data set that can be read twice; a stream is read to its end.

    Raises:
        DataError: it is no data set, or the stream has no end.
    """
    if isinstance(dataset, Dataset):
        return dataset
    if isinstance(dataset, Mapping | str) or not isinstance(dataset, Iterable):
        kind = f"a dictionary of {', '.join(map(repr, dataset))}" if isinstance(dataset, Mapping) else repr(dataset)
        raise DataError(f"{what} is {kind:.200}, not a data set: give one, a datasets.Dataset or another list of rows")
    rows = list(islice(dataset, STREAM_ROWS + 1))
    if len(rows) > STREAM_ROWS:
        raise DataError(
            f"{what} is a stream of more than {STREAM_ROWS:,} rows, and its rows are read before training: bound it "
            "by take(n)"
        )
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{what}: row {i} is a {type(row).__name__}, not a dictionary of columns such as prompt")
    return rows


def column_names(rows: Dataset | list[Mapping[str, Any]]) -> list[str]:
    """Every column that a row has."""
    return rows.column_names if isinstance(rows, Dataset) else list(dict.fromkeys(str(k) for row in rows for k in row))


def _need_columns(needed: Iterable[str], columns: list[str], what: str) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"{what} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, columns)) or 'none'}. "
            "Rename yours to TRL's names (prompt; chosen, rejected; for losses such as kto: completion, label)."
        )


def name_of(dataset: Any, what: str) -> str:
    """How messages call a data set: by its argument, and the file it came from."""
    source = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return f"{what} ({source})" if source and source not in what else what
