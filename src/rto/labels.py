"""Who says which of two completions is better: the gold reward, a judge behind an endpoint, or a person.

A label is what pairs cost, so a pair that none could be given is left out before anybody is asked: two equal
completions, an empty one, a pair that was there before. What was asked for and says nothing (a tie, an answer that
cannot be read) has cost its label, and is counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rto.data.chat import TEMPLATE_COLUMNS
from rto.data.errors import DataError
from rto.data.formats import Prompt
from rto.data.values import read_value, unanswered
from rto.evaluation.benchmarks.types import Battle, Contest, Question
from rto.evaluation.judging.endpoint import Cache, Endpoint, Patience
from rto.evaluation.judging.judges import PROTOCOLS, ChatJudge, Judge, hold, read_template
from rto.files import Row, read_rows, shown, write_atomically
from rto.inspection.reading import spoken
from rto.recipe import JudgeEndpoint
from rto.rollout.rewards import Completed

TIE = "a tie"
WORDS = ("a", "b", "tie")
"""What a person may write."""


class LabelsMissingError(DataError):
    """A person has not labelled all pairs yet; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class SampledPair:
    """Two completions of one policy for one prompt; neither is better by its place, since both are drawn alike."""

    prompt: Prompt
    completions: tuple[Any, Any]
    """Each in the format of the prompt: text, or one message."""
    ended: tuple[bool, bool]
    policy: str

    def row(self) -> Row:
        """As `read_sampled` reads it."""
        return {
            "prompt": self.prompt.raw,
            "completions": list(self.completions),
            "ended": list(self.ended),
            "policy": self.policy,
            **template_columns(self.prompt),
        }


class Label(NamedTuple):
    """What was said of a pair."""

    first: bool | None
    """The first completion is better; None: neither, for a reason."""
    reason: str | None = None


def template_columns(prompt: Prompt) -> Row:
    """What else of a row the chat template reads."""
    return {name: prompt.columns[name] for name in TEMPLATE_COLUMNS if prompt.columns.get(name)}


# --- before anybody is asked


def distinct(
    pairs: Sequence[SampledPair], earlier: Iterable[Mapping[str, Any]] = ()
) -> tuple[list[SampledPair], Counter[str]]:
    """The pairs that a label can be given, and how many others there are, by reason.

    Args:
        pairs: as they were sampled.
        earlier: rows of former rounds (``prompt``, ``chosen``, ``rejected``); a pair of them is not asked for again.
    """
    seen = {_identity(row.get("prompt"), (row["chosen"], row["rejected"])) for row in earlier}
    kept: list[SampledPair] = []
    left: Counter[str] = Counter()
    for pair in pairs:
        key = _identity(pair.prompt.raw, pair.completions)
        if pair.completions[0] == pair.completions[1]:
            left["two equal completions"] += 1
        elif any(unanswered(read_value(side, "completion")) for side in pair.completions):
            left["an empty completion"] += 1
        elif key in seen:
            left["a pair that was there before"] += 1
        else:
            seen.add(key)
            kept.append(pair)
    return kept, left


def _identity(prompt: Any, sides: Sequence[Any]) -> tuple[str, frozenset[str]]:
    """Of a pair, whichever side stands first."""
    return json.dumps(prompt, sort_keys=True), frozenset(json.dumps(side, sort_keys=True) for side in sides)


# --- who is asked


