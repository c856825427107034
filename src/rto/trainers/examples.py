"""Preference data as the trainer reads it: examples, their mismatched completions, and π_ref's numbers on them."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto.batches import Sequences, collate
from rto.data.chat import without_tail
from rto.data.formats import (
    DataError,
    Labelled,
    Pair,
    Rows,
    Skipped,
    column_names,
    listed,
    name_of,
    read_labelled,
    read_pairs,
)
from rto.models.roles import weights_of


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of preference data."""

    prompt: list[int]
    completions: tuple[list[int], ...]
    """Chosen and rejected; or one completion alone."""
    labels: tuple[bool, ...]
    """True for what is preferred or desirable, one for each completion."""
    mismatched: tuple[list[int], ...] = ()
    """Another prompt's completion for each of these, where the loss estimates KL(π ‖ π_ref)."""
    ref_logp: tuple[Tensor, ...] = ()
    """log π_ref(y_t|x,y_<t) of the completions, then of the mismatched ones; () where not computed beforehand."""
    counts: bool = True
    """False where it only fills up a process's batch: it is read, and nothing is learned of it."""

    @property
    def scored(self) -> tuple[list[int], ...]:
        """Everything that is scored after this prompt."""
        return self.completions + self.mismatched


def read_examples(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    unpaired: bool,
    max_length: int,
    context: int | None = None,
    swapped: bool = False,
    what: str,
) -> tuple[list[Example], Skipped]:
    """Examples of a data set of pairs or, for an unpaired loss, of labelled completions; that loss reads pairs, too.

    With ``swapped`` every preference is turned round: what was rejected counts as chosen.

    Raises:
        DataError: the data cannot be used; the message names the column or counts the rows.
    """
    if unpaired:
        dataset = listed(dataset, what)
    labelled = unpaired and "label" in column_names(dataset)
    read: Callable[..., tuple[list[Any], Skipped]] = read_labelled if labelled else read_pairs
    rows, skipped = read(dataset, tokenizer, max_length=max_length, context=context, what=what)
    examples = [_example(row, tokenizer) for row in rows]
    examples = [_swapped(example) for example in examples] if swapped else examples
    limit = max_length if context is None else min(max_length, context)
    return (mismatch(examples, limit, name_of(dataset, what)) if unpaired else examples), skipped


def _example(row: Pair | Labelled, tokenizer: PreTrainedTokenizerBase) -> Example:
    """What is learned of a row: each completion up to its end of turn."""
    sides: tuple[list[int], ...]
    labels: tuple[bool, ...]
    if isinstance(row, Pair):
        sides, labels = (row.chosen, row.rejected), (True, False)
    else:
        sides, labels = (row.completion,), (row.desirable,)
    return Example(prompt=row.prompt, completions=tuple(without_tail(ids, tokenizer) for ids in sides), labels=labels)


def _swapped(example: Example) -> Example:
    """The opposite preference: the sides of a pair change places, a completion alone its label."""
    if len(example.labels) == 1:
        return replace(example, labels=(not example.labels[0],))
    return replace(example, completions=example.completions[::-1])


def mismatch(examples: list[Example], max_length: int, what: str) -> list[Example]:
    """Give every completion a partner that answers another prompt; the same examples get the same partners.

    The pairing is drawn once over the data, where KTO's paper shifts completions within a batch: partners then do
    not depend on how batches are cut, and neighbours in the file that share a prompt are no partners.

    Raises:
        DataError: some prompt has no completion of another prompt that fits behind it.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    place = {i: at for at, i in enumerate(order)}

    def partner(i: int) -> Example:
        """The next one in the shuffled circle that answers another prompt and fits."""
        own, room = examples[i].prompt, max_length - len(examples[i].prompt)
        for step in range(1, len(order)):
            other = examples[order[(place[i] + step) % len(order)]]
            if other.prompt != own and max(map(len, other.completions)) <= room:
                return other
        raise DataError(
            f"{what}: no completion of another prompt fits behind prompt {i} within {max_length} tokens, and an "
            "unpaired loss needs one to estimate its KL term: bring more prompts or raise max_length"
        )

    return [replace(example, mismatched=partner(i).completions) for i, example in enumerate(examples)]


def sequences_of(
    examples: Sequence[Example],
    completions: Sequence[tuple[list[int], ...]],
    *,
    pad: int,
    device: torch.device | str,
) -> Sequences:
    """One batch, side by side: every example's first completion, then every example's second."""
    sides = list(zip(*completions))
    prompts = [example.prompt for _ in sides for example in examples]
    return collate(prompts, [ids for side in sides for ids in side], pad=pad, device=device)


def reference_key(reference: nn.Module, examples: Sequence[Example], precision: str) -> str:
    """What the reference's numbers depend on: its weights, the token ids (the template is in them), the precision."""
    digest = hashlib.blake2b(precision.encode(), digest_size=16)
    for name, weight in weights_of(reference).items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(memoryview(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    digest.update(json.dumps([[e.prompt, *e.scored] for e in examples]).encode())
    return digest.hexdigest()


def load_reference(path: Path) -> Tensor | None:
    """Log π_ref of all scored tokens of the examples, in their order; None where it is not there."""
    return safetensors.torch.load_file(path)["logp"] if path.is_file() else None


def save_reference(path: Path, logp: Tensor) -> None:
    """Write them so that a file of this name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    safetensors.torch.save_file({"logp": logp.cpu()}, partial)
    partial.replace(path)


def with_reference(examples: Sequence[Example], logp: Tensor) -> list[Example]:
    """Hand every example its part of the numbers."""
    lengths = [len(ids) for example in examples for ids in example.scored]
    parts = iter(logp.cpu().split(lengths))
    return [replace(example, ref_logp=tuple(next(parts) for _ in example.scored)) for example in examples]
