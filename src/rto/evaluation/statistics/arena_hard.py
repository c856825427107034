"""Arena-Hard v0.1: Bradley–Terry scores against a baseline, bootstrap intervals, style control. numpy only.

Sources: Li et al., "From Crowdsourced Data to High-Quality Benchmarks" (arXiv:2406.11939); ``show_result.py``,
``utils_math.py`` and ``add_markdown_info.py`` of lmarena/arena-hard-auto as of 2024-09-01.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from rto.evaluation.statistics.logistic import fit_logistic

BASELINE = "gpt-4-0314"
STRONG = 3
"""How often a strong verdict counts."""
VERDICTS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
"""Share of answer A, and how many battles the verdict makes."""
STYLE = ("tokens", "headers", "lists", "bold")
"""The official order: ``token_len``, ``header_count``, ``list_count``, ``bold_count``."""
ELO = math.log(10)
"""Model columns are ± ln 10 in the official design: a coefficient of 1 is 400 Elo points."""
STYLE_L2 = 1.0
"""scikit-learn's default ridge, which the official style-controlled fit has; the plain one has none."""


@dataclass(frozen=True, kw_only=True)
class Games:
    """Judged games of some models against one baseline; G games, a strong one being several battles.

    Attributes:
        models: names, in the order of every result here.
        questions: ids.
        model, question: indices of each game into them.
        share: of the model: 1 win, ½ tie, 0 loss.
        battles: how many battles the game counts as.
        style: (baseline − model) / (baseline + model + 1) of each style count, or None when not known.
    """

    models: tuple[str, ...]
    questions: tuple[str, ...]
    model: Int[np.ndarray, " G"]
    question: Int[np.ndarray, " G"]
    share: Float[np.ndarray, " G"]
    battles: Int[np.ndarray, " G"]
    style: Float[np.ndarray, "G 4"] | None = None

    @property
    def once(self) -> Float[np.ndarray, "1 G"]:
        """Each game as often as it counts: the weights of the estimate itself."""
        return self.battles[None].astype(float)

    def resample_questions(self, weights: Float[np.ndarray, "R q"]) -> Float[np.ndarray, "R G"]:
        """Weights of the games when question i is drawn ``weights[:, i]`` times, with all its games.

        The bootstrap of the paper's own statistics file. Copies of a strong verdict, the two games of a question and
        all models' games on it stay together, so an interval has the width that new questions would give.
        """
        return weights[:, self.question] * self.battles

    def resample_battles(self, rounds: int, seed: int) -> Float[np.ndarray, "R G"]:
        """Weights of the games when battles are drawn one by one out of the pool: the published leaderboard's rule.

        It takes the three copies of a strong verdict for three independent battles and so gives intervals that are too
        narrow (by a third for gpt-4-0613).
        """
        total = int(self.battles.sum())
        return np.random.default_rng(seed).multinomial(total, self.battles / total, size=rounds).astype(float)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One verdict: the model's share (1 win, ½ tie, 0 loss), and the number of battles it counts as."""

    model: str
    question: str
    share: float
    battles: int


def outcome(model: str, question: str, verdict: str | None, *, round_: int) -> Outcome | None:
    """What a verdict says of a game; None for a judgment without one of the five.

    In round 0 the baseline is answer A, in round 1 the model is.
    """
    if verdict not in VERDICTS:
        return None
    share, battles = VERDICTS[verdict]
    return Outcome(model=model, question=question, share=share if round_ == 1 else 1 - share, battles=battles)


def arena_scores(games: Games, weights: Float[np.ndarray, "R G"]) -> Float[np.ndarray, "R M"]:
    """``score_m`` = 100·P(m beats the baseline) = 100·Σ w·share / Σ w over the games of m.

    This *is* the Bradley–Terry maximum-likelihood score scaled to 50 for the baseline: where every game is against one
    baseline, the likelihood falls apart into one binomial a model, so sigmoid(ξ_m − ξ_b) is the weighted win share.
    nan in a round that drew no game of m.
    """
    of_model = (games.model[:, None] == np.arange(len(games.models))).astype(float)
    with np.errstate(invalid="ignore"):
        return 100 * ((weights * games.share) @ of_model) / (weights @ of_model)


