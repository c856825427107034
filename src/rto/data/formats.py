"""Data sets in TRL's formats to token ids, with every row that cannot be used counted and named.

Prompt-only: ``prompt``. Preference: ``prompt`` (or an implicit prompt), ``chosen``, ``rejected``. Unpaired preference:
``prompt``, ``completion``, ``label``. Each standard (text) or conversational (lists of messages, rendered by the
tokenizer's chat template).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_extract_prompt

from rto.data.chat import completion_ids, prompt_ids, side_ids, template_options
from rto.data.errors import DataError

logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(path: str | Path, *, name: str | None = None, split: str = "train") -> Dataset:
    """A data set from a local file (JSON lines, JSON, CSV, Parquet; .gz and .xz too), a folder, or the hub.

    Raises:
        DataError: the file does not exist, cannot be parsed, or has no such split.
    """
    path = str(path)
    suffixes = [s for s in Path(path).suffixes if s not in (".gz", ".xz", ".zst")]
    reader = _READERS.get(suffixes[-1]) if suffixes else None
    try:
        if reader is not None:
            if not Path(path).is_file():
                raise DataError(f"{path}: no such file")
            return load_dataset(reader, data_files={split: path}, split=split)
        return load_dataset(path, name, split=split)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds; each says what is wrong with the source
        raise DataError(f"{path}: cannot be read as a data set with a split {split!r}: {error}") from error


@dataclass
class Skipped:
    """How many rows were left out, why, and where the first of each kind stands."""

    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, row: int) -> None:
        """Count one row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, row)

    def report(self, what: str) -> str:
        """One line for people."""
        parts = [f"{n} {reason} (first: row {self.first[reason]})" for reason, n in self.counts.most_common()]
        return f"{what}: {sum(self.counts.values())} of {self.total} rows left out: " + "; ".join(parts)


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be completed."""

    ids: list[int]
    raw: Any
    """Text or messages, as the data set has it: what reward functions are given."""
    columns: dict[str, Any]
    """The row's other columns."""


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


def read_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    what: str = "train_dataset",
) -> tuple[list[Prompt], Skipped]:
    """Tokenize prompts; one longer than ``max_length`` tokens, or empty, is left out, never cut.

    Raises:
        DataError: there is no ``prompt`` column, or no row is left.
    """
    _need_columns(dataset, ("prompt",), what)
    skipped, kept = Skipped(), []
    for i, row in enumerate(dataset):
        skipped.total += 1
        if not row["prompt"]:
            skipped.add("with an empty prompt", i)
            continue
        ids = prompt_ids(row["prompt"], tokenizer, **template_options(row))
        if len(ids) > max_length:
            skipped.add(f"with a prompt over {max_length} tokens", i)
            continue
        kept.append(Prompt(ids, row["prompt"], {k: v for k, v in row.items() if k != "prompt"}))
    _tell(skipped, kept, what, "raise max_prompt_length or the model's context, or bring shorter prompts")
    return kept, skipped


def read_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    what: str = "train_dataset",
    encode: Callable[..., tuple[list[int], list[list[int]]]] = side_ids,
) -> tuple[list[Pair], Skipped]:
    """Tokenize preference pairs; what cannot be learned from or does not fit is left out with a count.

    Completions count as ended unless a column ``chosen_ended`` or ``rejected_ended`` says that one was cut off
    at a length limit: such a one gets no EOS, since nobody wrote it. ``encode`` says how a prompt and its two
    completions become token ids.

    Raises:
        DataError: ``chosen`` or ``rejected`` is missing, or no row is left.
    """
    _need_columns(dataset, ("chosen", "rejected"), what)
    skipped, kept = Skipped(), []
    for i, row in enumerate(dataset):
        skipped.total += 1
        pair = _pair(row, tokenizer, max_length, encode)
        if isinstance(pair, str):
            skipped.add(pair, i)
        else:
            kept.append(replace(pair, row=i))
    remedy = "every pair needs a prompt and two different, non-empty completions that fit max_length"
    _tell(skipped, kept, what, remedy)
    return kept, skipped


def _pair(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, encode: Callable[..., Any]
) -> Pair | str:
    """A row as token ids, or why it is left out."""
    if not row["chosen"] or not row["rejected"] or _blank(row["chosen"]) or _blank(row["rejected"]):
        return "with an empty side"
    if row["chosen"] == row["rejected"]:
        return "with two equal sides"
    row = {**row, **maybe_extract_prompt(dict(row))}
    if not row["prompt"]:
        return "with an empty prompt"  # no token would predict the completion's first one
    prompt, sides = encode(
        row["prompt"],
        [row["chosen"], row["rejected"]],
        tokenizer,
        ended=[row.get("chosen_ended", True), row.get("rejected_ended", True)],
        **template_options(row),
    )
    if len(prompt) + max(map(len, sides)) > max_length:
        return f"over {max_length} tokens"
    if sides[0] == sides[1]:
        return "with sides that are equal as tokens"
    return Pair(prompt, sides[0], sides[1])


def read_labelled(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    what: str = "train_dataset",
) -> tuple[list[Labelled], Skipped]:
    """Tokenize completions that are labelled one by one; what cannot be used is left out with a count.

    A column ``completion_ended`` says, as for pairs, which completions were cut off at a length limit.

    Raises:
        DataError: a column is missing, no row is left, or all labels are the same.
    """
    _need_columns(dataset, ("prompt", "completion", "label"), what)
    skipped, kept = Skipped(), []
    for i, row in enumerate(dataset):
        skipped.total += 1
        labelled = _labelled(row, tokenizer, max_length)
        if isinstance(labelled, str):
            skipped.add(labelled, i)
        else:
            kept.append(labelled)
    _tell(skipped, kept, what, "every row needs a prompt, a non-empty completion that fits max_length, and a label")
    if len({row.desirable for row in kept}) == 1:
        raise DataError(
            f"{what}: every label is {kept[0].desirable}: a preference needs desirable (true) and undesirable "
            "(false) completions"
        )
    return kept, skipped


def _labelled(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Labelled | str:
    """A row as token ids, or why it is left out."""
    if row["label"] is None:
        return "without a label"
    if row["label"] not in (0, 1):
        return "with a label that is neither true nor false"
    if not row["completion"] or _blank(row["completion"]):
        return "with an empty completion"
    if not row["prompt"]:
        return "with an empty prompt"
    ended = row.get("completion_ended", True)
    prompt, ids = completion_ids(row["prompt"], row["completion"], tokenizer, ended=ended, **template_options(row))
    if len(prompt) + len(ids) > max_length:
        return f"over {max_length} tokens"
    return Labelled(prompt, ids, bool(row["label"]))


def _blank(side: Any) -> bool:
    return not (side if isinstance(side, str) else "".join(str(m["content"]) for m in side)).strip()


def _need_columns(dataset: Dataset | IterableDataset, needed: Iterable[str], what: str) -> None:
    columns = dataset.column_names
    if columns is None:  # a stream: look at its first row
        columns = list(next(iter(dataset)))
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"{what} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, columns))}. "
            "Rename yours to TRL's names (prompt; chosen, rejected; for losses such as kto: completion, label)."
        )


def _tell(skipped: Skipped, kept: list[Any], what: str, remedy: str) -> None:
    if not kept:
        why = skipped.report(what) if skipped.total else f"{what} has no rows"
        raise DataError(f"{why}. Nothing is left to train on: {remedy}.")
    if skipped.counts:
        logger.warning(skipped.report(what))
