"""What the token reward adds to the sentence reward, and the other way: labels regressed on both margins."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rto.evaluation.statistics.estimates import Z
from rto.evaluation.statistics.logistic import fit_logistic, sigmoid

FOLDS = 10
LEAST = 2 * FOLDS
"""Pairs: two a fold."""
RIDGE = 1e-4
"""Of standardized margins: bounds the weights where pairs are separable, and moves no other fit."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of a logistic model with its 95 % interval (sandwich standard error)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """P(chosen ≻ rejected) = σ(w_d · Δd + w_s · Δs), Δ chosen less rejected, on held-out pairs.

    d is Σ_t clip(log π_dpo/π_ref), what the on-line stage is paid β₁ times; s is the score, paid β₃ times. The
    optimum of Eq. 4.7 is π* ∝ π_ref exp((β₁ d + β₃ s) / β₂): a policy is paid what people prefer, as far as these two
    know it, where β₁ : β₃ = w_d : w_s. Both are read from the same pairs, so one may add nothing to the other.
    """

    token_weight: Weight
    """w_d, a nat of the clipped log-ratio."""
    score_weight: Weight
    """w_s, a unit of the score."""
    ratio: float
    """β₁ / β₃ = w_d / w_s; NaN where a weight is not positive: no ratio is then better than one source alone."""
    log_loss: dict[str, float]
    """Cross-fitted mean −log P of the labels, nats: token, score, both. ln 2 says nothing."""
    token_adds: Weight
    """Log loss of the score alone less that of both, a pair: what the token reward adds (paired interval)."""
    score_adds: Weight
    """Log loss of the token reward alone less that of both: what the score adds."""
    knows: Weight
    """ln 2 less the log loss of both, nats a pair: what the two know of these labels."""
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """The same on pairs drawn from a trained policy and labelled anew, beside the held-out pairs of the start."""

    stacked: Stacked
    room: Weight
    """What both know of held-out labels less what they know of fresh ones: the room that fresh labels have."""


def compare_fresh(held_out: Stacked, fresh: Stacked) -> Fresh:
    """The drop from one set of pairs to the other, whose errors are independent."""
    a, b = held_out.knows, fresh.knows
    se = math.hypot(a.high - a.value, b.high - b.value) / Z
    return Fresh(stacked=fresh, room=_weight(a.value - b.value, se))


def stack(token: Float[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> Stacked | None:
    """Fit `Stacked` on the margins of n pairs; None where there are fewer than `LEAST`.

    Log losses are cross-fitted: a pair is judged by weights that were fitted without its fold. Rows are dealt to folds
    in turn, so the same pairs give the same numbers.
    """
    n = len(token)
    if n < LEAST:
        return None
    x = np.stack([token, score], axis=1)
    spread = np.sqrt((x**2).mean(0))
    x = x / np.where(spread > 0, spread, 1.0)
    columns = {"token": [0], "score": [1], "both": [0, 1]}
    loss = {name: _cross_fitted(x[:, at]) for name, at in columns.items()}
    w, se = _fit(x)
    scale = np.where(spread > 0, spread, math.nan)
    token_weight, score_weight = (_weight(*pair) for pair in zip(w / scale, se / scale, strict=True))
    positive = token_weight.value > 0 and score_weight.value > 0
    return Stacked(
        token_weight=token_weight,
        score_weight=score_weight,
        ratio=token_weight.value / score_weight.value if positive else math.nan,
        log_loss={name: float(x.mean()) for name, x in loss.items()},
        token_adds=_mean(loss["score"] - loss["both"]),
        score_adds=_mean(loss["token"] - loss["both"]),
        knows=_mean(math.log(2) - loss["both"]),
        pairs=n,
    )


def _cross_fitted(x: np.ndarray) -> np.ndarray:
    fold = np.arange(len(x)) % FOLDS
    loss = np.empty(len(x))
    for k in range(FOLDS):
        w, _ = _fit(x[fold != k])
        loss[fold == k] = np.logaddexp(0, -x[fold == k] @ w)
    return loss


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """argmin_w Σ log(1 + e^{−x·w}) + n · RIDGE/2 · ‖w‖² with sandwich standard errors. Every label is 1, no offset."""
    n, d = x.shape
    w = fit_logistic(x, np.ones(n), np.ones((1, n)), l2=RIDGE * n)[0]
    p = sigmoid(-x @ w)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + RIDGE * n * np.eye(d))
    meat = (x * (p**2)[:, None]).T @ x
    return w, np.sqrt(np.diag(bread @ meat @ bread))


def _weight(value: float, se: float) -> Weight:
    return Weight(value=float(value), low=float(value - Z * se), high=float(value + Z * se))


def _mean(x: np.ndarray) -> Weight:
    return _weight(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)))
