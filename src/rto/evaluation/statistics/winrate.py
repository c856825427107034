"""Win rate by AlpacaEval's conventions; what verdicts owe to position and length. numpy and scipy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from rto.evaluation.statistics.estimates import Estimate


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """A model against a baseline; rates and their error in percent.

    Attributes:
        win_rate: mean preference.
        standard_error: of it, s / √n with n − 1 in s.
        discrete_win_rate: a preference beyond ½ counts whole, a draw half.
        wins, losses, draws: prompts on which the preference is over, under and exactly ½.
        judged: n; ``missing`` prompts have no readable verdict and are in no other number.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    wins: int
    losses: int
    draws: int
    judged: int
    missing: int


def preference_share(preference: float | None) -> float:
    """Y = preference − 1 in [0, 1]: 1 the model wins, 0 the baseline, ½ a draw (1.5, or the older 0); nan not judged.

    Raises:
        ValueError: the preference is something else.
    """
    if preference is None or preference != preference:  # nan
        return np.nan
    if preference == 0:
        return 0.5
    if not 1 <= preference <= 2:
        raise ValueError(
            f"preference {str(preference)[:20]} is not in [1, 2] (2: the model wins; 1.5 or 0: a draw; "
            "null: no verdict)"
        )
    return preference - 1.0


def preference_shares(preference: Sequence[float | None] | np.ndarray) -> Float[np.ndarray, " n"]:
    """`preference_share` of each row.

    Raises:
        ValueError: as there; the message names the row.
    """
    shares = []
    for i, x in enumerate(preference):
        try:
            shares.append(preference_share(x))
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from error
    return np.array(shares, dtype=float)


def win_rate(shares: Float[np.ndarray, " n"]) -> WinRate:
    """100 · mean(y) and its standard error over the judged prompts (``alpaca_eval.metrics.winrate``).

    Raises:
        ValueError: no prompt was judged.
    """
    y = shares[~np.isnan(shares)]
    if not len(y):
        raise ValueError("no prompt has a verdict")
    rate = Estimate.of(100 * y)
    wins, losses, draws = (int(n.sum()) for n in (y > 0.5, y < 0.5, y == 0.5))
    return WinRate(
        win_rate=rate.mean,
        standard_error=rate.se,
        discrete_win_rate=100 * (wins + draws / 2) / len(y),
        wins=wins,
        losses=losses,
        draws=draws,
        judged=len(y),
        missing=len(shares) - len(y),
    )


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """What sitting first is worth to an answer, for one judge.

    Attributes:
        first: share of verdicts for the answer shown first, a draw counting half; ½ is no bias.
        agreement: share of exchanged pairs whose two verdicts name the same winner (or both a draw); None when no
            pair was judged both ways round.
    """

    first: Estimate
    agreement: Estimate | None


def position_bias(
    shares: Float[np.ndarray, " n"], model_first: Bool[np.ndarray, " n"], prompt: Sequence[object]
) -> PositionBias:
    """``first`` = mean of y where the model stood first, 1 − y where it stood second, over prompts.

    Where a prompt was judged both ways round its games are averaged before the standard error is taken: what the
    answers are worth cancels, and two games on one prompt are not two prompts. Where sides were drawn at random, once
    a prompt, it cancels on average only.

    Args:
        shares: y of each game, nan where there is no verdict.
        model_first: whether the model's answer was shown first.
        prompt: which games belong together.

    Raises:
        ValueError: no game has a verdict.
    """
    judged = ~np.isnan(shares)
    if not judged.any():
        raise ValueError("no game has a verdict")
    y, first = shares[judged], np.asarray(model_first)[judged]
    _, group = np.unique(np.array([str(p) for p in prompt])[judged], return_inverse=True)
    games = np.bincount(group)
    per_prompt = np.bincount(group, np.where(first, y, 1 - y)) / games
    both = (games == 2) & (np.bincount(group, first) == 1)
    winner = np.sign(y - 0.5)
    same = np.abs(np.bincount(group, winner * np.where(first, 1, -1)))[both] == 0
    return PositionBias(first=Estimate.of(per_prompt), agreement=Estimate.of(same) if both.any() else None)


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How verdicts go with length; length may cause them or go with quality, so this is a warning, not a correction.

    Attributes:
        longer: share of verdicts for the longer answer, a draw counting half, over prompts with unequal lengths.
        correlation: Spearman's, between length difference and preference; nan when either is constant.
        p: of no correlation.
        prompts: with unequal lengths.
    """

    longer: Estimate
    correlation: float
    p: float
    prompts: int


def length_bias(shares: Float[np.ndarray, " n"], extra_length: Float[np.ndarray, " n"]) -> LengthBias:
    """``longer`` = mean of y where the model's answer is longer, 1 − y where it is shorter.

    Args:
        shares: y, nan where there is no verdict.
        extra_length: length of the model's answer minus the baseline's, in any unit.

    Raises:
        ValueError: no judged prompt has answers of unequal length.
    """
    keep = ~np.isnan(shares) & (extra_length != 0)
    y, extra = shares[keep], np.asarray(extra_length, dtype=float)[keep]
    if not len(y):
        raise ValueError("no judged prompt has answers of unequal length")
    correlation, p = np.nan, np.nan
    if len(y) > 2 and np.ptp(y) > 0 and np.ptp(extra) > 0:
        correlation, p = stats.spearmanr(extra, y)
    return LengthBias(
        longer=Estimate.of(np.where(extra > 0, y, 1 - y)), correlation=float(correlation), p=float(p), prompts=len(y)
    )
