"""`rto inspect`: what a token reward says of held-out pairs and of text, before anyone trains with it."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rto.batches import collate
from rto.data.chat import (
    completion_ids,
    prompt_ids,
    split_special_tokens,
    stop_ids,
    template_options,
    without_tail,
)
from rto.data.formats import DataError, Pair, Prompt, Skipped, load_rows, normalized, read_pairs
from rto.data.pieces import pieces
from rto.errors import users_code
from rto.inspection.stacking import LEAST, Fresh, compare_fresh
from rto.inspection.statistics import (
    CreditReport,
    PairReport,
    Rewarded,
    RewardedPair,
    Span,
    by_word,
    credit_of_words,
    report_on_credit,
    report_on_pairs,
    words,
)
from rto.models.loading import (
    check_same_vocabulary,
    check_weights,
    find_config,
    load_policy,
    load_tokenizer,
    pad_id,
    shared_context,
)
from rto.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from rto.recipe import is_function, resolve
from rto.rollout.rewards import Completed, FunctionReward, RewardModel, function_name, reward_source
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.scoring import draw
from rto.rollout.token_rewards import TOKEN_REWARDS, TokenSource, token_source
from rto.values import check_choice

ROWS = 256  # pairs scored at a time

Credit = Callable[..., Sequence[Sequence[Span]]]
"""``f(prompts, completions, **columns)``: where each completion earns its true reward."""


@dataclass
class InspectArguments:
    """What `rto inspect` looks at.

    Attributes:
        dpo_model: π_dpo, or several models or functions (module:function), which count as their mean.
        ref_model: π_ref; not needed for an adapter (its base is taken), a function, or ``mean_logprob``.
        dataset_name: held-out pairs: a local file or folder, or a hub name.
        fresh_dataset_name: pairs drawn from a *trained* policy and labelled anew, by a gold, a judge or people: what
            both rewards know of them less than of the held-out ones is the room that fresh labels have.
        prompt: look at one prompt instead, with ``completion`` or completions sampled from π_dpo.
        completions: look at a file of completions instead: rows with prompt and completion, or chosen and rejected.
    """

    dpo_model: list[str] = field(metadata={"help": "π_dpo: folder, hub id, adapter or function; several: their mean."})
    ref_model: str | None = field(default=None, metadata={"help": "π_ref, the model that π_dpo started from."})
    dataset_name: str | None = field(default=None, metadata={"help": "Held-out pairs: file, folder or hub name."})
    fresh_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs drawn from a trained policy, labelled anew: what is still known of them?"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_test_split: str = field(default="test", metadata={"help": "Its split."})
    rows: int | None = field(default=None, metadata={"help": "Look at the first so many rows only."})
    prompt: str | None = field(default=None, metadata={"help": "Show the token rewards of this prompt's completions."})
    completion: list[str] | None = field(
        default=None, metadata={"help": "Completions of --prompt; when not given, π_dpo is sampled from."}
    )
    completions: str | None = field(
        default=None, metadata={"help": "A file of rows with prompt and completion (or chosen, rejected) to show."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "A sentence reward model or function (module:function) to compare with."}
    )
    credit: str | None = field(
        default=None,
        metadata={"help": "module:function, f(prompts, completions) -> spans (start, end, value)."},
    )
    token_reward: str = field(default="logratio", metadata={"help": f"One of {', '.join(TOKEN_REWARDS)}."})
    token_reward_pessimism: float = field(default=0.0, metadata={"help": "κ of several models."})
    token_reward_clip: float = field(default=1.0, metadata={"help": "Bound on raw token rewards, as in training."})
    beta: float = field(default=0.1, metadata={"help": "β of the implicit reward, as in training of π_dpo."})
    spread_fraction: float = field(
        default=0.5, metadata={"help": "Spread of the token reward beside the score's for the suggested β₁."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of all log-probabilities, and of sampling."})
    max_length: int = field(default=1024, metadata={"help": "Longer rows (prompt + completion) are left out."})
    max_completion_length: int = field(default=128, metadata={"help": "Of completions sampled for --prompt."})
    max_tokens_per_micro_batch: int = field(default=16384, metadata={"help": "Padded tokens in one forward pass."})
    show: int = field(default=4, metadata={"help": "Pairs whose heat-map is shown: the first ones."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    output_dir: str = field(default="inspection", metadata={"help": "Where inspection.json and .html are written."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    split_special_tokens: bool | None = field(
        default=None,
        metadata={"help": "Read special tokens in the text of rows as text; else as the tokenizer has it."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the models.", "choices": ["float32", "bfloat16", "float16"]},
    )

    ranges: ClassVar[Mapping[str, Range]] = {
        **dict.fromkeys(("beta", "temperature", "token_reward_clip", "spread_fraction"), POSITIVE),
        **dict.fromkeys(("rows", "max_length", "max_completion_length", "max_tokens_per_micro_batch"), COUNT),
        **dict.fromkeys(("token_reward_pessimism", "show", "seed"), NOT_NEGATIVE),
    }

    def __post_init__(self) -> None:
        for name in ("dpo_model", "completion"):  # a YAML file may hold one as text
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        check_ranges(self, **self.ranges)
        if self.show == 0 and self.completions is not None:
            raise ValueError(f"show={self.show} leaves nothing to look at")
        check_choice("token_reward", self.token_reward, TOKEN_REWARDS)
        looked_at = [name for name in ("dataset_name", "prompt", "completions") if getattr(self, name) is not None]
        if len(looked_at) != 1:
            raise ValueError(
                "say what to look at by one of --dataset_name (held-out pairs), --prompt and --completions; "
                f"given: {', '.join(looked_at) or 'none'}"
            )
        needed = (
            ("completion", "prompt"),
            ("credit", "dataset_name"),
            ("fresh_dataset_name", "dataset_name"),
            ("fresh_dataset_name", "reward_model"),
        )
        for name, needs in needed:
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"--{name} needs --{needs}")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Completions of one prompt for the heat-map, side by side."""

    prompt: str
    sides: dict[str, Rewarded]
    """By name: chosen and rejected, or completion 1, 2, ..."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything the terminal and the page show."""

    source: str
    """What the token reward is, in words."""
    data: str
    """What was looked at."""
    pairs: PairReport | None
    credit: CreditReport | None
    shown: list[Shown]
    fresh: Fresh | None = None

    def to_json(self) -> str:
        """Numbers as JSON; the text that is shown is not repeated."""
        numbers = {"source": self.source, "data": self.data}
        parts = {"pairs": self.pairs, "credit": self.credit, "fresh": self.fresh}
        found = numbers | {name: asdict(x) for name, x in parts.items() if x is not None}
        return json.dumps(_json(found), indent=1, allow_nan=False)


