"""What benchmarks are made of: questions, answers, battles of two answers, and the games a judge makes of a battle."""

from dataclasses import dataclass, field
from typing import Any

from rto.files import Row

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