@dataclass(frozen=True, kw_only=True)
class StyleControlled:
    """R fits: scores in percent, and what one standard deviation of each style difference adds to the log-odds."""

    scores: Float[np.ndarray, "R M"]
    style: Float[np.ndarray, "R 4"]


def style_controlled(games: Games, weights: Float[np.ndarray, "R G"]) -> StyleControlled:
    """Logit P(baseline wins) = ln 10·(w_b − w_m) + γ·z,   score_m = 100·sigmoid(ln 10·(w_m − w_b)).

    z are the normalised style differences, each standardised over all battles of the pool; the fit has the official
    ridge (C = 1 with every battle counted twice). γ is shared by all models, so scores depend on which models are in
    the pool.

    Raises:
        ValueError: the games carry no style counts.
    """
    if games.style is None:
        raise ValueError("style control needs the token and markdown counts of both answers")
    x = np.concatenate([_model_columns(games), _standardised(games)], axis=1)
    w = fit_logistic(x, 1 - games.share, 2 * weights, l2=STYLE_L2)
    models = len(games.models)
    gap = ELO * (w[:, 1 : models + 1] - w[:, :1])
    return StyleControlled(scores=100 / (1 + np.exp(-gap)), style=w[:, models + 1 :])


def _model_columns(games: Games) -> np.ndarray:
    x = np.zeros((len(games.share), len(games.models) + 1))
    x[:, 0] = ELO
    x[np.arange(len(x)), 1 + games.model] = -ELO
    return x


def _standardised(games: Games) -> np.ndarray:
    """Mean 0 and standard deviation 1 over battles; a count that never differs explains nothing and stays 0."""
    assert games.style is not None
    c = games.battles / games.battles.sum()
    centred = games.style - c @ games.style
    deviation = np.sqrt(c @ centred**2)
    return centred / np.where(deviation > 0, deviation, 1.0)


def style_difference(
    baseline: Sequence[float] | np.ndarray, model: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "4"]:
    """(a − b) / (a + b + 1) of the counts of baseline a and model b, in [−1, 1]."""
    a, b = np.asarray(baseline, dtype=float), np.asarray(model, dtype=float)
    return (a - b) / (a + b + 1)


_CODE = re.compile(r"```([^`]*)```")
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
_NUMBERED, _BULLET = re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE)
_STARS, _UNDERSCORES = re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__")


def markdown_counts(answer: str) -> dict[str, int]:
    """Headers, list items and bold spans of an answer outside its fenced code.

    As officially counted: what stands between fences is removed wherever it occurs, the fences stay.
    """
    text = answer
    for code in _CODE.findall(answer):
        text = text.replace(code, "")

    def found(*patterns: re.Pattern[str]) -> int:
        return sum(len(pattern.findall(text)) for pattern in patterns)

    return {"headers": found(_HEADER), "lists": found(_NUMBERED, _BULLET), "bold": found(_STARS, _UNDERSCORES)}


def pool(games: Sequence[Outcome], style: Mapping[tuple[str, str], np.ndarray] | None = None) -> Games:
    """Games side by side, with the style difference of each (model, question) where given."""
    models = tuple(dict.fromkeys(g.model for g in games))
    questions = tuple(dict.fromkeys(g.question for g in games))
    at_model, at_question = ({x: i for i, x in enumerate(names)} for names in (models, questions))
    return Games(
        models=models,
        questions=questions,
        model=np.array([at_model[g.model] for g in games], dtype=int),
        question=np.array([at_question[g.question] for g in games], dtype=int),
        share=np.array([g.share for g in games], dtype=float),
        battles=np.array([g.battles for g in games], dtype=int),
        style=None if style is None else np.array([style[g.model, g.question] for g in games]).reshape(-1, len(STYLE)),
    )