def by_gold(
    pairs: Sequence[SampledPair], score: Callable[[Completed], list[float]], *, temperature: float, seed: int
) -> list[Label]:
    """P(first ≻ second) = σ((gold₁ − gold₂) / temperature), Bradley–Terry, and one draw of it a pair."""
    gold = [torch.tensor(score(side), dtype=torch.float64) for side in sides(pairs)]
    chance = torch.sigmoid((gold[0] - gold[1]) / temperature)
    draw = torch.rand(len(chance), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [Label(bool(first)) for first in draw < chance]


def sides(pairs: Sequence[SampledPair]) -> list[Completed]:
    """All first completions, and all second ones."""
    prompts = [pair.prompt for pair in pairs]
    return [
        Completed.of(prompts, [pair.completions[i] for pair in pairs], [pair.ended[i] for pair in pairs])
        for i in range(2)
    ]


def by_judge(pairs: Sequence[SampledPair], judge: Judge) -> list[Label]:
    """The side that the judge prefers on average over both orders.

    A judge that prefers whatever it is shown first, or that says "as good" twice, has made a tie; an order that
    could not be read leaves the pair unread.
    """
    battles = [
        Battle(
            question=Question(
                key=(str(i), 0),
                text=spoken(pair.prompt.raw),
                messages=None if isinstance(pair.prompt.raw, str) else pair.prompt.raw,
            ),
            baseline=text_of(pair.completions[0]),
            answer=text_of(pair.completions[1]),
        )
        for i, pair in enumerate(pairs)
    ]
    judge.games = 2
    return [_verdict(contest) for contest in hold(judge, battles)]


def _verdict(contest: Contest) -> Label:
    """A preference above 1½ is for the second completion, the "answer" of the battle."""
    preference = contest.preference
    if preference is None:
        reason = next(game.reason for game in contest.games if game.preference is None)
        return Label(None, f"not read: {reason}")
    return Label(None, TIE) if preference == 1.5 else Label(preference < 1.5)


def judge_of(asked: JudgeEndpoint, cache: Path) -> ChatJudge:
    """The judge that a recipe names; what it has answered is in a file, and is not asked for again.

    Raises:
        DataError: the template cannot be read.
        EndpointError: the address or the key cannot be used.
    """
    kind: Any = PROTOCOLS[asked.protocol]
    own = kind()
    parameters = {name: value for name, value in {**own.parameters, **asked.parameters}.items() if value is not None}
    template = own.template if asked.template is None else read_template(Path(asked.template))
    endpoint = Endpoint(
        asked.base_url,
        asked.model,
        key_variable=asked.key_env,
        cache=Cache(cache),
        patience=Patience(timeout=asked.timeout, retries=asked.retries),
        concurrency=asked.concurrency,
    )
    return ChatJudge(endpoint, kind(template=template, parameters=parameters))


def cost_of(judge: ChatJudge) -> Row:
    """What a judge was asked and what it said, in requests and tokens."""
    told = ("requests", "answered", "cached", "failed", "prompt_tokens", "completion_tokens")
    usage = asdict(judge.endpoint.usage)
    return {name: usage[name] for name in told}


# --- a person


def write_questions(pairs: Sequence[SampledPair], path: Path) -> None:
    """The file that a person fills, one row a pair; one that is there already is left as it is."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, map(_question, pairs))


def _question(pair: SampledPair) -> Row:
    first, second = map(text_of, pair.completions)
    return {"prompt": spoken(pair.prompt.raw), "completion_a": first, "completion_b": second, "label": ""}


def by_person(pairs: Sequence[SampledPair], path: Path) -> list[Label]:
    """What a person has written: a where ``completion_a`` is better, b where the other is, tie where neither.

    Raises:
        LabelsMissingError: rows are not filled yet.
        DataError: a row is damaged, was altered, or has another label.
    """
    read = read_rows(path)
    again = f"or delete {path} and label anew"
    if read.cut is not None:
        raise DataError(f"{path}: cut off in row {len(read.rows)}: bring it back whole, {again}")
    if len(read.rows) != len(pairs):
        raise DataError(f"{path}: {len(read.rows)} rows, and {len(pairs)} pairs were written: bring it back, {again}")
    labels, empty = [], []
    for i, pair in enumerate(pairs):
        for name, was in _question(pair).items():
            if name != "label" and read.get(i, name, str) != was:
                raise DataError(
                    f"{read.where(i)}: {name} is not what was written ({shown(was)}), so its label would be of "
                    f"something else: bring the row back, {again}"
                )
        said = str(read.get(i, "label", str, type(None)) or "").strip().lower()
        if said and said not in WORDS:
            raise DataError(f"{read.where(i)}: label is {shown(said)}: write a, b or tie")
        empty += [] if said else [i]
        labels.append(Label(None, TIE) if said == "tie" else Label(said == "a"))
    if empty:
        few = (
            "none of them has" if len(empty) == len(pairs) else f"{len(empty)} have not, the first is row {empty[0]},"
        )
        raise LabelsMissingError(
            f"{path}: {len(pairs)} pairs wait for a label, and {few} one: write a, b or tie as the label of each row, "
            "then run the same command again"
        )
    return labels


def text_of(completion: Any) -> str:
    """A completion as text."""
    return completion if isinstance(completion, str) else "\n".join(str(m["content"]) for m in completion)


# --- files


def write_sampled(pairs: Sequence[SampledPair], left: Mapping[str, int], path: Path, inputs: Row) -> None:
    """Pairs that wait for labels, what was left out, and what they were made from."""
    _write(path, [{"inputs": inputs, "left": dict(left)}, *(pair.row() for pair in pairs)])


def read_sampled(path: Path, inputs: Row) -> tuple[list[SampledPair], Counter[str]] | None:
    """What `write_sampled` wrote; None where there is nothing, or something that was made from other inputs."""
    if not path.is_file():
        return None
    head, *rows = read_rows(path).rows
    if head["inputs"] != inputs:
        return None
    return [_sampled(row) for row in rows], Counter(head["left"])


def _sampled(row: Row) -> SampledPair:
    columns = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
    (first, second), (ended, also) = row["completions"], row["ended"]
    return SampledPair(
        prompt=Prompt([], row["prompt"], columns),
        completions=(first, second),
        ended=(ended, also),
        policy=row["policy"],
    )


def labelled(pairs: Sequence[SampledPair], labels: Sequence[Label], more: Callable[[SampledPair], Row]) -> list[Row]:
    """Rows in TRL's preference format, of the pairs that have a better side; ``more`` gives further columns."""
    rows = []
    for pair, label in zip(pairs, labels, strict=True):
        if label.first is not None:
            won, lost = (0, 1) if label.first else (1, 0)
            row = {"prompt": pair.prompt.raw, "chosen": pair.completions[won], "rejected": pair.completions[lost]}
            row |= {"chosen_ended": pair.ended[won], "rejected_ended": pair.ended[lost]}
            rows.append(row | template_columns(pair.prompt) | more(pair))
    return rows


def counts(left: Mapping[str, int], labels: Sequence[Label]) -> Row:
    """What became of the sampled pairs: ``labels`` were paid for, ``pairs`` are learned from."""
    said = Counter(label.reason for label in labels if label.reason is not None)
    return {
        "sampled": len(labels) + sum(left.values()),
        "not asked": dict(left),
        "labels": len(labels),
        "left out": dict(said),
        "pairs": len(labels) - said.total(),
    }


def _write(path: Path, rows: Iterable[Row]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
