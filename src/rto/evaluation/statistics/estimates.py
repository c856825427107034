"""Means with standard errors, the bootstrap over prompts, paired tests and Holm's correction. numpy and scipy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval here."""
Z = 1.959963984540054
"""Of a normal variable, at that coverage."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts with its standard error (s / √n)."""

    mean: float
    se: float

    @classmethod
    def of(cls, x: Sequence[float] | np.ndarray) -> "Estimate":
        """Mean and standard error of independent numbers."""
        x = np.asarray(x, dtype=float)
        return cls(mean=float(x.mean()), se=float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan"))


def wilson(p: float, n: int, z: float = Z) -> tuple[float, float]:
    """(p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n): Wilson (1927), 95 %.

    It keeps a width where all n agree, and a draw, counted ½, varies less than the Bernoulli trial it assumes.
    """
    middle, width = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max((middle - width) / (1 + z * z / n), 0.0), min((middle + width) / (1 + z * z / n), 1.0)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much one policy is ahead of another on the same prompts.

    Attributes:
        value: the difference of the two estimates.
        low, high: its 95 % percentile interval.
        p: two-sided p-value of "no difference".
        prompts: how many prompts both were judged on.
    """

    value: float
    low: float
    high: float
    p: float
    prompts: int


def bootstrap_weights(n: int, rounds: int, seed: int) -> Float[np.ndarray, "R n"]:
    """How often each of n prompts is drawn in each of R rounds: multinomial(n; 1/n, …, 1/n).

    Drawing counts instead of indices lets every statistic that is a weighted sum be a matrix product.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=rounds).astype(float)


def percentile_interval(draws: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles over the rounds, linearly interpolated."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def paired_difference(
    value: float, draws: Float[np.ndarray, " R"], *, prompts: int, centre: float | None = None
) -> Difference:
    """T = d / (s* √(n / (n − 1))),  p = max(2 P(T_{n−1} > |t|), 2^{1−n}).

    d is the difference on the sample, s* the standard deviation of the same difference over bootstrap rounds that
    draw the same prompts for both policies. The tail is Student's, so that p does not stop at 1/R and many pairs can
    be corrected for; it is never below 2^{1−n}, the least that a sign-flip test on n prompts can say.

    Args:
        value: d.
        draws: the difference in each round.
        prompts: n, the prompts that both share.
        centre: what the rounds scatter around when that is not d (a cheaper fit than the one that gave d).
    """
    draws = draws + (0.0 if centre is None else value - centre)
    low, high = percentile_interval(draws)
    if prompts < 2:
        return Difference(value=value, low=low, high=high, p=1.0, prompts=prompts)
    se = float(draws.std(ddof=1)) * np.sqrt(prompts / (prompts - 1))
    t = abs(value) / se if se > 0 else np.inf  # every prompt says the same
    p = 1.0 if value == 0 else max(2 * float(stats.t.sf(t, prompts - 1)), 2.0 ** (1 - prompts))
    return Difference(value=value, low=low, high=high, p=p, prompts=prompts)


def paired_bootstrap(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, *, rounds: int = 1000, seed: int = 0
) -> Difference:
    """Mean of ours − theirs, row by row the same prompts, with its bootstrap interval and p-value.

    Raises:
        ValueError: the two do not have one number for each of the same, at least one, prompts.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a paired comparison needs one number a prompt for both: got {a.shape} and {b.shape}")
    d = a - b
    draws = bootstrap_weights(len(d), rounds, seed) @ d / len(d)
    return paired_difference(float(d.mean()), draws, prompts=len(d))


def holm(p: Sequence[float] | np.ndarray) -> Float[np.ndarray, " m"]:
    """p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)), p_(1) ≤ … ≤ p_(m).

    Rejecting where p̃ < α errs anywhere in the family with probability at most α, however the tests depend on each
    other (Holm, Scand. J. Statist. 6, 1979).
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