def _json(x: Any) -> Any:
    """What JSON can hold: null for what is not a number, and the word for ∞, which JSON has no number for."""
    if isinstance(x, dict):
        return {name: _json(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_json(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x).replace("inf", "Infinity")
    return x


def inspect(args: InspectArguments) -> Inspection:
    """Load, score, and tell.

    Raises:
        DataError: there is nothing to look at.
        ValueError: models do not fit together, or one is missing.
    """
    models = [spec for spec in args.dpo_model if not is_function(spec)]
    named = [*models, *([args.ref_model] if args.ref_model else [])]
    if not named:
        raise ValueError("a token reward function needs a tokenizer to cut text by: give --ref_model")
    context = _check_models(args, models)
    limit = args.max_length if context is None else min(args.max_length, context)
    functions = {spec: resolve(spec, "--dpo_model") for spec in args.dpo_model if is_function(spec)}
    credit = None if args.credit is None else resolve(args.credit, "--credit")
    score: str | Callable[..., Any] | None = args.reward_model
    if args.reward_model is not None and is_function(args.reward_model):
        score = resolve(args.reward_model, "--reward_model")
    tokenizer = split_special_tokens(
        load_tokenizer(named[0], trust_remote_code=args.trust_remote_code), args.split_special_tokens
    )
    source = ", ".join(spec if is_function(spec) else f"{args.token_reward} of {spec}" for spec in args.dpo_model)
    if args.dataset_name is None:
        skipped = Skipped()
        fitting = _rows_to_show(args, tokenizer, models, limit, skipped)
        inspector = _inspector(args, models, functions, score, tokenizer)
        rows_to_show = inspector.readable_rows(fitting, skipped)
        _check_some_are_left(rows_to_show, skipped, _what(args))
        data = skipped.report(_what(args)) if skipped.counts else _what(args)
        return Inspection(source=source, data=data, pairs=None, credit=None, shown=inspector.show(rows_to_show))
    read = [_pairs_of(args, name, tokenizer, context) for name in (args.dataset_name, args.fresh_dataset_name) if name]
    for name, _, found, _ in read if args.fresh_dataset_name else ():
        if len(found) < LEAST:
            raise DataError(f"{name}: {len(found)} pairs can be read; --fresh_dataset_name compares at least {LEAST}")
    inspector = _inspector(args, models, functions, score, tokenizer)
    (rewarded, skipped), *fresh_pairs = [inspector.of_rows(name, *some) for name, *some in read]
    report = report_on_pairs(rewarded, beta=args.beta, clip=args.token_reward_clip, fraction=args.spread_fraction)
    fresh = None
    for pairs, _ in fresh_pairs:
        anew = report_on_pairs(pairs, beta=args.beta, clip=args.token_reward_clip).stacked
        if report.stacked is None or anew is None:
            raise DataError(f"the reward model reads too few of the pairs: at least {LEAST} of each are compared")
        fresh = compare_fresh(report.stacked, anew)
    shown = [
        Shown(prompt=pair.prompt, sides={"chosen": pair.chosen, "rejected": pair.rejected})
        for pair in rewarded[: args.show]
    ]
    return Inspection(
        source=source,
        data=f"{len(rewarded):,} pairs of "
        + (skipped.report(args.dataset_name) if skipped.counts else args.dataset_name),
        pairs=report,
        credit=None if credit is None else credit_report(rewarded, credit),
        shown=shown,
        fresh=fresh,
    )


class Inspector:
    """Token rewards, and scores where there is a sentence reward, of completions as a data set has them.

    Args:
        source: the token reward; one that compares with a reference brings its own.
        tokenizer: of the models.
        score: a sentence reward to compare with.
        device: where the models run.
    """

    def __init__(
        self,
        source: TokenSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        score: RewardModel | FunctionReward | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.tokenizer, self.score, self.device = source.to(device), tokenizer, score, device
        self.ends = {tokenizer.eos_token_id, *stop_ids(tokenizer)}
        if isinstance(score, RewardModel):
            score.model.to(device)

    def readable(self, pairs: Sequence[Pair], rows: Dataset, skipped: Skipped) -> list[Pair]:
        """Pairs of which the sentence reward can read both sides; the others are counted."""
        found = []
        for pair in pairs:
            raw = normalized(rows[pair.row], ("chosen", "rejected"), self.tokenizer)
            why = self._why_unread(raw, {side: (pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected")})
            if why is None:
                found.append(pair)
            else:
                skipped.add(why, pair.row)
        return found

    def readable_rows(self, rows: Sequence[dict[str, Any]], skipped: Skipped) -> list[dict[str, Any]]:
        """Rows for `show` of which the sentence reward can read every side; the others are counted."""
        found = []
        for row in rows:
            why = self._why_unread(row, {side: _ids_of(row, side, self.tokenizer) for side in row["sides"]})
            if why is None:
                found.append(row)
            else:
                skipped.add(why, row["row"])
        return found

    def _why_unread(self, raw: dict[str, Any], sides: Mapping[str, tuple[list[int], list[int]]]) -> str | None:
        """Why the sentence reward cannot read one of a row's sides, each a prompt and a completion; None if it can."""
        if not isinstance(self.score, RewardModel):
            return None
        for side, (prompt, ids) in sides.items():
            (why,) = self.score.unread(self._completed([prompt], [ids], [raw], side))
            if why is not None:
                return why
        return None

    def of_rows(
        self, what: str, rows: Dataset, pairs: Sequence[Pair], skipped: Skipped
    ) -> tuple[list[RewardedPair], Skipped]:
        """A data set's pairs that can be read, rewarded.

        Raises:
            DataError: there is none.
        """
        rewarded = self.pairs(self.readable(pairs, rows, skipped), rows)
        _check_some_are_left(rewarded, skipped, what)
        return rewarded, skipped

    def pairs(self, pairs: Sequence[Pair], rows: Dataset) -> list[RewardedPair]:
        """Token rewards of both sides of each pair; ``rows`` is the data set that the pairs were read from."""
        found: list[RewardedPair] = []
        for start in range(0, len(pairs), ROWS):
            part = pairs[start : start + ROWS]
            raw = [normalized(rows[p.row], ("chosen", "rejected"), self.tokenizer) for p in part]
            sides = [
                self._reward(
                    [p.prompt for p in part], [without_tail(getattr(p, side), self.tokenizer) for p in part], raw, side
                )
                for side in ("chosen", "rejected")
            ]
            texts = [spoken(row["prompt"]) for row in raw]
            found += [RewardedPair(prompt=x, chosen=a, rejected=b) for x, a, b in zip(texts, *sides)]
        return found

    def show(self, rows: Sequence[dict[str, Any]]) -> list[Shown]:
        """Token rewards of rows with a prompt and one completion or more: every column whose name is a side's."""
        found = []
        for row in rows:
            sides = {}
            for name in row["sides"]:
                prompt, ids = _ids_of(row, name, self.tokenizer)
                (sides[name],) = self._reward([prompt], [ids], [row], name)
            found.append(Shown(prompt=spoken(row["prompt"]), sides=sides))
        return found

    def _completed(
        self, prompts: list[list[int]], completions: list[list[int]], raw: Sequence[dict[str, Any]], side: str
    ) -> Completed:
        """One side of some rows, as reward functions see it."""
        names = [name for name in raw[0] if name not in ("prompt", side, "sides", "sampled", "row")]
        asked = [
            Prompt(ids=ids, raw=row["prompt"], columns={name: row[name] for name in names})
            for ids, row in zip(prompts, raw)
        ]
        ended = [bool(row.get(f"{side}_ended", True)) for row in raw]
        return Completed.of(asked, [row[side] for row in raw], ended, completions)

    def _reward(
        self, prompts: list[list[int]], completions: list[list[int]], raw: Sequence[dict[str, Any]], side: str
    ) -> list[Rewarded]:
        """One side of some rows."""
        completed = self._completed(prompts, completions, raw, side)
        sequences = collate(prompts, completions, pad=pad_id(self.tokenizer), device=self.device)
        rewards = self.source(sequences, completed=completed).float().cpu().numpy().astype(float)
        for row, text in zip(rewards, completed.completions):
            if not np.isfinite(row).all():
                raise ValueError(f"the token rewards of {text!r:.200} are not finite: {row.tolist()!r:.200}")
        scores = self.score(completed) if self.score is not None else [None] * len(raw)
        return [
            Rewarded(
                pieces=tuple(pieces(self.tokenizer, ids)),
                labels=tuple(self.tokenizer.convert_ids_to_tokens(ids)),
                rewards=row[: len(ids)],
                score=score,
                ended=bool(ids) and ids[-1] in self.ends,
            )
            for ids, row, score in zip(completions, rewards, scores)
        ]


def credit_report(pairs: Sequence[RewardedPair], credit: Credit) -> CreditReport:
    """How well token rewards follow the truth, word by word, on both sides of the pairs."""
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    with users_code(function_name(credit)):
        spans = credit(prompts=[p for p, _ in sides], completions=["".join(side.pieces) for _, side in sides])
    if len(spans) != len(sides):
        raise ValueError(f"the credit has {len(spans)} lists of spans for {len(sides)} completions: one for each")
    groups = [words(side.pieces) for _, side in sides]
    return report_on_credit(
        [by_word(side.rewards, group) for (_, side), group in zip(sides, groups)],
        [credit_of_words(side.pieces, group, s) for (_, side), group, s in zip(sides, groups, spans, strict=True)],
    )


def spoken(prompt: Any) -> str:
    """A prompt as text for people."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


# --- what the user named


def _inspector(
    args: InspectArguments,
    models: list[str],
    functions: dict[str, Callable[..., Any]],
    score: str | Callable[..., Any] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> "Inspector":
    """Load what runs."""
    init: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "dtype": args.dtype}
    reference = _reference(args, models)
    named = [*(("--dpo_model", model) for model in models), ("--ref_model", reference), ("--reward_model", score)]
    for flag, model in named:
        if isinstance(model, str):
            check_weights(flag, model)
    source = token_source(
        [functions.get(spec, spec) for spec in args.dpo_model],
        reference,
        kind=args.token_reward,
        pessimism=args.token_reward_pessimism,
        temperature=args.temperature,
        max_tokens=args.max_tokens_per_micro_batch,
        **init,
    )
    scored = None if score is None else reward_source(score, max_tokens=args.max_tokens_per_micro_batch, **init)
    if isinstance(scored, RewardModel):
        split_special_tokens(scored.tokenizer, args.split_special_tokens)
    return Inspector(source, tokenizer, score=scored, device=PartialState().device)


def _reference(args: InspectArguments, models: list[str]) -> str | None:
    """The model to compare with: the named one, or an adapter's base."""
    if args.ref_model is not None or not models or not TOKEN_REWARDS[args.token_reward].compares:
        return args.ref_model
    base = base_of_adapter(models[0])
    if base is None:
        raise ValueError(
            f"{models[0]} is a whole model, so its reference must be named: --ref_model, the model it started from"
        )
    return base


def _check_models(args: InspectArguments, models: list[str]) -> int | None:
    """What can be told of models before they are loaded; the longest row that all of them can read."""
    trust = args.trust_remote_code
    for model in models:
        find_config("--dpo_model", model, trust_remote_code=trust)
    reference = _reference(args, models)
    named = [("--dpo_model", model) for model in models] + ([("--ref_model", reference)] if reference else [])
    scoring = ("--dpo_model",) if TOKEN_REWARDS[args.token_reward].scalar else ()
    context = shared_context(named, lambda _: {"trust_remote_code": trust}, scoring=scoring)
    if args.reward_model is not None and not is_function(args.reward_model):
        find_config("--reward_model", args.reward_model, trust_remote_code=trust)
    if models:
        tokenizer = load_tokenizer(models[0], trust_remote_code=trust)
        for role, other in named[1:]:
            check_same_vocabulary(role, other, tokenizer, models[0], trust_remote_code=trust)
    return context


def base_of_adapter(source: str) -> str | None:
    """The model that an adapter's folder names as its base; None for a whole model."""
    path = Path(source) / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None


def _load(args: InspectArguments, path: str) -> Dataset:
    return load_rows(path, name=args.dataset_config, split=args.dataset_test_split)


def _pairs_of(
    args: InspectArguments, name: str, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[str, Dataset, list[Pair], Skipped]:
    """A data set of pairs: its name, its rows, what can be read of them, and what cannot."""
    rows = _head(_load(args, name), args.rows)
    pairs, skipped = read_pairs(rows, tokenizer, max_length=args.max_length, context=context, what=name)
    return name, rows, pairs, skipped


def _head(dataset: Dataset, rows: int | None) -> Dataset:
    return dataset if rows is None else dataset.select(range(min(rows, len(dataset))))


def _what(args: InspectArguments) -> str:
    return f"the prompt {args.prompt!r}" if args.prompt is not None else str(args.completions)


def _rows_to_show(
    args: InspectArguments, tokenizer: PreTrainedTokenizerBase, models: list[str], limit: int, skipped: Skipped
) -> list[dict[str, Any]]:
    """Rows for `Inspector.show`, each with the names of its sides, each checked; long ones of a file are counted."""
    rows = [_typed_in(args, tokenizer, models, limit)] if args.completions is None else _of_file(args, tokenizer)
    skipped.total = len(rows)
    found = []
    for i, row in enumerate(rows):
        where = f"{_what(args)}, row {i}" if args.completions is not None else "--prompt"
        if not row["prompt"]:
            raise DataError(f"{where} is empty: a completion's first token needs something before it")
        longest = 0
        for side in row["sides"]:
            if row[side] is None:
                raise DataError(f"{where} has no {side}")
            tokens = sum(map(len, _ids_of(row, side, tokenizer)))
            if tokens > limit and args.completions is None:
                raise DataError(f"{where}: with its {side} it is {tokens} tokens, {_over(args, limit)}")
            longest = max(longest, tokens)
        if longest > limit:
            skipped.add(_over(args, limit), i)
        else:
            found.append({**row, "row": i})
    _check_some_are_left(found, skipped, _what(args))
    return found


def _check_some_are_left(found: Sequence[Any], skipped: Skipped, what: str) -> None:
    if not found:
        raise DataError(f"{skipped.report(what)}. Nothing is left to look at")


def _ids_of(row: dict[str, Any], side: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Prompt and completion as tokens; a sampled completion as it was sampled, which its text need not give again."""
    ended = row.get(f"{side}_ended", True)
    prompt, ids = completion_ids(row["prompt"], row[side], tokenizer, ended=ended, **template_options(row))
    return prompt, row["sampled"].get(side) or without_tail(ids, tokenizer)


def _over(args: InspectArguments, limit: int) -> str:
    return f"over {'max_length' if limit == args.max_length else 'the context of a model'}, {limit}"


def _of_file(args: InspectArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    rows = _head(_load(args, str(args.completions)), args.show)
    sides = [name for name in ("completion", "chosen", "rejected") if name in rows.column_names]
    if "prompt" not in rows.column_names or not sides:
        raise DataError(
            f"{args.completions} has the columns {', '.join(rows.column_names)}: heat-maps need a prompt, and a "
            "completion or chosen and rejected"
        )
    if not len(rows):
        raise DataError(f"{args.completions} has no rows")
    return [
        {**_said(row, sides, tokenizer, f"{args.completions}, row {i}"), "sides": sides, "sampled": {}}
        for i, row in enumerate(rows)
    ]


def _said(row: dict[str, Any], sides: list[str], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """A row with its prompt and completions as the other stages read them.

    Raises:
        DataError: something is missing or cannot be read.
    """
    try:
        read = {side: normalized(row, (side,), tokenizer) for side in sides}
    except DataError as error:
        raise DataError(f"{where} is one {error}: to be shown it needs a prompt and {' and '.join(sides)}") from error
    return {**read[sides[0]], **{side: read[side][side] for side in sides}}


def _typed_in(
    args: InspectArguments, tokenizer: PreTrainedTokenizerBase, models: list[str], limit: int
) -> dict[str, Any]:
    if not args.prompt:
        raise DataError("--prompt is empty: a completion's first token needs something before it")
    row: dict[str, Any] = {"prompt": args.prompt, "sampled": {}}
    if args.completion is not None:
        row |= {f"completion {i + 1}": text for i, text in enumerate(args.completion)}
    else:
        for i, (text, ids, ended) in enumerate(_sample(args, tokenizer, models, limit)):
            name = f"completion {i + 1}"
            row |= {name: text, f"{name}_ended": ended}
            row["sampled"][name] = ids
    return row | {"sides": [name for name in row if re.fullmatch(r"completion \d+", name)]}


def _sample(
    args: InspectArguments, tokenizer: PreTrainedTokenizerBase, models: list[str], limit: int
) -> list[tuple[str, list[int], bool]]:
    """Two completions of the prompt by the first model, as text and as tokens, and whether they ended."""
    if not models:
        raise ValueError("nothing to sample from: give --completion, or a model as --dpo_model")
    ids = prompt_ids(args.prompt, tokenizer)
    if len(ids) + args.max_completion_length > limit:
        raise DataError(f"--prompt is {len(ids)} tokens: with max_completion_length it is {_over(args, limit)}")
    policy = load_policy(models[0], trust_remote_code=args.trust_remote_code, dtype=args.dtype).to(
        PartialState().device
    )
    config = SamplingConfig(max_completion_length=args.max_completion_length, temperature=args.temperature)
    sampler = TransformersSampler.of(policy, tokenizer, config)
    drawn = draw(sampler, policy, tokenizer, [ids] * 2, args.seed)
    return list(zip(drawn.texts, drawn.ids, drawn.ended, strict=True))
